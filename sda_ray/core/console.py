r"""Output in a terminal: progress bars, tables, and sizes, times and texts as people read them.

Names and texts come from files that anyone may have written. They are shown as plain text, without
control characters.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from .system import try_print

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERVAL = 10.0  # seconds between two lines of progress where there is no terminal
YEAR = 365.25 * 86400  # seconds
NORMAL = "\x1b[?1049l\x1b[?25h"  # leaves the alternate screen, and shows the cursor

_screens: list[Screen] = []  # those that hold the terminal


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

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:  # rich 15 would exit with 1
            raise  # the BrokenPipeError

    width = None if sys.stdout.isatty() else 160

    return PlainConsole(width=width, highlight=False, markup=False, emoji=False)


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


class Screen:
    r"""Takes the terminal for a view that fills it, until :meth:`leave`.

    What this process prints meanwhile is kept as `lines`, and printed when the terminal is left.

    Arguments:
        last: Returns the last line to print, such as the final state of what was viewed.
        log: A file for what libraries write to the terminal themselves, such as those in C++.
    """

    def __init__(self, last: Callable[[], str], log: Path | None = None) -> None:
        self.last, self.log = last, log
        self.lines: list[str] = []
        encoding = sys.stdout.encoding
        self.file = open(os.dup(1), "w", encoding=encoding, errors="replace")  # noqa: SIM115
        self._streams = sys.stdout, sys.stderr
        self._kept: dict[int, int] = {}  # a stream of the terminal -> its duplicate

        for number, stream in enumerate(self._streams, start=1):
            if os.isatty(number):
                stream.flush()
                self._kept[number] = os.dup(number)

        with open(log or os.devnull, "wb") as file:
            for number in self._kept if log else ():
                os.dup2(file.fileno(), number)

        sys.stdout, sys.stderr = (
            cast("TextIO", _Lines(stream, self.lines)) if number in self._kept else stream
            for number, stream in enumerate(self._streams, start=1)
        )
        _screens.append(self)

    def leave(self, failed: bool = False) -> None:
        r"""Returns the terminal and prints what was kept, after an error also where the log is."""

        if self not in _screens:
            return

        _screens.remove(self)

        with suppress(OSError):  # a closed terminal
            self.file.write(NORMAL)
            self.file.flush()

        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        sys.stdout, sys.stderr = self._streams

        for number, kept in self._kept.items():
            os.dup2(kept, number)
            os.close(kept)

        try:
            self.lines.append(self.last())

            if self.log is not None and self.log.stat().st_size == 0:
                self.log.unlink()
            elif self.log is not None and failed:
                self.lines.append(f"What libraries such as Ray wrote is in {self.log}.")
        finally:
            try_print(plain("\n".join(self.lines)))


class _Lines:
    r"""A stream that keeps what is printed as lines."""

    def __init__(self, stream: TextIO, lines: list[str]) -> None:
        self._stream, self._lines, self._rest = stream, lines, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        self._lines += [line for line in whole if line.strip()]

        return len(text)

    def flush(self) -> None:
        pass


def leave_screens() -> None:
    r"""Returns the terminal before this process ends at once, see :class:`Screen`."""

    for screen in [*_screens]:
        screen.leave(failed=True)


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
