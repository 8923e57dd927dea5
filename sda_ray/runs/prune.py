r"""Removes checkpoints, which only serve to resume or extend a run, to free disk space.

A finished run keeps its weights. A run that is not finished restarts at its first epoch and ends
in the same bits: see :meth:`sda_ray.runs.run.Run.load`.
"""

import contextlib
import os
import stat
import zipfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from ..core import UserError, locked, read_holder, write_json
from .inventory import Entry, is_held, read_entry
from .path import RunPath

__all__ = ["give_back", "prune_run", "refusal", "resumable"]

QUIET = 3600.0  # seconds without a heartbeat after which a holder on another host is dead


def resumable(path: RunPath) -> dict[Path, int]:
    r"""Returns the checkpoints of a run and their bytes.

    They are in the order in which they may be removed: the newest checkpoint never goes before an
    older one. A file that has two names counts once; symbolic links do not count.
    """

    sizes: dict[Path, int] = {}
    seen: set[int] = set()

    for file in (path.previous, path.checkpoint, path.decay):
        with contextlib.suppress(OSError):
            status = file.lstat()

            if stat.S_ISREG(status.st_mode):
                sizes[file] = 0 if status.st_ino in seen else status.st_size
                seen.add(status.st_ino)

    return sizes


def refusal(entry: Entry) -> str | None:
    r"""Returns why the checkpoints of a run must stay, or None if they may be removed."""

    path = entry.path

    if entry.faults:
        return f"it is damaged: {entry.faults[0]}"

    if entry.status != "finished":
        return f"it is {entry.status}, and only finished runs are pruned."

    if (reason := _in_use(path)) is not None:
        return reason

    with contextlib.suppress(OSError):
        status = path.state.lstat()

        if stat.S_ISREG(status.st_mode) and status.st_size > 0:
            return None

    return f"{path.state} is missing: the weights are only in the checkpoint."


def _in_use(path: RunPath) -> str | None:
    if os.path.lexists(path.lease) and read_holder(path.lease) is None:
        return f"{path.lease} is damaged: a process may use the run."

    return "a process uses it." if is_held(path, QUIET) else None


def prune_run(path: RunPath) -> int:
    r"""Removes the checkpoints of a finished run and returns the bytes freed.

    The lock of the run's lease is held meanwhile, so that no process can take the run. The
    checkpoints stay unless the weights in `state.pth` load.

    Raises:
        UserError: If the checkpoints must stay, see :func:`refusal`, or cannot be removed.
    """

    with _locked(path):
        entry = read_entry(path)

        if (reason := refusal(entry) if entry else "it has vanished.") is not None:
            raise UserError(f"{path.directory.name} stays as it is: {reason}")

        _check_weights(path)

        return _remove(path)


def give_back(path: RunPath, sweep: str) -> int:
    r"""Removes the checkpoints of a run of a sweep and returns the bytes freed.

    Unlike with :func:`prune`, the run may be paused, diverged, failed or stopped. If it is
    resumed, it restarts at its first epoch; its `run.json` gets the key `given_back` before
    anything is removed. The weights of a finished run are read and not loaded: no torch is needed.

    Arguments:
        path: The run.
        sweep: The name of the sweep. The run's own record must name it.

    Raises:
        UserError: If the checkpoints must stay, or cannot be removed.
    """

    with _locked(path):
        entry = read_entry(path)

        if (reason := _stays(entry, sweep) if entry else "it has vanished.") is not None:
            raise UserError(f"{path.directory.name} stays as it is: {reason}")

        assert entry is not None

        if entry.status == "finished":
            _check_archive(path)
        else:
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")

            with contextlib.suppress(OSError):  # a full disk needs the space most
                write_json(path.record, entry.record | {"given_back": when})

        return _remove(path)


def _stays(entry: Entry, sweep: str) -> str | None:
    path = entry.path

    if path.directory.is_symlink():
        return "its directory is a link to somewhere else."

    if path.record.is_symlink() or entry.sweep != sweep:
        return f"its run.json does not name sweep '{sweep}'."

    if entry.status == "finished":
        return refusal(entry)

    if entry.faults:
        return f"it is damaged: {entry.faults[0]}"

    if entry.record["status"] == "running":
        return "its run.json says that it is running."

    if "parent" in entry.record:
        return "it started with the weights of another run."

    return _in_use(path)


def _check_weights(path: RunPath) -> None:
    from ..nn import load_network

    try:
        load_network(path.directory)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise UserError(
            f"{path.directory.name} stays as it is: {path.state} does not load: {error}"
        )


def _check_archive(path: RunPath) -> None:
    r"""Checks the checksums of the weights. Unlike loading them, it needs no torch."""

    try:
        with zipfile.ZipFile(path.state) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        damaged = str(error)

    if damaged is not None:
        raise UserError(
            f"{path.directory.name} stays as it is: {path.state} is damaged: {damaged}"
        )


def _remove(path: RunPath) -> int:
    files = resumable(path)

    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be removed: {error.strerror}.")

    return sum(files.values())


@contextlib.contextmanager
def _locked(path: RunPath) -> Iterator[None]:
    r"""Holds the lock under which leases are taken. Writers hold it for an instant only."""

    file = path.lease.with_suffix(".lock")

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(file, wait=False))
        except OSError as error:
            raise UserError(f"{file} cannot be locked: {error.strerror}.")

        yield
