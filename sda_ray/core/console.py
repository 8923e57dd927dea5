r"""Output in a terminal: progress bars, tables, and sizes, times and texts as people read them.

Names and texts come from files that anyone may have written. They are shown as plain text, without
control characters.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERVAL = 10.0  # seconds between two lines of progress where there is no terminal
YEAR = 365.25 * 86400  # seconds


class ProgressBar:
    r"""Creates a progress bar with the time left; off a terminal, a line from time to time."""

    def __init__(self, unit: str, total: int, done: int = 0) -> None:
        from rich import progress
        from rich.console import Console

        console = Console()
        self.unit, self.total = unit, total
        self.done = self.first = done
        self.start = self.last = time.monotonic()
        self.bar = None

        if console.is_terminal:
            self.bar = progress.Progress(
                "[bold]{task.description}",
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(unit, total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        if self.bar is not None:
            self.bar.start()

        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, note: str = "") -> None:
        r"""Shows that a number of steps are done, with a note such as the latest losses."""

        self.done, now = done, time.monotonic()

        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=note or self.unit)
        elif now - self.last > INTERVAL or done == self.total:
            self.last = now
            left = (now - self.start) * (self.total - done) / max(1, done - self.first)
            note = f"{note}, " if note else ""
            time_left = timedelta(seconds=round(left))
            print(f"{self.unit} {done}/{self.total}: {note}{time_left} left", flush=True)

    def advance(self) -> None:
        self.update(self.done + 1)


def make_console() -> Console:
    r"""Returns a console that shows texts as they are, with wide lines where no terminal is."""

    from rich.console import Console

    width = None if sys.stdout.isatty() else 160

    return Console(width=width, highlight=False, markup=False, emoji=False)


def make_table(
    *columns: str, right: Sequence[str] = (), fold: Sequence[str] | None = None
) -> Table:
    r"""Returns an empty table without borders.

    The columns `right` are aligned to the right. Long cells of the columns `fold`, by default all,
    are folded into several lines.
    """

    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")

    for name in columns:
        side: Any = "right" if name in right else "left"
        whole = fold is not None and name not in fold
        table.add_column(name, justify=side, overflow="fold", no_wrap=whole)

    return table


def plain(value: Any) -> str:
    r"""Returns a value as a text without control characters, except ends of lines and tabs."""

    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in str(value))


def say(value: Any, file: TextIO | None = None) -> None:
    r"""Prints a value at once as plain text, see :func:`plain`."""

    print(plain(value), file=file, flush=True)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def log_warnings() -> None:
    r"""Makes this process print its warnings, above a table or progress bar that is shown."""

    handler = logging.lastResort  # which asks for sys.stderr each time: rich replaces that
    assert handler is not None
    handler.setFormatter(_Plain("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])


def printable(value: Any, limit: int = 200) -> str:
    r"""Returns a value as one line of at most `limit` printable characters."""

    text = "".join(c if c.isprintable() else "�" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def format_size(count: float | None) -> str:
    r"""Returns a number of bytes as people read it, as `1.2 MB`."""

    if count is None:
        return "–"

    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"

        count /= 1000

    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    r"""Returns a time span in its largest unit, as `3 h`, `1.5 d` or `12 years`."""

    if (years := seconds / YEAR) >= 1.1:
        return f"{years:.2g} years" if years < 10 else f"{years:,.0f} years"

    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if (count := seconds / length) >= 1:
            return f"{count:.2g} {unit}" if count < 10 else f"{int(count)} {unit}"

    return f"{int(seconds)} s"
