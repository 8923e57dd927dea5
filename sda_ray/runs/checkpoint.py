r"""Checkpoints: the state that a run is resumed from, its weights, and the removal of the former.

A checkpoint is a flat dict of tensors plus one JSON text, with a SHA-256 digest over all of it. It
is read with `weights_only=True`: no code in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import stat
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import (
    MAX_WEIGHTS,
    Hold,
    UserError,
    count_weights,
    is_out_of_memory,
    load_config,
    locked_at_once,
    open_atomic,
    read_holder,
    read_regular,
    sync_directory,
    write_atomic,
)
from .inventory import Entry, is_held, read_entry
from .path import RunPath

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0  # between two checkpoints, unless they cost too much
QUIET = 3600.0  # seconds without a heartbeat after which a holder on another host is dead


def save_checkpoint(
    path: RunPath, tensors: dict[str, Tensor], info: dict[str, Any], hold: Hold = nullcontext
) -> None:
    r"""Saves a checkpoint, and keeps the one before as `checkpoint.prev.pth`.

    The file is written aside, synced and renamed, under `hold`: at every instant there is a whole
    checkpoint.

    Raises:
        OSError: If the file cannot be written. Existing checkpoints are then untouched.
    """

    text = json.dumps(info)
    content = {"tensors": tensors, "info": text, "sha256": _digest(tensors, text)}
    _save(content, path.checkpoint, hold, lambda: keep_previous(path))


def keep_previous(path: RunPath) -> None:
    r"""Keeps the newest checkpoint as `checkpoint.prev.pth`, before another one takes its place."""

    if path.checkpoint.exists():
        path.previous.unlink(missing_ok=True)

        try:  # a link leaves the newest one in its place until the rename
            os.link(path.checkpoint, path.previous)
        except OSError:  # a file system without links
            os.replace(path.checkpoint, path.previous)


def keep_checkpoint(path: RunPath, hold: Hold = nullcontext) -> None:
    r"""Keeps the newest checkpoint as `checkpoint.decay.pth`, beside later ones."""

    with hold():
        path.decay.unlink(missing_ok=True)

        try:
            os.link(path.checkpoint, path.decay)
            sync_directory(path.directory)
        except OSError:  # a file system without links
            write_atomic(path.decay, path.checkpoint.read_bytes())


def save_state(path: RunPath, tensors: dict[str, Tensor], hold: Hold = nullcontext) -> None:
    r"""Saves a state dict as `state.pth`, in the format of upstream: weights and nothing else."""

    _save({key: x.detach().cpu().contiguous() for key, x in tensors.items()}, path.state, hold)


def _save(content: Any, file: Path, hold: Hold, before: Callable[[], None] = lambda: None) -> None:
    import torch

    with ExitStack() as stack, open_atomic(file) as stream:
        try:
            torch.save(content, stream)
            stream.flush()
        except RuntimeError as error:  # torch 2.13 hides a full disk behind a RuntimeError
            raise OSError(f"cannot write {file}: {error}") from error

        os.fsync(stream.fileno())
        stack.enter_context(hold())
        before()


def _digest(tensors: dict[str, Tensor], info: str) -> str:
    import torch

    digest = hashlib.sha256(info.encode())

    for key in sorted(tensors):
        x = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {x.dtype} {tuple(x.shape)}".encode())
        content: Any = x.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)

    return digest.hexdigest()


def load_checkpoint(path: RunPath) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    r"""Loads the newest whole checkpoint of a run. Only the owner of the run may call this.

    A damaged one is renamed to `checkpoint.damaged.pth`, with a warning, so that it never becomes
    the previous one of the next; then the one before is loaded.

    Returns:
        The tensors, on the CPU, and the info, or None if there is no whole checkpoint.

    Raises:
        UserError: If a checkpoint is a link out of the directory, or far too large.
        MemoryError: If there is too little memory for it; from torch, a RuntimeError.
    """

    for file in (path.checkpoint, path.previous):
        if not os.path.lexists(file):
            continue

        data = _read(file)  # a read error of the disk is no damage

        try:
            return _load(data)
        except Exception as error:  # a damaged file makes torch raise almost anything
            if is_out_of_memory(error):  # the file may well be whole
                raise

            reason = _reason(error)

        aside = file.with_suffix(".damaged.pth")
        os.replace(file, aside)
        logger.warning("%s is damaged (%s). It is now %s.", file, reason, aside.name)

    return None


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    r"""Returns the tensors and the info of a checkpoint file. May be called at any time.

    Raises:
        ValueError: If the file cannot be read or is damaged. The message names it.
    """

    try:
        return _load(_read(file))
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ValueError(f"{file} is damaged ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _read(file: Path) -> bytes:
    r"""Returns the bytes of a checkpoint, unless there are far more than its config asks for."""

    try:
        weights = count_weights(load_config(file.with_name("config.json")))
    except UserError:
        weights = MAX_WEIGHTS

    return read_regular(file, 64 * weights + 2**30)  # float32, two moments, average: 16


def _load(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torch

    from ..nn import check_archive, total_size

    stream = io.BytesIO(data)
    check_archive(stream)
    content = torch.load(stream, map_location="cpu", weights_only=True)
    tensors, text = content["tensors"], content["info"]

    # An expanded tensor takes no space in the file, but would in memory.
    if (size := total_size(tensors)) > len(data):
        raise ValueError(f"its tensors have {size} bytes")

    if _digest(tensors, text) != content["sha256"]:
        raise ValueError("its checksum is wrong")

    info = json.loads(text)

    # A stranger can make a right checksum. A step leaves a loss among the tensors, at least.
    for key, last in (("epoch", 10**8), ("step", len(data))):
        if type(info[key]) is not int or not 0 <= info[key] <= last:
            raise ValueError(f"its {key} is {str(info[key])[:80]}")

    return tensors, info


# Removal


def resumable(path: RunPath) -> dict[Path, int]:
    r"""Returns the checkpoints of a run and their bytes.

    They are in the order in which they may be removed: the newest checkpoint never goes before an
    older one. A file that has two names counts once; symbolic links do not count.
    """

    sizes: dict[Path, int] = {}
    seen: set[int] = set()

    for file in (path.previous, path.checkpoint, path.decay):
        with suppress(OSError):
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
    r"""Removes the checkpoints of a run to free disk space, and returns the bytes freed.

    A finished run keeps its weights. One that is not finished restarts at its first epoch and ends
    in the same bits, see :meth:`sda_ray.runs.run.Run.load`. The lock of the run's lease is held
    meanwhile, so that no process can take the run. Weights are read and not loaded: no torch is
    needed.

    Arguments:
        path: The run. It must be finished, and its weights whole.
        sweep: The name of the sweep that prunes its own runs, which the run's record must name.
            The run may then be paused, diverged, failed or stopped.

    Raises:
        UserError: If the checkpoints must stay, see :func:`refusal`, or cannot be removed.
    """

    with locked_at_once(path.lease.with_suffix(".lock")):
        entry = read_entry(path)

        if entry is None:
            raise UserError(f"{path.directory.name} has vanished.")

        if reason := refusal(entry, sweep) or _damage(entry):
            raise UserError(f"{path.directory.name} stays as it is: {reason}")

        files = resumable(path)

        try:
            for file in files:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be removed: {error.strerror}.")

        return sum(files.values())


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
