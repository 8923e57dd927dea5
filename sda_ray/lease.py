r"""Leases: who may write to a run or a sweep.

A lease is a small JSON file that names its holder (host, boot, process) and an attempt number that
only ever grows. Whoever writes under a lease first looks whether its number is still the highest,
holding a file lock meanwhile: a holder that was frozen, cut off or taken for dead finds a higher
number when it comes back and writes nothing more.
"""

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json, write_json

__all__ = ["Lease", "LeaseLost", "holder", "is_alive"]

HEARTBEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which a holder on another host counts as dead


class LeaseLost(RuntimeError):
    r"""Signals that another process holds the lease now: nothing more may be written."""


def _boot() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def _started(pid: int) -> str | None:
    r"""Returns when a process started, in clock ticks since boot, or None if it does not run."""

    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None

    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def holder(file: Path) -> dict[str, Any] | None:
    r"""Returns what a lease file says of its holder, or None if nobody holds it."""

    try:
        found = read_json(file)
    except UserError:  # never taken, or damaged
        return None

    return found if isinstance(found, dict) else None


def is_alive(file: Path, patience: float = STALE) -> bool:
    r"""Tells whether the holder of a lease still lives.

    On the holder's own host and boot its process decides. From elsewhere the heartbeat is watched
    for `patience` seconds, by the observer's own clock.
    """

    found = holder(file)

    if found is None or found.get("pid") is None:
        return False

    if (found["host"], found["boot"]) == (socket.gethostname(), _boot()):
        return _started(found["pid"]) == found["started"]

    if found["host"] == socket.gethostname():  # the same host before its last boot
        return False

    before, deadline = file.stat().st_mtime_ns, time.monotonic() + patience

    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))

        if file.stat().st_mtime_ns != before:
            return True

    return False


def _kill(found: dict[str, Any]) -> None:
    r"""Kills a holder on this host and waits for its end, lest it wake up with a lock in hand."""

    pid, here = found.get("pid"), (socket.gethostname(), _boot())

    if pid in (None, os.getpid()) or (found.get("host"), found.get("boot")) != here:
        return

    while _started(pid) == found.get("started"):
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


class Lease:
    r"""Creates a lease and takes it.

    Arguments:
        file: The lease file. A lock file of the same name with suffix `.lock` lies beside it.
        what: What is held, for messages, such as "run crimson-cloud-4_6k7cjnx7".
        attempt: The number of this attempt, if the caller counts them. Otherwise one more than
            the highest before.
        takeover: Whether to take the lease from a holder that seems to live. On this host its
            process is killed; elsewhere the attempt number keeps it from writing.

    Raises:
        UserError: If another process holds the lease.
        LeaseLost: If an attempt of this or a higher number took the lease before.
    """

    def __init__(
        self, file: Path, what: str, attempt: int | None = None, takeover: bool = False
    ) -> None:
        self.file = file
        self.what = what

        found = holder(file) or {}

        if takeover:
            _kill(found)
        elif is_alive(file):
            raise UserError(
                f"{what} is in use by process {found.get('pid')} on {found.get('host')} since "
                f"{found.get('since')}. Wait for it to end, or stop it, and try again."
            )

        with self._lock():
            last = int((holder(file) or {}).get("attempt", 0))

            if attempt is not None and attempt <= last:
                raise LeaseLost(f"attempt {attempt} at {what} comes after attempt {last}")

            self.attempt = last + 1 if attempt is None else attempt
            self._write(os.getpid())

        self._over = threading.Event()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self.file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, pid: int | None) -> None:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._holder = {
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": pid,
            "started": None if pid is None else _started(pid),
            "since": since,
        }
        write_json(self.file, self._holder)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            try:
                with self.hold():
                    os.utime(self.file)
            except LeaseLost:
                return
            except OSError:  # a file system away for a while; the next beat tells
                continue

    @contextmanager
    def hold(self) -> Iterator[None]:
        r"""Holds the lease for the duration of one write.

        Raises:
            LeaseLost: If another attempt has taken the lease.
        """

        with self._lock():
            if (holder(self.file) or {}) != json.loads(json.dumps(self._holder)):
                raise LeaseLost(f"{self.what} was taken over from attempt {self.attempt}")

            yield

    def release(self) -> None:
        r"""Gives the lease back, if it is still held. The attempt number stays on record."""

        self._over.set()

        try:
            with self.hold():
                self._write(None)
        except (LeaseLost, OSError):
            pass
