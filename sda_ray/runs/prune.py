r"""Removes checkpoints, which only serve to resume or extend a run, to free disk space.

A finished run keeps its weights. A run that is not finished restarts at its first epoch and ends
in the same bits: see :meth:`sda_ray.runs.run.Run.load`.
"""

import contextlib
import os
import stat
import zipfile
from pathlib import Path

from ..core import UserError, locked_at_once, read_holder, write_json
from .inventory import Entry, is_held, read_entry
from .path import RunPath
from .record import timestamp

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


def refusal(entry: Entry, sweep: str | None = None) -> str | None:
    r"""Returns why the checkpoints of a run must stay, or None, see :func:`prune_run`."""

    path, finished = entry.path, entry.status == "finished"

    if sweep is not None:
        if path.directory.is_symlink():
            return "its directory is a link."

        if path.record.is_symlink() or entry.sweep != sweep:
            return f"its run.json does not name sweep '{sweep}'."

    if entry.faults:
        return f"it is damaged: {entry.faults[0]}"

    if not finished and sweep is None:
        return f"it is {entry.status}, and only finished runs are pruned."

    if entry.record.get("status") == "running":
        return "its run.json says that it is running."

    if not finished and "parent" in entry.record:
        return "it started with the weights of another run."

    if os.path.lexists(path.lease) and read_holder(path.lease) is None:
        return f"{path.lease} is damaged: a process may use the run."

    if is_held(path, QUIET):
        return "a process uses it."

    if finished and not (path.state.is_file() and not path.state.is_symlink()):
        return f"{path.state} is missing: the weights are only in the checkpoint."

    return None


def prune_run(path: RunPath, sweep: str | None = None) -> int:
    r"""Removes the checkpoints of a run and returns the bytes freed.

    The lock of the run's lease is held meanwhile, so that no process can take the run. Weights are
    read and not loaded: no torch is needed.

    Arguments:
        path: The run. It must be finished, and its weights whole.
        sweep: The name of the sweep that prunes its own runs, which the run's record must name.
            The run may then be paused, diverged, failed or stopped. If it is resumed, it restarts
            at its first epoch; its `run.json` gets the key `given_back` before anything is removed.

    Raises:
        UserError: If the checkpoints must stay, see :func:`refusal`, or cannot be removed.
    """

    with locked_at_once(path.lease.with_suffix(".lock")):
        entry = read_entry(path)

        if entry is None:
            raise UserError(f"{path.directory.name} has vanished.")

        if reason := refusal(entry, sweep) or _damage(entry):
            raise UserError(f"{path.directory.name} stays as it is: {reason}")

        if entry.status != "finished":
            with contextlib.suppress(OSError):  # a full disk needs the space most
                write_json(path.record, entry.record | {"given_back": timestamp()})

        return _remove(path)


def _damage(entry: Entry) -> str | None:
    r"""Returns why the weights of a finished run do not load, by their checksums."""

    if entry.status != "finished":
        return None

    try:
        with zipfile.ZipFile(entry.path.state) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        damaged = str(error)

    return damaged and f"{entry.path.state} is damaged and does not load: {damaged}."


def _remove(path: RunPath) -> int:
    files = resumable(path)

    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be removed: {error.strerror}.")

    return sum(files.values())
