r"""Checkpoints: the state that a run is resumed from, and its weights.

A checkpoint is a flat dict of tensors plus one JSON text, with a SHA-256 digest over all of it. It
is read with `weights_only=True`: no code in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import (
    MAX_WEIGHTS,
    Hold,
    UserError,
    count_weights,
    is_out_of_memory,
    load_config,
    open_atomic,
    read_regular,
    sync_directory,
    write_atomic,
)
from .path import RunPath

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0  # between two checkpoints, unless they cost too much


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
