r"""Trajectories on disk, and windows cut out of them.

A data set is a directory with the files `train.h5`, `valid.h5` and `test.h5`. Each holds a dataset
`x` of :math:`N` trajectories, :math:`(N, L, 2, H, W)`, and, if :mod:`sda_ray.data.simulate` wrote it, a
mask `done` of those that are complete. Only the evaluation of a finished network opens `test.h5`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import UserError
from .hdf5 import Origin, open_trajectories, read_origin, view

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "DataInfo",
    "TrajectoryDataset",
    "check_data",
    "check_file",
    "fingerprint",
]

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class DataInfo:
    r"""Creates a summary of the data that a network is trained with.

    Arguments:
        size: The number of cells along each side of a snapshot.
        length: The number of snapshots in a trajectory.
        trajectories: The number of trajectories of each split.
        fingerprint: The SHA-256 of :func:`fingerprint`.
    """

    size: int
    length: int
    trajectories: dict[str, int]
    fingerprint: str


class TrajectoryDataset:
    r"""Creates a data set of trajectories that is read window by window.

    A contiguous file is mapped into memory, such that the processes of a machine share one copy
    in its page cache. Any other file (chunked, compressed, of exotic numbers) is read at once.
    See :meth:`move` for GPUs.

    Arguments:
        file: An HDF5 file with a dataset `x` of shape :math:`(N, L, 2, H, W)`.
        window: The number of consecutive snapshots in a window.

    Raises:
        UserError: If the file cannot be used, or is shorter than the window.
    """

    def __init__(self, file: Path, window: int) -> None:
        self.file = Path(file)
        self.window = window
        self._moved: Tensor | None = None

        with open_trajectories(self.file) as dataset:
            self.x = view(self.file, dataset)

        if not 1 <= window <= self.x.shape[1]:
            raise UserError(
                f"{file} holds trajectories of {self.x.shape[1]} snapshots, but window is "
                f"{window} and must be between 1 and that length. Choose a smaller window or "
                "other data."
            )

    def __len__(self) -> int:
        return len(self.x)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memmap would carry the data along.
        return type(self), (self.file, self.window)

    @property
    def starts(self) -> int:
        r"""The number of windows in a trajectory."""

        return int(self.x.shape[1]) - self.window + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        r"""The shape :math:`(2K, H, W)` of a window of :math:`K` snapshots."""

        return (2 * self.window, *self.x.shape[-2:])

    def move(self, device: str | torch.device, room: int) -> bool:
        r"""Copies the trajectories to a device, if they take at most `room` bytes there.

        From then on windows are cut out there, with the same bits. A pickled data set stays behind.

        Returns:
            Whether they are there now.
        """

        import torch

        if 4 * self.x.size > room:
            return False

        self._moved = torch.empty(self.x.shape, dtype=torch.float32, device=device)

        for there, here in zip(self._moved, self.x, strict=True):
            there.copy_(torch.from_numpy(np.array(here, dtype=np.float32)))

        return True

    def windows(self, indices: Sequence[int] | Tensor, starts: Sequence[int] | Tensor) -> Tensor:
        r"""Copies windows out of the trajectories.

        Arguments:
            indices: The :math:`B` trajectories.
            starts: The first snapshot of each window, in :math:`[0, L - K]`.

        Returns:
            The windows, of shape :math:`(B, 2K, H, W)`: the channels of the first snapshot come
            first, then those of the second, and so on. They are where the trajectories are.
        """

        import torch

        if self._moved is not None:
            return self._cut(self._moved, torch.as_tensor(indices), torch.as_tensor(starts))

        out = torch.empty(len(indices), self.window, *self.x.shape[2:], dtype=torch.float32)
        rows = out.numpy()

        for row, i, j in zip(rows, map(int, indices), map(int, starts), strict=True):
            self._check(i, j)
            row[...] = self.x[i, j : j + self.window]

        return out.flatten(1, 2)

    def _cut(self, x: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
        import torch

        for i, j in zip(indices.tolist(), starts.tolist(), strict=True):
            self._check(i, j)

        first = indices * x.shape[1] + starts
        snapshots = (first[:, None] + torch.arange(self.window)).flatten()
        found = x.flatten(0, 1).index_select(0, snapshots.to(x.device, non_blocking=True))

        return found.view(len(indices), -1, *x.shape[3:])

    def _check(self, i: int, j: int) -> None:
        if not (0 <= i < len(self) and 0 <= j < self.starts):
            raise IndexError(
                f"trajectory {i}, start {j} is not in {len(self)} × {self.starts} windows"
            )


def check_data(directory: Path, window: int = 1) -> DataInfo:
    r"""Checks everything that training relies on: `train.h5` and `valid.h5`, to the last number.

    `test.h5` is not opened.

    Arguments:
        directory: The directory of the data set.
        window: The number of snapshots that a trajectory must have at least.

    Raises:
        UserError: If anything is missing, damaged, unfinished or of the wrong form. The message
            names the file, what was found and what is expected.
    """

    directory = Path(directory)
    train, valid = (_header(directory / f"{split}.h5") for split in SPLITS)

    if train.shape[1:] != valid.shape[1:]:
        raise UserError(
            f"{directory / 'valid.h5'} holds trajectories of shape {valid.shape[1:]}, but those "
            f"of train.h5 are of shape {train.shape[1:]}. Both must be the same."
        )

    if train.origin and valid.origin and train.origin != valid.origin:
        raise UserError(
            f"{directory / 'valid.h5'} was simulated with {valid.origin.options}, but train.h5 "
            f"with {train.origin.options}. Files of different data sets may share trajectories: "
            "use files of one."
        )

    for split in SPLITS:
        check_file(directory / f"{split}.h5", window)

    return DataInfo(
        size=train.shape[-1],
        length=train.shape[1],
        trajectories={"train": train.shape[0], "valid": valid.shape[0]},
        fingerprint=fingerprint(directory),
    )


def check_file(file: Path, window: int = 1) -> None:
    r"""Checks a file of trajectories, to the last number.

    Arguments:
        file: The HDF5 file.
        window: The number of snapshots that a trajectory must have at least.

    Raises:
        UserError: See :func:`check_data`.
    """

    dataset = TrajectoryDataset(file, window)

    for i in range(len(dataset)):
        with np.errstate(all="ignore"):
            x = np.asarray(dataset.x[i], dtype=np.float32)
            total = x.sum()

        # The sum, a single pass, tells nearly always; it may also overflow, or cancel out.
        if not np.isfinite(total) and not (finite := np.isfinite(x)).all():
            snapshot = int(np.argmin(finite.all(axis=(1, 2, 3))))
            raise UserError(
                f"{file} holds a number that is not finite (in float32) in trajectory {i}, "
                f"snapshot {snapshot}, but all of `x` must be finite. Make the file anew."
            )

        if total == 0 and not x.any():
            raise UserError(
                f"{file} holds only zeros in trajectory {i}: it was never written, or lost. "
                "Make the file anew."
            )


def fingerprint(directory: Path) -> str:
    r"""Computes a SHA-256 that tells data sets apart, without reading all of them.

    It covers the shape and type of `x` in `train.h5` and `valid.h5`, and a page (1024 numbers) of
    each trajectory. It depends neither on how HDF5 stores them, nor on names and times of files.

    Arguments:
        directory: The directory of the data set.

    Returns:
        The digest, as 64 hexadecimal digits.
    """

    sha = hashlib.sha256()

    for split in SPLITS:
        with open_trajectories(Path(directory) / f"{split}.h5") as dataset:
            n, length, _, height, width = dataset.shape
            rows = min(-(-1024 // width), height)
            sha.update(f"{split} {dataset.shape} float{8 * dataset.dtype.itemsize} ".encode())

            for i in range(n):
                page = dataset[i, length // 2, 0, :rows]
                sha.update(page.astype(dataset.dtype.newbyteorder("<")).tobytes())

    return sha.hexdigest()


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    origin: Origin | None


def _header(file: Path) -> _Header:
    with open_trajectories(file) as dataset:
        return _Header(dataset.shape, read_origin(dataset.file))
