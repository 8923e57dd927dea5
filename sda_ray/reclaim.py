r"""Space that finished runs can give back: the state that serves only to go on with them."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .checkpoint import RunPath
from .curves import check_regular
from .errors import UserError
from .inventory import Entry, is_held, read_entry
from .lease import holder

__all__ = ["prune", "refusal", "resumable"]

QUIET = 3600.0  # seconds without a heartbeat before a holder on another host counts as dead


def resumable(path: RunPath) -> dict[Path, int]:
    r"""Returns the files of a run that serve only to go on with it, and their bytes."""

    found: dict[Path, int] = {}

    for file in (path.checkpoint, path.previous, path.decay):
        with contextlib.suppress(OSError):
            found[file] = file.lstat().st_size

    return found


def refusal(entry: Entry) -> str | None:
    r"""Tells why the resumable state of a run must stay, or None if it may go."""

    path = entry.path

    if entry.faults:
        return f"it is damaged: {entry.faults[0]}"

    if entry.status != "finished":
        return f"it is {entry.status}, and only finished runs are pruned."

    if os.path.lexists(path.lease) and not _tells_holder(path.lease):
        return f"{path.lease} is damaged: a process may be at the run."

    if is_held(path, QUIET):
        return "a process is at it."

    with contextlib.suppress(OSError, UserError):
        if check_regular(path.state).stat().st_size > 0:
            return None

    return f"{path.state} is missing: the checkpoint is all that is left of the weights."


def _tells_holder(file: Path) -> bool:
    with contextlib.suppress(OSError, UserError):
        return holder(check_regular(file)) is not None

    return False


def prune(path: RunPath) -> int:
    r"""Removes the resumable state of a finished run, and returns the bytes freed.

    It happens under the lock of the run's lease, so that no process can take the run meanwhile,
    and only if the weights in `state.pth` load.

    Raises:
        UserError: If the state must stay, see :func:`refusal`, or cannot be removed.
    """

    from .score import load_network

    name = path.directory.name

    with _locked(path):
        entry = read_entry(path)

        if (reason := refusal(entry) if entry else "it has vanished.") is not None:
            raise UserError(f"{name} is left as it is: {reason}")

        try:
            load_network(path.directory)
        except Exception as error:  # whatever a damaged file provokes in torch
            raise UserError(f"{name} is left as it is: {path.state} does not load: {error}")

        files = resumable(path)

        try:
            for file in files:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be removed: {error.strerror}.")

    return sum(files.values())


@contextlib.contextmanager
def _locked(path: RunPath) -> Iterator[None]:
    r"""Holds the lock under which leases are taken; whoever writes has it for an instant only."""

    file = path.lease.with_suffix(".lock")

    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{file} cannot be opened: {error.strerror}.")

    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{file} cannot be locked: {error.strerror}.")

        yield
    finally:
        os.close(handle)
