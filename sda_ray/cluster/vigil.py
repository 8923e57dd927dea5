r"""The watch over trials from outside: a process that is frozen as a whole, or cut off, is found.

It gives no sign of life then: the heartbeat of its run's lease stands still. (A process that
lives and hangs finds that out itself, see :mod:`sda_ray.training.watchdog`.)
"""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.holder import holder, is_alive, is_here, pulse
from ..core.lease import HEARTBEAT
from ..runs.path import RunPath
from ..search.promotion import Record
from ..training.watchdog import OTHER, STACKS, TAKEN

__all__ = ["Vigil", "end"]

BEATS = 2  # heartbeats that may be missed in any case
AWAY = 15.0  # seconds after which it was the driver itself that was frozen, or its disk


class Vigil:
    r"""Creates the watch over the runs of a sweep.

    Arguments:
        runs: The directory of all runs.
        stall: The seconds without a sign of life after which a process counts as frozen.
    """

    def __init__(self, runs: Path, stall: float) -> None:
        self.runs = runs
        self.limit = max(stall, BEATS * HEARTBEAT)
        self.paths: dict[str, RunPath] = {}
        self.seen: dict[int, tuple[Any, float]] = {}  # index of a run -> last sign of life, when
        self.looked = time.monotonic()

    def look(self, records: Iterable[Record]) -> list[tuple[Record, float]]:
        r"""Returns which of the runs that have a process are frozen, and for how many seconds."""

        now = time.monotonic()
        before, self.seen = self.seen if now - self.looked < AWAY else {}, {}
        frozen = []

        for record in records:
            sign, limit = self._sign(record)
            last, since = before.get(record.index, (None, now))
            self.seen[record.index] = sign, (since if sign == last else now)
            silent = now - self.seen[record.index][1]

            if silent > limit:
                frozen.append((record, silent))

        self.looked = time.monotonic()

        return frozen

    def path(self, record: Record) -> RunPath | None:
        r"""Returns where a run is, if it has a directory yet."""

        known = self.paths.get(record.run_id)

        if known is None or not known.lease.exists():
            if (found := RunPath.of_id(self.runs, record.run_id)) is None:
                return None

            self.paths[record.run_id] = known = found

        return known

    def _sign(self, record: Record) -> tuple[Any, float]:
        r"""Returns what changes while a run's process lives, and how long it may not."""

        if (path := self.path(record)) is not None:
            found = holder(path.lease)

            if found and found["pid"] is not None and found["attempt"] >= record.attempt:
                return (found["attempt"], pulse(path.lease)), self.limit

        return record.attempt, OTHER * self.limit  # it starts, or is done with it


def end(path: RunPath, record: Record, silent: float) -> str:
    r"""Ends the process of a frozen run, if it is on this machine, and returns what it was at.

    The same is noted beside the stacks of processes that hung.
    """

    found = holder(path.lease) or {}
    pid, where = found.get("pid"), found.get("host")
    state = ""

    agent = bool(found.get("agent"))  # which holds the leases of others, too

    if pid and not agent and is_here(found) and is_alive(path.lease):
        state = ", ".join(filter(None, (_proc(pid, name) for name in ("status", "wchan"))))

        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)

    who = "the process elsewhere" if agent else f"process {pid} on {where}"
    said = f"no sign of life for {silent:.0f} s from {who}"
    said += f" ({state})" if state else ""

    with suppress(OSError), open(path.directory / STACKS, "a") as stream:
        stream.write(f"{said}, {TAKEN} {record.attempt}.\n")

    return said


def _proc(pid: int, name: str) -> str:
    r"""Returns what the kernel says of a process."""

    try:
        text = Path(f"/proc/{pid}/{name}").read_text().strip()
    except OSError:
        return ""

    if name == "status":
        return next((" ".join(x.split()) for x in text.splitlines() if x[:6] == "State:"), "")

    return f"waits in {text}" if text not in ("", "0") else ""
