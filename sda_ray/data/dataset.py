r"""Trajectories on disk, and windows cut out of them.

A data set is a directory with the files `train.h5`, `valid.h5` and `test.h5`. Each holds a dataset
`x` of :math:`N` trajectories, :math:`(N, L, 2, H, W)`, and, if :mod:`sda_ray.data.simulate` wrote it, a
mask `done` of those that are complete. Only the evaluation of a finished network opens `test.h5`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from ..core import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")

STATES = 16  # in which :func:`unusual` looks
# The bounds of what is usual. Kolmogorov flow has a standard deviation of 0.9, and a ratio of 1.
OFFSET = 0.5  # of the mean, in standard deviations
STD = 0.2, 5.0
JUMP = 3.0  # across the boundary, in differences of neighbouring cells


class DataChanged(UserError):
    r"""Raised if data are no longer those that a run or a sweep was started with."""


@dataclass(frozen=True)
class Origin:
    r"""The settings that a data set was simulated with, kept as attributes of its files."""

    trajectories: int  # in all files together
    size: int  # cells along each side of the simulation
    seed: int

    @property
    def options(self) -> str:
        r"""The settings as options of the command line."""

        return " ".join(f"--{key} {value}" for key, value in asdict(self).items())


def read_origin(f: h5py.File) -> Origin | None:
    r"""Returns the record in a simulated file, or None if it has none."""

    keys = Origin.__dataclass_fields__

    return Origin(*(int(f.attrs[k]) for k in keys)) if all(k in f.attrs for k in keys) else None


@contextmanager
def open_trajectories(file: Path) -> Iterator[h5py.Dataset]:
    r"""Opens a file, checks its dataset `x`, and yields it."""

    try:
        if not file.exists():
            missing = f"file {file}" if file.parent.is_dir() else f"directory {file.parent}"
            raise UserError(
                f"there is no {missing}, but training needs a data set: train.h5 and "
                "valid.h5. `sda-ray simulate --preset demo` makes a small one to try things out, "
                "`sda-ray simulate --preset full` a real one; --data says where it is."
            )

        if not file.is_file() or not h5py.is_hdf5(file):
            raise UserError(
                f"{file} is not an HDF5 file, but must be one with a dataset `x` of shape "
                "(N, L, 2, H, W). Make or copy it again."
            )

        # Not every file system has locks, and reading needs none
        with h5py.File(file, "r", locking=False) as f:
            dataset = get_dataset(file, f, "x")
            _check_form(file, dataset)
            _check_done(file, f, len(dataset))

            yield dataset
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as e:
        raise UserError(
            f"{file} cannot be read: it is truncated, damaged, closed to this user, or a process "
            f"has it open for writing ({e}). Close it there, or make or copy it again."
        ) from e


def get_dataset(file: Path, f: h5py.File, name: str) -> h5py.Dataset:
    r"""Returns a dataset that lies in the file itself."""

    if name not in f:
        raise UserError(
            f"{file} has no dataset `{name}`, only {sorted(f.keys())}, but must have one of shape "
            "(N, L, 2, H, W)."
        )

    dataset = f[name]

    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{file} has a group `{name}`, but `{name}` must be a dataset.")

    if dataset.file.filename != f.filename or dataset.external or dataset.is_virtual:
        raise UserError(
            f"{file} keeps the dataset `{name}` in another file. Copy the data into it."
        )

    return dataset


def _check_form(file: Path, dataset: h5py.Dataset) -> None:
    shape, dtype = dataset.shape, dataset.dtype

    if shape is None or len(shape) != 5 or shape[2] != 2 or shape[3] != shape[4] or 0 in shape:
        raise UserError(
            f"{file} has a dataset `x` of shape {shape}, but it must be (N, L, 2, H, W) with 2 "
            "velocity components, H = W, and no dimension 0: N trajectories of L snapshots."
        )

    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise UserError(
            f"{file} has a dataset `x` of type {dtype}, but it must be float32 (float16 and "
            "float64 are converted)."
        )

    if dataset.id.get_storage_size() == 0:
        raise UserError(f"{file} declares a dataset `x` of {shape}, but holds no data.")


def _check_done(file: Path, f: h5py.File, n: int) -> None:
    if "done" not in f:
        return

    done = get_dataset(file, f, "done")

    if done.shape != (n,) or done.dtype.kind not in "biu":
        raise UserError(
            f"{file} has a mask `done` of shape {done.shape} and type {done.dtype}, but it must "
            f"have one integer or bool for each of the {n} trajectories in `x`."
        )

    complete = int(np.count_nonzero(done[...]))

    if complete < n:
        origin = read_origin(f)
        options = f"{origin.options} --data {file.parent}" if origin else "…"
        raise UserError(
            f"{file} is unfinished: {complete} of {n} trajectories are simulated. The same "
            f"command continues: `sda-ray simulate {options}`."
        )


def _view(file: Path, dataset: h5py.Dataset) -> np.ndarray:
    r"""Maps a dataset into memory, read only; or reads it, with a warning, if it is not contiguous.

    The array outlives the open file.
    """

    offset = dataset.id.get_offset()
    exact = h5py.h5t.py_create(dataset.dtype) == dataset.id.get_type()

    if offset is not None and exact:
        return np.memmap(file, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)

    logger.warning(
        "%s is chunked or compressed: each process reads all of it into memory (%.2f GiB). "
        "`h5repack -l x:CONTI -f x:NONE OLD NEW` makes a file that processes share.",
        file,
        4 * dataset.size / 2**30,
    )

    x = np.empty(dataset.shape, dtype=np.float32)
    dataset.read_direct(x)

    return x


@dataclass(frozen=True)
class DataInfo:
    r"""A summary of the data that a network is trained with."""

    size: int  # cells along each side of a snapshot
    length: int  # snapshots in a trajectory
    trajectories: dict[str, int]  # their number in each split
    fingerprint: str  # see :func:`fingerprint`
    warnings: Sequence[str] = ()  # see :func:`unusual`


class TrajectoryDataset:
    r"""Creates a data set of trajectories that is read window by window.

    A contiguous file is mapped into memory, so that the processes of a machine share one copy in
    its page cache. Any other file (chunked, compressed, of another type) is read at once.
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
            self.x = _view(self.file, dataset)

        if not 1 <= window <= self.x.shape[1]:
            raise UserError(
                f"{file} holds trajectories of {self.x.shape[1]} snapshots, but window is "
                f"{window} and must be between 1 and that length. Choose a smaller window or "
                "other data."
            )

    def __len__(self) -> int:
        return len(self.x)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memmap would carry the data.
        return type(self), (self.file, self.window)

    @property
    def starts(self) -> int:
        r"""The number of windows in a trajectory."""

        return int(self.x.shape[1]) - self.window + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        r"""The shape :math:`(2K, H, W)` of a window of :math:`K` snapshots."""

        return (2 * self.window, *self.x.shape[-2:])

    def move(self, device: str | torch.device, limit: int) -> bool:
        r"""Copies the trajectories to a device, if they take at most `limit` bytes there.

        Windows are then cut out there, with the same bits. A pickled data set is not moved.
        """

        import torch

        if 4 * self.x.size > limit:
            return False

        self._moved = torch.empty(self.x.shape, dtype=torch.float32, device=device)

        for copy, trajectory in zip(self._moved, self.x, strict=True):
            copy.copy_(torch.from_numpy(np.array(trajectory, dtype=np.float32)))

        return True

    def windows(self, indices: Sequence[int] | Tensor, starts: Sequence[int] | Tensor) -> Tensor:
        r"""Copies windows out of trajectories, which start at given snapshots.

        Returns:
            The windows, of shape :math:`(B, 2K, H, W)`, with the channels of the first snapshot
            first. They are on the device of the trajectories.
        """

        import torch

        indices, starts = torch.as_tensor(indices).tolist(), torch.as_tensor(starts).tolist()
        pairs = list(zip(indices, starts, strict=True))

        for i, j in pairs:
            if not (0 <= i < len(self) and 0 <= j < self.starts):
                raise IndexError(
                    f"trajectory {i}, start {j} is not in {len(self)} × {self.starts} windows"
                )

        if self._moved is None:
            out = torch.empty(len(pairs), self.window, *self.x.shape[2:], dtype=torch.float32)

            for row, (i, j) in zip(out.numpy(), pairs, strict=True):
                row[...] = self.x[i, j : j + self.window]

            return out.flatten(1, 2)

        first = torch.tensor([i * self.x.shape[1] + j for i, j in pairs])
        snapshots = (first[:, None] + torch.arange(self.window)).flatten()
        out = self._moved.flatten(0, 1).index_select(
            0, snapshots.to(self._moved.device, non_blocking=True)
        )

        return out.view(len(pairs), -1, *self.x.shape[3:])


def check_data(directory: Path) -> DataInfo:
    r"""Checks `train.h5` and `valid.h5`, to the last number. `test.h5` is not opened.

    Raises:
        UserError: If anything is missing, damaged, unfinished or of the wrong form. The message
            names the file, its fault and what is expected.
    """

    files = [Path(directory) / f"{split}.h5" for split in SPLITS]
    (train, made), (valid, made_valid) = map(_shape_and_origin, files)

    if train[1:] != valid[1:]:
        raise UserError(
            f"{files[1]} holds trajectories of shape {valid[1:]}, but those of train.h5 are of "
            f"shape {train[1:]}. Both must be the same."
        )

    if made and made_valid and made != made_valid:
        raise UserError(
            f"{files[1]} was simulated with {made_valid.options}, but train.h5 with "
            f"{made.options}. Files of different data sets may share trajectories: use files of "
            "one."
        )

    for file in files:
        check_file(file)

    trajectories = {"train": train[0], "valid": valid[0]}

    odd = tuple(unusual(files[0]))

    return DataInfo(train[-1], train[1], trajectories, fingerprint(directory), odd)


def _shape_and_origin(file: Path) -> tuple[tuple[int, ...], Origin | None]:
    with open_trajectories(file) as dataset:
        return dataset.shape, read_origin(dataset.file)


def check_file(file: Path) -> None:
    r"""Checks a file of trajectories, to the last number, see :func:`check_data`."""

    for i, trajectory in enumerate(TrajectoryDataset(file, window=1).x):
        with np.errstate(all="ignore"):
            x = np.asarray(trajectory, dtype=np.float32)
            total = x.sum()

        # One pass for the sum is enough, unless it overflows or cancels out.
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


def unusual(file: Path) -> Iterator[str]:
    r"""Yields in what respect a few states of a file are not as networks take them to be.

    Nothing is normalised: velocities must have a mean near 0 and a size near 1. All convolutions
    are periodic.
    """

    with open_trajectories(file) as x:
        few = {round(i) for i in np.linspace(0, len(x) - 1, STATES)}
        states = np.stack([x[i, x.shape[1] // 2] for i in few]).astype(np.float64)

    mean, std = states.mean((0, 2, 3)), states.std((0, 2, 3))

    if (abs(mean) > OFFSET * std).any() or not (STD[0] <= std).all() or (std > STD[1]).any():
        values = " and ".join(f"{m:.3g} ± {s:.3g}" for m, s in zip(mean, std, strict=True))
        yield (
            f"the velocities in {file} are {values}. Networks take them as they are, and learn "
            "best from a mean of 0 and a standard deviation near 1. Scale them."
        )

    for axis in (-2, -1):
        inner = np.sqrt(np.square(np.diff(states, axis=axis)).mean())
        across = np.take(states, 0, axis) - np.take(states, -1, axis)

        if (jump := np.sqrt(np.square(across).mean())) > JUMP * inner:
            yield (
                f"the states in {file} are not periodic along axis {axis}, but networks take them "
                f"to be: they differ by {jump:.3g} across the boundary, and by {inner:.3g} from "
                "cell to cell."
            )


def fingerprint(directory: Path, splits: Sequence[str] = SPLITS) -> str:
    r"""Returns a SHA-256 that tells data sets apart, without reading all of them.

    It covers the shape and type of `x` in the files of the splits, and a page (1024 numbers) of
    each trajectory. It depends neither on how HDF5 stores them, nor on names and times of files.
    """

    sha = hashlib.sha256()

    for split in splits:
        with open_trajectories(Path(directory) / f"{split}.h5") as dataset:
            n, length, _, height, width = dataset.shape
            rows = min(-(-1024 // width), height)
            sha.update(f"{split} {dataset.shape} float{8 * dataset.dtype.itemsize} ".encode())

            for i in range(n):
                page = dataset[i, length // 2, 0, :rows]
                sha.update(page.astype(dataset.dtype.newbyteorder("<")).tobytes())

    return sha.hexdigest()
