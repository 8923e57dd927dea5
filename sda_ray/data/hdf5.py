r"""HDF5 files of trajectories, from anyone: opened, checked and viewed without trusting them."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np

from ..core.errors import UserError

__all__ = [
    "Origin",
    "get_dataset",
    "open_trajectories",
    "read_origin",
    "view",
]

logger = logging.getLogger(__name__)

MAX_RATIO = 1032  # the best that deflate can do


@dataclass(frozen=True)
class Origin:
    r"""Creates a record of what a data set was simulated with, kept as attributes of its files.

    Arguments:
        trajectories: The number of trajectories in all files together.
        size: The number of cells along each side of the simulation.
        seed: The seed of the data set.
    """

    trajectories: int
    size: int
    seed: int

    @property
    def options(self) -> str:
        r"""The same as options of the command line."""

        return " ".join(f"--{key} {value}" for key, value in asdict(self).items())


def read_origin(f: h5py.File) -> Origin | None:
    r"""Returns what a file was simulated with, if it says so."""

    keys = list(Origin.__dataclass_fields__)

    if not all(key in f.attrs for key in keys):
        return None

    return Origin(*(int(f.attrs[key]) for key in keys))


@contextmanager
def open_trajectories(file: Path) -> Iterator[h5py.Dataset]:
    r"""Opens a file and yields its dataset `x`, whose form, size and completeness are checked."""

    try:
        if not file.exists():
            what = "file" if file.parent.is_dir() else "directory"
            missing = file if what == "file" else file.parent
            raise UserError(
                f"there is no {what} {missing}, but training needs a data set: train.h5 and "
                "valid.h5. `sda-ray simulate --preset demo` makes a small one to try things out, "
                "`sda-ray simulate --preset full` a real one; --data says where it is."
            )

        if not file.is_file() or not h5py.is_hdf5(file):
            raise UserError(
                f"{file} is not an HDF5 file, but must be one with a dataset `x` of shape "
                "(N, L, 2, H, W). Make or copy it again."
            )

        with h5py.File(file, "r") as f:
            dataset = get_dataset(file, f, "x")
            _check_form(file, dataset)
            _check_storage(file, dataset)
            _check_done(file, f, len(dataset))

            yield dataset
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as e:
        raise UserError(
            f"{file} cannot be read: it is truncated or damaged, or closed to this user ({e}). "
            "Make or copy it again."
        ) from e


def get_dataset(file: Path, f: h5py.File, name: str) -> h5py.Dataset:
    r"""Returns a dataset that lies in the file itself."""

    link = f.get(name, getclass=True, getlink=True)

    if link is None:
        raise UserError(
            f"{file} has no dataset `{name}`, only {sorted(f.keys())}, but must have one of shape "
            "(N, L, 2, H, W)."
        )

    # A stranger's file could otherwise make us read any file of this user.
    if link is not h5py.HardLink:
        raise UserError(
            f"{file} has a link in place of the dataset `{name}`; links are not followed. Use a "
            "file that holds the data itself."
        )

    dataset = f[name]

    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{file} has a group `{name}`, but `{name}` must be a dataset.")

    if dataset.is_virtual or dataset.external:
        raise UserError(
            f"{file} keeps the dataset `{name}` in other files, which are not followed. Use a "
            "file that holds the data itself."
        )

    size = int(np.prod(dataset.shape or (), dtype=object)) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()

    if stored and size > MAX_RATIO * stored + 2**20:  # or memory would be spent on nothing
        raise UserError(
            f"{file} declares {size} bytes of `{name}`, but holds only {stored}. Make or copy it "
            "again."
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


def _check_storage(file: Path, dataset: h5py.Dataset) -> None:
    if dataset.id.get_storage_size() == 0:
        raise UserError(f"{file} declares a dataset `x` of {dataset.shape}, but holds no data.")

    offset = dataset.id.get_offset()
    size = os.path.getsize(file)

    if offset is not None and offset + dataset.id.get_storage_size() > size:
        raise UserError(
            f"{file} is truncated: it has {size} bytes, but `x` of shape {dataset.shape} needs "
            f"{offset + dataset.id.get_storage_size()}. Make or copy it again."
        )


def _check_done(file: Path, f: h5py.File, n: int) -> None:
    if f.get("done", getclass=True, getlink=True) is None:
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
            f"command goes on where it was interrupted: `sda-ray simulate {options}`."
        )


def view(file: Path, dataset: h5py.Dataset) -> np.ndarray:
    r"""Maps a dataset into memory, read only; or reads it, with a notice, if it is not contiguous.

    Arguments:
        file: The file of the dataset.
        dataset: The dataset, from :func:`open_trajectories`.

    Returns:
        The array, which outlives the open file.
    """

    offset = dataset.id.get_offset()
    exact = h5py.h5t.py_create(dataset.dtype) == dataset.id.get_type()

    if offset is not None and exact:
        return np.memmap(file, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)

    size = 4 * int(np.prod(dataset.shape, dtype=object))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    if size > memory:
        raise UserError(
            f"{file} is chunked or compressed, must therefore be read into memory and needs "
            f"{size / 2**30:.1f} GiB of it; this machine has {memory / 2**30:.1f} GiB. Rewrite "
            "it: `h5repack -l x:CONTI -f x:NONE OLD NEW`."
        )

    logger.warning(
        "%s is chunked or compressed: each process reads all of it into memory (%.2f GiB).",
        file,
        size / 2**30,
    )

    x = np.empty(dataset.shape, dtype=np.float32)
    dataset.read_direct(x)

    return x
