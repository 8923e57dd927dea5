r"""Who holds a lease, see :mod:`sda_ray.core.lease`, and whether it lives, as far as one can see."""

import logging
import os
import signal
import socket
import time
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json

__all__ = [
    "STALE",
    "described",
    "end_holder",
    "holder",
    "is_alive",
    "is_here",
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
