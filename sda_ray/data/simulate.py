r"""Simulation of data sets of Kolmogorov flow.

A data set consists of trajectories of 128 states after a random one, of which the last 64 are kept
and averaged down to 64 × 64 cells. They are split by index into `train.h5` (80 %), `valid.h5` and
`test.h5` (10 % each).

A file has its final size and metadata from the start, and is filled row by row. Its mask `done`
says which of its trajectories are complete. One process at a time writes in a directory.
"""

import functools
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from ..core import ProgressBar, UserError, locked_at_once
from .dataset import Origin, get_dataset, read_origin

PRESETS = {
    "full": {"trajectories": 1024, "size": 256},
    "demo": {"trajectories": 64, "size": 64},
}

SHAPE = (64, 2, 64, 64)
KEPT, _, SIZE, _ = SHAPE
DISCARDED = 64
BYTES = 4 * math.prod(SHAPE)
LIMIT = 2**20  # trajectories
IN_USE = " If another process simulates in it, wait for its end. Else use another --data."
GROUPS = 16  # at least, where trajectories are simulated together, to share them out evenly

# Applies a function to items, perhaps in parallel, and yields each item with its result.
Function = Callable[[Sequence[int]], np.ndarray]
Results = Generator[tuple[Sequence[int], np.ndarray]]
MapTasks = Callable[[Function, Iterable[Sequence[int]]], Results]


def map_here(function: Function, items: Iterable[Sequence[int]]) -> Results:
    for item in items:
        yield item, function(item)


def simulate_dataset(
    directory: Path,
    trajectories: int,
    size: int,
    seed: int = 0,
    map_tasks: MapTasks = map_here,
) -> int:
    r"""Simulates the trajectories that are missing in the directory of a data set, and counts them.

    It may be killed at any time and called again with the same arguments: a trajectory is marked
    as done once all its numbers are on the disk. On machines of one kind, its bits depend on the
    seed and its index alone. A second call for the same directory at the same time is refused.

    Arguments:
        trajectories: The number of trajectories, at least 10.
        size: The number of cells along each side of the simulation, a multiple of 64.
        map_tasks: A function that simulates groups of trajectories, such as in parallel on Ray.

    Raises:
        UserError: If the arguments are not valid, the directory holds other data or is in use, or
            the disk is full.
    """

    _check(trajectories, size, seed)

    directory = Path(directory)
    origin = Origin(trajectories, size, seed)

    if not find_missing(directory, origin):
        print(f"{directory} is complete: {trajectories} trajectories. There is nothing to do.")
        return 0

    with lock_directory(directory):
        create_files(directory, origin)
        missing = find_missing(directory, origin)
        done = trajectories - len(missing)

        print(
            f"Simulating {len(missing)} of {trajectories} trajectories on {size} × {size} cells, "
            f"seed {seed}, in {directory}"
        )

        if size < 256:
            print("The flow needs 256 × 256 cells: data of fewer are for trying things out.")

        # On few cells the overhead of an operation counts: several trajectories share it.
        together = max(1, min(2**15 // size**2, len(missing) // GROUPS))
        groups = [missing[i : i + together] for i in range(0, len(missing), together)]
        results = map_tasks(functools.partial(_simulate, size, seed), groups)

        try:
            with ProgressBar("trajectory", trajectories, done) as bar, closing(results):
                for group, x in results:
                    for i, trajectory in zip(group, x, strict=True):
                        write_trajectory(directory, origin, i, trajectory)
                        done += 1
                        bar.update(done)
        except KeyboardInterrupt:
            print(
                f"Interrupted: {done} of {trajectories} trajectories are done. The same command "
                "continues."
            )
            raise

        print(f"{directory} is complete: {trajectories} trajectories.")

    return len(missing)


def _check(trajectories: int, size: int, seed: int) -> None:
    if trajectories < 10:
        raise UserError(
            f"trajectories is {trajectories}, but must be at least 10: a tenth of them is for "
            "validation, another for testing."
        )

    if trajectories > LIMIT:
        raise UserError(f"trajectories is {trajectories}, but must be at most {LIMIT}: 2 TiB.")

    if size < SIZE or size % SIZE:
        raise UserError(
            f"size is {size}, but must be a multiple of {SIZE}: the states are averaged over "
            f"blocks of cells to {SIZE} × {SIZE}."
        )

    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}, but must be from 0 to {2**63 - 1}.")


def _simulate(size: int, seed: int, indices: Sequence[int]) -> np.ndarray:
    r"""Returns the trajectories of some indices, of shape :math:`(N, 64, 2, 64, 64)`."""

    import torch

    from .flow import KolmogorovFlow, coarsen

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    try:
        flow = KolmogorovFlow(size, dt=0.2)
        x = flow.prior([_seed(seed, i) for i in indices])
        x = flow.trajectory(x, DISCARDED + KEPT, last=KEPT)
        result = coarsen(x, size // SIZE).numpy()
    finally:
        torch.set_num_threads(threads)

    if not np.isfinite(result).all():
        raise FloatingPointError(
            f"trajectories {indices} of seed {seed} on {size}² cells diverged"
        )

    return result


def _seed(seed: int, i: int) -> int:
    return int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0])


# Files


def split_indices(n: int) -> dict[str, range]:
    r"""Returns the trajectories in each file, of :math:`n` in all."""

    a, b = n * 8 // 10, n * 9 // 10

    return {"train": range(a), "valid": range(a, b), "test": range(b, n)}


def find_missing(directory: Path, origin: Origin) -> list[int]:
    r"""Returns the trajectories that are not done, and checks that the files have these settings."""

    missing: list[int] = []

    for split, indices in split_indices(origin.trajectories).items():
        file = directory / f"{split}.h5"
        done = _read_done(file, origin, len(indices)) if file.exists() else [False] * len(indices)
        missing += [i for i, d in zip(indices, done, strict=True) if not d]

    return missing


def _read_done(file: Path, origin: Origin, n: int) -> list[bool]:
    r"""Returns the mask of a file, and checks that it belongs to this data set."""

    try:
        with h5py.File(file, "r", locking=False) as f:
            recorded = read_origin(f)
            done = get_dataset(file, f, "done")[...] if recorded == origin else None
    except UserError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{file} is damaged ({e}). Delete it, or use another --data.") from e

    if done is None or done.shape != (n,):
        was = f"but with {recorded.options}" if recorded else "if at all"
        raise UserError(
            f"{file} was not written by `sda-ray simulate` with {origin.options}, {was}. These are "
            "fixed when a data set is created: use the same, or another --data."
        )

    return [bool(d) for d in done]


def create_files(directory: Path, origin: Origin) -> None:
    r"""Creates the files that do not exist, with all their space on the disk."""

    splits = split_indices(origin.trajectories).items()
    files = {directory / f"{split}.h5": len(indices) for split, indices in splits}
    files = {file: n for file, n in files.items() if not file.exists()}
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

    with h5py.File(file, "w", locking=False) as f:
        for name, shape, dtype in (("x", (n, *SHAPE), "<f4"), ("done", (n,), "|u1")):
            space = h5py.h5s.create_simple(shape)
            kind = h5py.h5t.py_create(np.dtype(dtype))
            h5py.h5d.create(f.id, name.encode(), kind, space, dcpl=layout)

        f.attrs.update(asdict(origin))

    with open(file, "r+b") as raw:
        # A sparse file could not be filled on a full disk.
        os.posix_fallocate(raw.fileno(), 0, os.path.getsize(file))
        os.fsync(raw.fileno())


def write_trajectory(directory: Path, origin: Origin, i: int, x: np.ndarray) -> None:
    r"""Writes a trajectory past HDF5, whose metadata need not change, and then its mark."""

    splits = split_indices(origin.trajectories).items()
    split, indices = next(item for item in splits if i in item[1])
    file, row = directory / f"{split}.h5", i - indices.start

    with h5py.File(file, "r", locking=False) as f:
        offset, mark = f["x"].id.get_offset() + row * BYTES, f["done"].id.get_offset() + row

    with open(file, "r+b") as raw:
        for position, data in ((offset, x.astype("<f4").tobytes()), (mark, b"\x01")):
            raw.seek(position)
            raw.write(data)
            raw.flush()
            os.fsync(raw.fileno())


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{directory} cannot be written to ({e}). Use another --data.") from e

    with locked_at_once(directory / ".lock", IN_USE):
        yield
