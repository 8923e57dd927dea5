r"""The live table of a sweep, its leaderboard, and what to do next."""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..core import UserError, format_size, format_value, read_holder
from ..runs import RunPath, sweep_directory
from ..search import Rules, Study, TrialRecord, count_trials, importances, rank_key
from ..sweep import read_sweep, watch

__all__ = ["LiveTable", "announce", "attach", "conclude", "leaderboard"]

STYLES = {
    "running": "cyan",
    "complete": "green",
    "paused": "yellow",
    "pruned": "yellow",
    "stopped": "yellow",
    "diverged": "red",
    "failed": "bold red",
}
REFRESH = 4  # times a second
LOOK = 1.0  # seconds between two looks at the files of a sweep
WEIGH = 10.0  # seconds between two looks at the size of its checkpoints
KEY = 9  # characters that a key of CONFIG has at least


def _status(record: TrialRecord) -> str:
    return "paused" if record.paused and record.state == "running" else record.state


def _loss(record: TrialRecord) -> str:
    loss = record.values.get(record.last, math.nan)

    return "–" if math.isnan(loss) else f"{loss:.4f}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else format_value(value)


def _rows(records: Sequence[TrialRecord], names: dict[str, str], width: int) -> Table:
    r"""Returns a table of runs that fits a width: keys, then names are left out for it."""

    keys = list(dict.fromkeys(key for record in records for key in record.config))
    wide = width >= 80 + 8 * len(keys)
    keys = keys[: max(0, width - 45) // (KEY + 2)]
    table = Table(box=None, pad_edge=False, header_style="bold")

    for column, least in {"#": 3, "run": 8, "status": 8, "epoch": 5, "loss_valid": 6}.items():
        left = column in ("run", "status")
        table.add_column(
            column, justify="left" if left else "right", no_wrap=True, min_width=least
        )

    for key in keys:
        table.add_column(key, justify="right", no_wrap=True, min_width=KEY)

    for record in records:
        status = _status(record)
        table.add_row(
            str(record.index),
            f"{names.get(record.run_id, '…')}_{record.run_id}" if wide else record.run_id,
            Text(status, style=STYLES.get(status, "")),
            f"{record.last}/{record.epochs}",
            _loss(record),
            *(_short(record.config[key]) if key in record.config else "–" for key in keys),
        )

    return table


class LiveTable:
    r"""Creates the live table of a sweep: a table on a terminal, a line per event elsewhere.

    Arguments:
        title: The name of the sweep.
        target: The number of runs wanted.
        runs: The directory of all runs.
        records: Gives the runs of the sweep.
    """

    def __init__(
        self, title: str, target: int, runs: Path, records: Callable[[], list[TrialRecord]]
    ) -> None:
        self.title = title
        self.target = target
        self.runs = runs
        self.records = records
        self.start = time.monotonic()
        self.console = Console()
        self.names: dict[str, str] = {}
        self.named = float("-inf")  # when names were last looked for
        self.size: Callable[[], int] = int  # bytes of all checkpoints
        self.now = records()
        self.live: Live | None = None

    def __enter__(self) -> "LiveTable":
        if self.console.is_terminal:
            self.live = Live(
                console=self.console,
                get_renderable=self._render,  # by itself: time passes without events, too
                refresh_per_second=REFRESH,
                transient=True,
                vertical_overflow="crop",
            )
            self.live.start()

        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        r"""Prints a line, above the table if there is one."""

        if self.live is not None:
            self.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def notify(self, event: str, record: TrialRecord) -> None:
        r"""Shows that something happened to a run."""

        if self.live is not None:
            self.now = self.records()
        elif event != "running":
            self._print(event, record)

    def look(self) -> None:
        r"""Reads the study again, and shows what has changed. For views outside the driver."""

        before = {record.run_id: record for record in self.now}
        self.now = self.records()

        if self.live is None:
            for record in self.now:
                if event := _event(before.get(record.run_id), record):
                    self._print(event, record)

    def show(self) -> None:
        r"""Prints the table as it is."""

        self.console.print(self._render())

    def _print(self, event: str, record: TrialRecord) -> None:
        said = {
            "draw": "starts",
            "adopt": "is resumed",
            "promote": "is promoted",
            "lost": "is lost",
            "memory": "is out of memory and is tried once more",
        }
        config = " ".join(f"{key}={_short(x)}" for key, x in record.config.items())
        print(
            f"[{time.monotonic() - self.start:6.1f} s] run {record.index} {record.run_id} "
            f"{said.get(event, event)}: epoch {record.last}/{record.epochs}, "
            f"loss_valid {_loss(record)}, {config}"
            + (f": {record.error}" if record.error else ""),
            flush=True,
        )

    def _render(self) -> RenderableType:
        records = self.now
        running = [r for r in records if _status(r) == "running"]
        rest = sorted((r for r in records if _status(r) != "running"), key=rank_key)
        width, height = self.console.size
        room = max(1, height - len(running) - 4)
        counts = {s: sum(_status(r) == s for r in records) for s in STYLES}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        elapsed = int(time.monotonic() - self.start)
        head = Text.assemble(
            ("sweep ", "bold"),
            (self.title, "bold cyan"),
            f"  {elapsed // 60}:{elapsed % 60:02}  {len(records)}/{self.target} runs: "
            f"{said or 'starting Ray'}",
            f", checkpoints {format_size(self.size())}" if self.size() else "",
            overflow="ellipsis",
            no_wrap=True,
        )
        self._name(running + rest[:room])
        parts: list[RenderableType] = [head]

        if records:
            parts.append(_rows(running + rest[:room], self.names, width))

        if len(rest) > room:
            parts.append(Text(f"and {len(rest) - room} more", style="dim"))

        return Group(*parts)

    def _name(self, records: Sequence[TrialRecord]) -> None:
        r"""Looks for the names of runs that are new. A run has its name from its first start."""

        missing = any(record.run_id not in self.names for record in records)

        if missing and time.monotonic() - self.named > LOOK:
            self.named = time.monotonic()
            self.names |= {path.id: path.name for path in RunPath.all(self.runs)}


def _event(before: TrialRecord | None, now: TrialRecord) -> str:
    r"""Returns the word for what has become of a run, or nothing if nothing has."""

    if before is None:
        return "draw"

    if _status(before) != (status := _status(now)):
        return "promote" if status == "running" else status

    return "adopt" if now.attempt > before.attempt else ""


def announce(title: str, rules: Rules, records: Sequence[TrialRecord], directory: Path) -> None:
    r"""Prints what a sweep is about to do."""

    rungs = ", ".join(map(str, rules.rungs))
    print(f"sweep '{title}' in {directory}: {rules.target} trials, rungs at epochs {rungs}")

    if records:
        brought = sum(bool(record.source) for record in records)
        under_way = sum(r.state == "running" and not r.paused for r in records)
        paused = sum(r.state == "running" and r.paused for r in records)
        print(
            f"resumed: {len(records) - brought} runs so far, {under_way} of them in progress, "
            f"{paused} paused" + (f"; {brought} brought in" if brought else ""),
            flush=True,
        )


def leaderboard(title: str, records: Sequence[TrialRecord], runs: Path, count: int = 10) -> None:
    r"""Prints the best runs of a sweep, and how far its numbers carry."""

    console = Console(width=None if sys.stdout.isatty() else 160)
    finished = sorted((r for r in records if r.values), key=rank_key)
    names = {path.id: path.name for path in RunPath.all(runs)}
    console.print(Text(f"\nLeaderboard of {title}", style="bold"))
    console.print(_rows(finished[:count], names, console.width))

    if len(finished) > count:
        console.print(f"and {len(finished) - count} more.")

    if len({record.config.get("seed") for record in records}) <= 1:
        console.print(
            f"One seed, selected as the best of {len(records)}: the winner's loss is flattered "
            "by the selection. Train it again with other seeds before you quote it."
        )


def conclude(
    title: str,
    target: int,
    records: Sequence[TrialRecord],
    directory: Path,
    runs: Path,
    importances: Mapping[str, float],
) -> None:
    r"""Prints the leaderboard of a finished sweep, and the commands to try next."""

    leaderboard(title, records, runs)
    complete = sorted((r for r in records if r.state == "complete"), key=rank_key)

    if not complete:
        print("No run is complete: run.json and error.txt in the run directories say why.")
        return

    if all(record.config.keys() == {"seed"} for record in complete):
        _conclude_repeats(complete)
        return

    best = complete[0]
    path = RunPath(Path(best.source)) if best.source else RunPath.of_id(runs, best.run_id)
    values = " ".join(f"{key}={format_value(x)}" for key, x in best.config.items())
    print(f"\nBest configuration: {values}")

    if importances:
        said = ", ".join(f"{key} {x:.2f}" for key, x in importances.items())
        print(f"What mattered:      {said} (PED-ANOVA over {len(complete)} complete runs)")

    if path is None:
        print(f"Its directory, of run {best.run_id}, is gone.")
        return

    run, here = path.directory.name, os.path.relpath(path.directory)
    journal = os.path.relpath(directory / "study.journal")
    print(f"Its weights:        {here}/state.pth\n")
    print("What next?")

    if not _exhausted(records, target):
        print(f"  sda-ray sweep {title} --trials {2 * target}   # go on searching")

    print(f"  sda-ray train --config {run} --replicas 3   # other seeds")
    print(f"  optuna-dashboard {journal}   # curves")
    print(f"  python -c \"from sda_ray import load_score; print(load_score('{here}'))\"")


def _exhausted(records: Sequence[TrialRecord], target: int) -> bool:
    r"""Tells whether a sweep has ended with fewer runs than wanted, though few of them failed."""

    ended = all(record.state != "running" for record in records)
    failed = sum(record.state == "failed" and not record.source for record in records)

    return ended and count_trials(records) < target and failed <= Rules(target, 1).failures


def _conclude_repeats(complete: Sequence[TrialRecord]) -> None:
    r"""Prints what repeats that differ in the seed alone say together."""

    losses = [record.values[record.last] for record in complete]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    print(f"\nloss_valid over {len(losses)} seeds: {statistics.mean(losses):.4f}{spread}")
    print("The number behind ± is the standard deviation over seeds.")


def attach(runs: Path, name: str) -> None:
    r"""Shows the live table of a sweep until it ends, then its leaderboard. Writes nothing.

    Ctrl-C ends the look, and leaves the sweep running.

    Arguments:
        runs: The directory of all runs.
        name: The name of the sweep.

    Raises:
        UserError: If there is no such sweep, or it has nothing to show.
    """

    read_sweep(runs, name)
    directory = sweep_directory(runs, name)
    file = directory / "lease.json"
    found = read_holder(file)
    runs_now = found is not None and found["pid"] is not None
    alive = watch(file, found) if found is not None and runs_now else lambda: False

    try:
        while alive() and not (directory / "study.journal").exists():
            time.sleep(LOOK)

        if not (directory / "study.journal").exists():
            raise UserError(f"sweep '{name}' has not begun: sda-ray sweep {name}")

        objectives = read_sweep(runs, name)["definition"]["objectives"]
        study = Study(directory / "study.journal", name, None, objectives)

        if found is not None and alive():
            print(
                f"sweep '{name}' is driven by process {found['pid']} on {found['host']}. Ctrl-C "
                f"leaves it running; `sda-ray stop {name}` stops it.",
                flush=True,
            )
            _follow(runs, name, study, alive, _seconds(found))
        else:
            print(f"sweep '{name}' does not run. This is how it stands:")
    except KeyboardInterrupt:
        print(
            f"\nSweep '{name}' keeps running. Attach again with `sda-ray attach {name}`.",
            flush=True,
        )
        return

    _show_end(runs, name, study)


def _follow(runs: Path, name: str, study: Study, alive: Any, seconds: float) -> None:
    directory = sweep_directory(runs, name)
    table = LiveTable(name, read_sweep(runs, name)["trials"], runs, study.records)
    table.start -= seconds
    size, weighed = 0, float("-inf")
    table.size = lambda: size

    if not table.console.is_terminal:
        table.show()

    with table:
        while alive():
            time.sleep(LOOK)
            table.look()

            if time.monotonic() - weighed > WEIGH:
                size, weighed = _checkpoint_size(runs, table), time.monotonic()
                table.target = read_sweep(runs, directory.name)["trials"]

        table.look()


def _checkpoint_size(runs: Path, table: LiveTable) -> int:
    r"""Returns the bytes of all checkpoints of the runs in a table."""

    ids, size = {record.run_id for record in table.now}, 0

    for path in RunPath.all(runs):
        if path.id in ids:
            for file in path.directory.glob("checkpoint*.pth"):
                try:
                    size += file.lstat().st_size
                except OSError:  # replaced just now
                    continue

    return size


def _seconds(found: dict[str, Any]) -> float:
    r"""Returns for how long a lease has been held, as far as clocks agree."""

    try:
        since = datetime.fromisoformat(found["since"])
        return max(0.0, (datetime.now(timezone.utc) - since).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _show_end(runs: Path, name: str, study: Study) -> None:
    r"""Prints the leaderboard, and what can be done next."""

    records, directory = study.records(), sweep_directory(runs, name)
    target = read_sweep(runs, name)["trials"]
    under_way = sum(record.state == "running" for record in records)

    if under_way or not records:
        leaderboard(name, records, runs)
        print(
            f"\n{len(records)} of {target} runs so far, {under_way} of them not at their end: "
            f"`sda-ray sweep {name}` carries them on."
        )
    else:
        conclude(name, target, records, directory, runs, importances(study.study))
