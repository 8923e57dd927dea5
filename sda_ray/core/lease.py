r"""Leases: who may write to a run or a sweep, and whether the holder is alive.

A lease is a small JSON record that names its holder (host, boot, process) and an attempt number
that only grows. Every write under a lease first checks, with the lease locked, that the lease is
still held. A holder that was frozen, cut off or presumed dead finds a newer attempt when it comes
back, and writes nothing more.
"""

import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError
from .files import lock_works, locked, open_regular, read_regular, write_atomic

logger = logging.getLogger(__name__)

STALE = 60.0  # seconds without a heartbeat after which a holder on another host counts as dead
HEARTBEAT = 10.0  # seconds between two heartbeats
DELETION = 0.5  # seconds that the deletion of a directory may take, once it has begun
KILL_TIMEOUT = 10.0  # seconds that a killed process may take to end

Holder = dict[str, Any]  # attempt, pid, started, since, host, machine, boot, space
Hold = Callable[[], AbstractContextManager[None]]  # as :meth:`Lease.hold`


class LeaseLost(RuntimeError):
    r"""Raised if the lease is no longer held: nothing more may be written."""


class LeaseGone(OSError):
    r"""Raised if the directory of a lease was deleted, or unmounted, while the lease was held."""


class Conflict(RuntimeError):
    r"""Raised if a record, or another object, is not at the version that a write expects."""


class Backend(Protocol):
    r"""Storage of one lease record, changed only by compare and swap.

    A version is any value that differs after each write and each heartbeat. It is None if there
    is no record. A write to another version raises :class:`Conflict`, a failure an OSError.
    """

    def read(self) -> tuple[bytes, Any] | None: ...

    def write(self, data: bytes, version: Any) -> Any:
        r"""Replaces a record and returns its new version."""

    def beat(self, data: bytes, version: Any) -> Any:
        r"""Changes the version of a record, but not its meaning, and returns the new version."""

    def lock(self) -> AbstractContextManager[object]:
        r"""Keeps other processes from changing the record meanwhile, if the storage has locks."""


class FileBackend:
    r"""Creates a lease record in a file, with a lock file of suffix `.lock` beside it.

    The modification time is the version. It is for observers: what excludes other writers is the
    lock, under which every write falls.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> tuple[bytes, int] | None:
        try:
            return read_regular(self.file), last_heartbeat(self.file)
        except FileNotFoundError:
            return None
        except UserError:  # a link out of the directory, or no regular file
            return b"", 0

    def write(self, data: bytes, version: Any) -> int:
        try:
            write_atomic(self.file, data)
        except OSError:  # a full disk: to write over the present record takes no space
            with os.fdopen(open_regular(self.file, os.O_RDWR), "r+b", buffering=0) as f:
                if len(data) > (size := os.fstat(f.fileno()).st_size):
                    raise

                f.write(data.ljust(size))
                os.fsync(f.fileno())

        return last_heartbeat(self.file)

    def beat(self, data: bytes, version: Any) -> int:
        os.utime(self.file)
        return last_heartbeat(self.file)

    def lock(self) -> AbstractContextManager[object]:
        return locked(self.file.with_suffix(".lock"))


class Lease:
    r"""Creates a lease and takes it.

    Its `confirmed` is when this process last was the holder for certain, on the monotonic clock.
    If the directory of its file is renamed under :meth:`hold`, set its `backend` at once.

    Arguments:
        place: The lease file, or the backend that keeps the record.
        what: What is held, for messages, such as "run crimson-cloud-4_6k7cjnx7".
        attempt: The number of this attempt, if the caller counts them. Otherwise one more than
            the highest before.
        takeover: Whether to take the lease from a holder that seems alive. On this host its
            process is killed; elsewhere the attempt number keeps it from writing.
        patience: How long to watch for the heartbeat of a holder on another host, in seconds.

    Raises:
        UserError: If another process holds the lease, or the record cannot be written.
        LeaseLost: If an attempt of this or a higher number took the lease before.
    """

    def __init__(
        self,
        place: Path | Backend,
        what: str,
        attempt: int | None = None,
        takeover: bool = False,
        patience: float = STALE,
    ) -> None:
        self.backend = _backend(place)
        self.what = what
        self.confirmed = time.monotonic()
        self._released = threading.Event()
        self._notes: dict[str, Any] = {}

        try:
            while not self._take(attempt, takeover, patience):
                pass  # another process was quicker
        except OSError as error:
            reason = isinstance(place, Path) and lock_works(place.parent)
            raise UserError(f"{what} cannot be taken: {reason or error}.") from error

        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def _take(self, attempt: int | None, takeover: bool, patience: float) -> bool:
        before = read_holder(self.backend)

        if before is not None and takeover:
            _end_process(before)
        elif before is not None and is_alive(self.backend, patience):
            raise UserError(
                f"{self.what} is in use by process {before['pid']} on {before['host']} since "
                f"{before['since']}. Wait for it to end, or stop it, and try again."
            )

        with self.backend.lock():
            record = self.backend.read()
            holder, _ = _parse(record)

            if holder != before and not takeover:
                return False

            last = 0 if holder is None else holder["attempt"]

            if attempt is not None and attempt <= last:
                raise LeaseLost(f"attempt {attempt} at {self.what} comes after attempt {last}")

            self.attempt = last + 1 if attempt is None else attempt

            try:
                self._write(this_process(self.attempt), None if record is None else record[1])
            except Conflict:
                return False

        return True

    def _write(self, holder: Holder, version: str | None) -> None:
        self._version = self.backend.write(_encode(holder, self._notes), version)
        self._mine = holder

    def note(self, **facts: Any) -> None:
        r"""Adds facts to the record, where :func:`read_notes` finds them until the next attempt.

        Raises:
            LeaseLost: If the lease is no longer held.
            OSError: If the record cannot be written.
        """

        with self.hold():
            self._notes = self._notes | facts
            self._write(self._mine, self._version)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            try:
                self.renew()
            except LeaseLost:
                self.confirmed = -math.inf
                return
            except Exception:  # out of reach, maybe for a while only
                continue

    def renew(self) -> None:
        r"""Gives a heartbeat. Raises the errors of :meth:`hold`."""

        start = time.monotonic()

        with self.hold():
            self._version = self.backend.beat(_encode(self._mine, self._notes), self._version)

        self.confirmed = start

    @contextmanager
    def hold(self) -> Iterator[None]:
        r"""Holds the lease for the duration of one write. Cannot be nested.

        Raises:
            LeaseLost: If another attempt has taken the lease, or it was released.
            LeaseGone: If the lease, or the write, fails because the directory is gone.
            OSError: If the lease cannot be read, so that its holder is unknown.
        """

        try:
            with self.backend.lock():
                self._check()
                yield
        except OSError as error:
            if isinstance(self.backend, FileBackend):
                if isinstance(error, FileNotFoundError):  # all may be about to be deleted
                    time.sleep(DELETION)

                check_present(self.backend.file)

            raise

    def _check(self) -> None:
        record = self.backend.read()
        holder, _ = _parse(record)

        if self._released.is_set():
            raise LeaseLost(f"{self.what} was released by attempt {self.attempt}")

        if record is None or holder is None:
            raise OSError(f"the lease of {self.what} cannot be read")

        if holder != self._mine:
            raise LeaseLost(
                f"{self.what} was taken over from attempt {self.attempt} by process "
                f"{holder['pid']} on {holder['host']}"
            )

        self._version = record[1]

    def is_lost(self) -> bool:
        r"""Tells whether another attempt is known to have taken the lease.

        It takes no lock, so that a signal handler may call it.
        """

        return read_holder(self.backend) not in (None, self._mine)

    def release(self) -> None:
        r"""Releases the lease, if it is still held. The attempt number stays on record."""

        try:
            with suppress(LeaseLost, OSError, Conflict), self.hold():
                self._write(self._mine | {"pid": None, "started": None}, self._version)
        finally:
            self._released.set()


# Holders


def read_holder(place: Path | Backend) -> Holder | None:
    r"""Returns the record of the last holder of a lease, or None if there is no valid one.

    Its `pid` is None if the lease was released.
    """

    return read_notes(place)[0]


def read_notes(place: Path | Backend) -> tuple[Holder | None, dict[str, Any]]:
    r"""Returns the last holder of a lease, and what it has added by :meth:`Lease.note`."""

    return _parse(_read(_backend(place)))


def _read(backend: Backend) -> tuple[bytes, Any] | None:
    with suppress(OSError):
        return backend.read()

    return None


def _parse(record: tuple[bytes, Any] | None) -> tuple[Holder | None, dict[str, Any]]:
    r"""Returns the holder that a record names and its notes, None and {} if it is damaged."""

    try:
        holder = json.loads(record[0] if record else b"")
    except (ValueError, RecursionError):
        return None, {}

    if not isinstance(holder, dict):
        return None, {}

    holder.pop("beat", None)  # which changes with each heartbeat of an object
    notes = holder.pop("notes", None)
    pid, attempt = holder.get("pid"), holder.get("attempt")
    texts = all(isinstance(holder.get(key), str) for key in ("host", "boot", "space", "since"))
    process = pid is None or (
        type(pid) is int and 0 < pid < 2**31 and isinstance(holder.get("started"), str)
    )

    if texts and process and type(attempt) is int and abs(attempt) < 2**31:
        return holder, notes if isinstance(notes, dict) else {}

    return None, {}


def is_alive(place: Path | Backend, patience: float = STALE) -> bool:
    r"""Tells whether the holder of a lease is alive.

    On the holder's own host and boot its process decides. From elsewhere the heartbeat is watched
    for `patience` seconds, by the observer's own clock.
    """

    backend = _backend(place)
    record = _read(backend)
    holder, _ = _parse(record)

    if record is None or holder is None:
        return False

    if (alive := holder_alive(holder)) is not None:
        return alive

    logger.warning(
        "%s was last held by process %d on %s, which cannot be seen from here: watching for a "
        "heartbeat for %.0f s.",
        place if isinstance(place, Path) else "The lease",
        holder["pid"],
        holder["host"],
        patience,
    )
    deadline = time.monotonic() + patience

    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))
        newer = _read(backend)

        if newer is not None and newer[1] != record[1]:
            return (_parse(newer)[0] or holder)["pid"] is not None

    return False


def holder_alive(holder: Holder) -> bool | None:
    r"""Tells whether a holder is alive, or returns None if that cannot be seen from this host."""

    if holder.get("pid") is None:
        return False

    if _is_local(holder):
        return _start_of(holder["pid"]) == holder.get("started")

    here = this_host()
    same = here["machine"] and all(holder.get(key) == here[key] for key in ("host", "machine"))

    return False if same and holder.get("boot") != here["boot"] else None  # it was rebooted


def _is_local(holder: Holder) -> bool:
    r"""Tells whether the process number of a holder names the same process on this host."""

    return all(holder.get(key) == value for key, value in this_host().items())


def this_process(attempt: int) -> Holder:
    r"""Returns the record of this process as the holder of a lease."""

    return {
        "attempt": attempt,
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **this_host(),
    }


def this_host() -> dict[str, str]:
    r"""Returns the scope in which process numbers are unique: host, machine, boot, container.

    Machines may share a name; a digest of their confidential ids tells them apart.
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


def last_heartbeat(file: Path) -> int:
    r"""Returns when a lease file was last written or touched, 0 if it is gone."""

    def pipe_too(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK)

    try:
        # NFS looks at the server again when a file is opened
        with open(file, opener=pipe_too) as f:
            return os.fstat(f.fileno()).st_mtime_ns
    except OSError:
        return 0


def check_present(lease: Path) -> None:
    r"""Raises LeaseGone if an open run has lost its lease file, and so its directory.

    A file system that is only out of reach for now counts as present.
    """

    try:
        os.stat(lease)
    except (FileNotFoundError, NotADirectoryError):
        raise LeaseGone(
            f"{lease.parent} was deleted or unmounted while it was in use: nothing more is "
            "written there."
        )
    except OSError:
        pass


def _backend(place: Path | Backend) -> Backend:
    return FileBackend(place) if isinstance(place, Path) else place


def _encode(holder: Holder, notes: dict[str, Any]) -> bytes:
    record = holder | ({"notes": notes} if notes else {})

    return (json.dumps(record, indent=2) + "\n").encode()


def _start_of(pid: int) -> str | None:
    r"""Returns when a process started, in clock ticks since boot, or None if it does not run."""

    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None

    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _end_process(holder: Holder) -> None:
    r"""Kills a holder on this host and waits for its end, so that it cannot keep the lock."""

    pid = holder["pid"]

    if pid in (None, os.getpid()) or not _is_local(holder):
        return

    deadline = time.monotonic() + KILL_TIMEOUT

    while _start_of(pid) == holder["started"]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError:
            raise UserError(f"process {pid} belongs to another user: ask them to end it.")

        if time.monotonic() > deadline:
            raise UserError(f"process {pid} does not end; a disk may hang.")

        time.sleep(0.01)
