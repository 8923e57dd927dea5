r"""Leases: who may write to a run or a sweep.

A lease is a small JSON file that names its holder (host, boot, process) and an attempt number that
only ever grows. Whoever writes under a lease first looks whether it is still the holder, with a
file lock in hand: a holder that was frozen, cut off or taken for dead finds another one when it
comes back, and writes nothing more.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import open_regular, read_json, write_json

__all__ = [
    "STALE",
    "Lease",
    "LeaseLost",
    "Vanished",
    "check_present",
    "described",
    "end_holder",
    "held",
    "holder",
    "is_alive",
    "is_here",
    "is_present",
    "place",
    "pulse",
    "started",
    "verdict",
]

logger = logging.getLogger(__name__)

STALE = 60.0  # seconds without a sign of life after which a holder on another host counts as dead
DEATH = 10.0  # seconds that a killed process may take to end


def place() -> dict[str, str]:
    r"""Returns where process numbers have the meaning they have here: host, boot, container.

    Machines may have one name; their ids, which are not for others to know, then tell them apart.
    """

    machine, boot = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")
    space = "/proc/self/ns/pid"
    id = machine.read_bytes() if machine.exists() else b""

    return {
        "host": socket.gethostname(),
        "machine": sha256(b"sda_ray " + id).hexdigest()[:16] if id else "",
        "boot": boot.read_text().strip() if boot.exists() else "",
        "space": os.readlink(space) if os.path.exists(space) else "",
    }


def started(pid: int) -> str | None:
    r"""Returns when a process started, in clock ticks since boot, or None if it does not run."""

    if not Path("/proc/self/stat").exists():  # not Linux: the time stays unknown
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass

        return ""

    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None

    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def holder(file: Path) -> dict[str, Any] | None:
    r"""Returns what a lease file says of its last holder, or None if it says nothing of use.

    Its `pid` is None if the lease was given back.
    """

    try:
        found = read_json(file)
    except UserError:  # never taken, or damaged
        return None

    if not isinstance(found, dict):
        return None

    pid, attempt = found.get("pid"), found.get("attempt")
    words = all(isinstance(found.get(key), str) for key in ("host", "boot", "space", "since"))
    process = pid is None or (
        type(pid) is int and 0 < pid < 2**31 and isinstance(found.get("started"), str)
    )

    return found if words and process and type(attempt) is int and abs(attempt) < 2**31 else None


def is_alive(file: Path, patience: float = STALE) -> bool:
    r"""Tells whether the holder of a lease still lives.

    On the holder's own host and boot its process decides. From elsewhere the heartbeat is watched
    for `patience` seconds, by the observer's own clock.
    """

    found = holder(file)

    if found is None:
        return False

    if (known := verdict(found)) is not None:
        return known

    logger.warning(
        "%s was last held by process %d on %s, which cannot be seen from here: watching for a "
        "sign of life for %.0f s.",
        file,
        found["pid"],
        found["host"],
        patience,
    )
    before, deadline = pulse(file), time.monotonic() + patience

    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))

        if pulse(file) != before:
            return (holder(file) or found)["pid"] is not None

    return False


def verdict(found: dict[str, Any]) -> bool | None:
    r"""Tells whether a holder lives, or returns None if that cannot be seen from here."""

    if found.get("pid") is None:
        return False

    if is_here(found):
        return started(found["pid"]) == found.get("started")

    here = place()
    same = here["machine"] and all(found.get(key) == here[key] for key in ("host", "machine"))

    return False if same and found.get("boot") != here["boot"] else None  # it was rebooted


def is_here(found: dict[str, Any]) -> bool:
    r"""Tells whether the number of a holder's process means here what it meant to the holder."""

    return all(found.get(key) == value for key, value in place().items())


def described(attempt: int) -> dict[str, Any]:
    r"""Returns what this process says of itself when it takes a lease."""

    return {
        "attempt": attempt,
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **place(),
    }


def pulse(file: Path) -> int:
    r"""Returns when a lease was last written or touched, 0 if it is gone."""

    try:
        with open(file) as f:  # NFS looks at the server again when a file is opened
            return os.fstat(f.fileno()).st_mtime_ns
    except OSError:
        return 0


def end_holder(found: dict[str, Any]) -> None:
    r"""Kills a holder on this host and waits for its end, lest it wake up with a lock in hand.

    One that holds leases for many others is left to the attempt number.
    """

    pid = found["pid"]

    if pid in (None, os.getpid()) or found.get("agent") or not is_here(found):
        return

    deadline = time.monotonic() + DEATH

    while started(pid) == found["started"]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError:
            raise UserError(f"process {pid} belongs to another user: ask for its end.")

        if time.monotonic() > deadline:
            raise UserError(f"process {pid} does not end, perhaps for a disk that hangs.")

        time.sleep(0.01)


HEARTBEAT = 10.0  # seconds between two signs of life


class LeaseLost(RuntimeError):
    r"""Signals that the lease is no longer held: nothing more may be written."""


class Lease:
    r"""Creates a lease and takes it.

    Arguments:
        file: The lease file. A lock file of the same name with suffix `.lock` lies beside it. If
            the directory is renamed under :meth:`hold`, this attribute must follow at once.
        what: What is held, for messages, such as "run crimson-cloud-4_6k7cjnx7".
        attempt: The number of this attempt, if the caller counts them. Otherwise one more than
            the highest before.
        takeover: Whether to take the lease from a holder that seems to live. On this host its
            process is killed; elsewhere the attempt number keeps it from writing.
        patience: How long to watch for the heartbeat of a holder on another host, in seconds.
        agent: The name of this process, if it holds leases for processes elsewhere. The same
            agent, started again, may take a lease again with the same attempt number.
        alive: Whether whom the lease is held for is alive: there is a heartbeat only then.

    Raises:
        UserError: If another process holds the lease, or the file cannot be written.
        LeaseLost: If an attempt of this or a higher number took the lease before.
    """

    def __init__(
        self,
        file: Path,
        what: str,
        attempt: int | None = None,
        takeover: bool = False,
        patience: float = STALE,
        agent: str | None = None,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.file = file
        self.what = what
        self.agent = agent
        self.alive = alive
        self._over = threading.Event()

        try:
            while not self._take(attempt, takeover, patience):
                pass  # somebody was quicker
        except OSError as error:
            raise UserError(f"{what} cannot be taken: {error}.") from error

        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def _take(self, attempt: int | None, takeover: bool, patience: float) -> bool:
        found = holder(self.file)

        if found is not None and takeover:
            end_holder(found)
        elif found is not None and is_alive(self.file, patience):
            raise UserError(
                f"{self.what} is in use by process {found['pid']} on {found['host']} since "
                f"{found['since']}. Wait for it to end, or stop it, and try again."
            )

        with self._lock():
            now = holder(self.file)

            if now != found and not takeover:
                return False

            last = 0 if now is None else now["attempt"]
            again = now is not None and self.agent and now.get("agent") == self.agent

            if attempt is not None and attempt <= last - bool(again):
                raise LeaseLost(f"attempt {attempt} at {self.what} comes after attempt {last}")

            self.attempt = last + 1 if attempt is None else attempt
            self._write(os.getpid())

        return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a stranger's link may lead anywhere
        descriptor = os.open(self.file.with_suffix(".lock"), flags, 0o644)

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, pid: int | None) -> None:
        mine = described(self.attempt) | ({} if pid else {"pid": None, "started": None})
        mine |= {"agent": self.agent} if self.agent else {}
        write_json(self.file, mine)
        self._mine = mine

    def _overwrite(self) -> None:
        r"""Gives the lease back in the place of its file, which takes no room."""

        text = json.dumps(self._mine | {"pid": None, "started": None}).encode()

        with os.fdopen(open_regular(self.file, os.O_RDWR), "r+b", buffering=0) as f:
            if len(text) <= (size := os.fstat(f.fileno()).st_size):
                f.write(text.ljust(size))
                os.fsync(f.fileno())

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            if not self.alive():
                continue

            try:
                with self.hold():
                    os.utime(self.file)
            except LeaseLost:
                return
            except OSError:  # a file system away for a while; the next beat tells
                continue

    @contextmanager
    def hold(self) -> Iterator[None]:
        r"""Holds the lease for the duration of one write. Not to be nested.

        Raises:
            LeaseLost: If another attempt has taken the lease, or it was given back.
            OSError: If the lease cannot be read: who holds it is not known then.
        """

        with self._lock():
            found = holder(self.file)

            if self._over.is_set():
                raise LeaseLost(f"{self.what} was given back by attempt {self.attempt}")

            if found is None:
                raise OSError(f"{self.file} cannot be read")

            if found != self._mine:
                raise LeaseLost(
                    f"{self.what} was taken over from attempt {self.attempt} by process "
                    f"{found['pid']} on {found['host']}"
                )

            yield

    def is_lost(self) -> bool:
        r"""Tells whether another attempt is known to have taken the lease.

        Nothing is held meanwhile, so that it may be called at any time, by a signal handler, too.
        """

        return holder(self.file) not in (None, self._mine)

    def release(self) -> None:
        r"""Gives the lease back, if it is still held. The attempt number stays on record."""

        with suppress(LeaseLost, OSError), self.hold():
            try:
                self._write(None)
            except OSError:  # a full disk: this process may live on, and must not be taken for it
                self._overwrite()

        self._over.set()


class Vanished(RuntimeError):
    r"""Signals that the directory of a run was deleted, or unmounted, while the run was open."""


def is_present(lease: Path) -> bool:
    r"""Tells whether a run that is open has its lease file, and so its directory.

    A file system that is only out of reach for now counts as present.
    """

    try:
        os.stat(lease)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass

    return True


def check_present(lease: Path) -> None:
    r"""Checks that a run that is open has its directory, given its lease file.

    Raises:
        Vanished: If not.
    """

    if not is_present(lease):
        raise Vanished(
            f"{lease.parent} was deleted or unmounted while it was in use: the training stops, "
            "and nothing more is written there."
        )


@contextmanager
def held(lease: Lease) -> Iterator[None]:
    r"""Holds the lease of a run for one write, as :meth:`sda_ray.core.lease.Lease.hold` does.

    Raises:
        Vanished: If the write fails because the directory is gone.
    """

    try:
        with lease.hold():
            yield
    except OSError:
        check_present(lease.file)
        raise
