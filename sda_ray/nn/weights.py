r"""Files of weights, as `state.pth`: what is read from them, and what is refused."""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..core.errors import UserError
from ..core.keys import ALPHAS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_alpha",
    "check_archive",
    "check_weights",
    "field_size",
    "inside",
    "read_weights",
    "total_size",
]

MAX_SIZE = 4096  # cells along an axis; a file that claims more is not one of ours
MAX_PICKLE = 16 * 2**20  # bytes that name the tensors of a file; a thousand take 0.3 MB

# All that a file of tensors calls. torch's own list also has what takes memory for nothing.
CALLS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
}


def inside(run: Path, name: str) -> Path:
    r"""Returns the path of a file in a run directory, if it is a regular file therein."""

    file = run / name
    target = Path(os.path.realpath(file))

    if not target.is_file():
        raise UserError(f"{file} is missing, or not a regular file.")

    if not target.is_relative_to(os.path.realpath(run)):
        raise UserError(
            f"{file} is a link to {target}, out of the run directory. Copy the file instead."
        )

    return file


def check_archive(f: BinaryIO) -> bool:
    r"""Checks a file of `torch.save`, before it is loaded, for what would take memory.

    Arguments:
        f: The file, open at its beginning, where it is left.

    Returns:
        Whether it is a zip archive, rather than in the format before torch 1.6.

    Raises:
        ValueError: If its entries are compressed or overlap, or it calls for more than tensors.
    """

    size = f.seek(0, os.SEEK_END)
    archived = zipfile.is_zipfile(f)

    if archived:
        with zipfile.ZipFile(f) as archive:
            items = archive.infolist()

            if any(item.compress_type != zipfile.ZIP_STORED for item in items):
                raise ValueError("it is compressed")

            if sum(item.file_size for item in items) > size:
                raise ValueError("its entries declare more bytes than it has")

            for item in items:
                if item.filename.endswith(".pkl"):
                    _check_pickle(item.file_size, archive.open(item))
    else:
        f.seek(0)

        for _ in range(5):  # magic number, protocol, system, tensors, names of the storages
            _check_pickle(0, f)

    f.seek(0)

    return archived


def _check_pickle(size: int, f: Any) -> None:
    if size > MAX_PICKLE:
        raise ValueError(f"it has {size} bytes of names, but at most {MAX_PICKLE} are read")

    for code, argument, position in pickletools.genops(f):
        if (position or 0) > MAX_PICKLE:
            raise ValueError(f"it has more than {MAX_PICKLE} bytes of names")

        known = code.name != "GLOBAL" or argument in CALLS
        storage = str(argument).startswith("torch ") and str(argument).endswith("Storage")

        if not (known or storage) or code.name in ("STACK_GLOBAL", "INST", "EXT1"):
            raise ValueError(f"it calls for '{argument}', which tensors do not need")


def total_size(tensors: Any) -> int:
    r"""Returns the bytes of tensors as they would be written out, expanded ones in full."""

    return sum(x.numel() * x.element_size() for x in tensors.values())


def read_weights(file: Path) -> dict[str, Tensor]:
    r"""Returns the tensors in a file, on the CPU. Nothing in the file is executed."""

    import torch

    try:
        with open(file, "rb") as f:
            mmap = check_archive(f)

        # Mapped rather than read, so that a file is never in memory twice.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # any kind of damage, each with its own kind of exception
        reason = str(e).partition("\n")[0]
        raise UserError(f"{file} is damaged, or not a file of weights: {reason}") from e

    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{file} holds something else than a state dict: tensors by name.")

    return dict(state)


def field_size(file: Path, state: dict[str, Tensor]) -> int:
    r"""Returns the size of the fields that weights are for."""

    if "kernel.forcing" not in state:
        raise UserError(f"{file} has no 'kernel.forcing'. It is not the state of a score network.")

    shape = tuple(state["kernel.forcing"].shape)

    if len(shape) != 3 or shape[1] != shape[2] or not 0 < shape[1] <= MAX_SIZE:
        raise UserError(
            f"{file} has 'kernel.forcing' of shape {shape}, but it must be (1, N, N), with N at "
            f"most {MAX_SIZE}: the size of the fields."
        )

    return shape[1]


def check_alpha(file: Path, state: dict[str, Tensor], alpha: str) -> None:
    r"""Checks that weights are for a given `alpha`, see :func:`sda_ray.nn.score.make_score`."""

    marks = [name for name in ALPHAS if f"alpha_{name}" in state] or ["cos"]

    if marks != [alpha]:
        raise UserError(
            f"{file} is for alpha={' and '.join(marks)}, but {file.with_name('config.json')} has "
            f"alpha={alpha}. They are not of the same run."
        )


def check_weights(file: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    r"""Checks that weights have the names, shapes and dtypes expected, and are in the file."""

    wrong = []

    for key in [*expected, *(key for key in state if key not in expected)]:
        if key not in state:
            wrong.append(f"'{key}' is missing")
        elif key not in expected:
            wrong.append(f"'{key}' is unknown")
        elif (found := _kind(state[key])) != (wanted := _kind(expected[key])):
            wrong.append(f"'{key}' is {found}, but must be {wanted}")

    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{file} does not fit {file.with_name('config.json')}: {'; '.join(wrong[:3])}{more}."
        )

    # An expanded tensor takes no space in the file, but would in memory.
    needed = total_size(expected)

    if needed > file.stat().st_size:
        raise UserError(f"{file} is shorter than the {needed} bytes of weights it should hold.")


def _kind(x: Tensor) -> str:
    import torch

    layout = "" if x.layout is torch.strided else f" ({x.layout})"

    return f"{x.dtype} of shape {tuple(x.shape)}{layout}".removeprefix("torch.")
