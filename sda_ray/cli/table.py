r"""The live table of a sweep, its leaderboard, and what to do next."""

import json
import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..core import (
    UserError,
    format_size,
    format_value,
    make_console,
    plain,
    printable,
    read_holder,
    say,
)
from ..runs import RunPath, is_off, last_metrics, read_metrics, sweep_directory
from ..search import Rules, Study, TrialRecord, count_trials, importances, rank_key
from ..sweep import read_sweep, watch
from .options import SWEEP, Args, command
from .render import REMEDY, STYLES, format_loss, format_std, short_value

REFRESH = 4  # times a second
LOOK = 1.0  # seconds between two looks at the files of a sweep
EVENTS = {
    "draw": "starts",
    "adopt": "is resumed",
    "promote": "is promoted",
    "lost": "is lost",
    "memory": "is out of memory and is tried once more",
}


def _loss(record: TrialRecord) -> str:
    return format_loss(record.value)


def _rows(
    records: Sequence[TrialRecord],
    names: dict[str, str],
    width: int,
    objective: str,
    more: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> list[RenderableType]:
    r"""Returns a table of runs that fits a width, and a line about the settings that do not.

    For it, names are left out, then settings. There are more columns, of texts by run, after the
    objective.
    """

    keys = list(dict.fromkeys(key for record in records for key in record.config))
    columns = {
        "#": [str(r.index) for r in records],
        "run": [printable(f"{names.get(r.run_id, '…')}_{r.run_id}") for r in records],
        "status": [r.status for r in records],
        "epoch": [f"{r.last}/{r.epochs}" for r in records],
        objective: [_loss(r) for r in records],
    }

    for name, texts in more.items():
        if texts:
            columns[name] = [texts.get(r.run_id, "–") for r in records]

    for key in keys:
        columns[key] = [short_value(r.config[key]) if key in r.config else "–" for r in records]

    def fits() -> bool:
        widths = (max(map(len, (name, *texts))) for name, texts in columns.items())
        return sum(widths) + 2 * len(columns) - 2 <= width

    if not fits():
        columns["run"] = [printable(r.run_id) for r in records]

    hidden: list[str] = []

    while keys and not fits():
        hidden.insert(0, keys.pop())
        del columns[hidden[0]]

    table = Table(box=None, pad_edge=False, header_style="bold")

    for column in columns:
        side: Any = "left" if column in ("run", "status") else "right"
        table.add_column(column, justify=side, no_wrap=True)

    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))

    if not hidden:
        return [table]

    plural = "s" * (len(hidden) > 1)
    note = f"too narrow for {len(hidden)} setting{plural}: {', '.join(hidden)}"

    return [table, Text(note, style="dim", no_wrap=True, overflow="ellipsis")]


class LiveTable:
    r"""The live table of a sweep: a table on a terminal, a line per event elsewhere."""

    def __init__(
        self,
        title: str,
        target: int,
        runs: Path,
        records: Callable[[], list[TrialRecord]],
        objective: str = "loss_valid",
    ) -> None:
        self.objective = objective
        self.title = title
        self.target = target
        self.runs = runs
        self.records = records
        self.start = time.monotonic()
        self.console = Console()
        self.names: dict[str, str] = {}
        self.named = float("-inf")  # when names were last read
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
            self.console.print(plain(text), highlight=False, markup=False)
        else:
            say(text)

    def notify(self, event: str, record: TrialRecord) -> None:
        r"""Shows that something happened to a run."""

        if self.live is not None:
            self.now = self.records()
        elif event != "running":
            self._print(event, record)

    def look(self) -> None:
        r"""Reads the study again and shows what has changed, for views outside the driver."""

        before = {record.run_id: record for record in self.now}
        self.now = self.records()

        if self.live is None:
            for record in self.now:
                if event := _event(before.get(record.run_id), record):
                    self._print(event, record)

    def _print(self, event: str, record: TrialRecord) -> None:
        config = " ".join(f"{key}={short_value(x)}" for key, x in record.config.items())
        say(
            f"[{time.monotonic() - self.start:6.1f} s] run {record.index} {record.run_id} "
            f"{EVENTS.get(event, event)}: epoch {record.last}/{record.epochs}, "
            f"{self.objective} {_loss(record)}, {config}"
            + (f": {record.error}" if record.error else ""),
        )

    def _render(self) -> RenderableType:
        records = self.now
        running = [r for r in records if r.status == "running"]
        others = sorted((r for r in records if r.status != "running"), key=rank_key)
        width, height = self.console.size
        room = max(1, height - 5)
        statuses = [r.status for r in records]
        counts = ", ".join(f"{statuses.count(x)} {x}" for x in STYLES if x in statuses)
        elapsed = int(time.monotonic() - self.start)
        head = Text.assemble(
            ("sweep ", "bold"),
            (self.title, "bold cyan"),
            f"  {elapsed // 60}:{elapsed % 60:02}  {len(records)}/{self.target} runs started: "
            f"{counts or 'starting Ray'}",
            f", checkpoints {format_size(self.size())}" if self.size() else "",
            overflow="ellipsis",
            no_wrap=True,
        )
        shown = (running + others)[:room]
        self._name(shown)
        parts: list[RenderableType] = [head]

        if records:
            parts += _rows(shown, self.names, width, self.objective)

        if len(records) > len(shown):
            parts.append(Text(f"and {len(records) - len(shown)} more", style="dim"))

        return Group(*parts)

    def _name(self, records: Sequence[TrialRecord]) -> None:
        r"""Reads the names of new runs. A run has its name from its first start."""

        missing = any(record.run_id not in self.names for record in records)

        if missing and time.monotonic() - self.named > LOOK:
            self.named = time.monotonic()
            self.names |= {path.id: path.name for path in RunPath.all(self.runs)}


def _event(before: TrialRecord | None, now: TrialRecord) -> str:
    r"""Returns the event between two records of a run, or nothing."""

    if before is None:
        return "draw"

    if before.status != (status := now.status):
        return "promote" if status == "running" else status

    return "adopt" if now.attempt > before.attempt else ""


def announce(
    title: str,
    rules: Rules,
    records: Sequence[TrialRecord],
    directory: Path,
    wanted: dict[str, float],
    parallel: int | None,
) -> None:
    r"""Prints the definition of a sweep that starts, its state, and an estimate of its training."""

    from ..plan import estimate

    rungs = ", ".join(map(str, rules.rungs))
    say(f"sweep '{title}' in {directory}: {rules.target} trials, rungs at epochs {rungs}")

    if records:
        brought = sum(bool(record.source) for record in records)
        under_way = sum(r.state == "running" and not r.paused for r in records)
        paused = sum(r.state == "running" and r.paused for r in records)
        say(
            f"resumed: {len(records) - brought} runs so far, {under_way} of them in progress, "
            f"{paused} paused" + (f"; {brought} brought in" if brought else "")
        )

    say(f"estimate: {estimate(rules, wanted, parallel)}")


def leaderboard(
    title: str,
    records: Sequence[TrialRecord],
    runs: Path,
    count: int = 10,
    objective: str = "loss_valid",
) -> None:
    r"""Prints the best runs of a sweep, and how far its numbers carry."""

    console = make_console()
    finished = sorted((r for r in records if r.value is not None), key=rank_key)
    paths = {path.id: path for path in RunPath.all(runs)}
    names = {id: path.name for id, path in paths.items()}
    best = [r for r in finished[:count] if r.run_id in paths]
    lines = {r.run_id: judgement(paths[r.run_id], objective) for r in best}
    scores = {r.run_id: _crps(paths[r.run_id]) for r in best}
    deviations = {id: x["sample_std"] for id, x in lines.items() if "sample_std" in x}
    more = {
        "±": {id: f"{x[key]:.2g}" for id, x in lines.items() if (key := f"{objective}_se") in x},
        "sample_std": {id: format_std(x) for id, x in deviations.items()},
        "CRPS": {id: format_loss(x) for id, x in scores.items() if x is not None},
    }
    console.print(Text(f"\nLeaderboard of {title}", style="bold"))
    console.print(*_rows(finished[:count], names, console.width, objective, more), sep="\n")

    if len(finished) > count:
        console.print(f"and {len(finished) - count} more.")

    if off := sum(map(is_off, deviations.values())):
        console.print(
            f"! Samples of {off} of these runs are off the data by more than a factor of two: "
            f"{REMEDY}."
        )

    if len({record.config.get("seed") for record in records}) <= 1:
        console.print(
            f"One seed, selected as the best of {len(records)}: the winner's {objective} is "
            "flattered by the selection. `sda-ray confirm` trains the best with other seeds."
        )


def judgement(path: RunPath, objective: str) -> dict[str, Any]:
    r"""Returns the newest metrics with the objective, or nothing if they are damaged."""

    line: dict[str, Any] = {}

    with suppress(UserError, OSError):
        line = last_metrics(path.metrics)

        if objective not in line:  # it is measured at rungs
            lines = reversed(read_metrics(path.metrics))
            line = next((x for x in lines if objective in x), line)

    return line


def _crps(path: RunPath) -> float | None:
    r"""Returns the CRPS of `assim` over the trajectories that a run was evaluated on, if any."""

    if not path.evaluation.exists():
        return None

    from ..runs import read_evaluation  # which loads h5py

    with suppress(UserError, OSError):
        if evaluation := read_evaluation(path):
            found = [row.get("crps") for row in evaluation.results.get("assim", {}).values()]
            numbers = [x for x in found if isinstance(x, int | float)]
            return statistics.mean(numbers) if numbers else None

    return None


def conclude(
    title: str,
    target: int,
    records: Sequence[TrialRecord],
    runs: Path,
    importances: Mapping[str, tuple[float, float, float]],
    objective: str = "loss_valid",
) -> None:
    r"""Prints the leaderboard of a finished sweep, and the commands to try next."""

    leaderboard(title, records, runs, objective=objective)
    complete = sorted((r for r in records if r.state == "complete"), key=rank_key)

    if not complete:
        say("No run is complete: run.json and error.txt in the run directories say why.")
        return

    if all(record.config.keys() == {"seed"} for record in complete):
        _conclude_repeats(complete, objective)
        return

    best = complete[0]
    path = RunPath(Path(best.source)) if best.source else RunPath.of_id(runs, best.run_id)
    values = " ".join(f"{key}={format_value(x)}" for key, x in best.config.items())
    say(f"\nBest configuration: {values}")

    if importances:
        texts = (f"{k} {x:.2f} ({a:.2f} to {b:.2f})" for k, (x, a, b) in importances.items())
        say(f"What mattered:      {', '.join(texts)}")
        say(f"                    PED-ANOVA over {len(complete)} complete runs, 90 % intervals")

    if path is None:
        say(f"Its directory, of run {best.run_id}, is gone.")
        return

    here = os.path.relpath(path.directory)
    code = f"from sda_ray import load_score; print(load_score({json.dumps(here)}))"
    say(f"Its weights:        {here}/state.pth\n")
    say("What next?")

    if not exhausted(records, target):
        more = 2 * max(target, count_trials(records))
        say(f"  sda-ray sweep {title} --trials {more}   # go on searching")

    say(f"  sda-ray confirm {title}   # other seeds: is the winner luck?")
    say(f"  sda-ray dashboard {title}   # curves")
    say(f"  python -c {shlex.quote(code)}")


def exhausted(records: Sequence[TrialRecord], target: int) -> bool:
    r"""Tells whether a sweep has ended with fewer runs than wanted, though few of them failed."""

    ended = all(record.state != "running" for record in records)
    failed = sum(record.state == "failed" and not record.source for record in records)

    return ended and count_trials(records) < target and failed <= Rules(target, 1).failures


def _conclude_repeats(complete: Sequence[TrialRecord], objective: str) -> None:
    r"""Prints what repeats that differ in the seed alone say together."""

    losses = [record.values[record.last] for record in complete]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    say(f"\n{objective} over {len(losses)} seeds: {statistics.mean(losses):.4f}{spread}")
    say("The number behind ± is the standard deviation over seeds.")


@command("attach")
@SWEEP
def attach_command(args: Args) -> None:
    r"""Shows the live table of a sweep that runs elsewhere.

    In the background, in a job, or on another machine that sees the directory of runs. Ctrl-C leaves
    the sweep running. When the sweep ends, its leaderboard is shown.

      sda-ray attach width
    """

    runs, name = args.runs, args.sweep
    objectives = read_sweep(runs, name)["definition"]["objectives"]
    directory = sweep_directory(runs, name)
    file, journal = directory / "lease.json", directory / "study.journal"
    holder = read_holder(file)
    driven = holder is not None and holder["pid"] is not None
    alive = watch(file, holder) if holder is not None and driven else lambda: False

    try:
        while alive() and not journal.exists():
            time.sleep(LOOK)

        if not journal.exists():
            raise UserError(f"sweep '{name}' has not begun: sda-ray sweep {name}")

        study = Study(journal, name, None, objectives)

        if holder is not None and alive():
            say(
                f"sweep '{name}' is driven by process {holder['pid']} on {holder['host']}. Ctrl-C "
                f"leaves it running; `sda-ray stop {name}` stops it.",
            )
            _follow(runs, name, study, alive, _seconds(holder))
        else:
            say(f"sweep '{name}' does not run. This is how it stands:")
    except KeyboardInterrupt:
        say(f"\nSweep '{name}' keeps running. Attach again with `sda-ray attach {name}`.")
        return

    show_end(runs, name, study)


def _follow(
    runs: Path, name: str, study: Study, alive: Callable[[], bool], seconds: float
) -> None:
    r"""Shows a sweep that has been running for some seconds, until it ends."""

    target, objective = read_sweep(runs, name)["trials"], study.objectives[0]
    table = LiveTable(name, target, runs, study.records, objective)
    table.start -= seconds

    if not table.console.is_terminal:
        table.console.print(table._render())

    with table:
        while True:
            table.target = read_sweep(runs, name)["trials"]
            ended = not alive()
            table.look()

            if ended:
                return

            time.sleep(LOOK)


def _seconds(holder: dict[str, Any]) -> float:
    r"""Returns for how long a lease has been held, as far as clocks agree."""

    try:
        since = datetime.fromisoformat(holder["since"])
        return max(0.0, (datetime.now(timezone.utc) - since).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def show_end(runs: Path, name: str, study: Study) -> None:
    r"""Prints the leaderboard, and the commands to try next."""

    records = study.records()
    sweep, objective = read_sweep(runs, name), study.objectives[0]
    target = sweep["trials"]
    under_way = sum(record.state == "running" for record in records)

    if "confirms" in sweep and len(records) >= target and not under_way:
        from .confirm import show_confirmation

        show_confirmation(runs, name)
        return

    if records and not under_way:
        conclude(name, target, records, runs, importances(study.study), objective)
        return

    leaderboard(name, records, runs, objective=objective)
    say(
        f"\n{len(records)} of {target} runs so far, {under_way} of them not at their end: "
        f"`sda-ray sweep {name}` carries them on."
    )
