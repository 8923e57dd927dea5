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
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.config import MAX_WEIGHTS, count_weights, load_config
from ..core.errors import UserError
from ..core.files import open_atomic, read_regular, sync_directory, write_atomic
from ..core.system import lacks_memory
from .path import RunPath

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "keep_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "save_state",
]

logger = logging.getLogger(__name__)


def _digest(tensors: dict[str, Tensor], info: str) -> str:
    import torch

    digest = hashlib.sha256(info.encode())

    for key in sorted(tensors):
        x = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {x.dtype} {tuple(x.shape)}".encode())
        content: Any = x.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)

    return digest.hexdigest()


def save_checkpoint(
    path: RunPath,
    tensors: dict[str, Tensor],
    info: dict[str, Any],
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    r"""Saves a checkpoint and keeps the one before as `checkpoint.prev.pth`.

    The file is written aside, synced and renamed: at every instant there is a whole checkpoint.

    Arguments:
        path: The run.
        tensors: All tensors by name.
        info: Everything else, as JSON.
        hold: Entered around the renames, see :meth:`sda_ray.core.lease.Lease.hold`.

    Raises:
        OSError: If the file cannot be written. The checkpoints that exist are then untouched.
    """

    text = json.dumps(info)
    content = {"tensors": tensors, "info": text, "sha256": _digest(tensors, text)}

    def keep_previous() -> None:
        if path.checkpoint.exists():
            path.previous.unlink(missing_ok=True)

            try:  # a link leaves the newest one in its place until the rename
                os.link(path.checkpoint, path.previous)
            except OSError:  # a file system without links
                os.replace(path.checkpoint, path.previous)

    _save(content, path.checkpoint, hold, keep_previous)


def keep_checkpoint(
    path: RunPath, hold: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    r"""Keeps the newest checkpoint as `checkpoint.decay.pth` beside those that follow.

    Raises:
        OSError: If that cannot be done.
    """

    with hold():
        path.decay.unlink(missing_ok=True)

        try:
            os.link(path.checkpoint, path.decay)
            sync_directory(path.directory)
        except OSError:  # a file system without links
            write_atomic(path.decay, path.checkpoint.read_bytes())


def save_state(
    path: RunPath,
    tensors: dict[str, Tensor],
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    r"""Saves a state dict as `state.pth`, in the format of upstream: weights and nothing else.

    Raises:
        OSError: If the file cannot be written.
    """

    _save({key: x.detach().cpu().contiguous() for key, x in tensors.items()}, path.state, hold)


def _save(
    content: Any,
    file: Path,
    hold: Callable[[], AbstractContextManager[None]],
    before: Callable[[], None] = lambda: None,
) -> None:
    import torch

    with ExitStack() as held, open_atomic(file) as stream:
        try:
            torch.save(content, stream)
            stream.flush()
        except RuntimeError as error:  # torch 2.13 hides a full disk behind a RuntimeError
            raise OSError(f"cannot write {file}: {error}") from error

        os.fsync(stream.fileno())
        held.enter_context(hold())
        before()


def load_checkpoint(path: RunPath) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    r"""Loads the newest whole checkpoint of a run. Only the owner of the run may call this.

    A damaged one is set aside as `checkpoint.damaged.pth`, with a warning, in favour of the one
    before: it must not become the previous one of the next.

    Returns:
        The tensors, on the CPU, and the info, or None if there is no whole checkpoint.

    Raises:
        UserError: If a checkpoint is a link out of the directory, or far too large.
        MemoryError: If there is too little memory for it; of torch, a RuntimeError.
    """

    for file in (path.checkpoint, path.previous):
        if not os.path.lexists(file):
            continue

        data = _read(file)  # a disk that fails to read is another matter than damage

        try:
            return _load(data)
        except Exception as error:  # whatever a damaged file provokes in torch
            if lacks_memory(error):  # the file may well be whole
                raise

            reason = str(error).partition("\n")[0] or type(error).__name__

        aside = file.with_suffix(".damaged.pth")
        os.replace(file, aside)
        logger.warning("%s is damaged (%s). It is now %s.", file, reason, aside.name)

    return None


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    r"""Returns what is in a file of a checkpoint. Anyone may call this at any time.

    Raises:
        ValueError: If the file cannot be read or is damaged. The message names it.
    """

    try:
        return _load(_read(file))
    except Exception as error:  # whatever a damaged file provokes in torch
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is damaged ({reason})") from error


def _read(file: Path) -> bytes:
    r"""Returns the bytes of a checkpoint, unless there are far more than its config asks for."""

    try:
        weights = count_weights(load_config(file.with_name("config.json")))
    except UserError:
        weights = MAX_WEIGHTS

    return read_regular(file, 64 * weights + 2**30)  # float32, two moments, average: 16


def _load(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torch

    from ..nn.score import check_archive, total_size

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
