r"""The watchdog of a training: a process that hangs saves its stacks and ends.

It does so from a thread of :mod:`faulthandler`, which needs no lock of Python, so that it works
wherever a training hangs.
"""

import faulthandler
import os
import statistics
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

STACKS = "stacks.txt"
STALL = 600.0  # seconds that every step may take
SLOW = 20  # times the usual step that a step may take
OTHER = 3  # times longer that start-up, compilation, validation and samples may take
TAKEN = "so its process was ended: attempt"


class Watchdog:
    r"""Creates the watchdog of an attempt at a run, at rest.

    Arguments:
        file: Where stacks are saved. It is deleted in the end if it is empty.
        least: The least number of seconds after which a step counts as hanging.
    """

    def __init__(self, file: Path, least: float = STALL) -> None:
        self.file = file
        self.least = least
        self.longest = 0.0  # seconds between two calls, start-up apart
        self._stream: BinaryIO | None = None
        self._steps: deque[float] = deque(maxlen=101)
        self._usual = 0.0  # seconds that a step takes
        self._begun = False  # whether a step has ended: before that, all is start-up
        self._doing, self._since = "", time.monotonic()

        with suppress(OSError):  # training without a watchdog is better than none
            self._stream = open(file, "ab")  # noqa: SIM115

    def step(self) -> None:
        r"""Notes that a step has ended, and another begins."""

        before = self._since
        self._turn("step")

        if self._steps:
            self._usual = statistics.median(self._steps)
        elif not self._begun:  # no step has been timed yet
            self._usual = (self._since - before) * OTHER / SLOW

        self._begun = True
        self._set(1)

    def phase(self) -> None:
        r"""Notes that something other than a step begins, which may take longer."""

        self._turn("phase")
        self._set(OTHER)

    def _turn(self, doing: str) -> None:
        now = time.monotonic()

        if self._doing and self._begun:
            self.longest = max(self.longest, now - self._since)

        if self._doing == "step":
            self._steps.append(now - self._since)

        self._doing, self._since = doing, now

    def _set(self, factor: int) -> None:
        seconds = factor * max(self.least, SLOW * self._usual)

        if self._stream is not None:
            with suppress(RuntimeError):  # no memory for a thread: the training will fail anyway
                faulthandler.dump_traceback_later(seconds, exit=True, file=self._stream)

    def rest(self) -> None:
        r"""Notes that the training waits."""

        faulthandler.cancel_dump_traceback_later()
        self._doing = ""

    def close(self) -> None:
        r"""Stops the watchdog. May be repeated."""

        self.rest()

        if self._stream is not None:
            self._stream.close()
            self._stream = None

            with suppress(OSError):
                if os.path.getsize(self.file) == 0:
                    self.file.unlink()


def take_stacks(file: Path, attempt: int) -> bool:
    r"""Returns whether new stacks were saved since the last call."""

    try:
        if not (text := file.read_text(errors="replace")) or TAKEN in text.splitlines()[-1]:
            return False

        with open(file, "a") as stream:
            stream.write(f"It hung, {TAKEN} {attempt}.\n")
    except OSError:
        return False

    return True
