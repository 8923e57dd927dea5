r"""The live view of a sweep: the whole screen of a terminal, and plain lines elsewhere."""

import math
import os
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..core import (
    Screen,
    format_duration,
    format_size,
    plain,
    printable,
    read_notes,
    say,
)
from ..runs import Cost, RunPath, cost_of
from ..search import (
    FINAL,
    Rules,
    TrialRecord,
    average_seeds,
    count_trials,
    ranked,
    standing,
)
from .render import STYLES, format_loss, run_table, short_settings, sparkline

REFRESH = 1  # frames a second
LOOK = 1.0  # seconds between two looks at the files of a sweep
STATUS = 300.0  # seconds between two lines about the state, where there is no terminal
MESSAGES = 4  # lines of the screen for the newest messages
BAR = 20  # characters of the progress bar
STRETCHES = 8  # parts of the time so far whose paces tell the spread of the time left
THRIFT = 20  # times the time of an estimate until the next one
SPREAD = 1.28  # standard deviations from the middle to an end of an interval of 80 %
EVENTS = {
    "draw": "starts",
    "adopt": "is resumed",
    "promote": "is promoted",
    "replicate": "starts, another seed",
    "lost": "is lost",
    "memory": "is out of memory and is tried once more",
}
TROUBLE = ("lost", "memory", "diverged", "failed")  # events that are messages on the screen, too


@dataclass
class Pace:
    r"""The epochs that a sweep has done over the time that it was watched."""

    times: list[float] = field(default_factory=list)  # seconds
    epochs: list[int] = field(default_factory=list)

    def add(self, now: float, epochs: int) -> None:
        if not self.epochs or epochs != self.epochs[-1]:
            self.times.append(now)
            self.epochs.append(epochs)

    def left(
        self, epochs: float, now: float, deviation: float = 0.0
    ) -> tuple[float, float, float] | None:
        r"""Returns the seconds that more epochs take and the ends of their 80 % interval.

        The pace is the mean since the first change. Its paces over 8 stretches of that time tell
        how far the mean is off, and how far the rest deviates from it. It is None before there are
        as many changes. The number of epochs has a standard deviation, too.
        """

        if len(self.times) < STRETCHES + 2:  # what came before the first change is not known
            return None

        start, length = self.times[1], (now - self.times[1]) / STRETCHES
        ends = [start + i * length for i in range(STRETCHES + 1)]
        done = [self.epochs[bisect_right(self.times, end) - 1] for end in ends]
        paces = [(b - a) / length for a, b in pairwise(done)]

        if (mean := statistics.fmean(paces)) <= 0:
            return None

        seconds = epochs / mean
        share = 1 / STRETCHES + (length / seconds if seconds else 0.0)
        spread = statistics.stdev(paces) / mean * math.sqrt(share)
        off = SPREAD * math.hypot(spread, deviation / max(1.0, epochs))

        return seconds, seconds / (1 + off), seconds * (1 + off)


@dataclass(frozen=True)
class Totals:
    r"""The numbers above the table."""

    epochs: int  # that the sweep's own runs have done
    expected: int  # epochs in the end
    deviation: float  # of these
    trained: float  # seconds
    saved: float  # seconds that the runs which are paused now would train to their ends
    best: TrialRecord | None


@dataclass(eq=False)
class LiveTable:
    r"""The live view of a sweep: the whole screen of a terminal, a line per event elsewhere.

    Messages that are printed meanwhile are shown below the table, and printed at the end.

    Arguments:
        rules: The rules of the sweep, which may be replaced.
        parallel: The number of trials at a time, if it is known.
        log: A file for what Ray writes to the terminal, see :class:`sda_ray.core.console.Screen`.
    """

    title: str
    rules: Rules
    runs: Path
    records: Callable[[], list[TrialRecord]]
    objective: str = "loss_valid"
    parallel: int | None = None
    log: Path | None = None

    def __post_init__(self) -> None:
        self.start = self.told = time.monotonic()
        self.console = Console()
        self.size: Callable[[], int] = int  # bytes of all checkpoints
        self.pace = Pace()
        self.paths: dict[str, RunPath] = {}
        self.listed = float("-inf")  # when paths were last read
        self.places: dict[tuple[str, int, int], tuple[str, str]] = {}  # nodes and GPUs of runs
        self.best = "", 0.0  # the id of the best run, and since when it is
        self.now = self.records()
        self.due = 0.0  # when the epochs of the whole sweep are estimated again
        self.measured: tuple[list[TrialRecord], Totals] | None = None
        self.screen: Screen | None = None
        self.live: Live | None = None

    @property
    def full(self) -> bool:
        r"""Whether there is a terminal that can show a whole screen."""

        return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")

    def __enter__(self) -> "LiveTable":
        if self.full:
            self.screen = Screen(self.state, self.log)
            terminal = self.screen.file
            self.console = Console(file=terminal, force_terminal=True, force_interactive=True)

            try:
                self.live = Live(
                    console=self.console,
                    screen=True,
                    get_renderable=self._render,  # by itself: time passes without events, too
                    refresh_per_second=REFRESH,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self.live.start(refresh=True)
            except BaseException as error:
                self.__exit__(type(error))
                raise

        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        if self.screen is not None:
            with suppress(OSError):  # the terminal is closed
                if self.live is not None:
                    self.live.stop()

            self.screen.leave(failed=kind not in (None, KeyboardInterrupt))
            self.live = None

    def notify(self, event: str, record: TrialRecord) -> None:
        r"""Shows that something happened to a run."""

        self.now = self.records()

        if event != "running":
            self._print(event, record)

    def look(self) -> None:
        r"""Reads the study again and shows what has changed, for views outside the driver."""

        before = {record.run_id: record for record in self.now}
        self.now = self.records()

        for record in self.now:
            if event := _event(before.get(record.run_id), record):
                self._print(event, record)

        self.remind()

    def remind(self) -> None:
        r"""Prints the state every 5 minutes where there is no terminal. To be called often."""

        if self.live is not None:  # whose thread has the numbers
            return

        if self._totals().epochs and time.monotonic() - self.told > STATUS:
            self.told = time.monotonic()
            self._say(self.state())

    def state(self) -> str:
        r"""Returns a line about the state of the sweep."""

        self.measured, self.due = None, 0.0
        texts = (self._progress(), self._left(), self._best(), self._counts())

        return f"sweep '{self.title}': " + "; ".join(text for text in texts if text)

    def _say(self, text: str) -> None:
        say(f"[{time.monotonic() - self.start:6.1f} s] {text}")

    def _print(self, event: str, record: TrialRecord) -> None:
        if self.live is not None and event not in TROUBLE:  # the table shows it
            return

        text = f"run {record.index} {record.run_id} {EVENTS.get(event, event)}"

        if self.live is None:
            value = f"{self.objective} {format_loss(record.value)}"
            settings = short_settings(record.config)
            text += f": epoch {record.last}/{record.epochs}, {value}, {settings}"

        self._say(text + (f": {record.error}" if record.error else ""))

    # Numbers

    def _totals(self) -> Totals:
        r"""Returns the totals of the records as they are now, once for each change of these."""

        records = self.now

        if self.measured is not None and self.measured[0] is records:
            return self.measured[1]

        self._list()
        own = [r for r in records if not r.source]
        epochs = sum(r.last for r in own)
        seconds = {r.run_id: self._cost(r).seconds for r in own}
        saved = sum(
            seconds[r.run_id] * (r.epochs / r.last - 1) for r in own if r.paused and r.last
        )
        best = self._find_best(records)
        totals = Totals(epochs, *self._expect(epochs), sum(seconds.values()), saved, best)
        self.pace.add(time.monotonic(), epochs)
        self.measured = records, totals

        return totals

    def _expect(self, epochs: int) -> tuple[int, float]:
        r"""Returns the epochs of the whole sweep and their deviation, from a look now and then."""

        from ..plan import expect

        start = time.monotonic()

        if start >= self.due:
            busy = sum(record.status == "running" for record in self.now)
            self.expected = expect(self.rules, self.now, self.parallel or busy or 1)
            self.due = time.monotonic() + THRIFT * (time.monotonic() - start)

        return max(epochs, self.expected.epochs), self.expected.deviation

    def _list(self) -> None:
        r"""Finds the directories of new runs. A run has one from its first start."""

        missing = any(record.run_id not in self.paths for record in self.now)

        if missing and time.monotonic() - self.listed > LOOK:
            self.listed = time.monotonic()
            self.paths = self.paths | {path.id: path for path in RunPath.all(self.runs)}

    def _find_best(self, records: Sequence[TrialRecord]) -> TrialRecord | None:
        r"""Returns the run with the least value, and notes since when: its newest metrics."""

        compared = average_seeds(records)
        sound = (r for r in compared if r.state not in ("diverged", "failed"))
        finite = [(x, r) for r in sound if (x := r.value) is not None and math.isfinite(x)]
        best = min(finite, key=itemgetter(0))[1] if finite else None

        if best is not None and best.run_id != self.best[0]:
            since, path = time.time(), self.paths.get(best.run_id)

            with suppress(OSError):
                since = path.metrics.stat().st_mtime if path else since

            self.best = best.run_id, since

        return best

    def _cost(self, record: TrialRecord) -> Cost:
        return cost_of(self.paths.get(record.run_id), record.last)

    def details(self, record: TrialRecord) -> dict[str, Any]:
        r"""Returns facts about a run that its record lacks.

        It has `rank`, among how many, at the newest rung; and for a run in progress `left`, the
        seconds up to its next decision, at a rung or the end; `memory` in GB, `node` and `gpu`.
        """

        reached = [rung for rung in self.rules.rungs if rung in record.values]
        rank = standing(record, reached[-1], self.now) if reached else None

        if record.status != "running":
            return {"rank": rank}

        cost, (node, gpu) = self._cost(record), self._place(record)
        left = None

        if cost.pace is not None:
            begun = max(0.0, min(time.time() - cost.at, cost.pace))  # of the epoch in progress
            left = max(0.0, (record.until - record.last) * cost.pace - begun)

        return {"rank": rank, "left": left, "memory": cost.memory, "node": node, "gpu": gpu}

    def _place(self, record: TrialRecord) -> tuple[str, str]:
        r"""Returns the node and the GPU of a run in progress, from the lease of its directory."""

        key = record.run_id, record.attempt, record.last  # a run that begins may have no GPU yet

        if key not in self.places and record.run_id in self.paths:
            holder, notes = read_notes(self.paths[record.run_id].lease)

            if holder is not None and holder["pid"] is not None:
                gpu = printable(notes.get("gpu", ""), 20)
                self.places[key] = printable(holder["host"], 20), gpu

        return self.places.get(key, ("", ""))

    # Texts

    def _progress(self) -> str:
        totals = self._totals()
        about = "at most" if self.rules.pruner in FINAL else "about"
        share = math.floor(100 * totals.epochs / totals.expected)

        return f"{totals.epochs:,} of {about} {totals.expected:,} epochs ({share} %)"

    def _left(self) -> str:
        totals = self._totals()
        rest = totals.expected - totals.epochs
        left = self.pace.left(rest, time.monotonic(), totals.deviation)

        if left is None or not rest:
            return ""

        seconds, low, high = map(format_duration, left)

        return f"{seconds} left ({low} to {high})"

    def _best(self) -> str:
        if (best := self._totals().best) is None:
            return ""

        path = self.paths.get(best.run_id)
        name = printable(path.name if path else best.run_id)
        age = format_duration(max(0.0, time.time() - self.best[1]))

        return (
            f"best {self.objective} {format_loss(best.value)}: run {best.index} {name}, "
            f"epoch {best.last}/{best.epochs}, for {age}"
        )

    def _counts(self) -> str:
        statuses = [record.status for record in self.now]
        counts = ", ".join(f"{statuses.count(x)} {x}" for x in STYLES if x in statuses)

        trials = f"{count_trials(self.now)}/{self.rules.target} trials"

        return f"{trials}: {counts or 'starting Ray'}"

    def _spent(self) -> str:
        totals, size = self._totals(), self.size()
        texts = [
            f"{format_duration(totals.trained)} of training" if totals.trained else "",
            f"{format_duration(totals.saved)} saved by pausing" if totals.saved else "",
            f"checkpoints {format_size(size)}" if size else "",
        ]

        return ", ".join(text for text in texts if text)

    # The screen

    def _head(self) -> list[Text]:
        totals = self._totals()
        elapsed = int(time.monotonic() - self.start)
        done = math.floor(BAR * min(1.0, totals.epochs / totals.expected))
        full, empty = "#-" if self.console.options.ascii_only else "━━"
        lines = [
            Text.assemble(
                (f"sweep {self.title}", "bold cyan"),
                f"  {elapsed // 3600}:{elapsed // 60 % 60:02}:{elapsed % 60:02}  ",
                (full * done, "green"),
                (empty * (BAR - done), "bright_black"),
                f"  {self._progress()}",
            ),
            Text("; ".join(text for text in (self._left(), self._counts()) if text)),
        ]

        if totals.best is not None:
            lines.append(Text(self._best(), style="green"))
            lines.append(Text("     " + short_settings(totals.best.config), style="green"))

        return [*lines, Text(cost)] if (cost := self._spent()) else lines

    def _render(self) -> RenderableType:
        if self.screen is not None:
            with suppress(OSError):  # its streams may be redirected, so rich does not know it
                width, height = os.get_terminal_size(self.screen.file.fileno())
                self.console.size = width or 80, height or 24

        self._list()
        width, height = self.console.size
        head = self._head()
        lines = [] if self.screen is None else self.screen.lines
        messages = lines[-min(MESSAGES, height // 6) :]
        rows = sorted(ranked(self.now), key=lambda r: r.status != "running")
        low = height <= 15
        head = head[:3] if low else head
        rest = 3 if low else 5  # lines: two of the header, and those around the table
        shown = rows[: max(1, height - len(head) - len(messages) - rest)]
        parts = self.rows(shown, width)[: 1 if low else 2] if shown else []

        if len(rows) > len(shown):
            parts.append(Text(f"and {len(rows) - len(shown)} more", style="dim"))

        for line in (*head, *(bottom := [Text(plain(x), style="yellow") for x in messages])):
            line.no_wrap, line.overflow = True, "ellipsis"

        return Group(*head, *([] if low else [Text()]), *parts, *bottom)

    def rows(self, records: Sequence[TrialRecord], width: int) -> list[RenderableType]:
        r"""Returns the table of some runs, see :func:`sda_ray.cli.render.run_table`."""

        ascii_only = self.console.options.ascii_only
        found = {r.run_id: self.details(r) for r in records}

        def column(key: str, show: Callable[[Any], str]) -> dict[str, str]:
            return {id: show(x) for id, row in found.items() if (x := row.get(key))}

        more = {
            "curve": {r.run_id: sparkline(r.trajectory.values(), ascii_only) for r in records},
            "left": {
                r.run_id: f"{format_duration(x)} to {r.until}"
                for r in records
                if (x := found[r.run_id].get("left")) is not None
            },
            "rank": column("rank", lambda x: f"{x[0]}/{x[1]}"),
            "memory": column("memory", lambda x: f"{x:.2g} GB"),
            "GPU": column("gpu", str),
            "node": column("node", str) if len({x for x, _ in self.places.values()}) > 1 else {},
        }
        names = {id: path.name for id, path in self.paths.items()}

        return run_table(records, names, width, self.objective, more)


def _event(before: TrialRecord | None, now: TrialRecord) -> str:
    r"""Returns the event between two records of a run, or nothing."""

    if before is None:
        return "draw"

    if before.status != (status := now.status):
        return "promote" if status == "running" else status

    return "adopt" if now.attempt > before.attempt else ""
