r"""Files of a data set while it is generated: created whole, filled in row by row, never in doubt.

A file has its final size and metadata from the moment that it exists; its mask `done` says which
of its trajectories are there. One process at a time writes in a directory.
"""

import fcntl
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from ..core.errors import UserError
from .hdf5 import Origin, get_dataset, read_origin

__all__ = [
    "SHAPE",
    "create_files",
    "find_missing",
    "lock_directory",
    "split_indices",
    "write_trajectory",
]

SHAPE = (64, 2, 64, 64)
BYTES = 4 * math.prod(SHAPE)


def split_indices(n: int) -> dict[str, range]:
    r"""Returns which of :math:`n` trajectories belong to which file."""

    a, b = n * 8 // 10, n * 9 // 10

    return {"train": range(a), "valid": range(a, b), "test": range(b, n)}


def find_missing(directory: Path, origin: Origin) -> list[int]:
    r"""Returns the trajectories that are not done, in files of these settings or none."""

    missing: list[int] = []

    for split, indices in split_indices(origin.trajectories).items():
        file = directory / f"{split}.h5"
        done = _read_done(file, origin, len(indices)) if file.exists() else [False] * len(indices)
        missing += [i for i, d in zip(indices, done, strict=True) if not d]

    return missing


def _read_done(file: Path, origin: Origin, n: int) -> list[bool]:
    r"""Returns the mask of a file, after a check that it belongs to this data set."""

    try:
        with h5py.File(file, "r") as f:
            found = read_origin(f)
            done = (
                np.atleast_1d(get_dataset(file, f, "done")[...])
                if found == origin
                else np.empty(0)
            )
    except UserError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{file} is damaged ({e}). Delete it, or use another --data.") from e

    if found is not None and found != origin:
        raise UserError(
            f"{file} belongs to a data set with {found.options}, but {origin.options} is asked "
            "for. These are fixed when a data set is created: use the same, or another --data."
        )

    if found is None or len(done) != n:
        raise UserError(
            f"{file} exists, but was not written by `sda-ray simulate` with {origin.options}. "
            "Use another --data."
        )

    return [bool(d) for d in done]


def create_files(directory: Path, origin: Origin) -> None:
    r"""Creates the files that do not exist, each at once with all its space on the disk."""

    files = {
        directory / f"{split}.h5": len(indices)
        for split, indices in split_indices(origin.trajectories).items()
        if not (directory / f"{split}.h5").exists()
    }

    need, free = BYTES * sum(files.values()), shutil.disk_usage(directory).free

    if files and need + 2**24 > free:
        raise UserError(
            f"{directory} needs {need / 2**30:.2f} GiB for the data, but its disk has "
            f"{free / 2**30:.2f} GiB left. Make space, or use another --data."
        )

    for file, n in files.items():
        temporary = file.with_name(f".{file.name}.tmp")

        try:
            _create_file(temporary, n, origin)
            os.replace(temporary, file)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{file} cannot be created ({e}). Use another --data.") from e


def _create_file(file: Path, n: int, origin: Origin) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)

    with h5py.File(file, "w") as f:
        for name, shape, dtype in (("x", (n, *SHAPE), "<f4"), ("done", (n,), "|u1")):
            space = h5py.h5s.create_simple(shape)
            kind = h5py.h5t.py_create(np.dtype(dtype))
            h5py.h5d.create(f.id, name.encode(), kind, space, dcpl=layout)

        f.attrs.update(asdict(origin))

    with open(file, "r+b") as raw:
        # A sparse file would be a promise that a full disk cannot keep.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(raw.fileno(), 0, os.path.getsize(file))

        os.fsync(raw.fileno())


def write_trajectory(directory: Path, origin: Origin, i: int, x: np.ndarray) -> None:
    r"""Writes a trajectory past HDF5, whose metadata need not change, and then its mark."""

    split, indices = next(
        (split, indices)
        for split, indices in split_indices(origin.trajectories).items()
        if i in indices
    )
    file, row = directory / f"{split}.h5", i - indices.start

    with h5py.File(file, "r") as f:
        offset, mark = f["x"].id.get_offset() + row * BYTES, f["done"].id.get_offset() + row

    with open(file, "r+b") as raw:
        for position, data in ((offset, x.astype("<f4").tobytes()), (mark, b"\x01")):
            raw.seek(position)
            raw.write(data)
            raw.flush()
            os.fsync(raw.fileno())


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    r"""Holds the directory for this process, until the end or its death, whatever comes first."""

    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = open(directory / ".lock", "a+")  # noqa: SIM115
    except OSError as e:
        raise UserError(f"{directory} cannot be written to ({e}). Use another --data.") from e

    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise UserError(
                f"{directory} is in use: {owner} is simulating in it. Wait for its end, or use "
                "another --data."
            ) from e

        handle.truncate(0)
        handle.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        handle.flush()

        yield
