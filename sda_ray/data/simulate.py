r"""Generation of data sets of Kolmogorov flow, in parallel on Ray.

A data set consists of trajectories of 128 states after a random one, of which the last 64 are kept
and averaged down to 64 × 64 cells. They are split by index into `train.h5` (80 %), `valid.h5` and
`test.h5` (10 % each).
"""

import fcntl
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from ..cluster.connect import connect
from ..core.errors import UserError
from .dataset import Origin, get_dataset, read_origin

__all__ = [
    "PRESETS",
    "SHAPE",
    "create_files",
    "find_missing",
    "lock_directory",
    "simulate",
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


PRESETS = {
    "full": {"trajectories": 1024, "size": 256},
    "demo": {"trajectories": 64, "size": 64},
}

MOST = 2**20  # trajectories
DISCARDED = 64
KEPT, _, SIZE, _ = SHAPE


def simulate(
    directory: Path,
    trajectories: int,
    size: int,
    seed: int = 0,
    *,
    workers: int | None = None,
    address: str | None = None,
) -> int:
    r"""Simulates the trajectories of a data set that are missing in its directory.

    It may be killed at any time and called again with the same arguments: a trajectory is marked
    as done after all its numbers are on the disk. Its bits depend on the seed and its index alone,
    on machines of one kind: a C compiler, for one, makes a difference in the last.
    A second call for the same directory at the same time is refused.

    Arguments:
        directory: Where the data set is, or shall be.
        trajectories: The number of trajectories, at least 10.
        size: The number of cells along each side of the simulation, a multiple of 64.
        seed: The seed of the data set.
        workers: The number of processes. If :py:`None`, one for each CPU that may be used.
        address: The address of a running Ray cluster. If :py:`None`, a private one is started.

    Returns:
        The number of trajectories that were simulated.

    Raises:
        UserError: If the arguments are not valid, the directory holds other data or is in use, or
            the disk is full.
    """

    _check(trajectories, size, seed, workers)

    directory = Path(directory)
    origin = Origin(trajectories, size, seed)

    if not find_missing(directory, origin):
        print(f"{directory} is complete: {trajectories} trajectories. There is nothing to do.")
        return 0

    with lock_directory(directory):
        create_files(directory, origin)
        missing = find_missing(directory, origin)
        left = len(missing)

        print(
            f"Simulating {left} of {trajectories} trajectories on {size} × {size} cells, "
            f"seed {seed}, in {directory}"
        )

        if size < 256:
            print("The flow needs 256 × 256 cells: data of fewer are for trying things out.")

        try:
            with connect(address, workers), _progress(trajectories, left) as advance:
                for i, x in _trajectories(missing, size, seed, workers):
                    write_trajectory(directory, origin, i, x)
                    left -= 1
                    advance()
        except KeyboardInterrupt:
            print(
                f"Interrupted: {trajectories - left} of {trajectories} trajectories are done. The "
                "same command goes on."
            )
            raise

        print(f"{directory} is complete: {trajectories} trajectories.")

    return len(missing)


def _check(trajectories: int, size: int, seed: int, workers: int | None) -> None:
    if trajectories < 10:
        raise UserError(
            f"trajectories is {trajectories}, but must be at least 10: a tenth of them is for "
            "validation, another for testing."
        )

    if trajectories > MOST:
        raise UserError(f"trajectories is {trajectories}, but must be at most {MOST}: 2 TiB.")

    if size < SIZE or size % SIZE:
        raise UserError(
            f"size is {size}, but must be a multiple of {SIZE}: the states are averaged over "
            f"blocks of cells to {SIZE} × {SIZE}."
        )

    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}, but must be from 0 to {2**63 - 1}.")

    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}, but must be at least 1.")


# Simulation


def _trajectories(
    missing: Sequence[int], size: int, seed: int, workers: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    r"""Yields trajectories as the workers finish them."""

    import ray

    cpus = workers or int(ray.cluster_resources().get("CPU", 1))

    # On few cells the overhead of an operation counts: several trajectories share it.
    at_once = max(1, min(2**15 // size**2, -(-len(missing) // cpus)))
    groups = [missing[i : i + at_once] for i in range(0, len(missing), at_once)]
    task = ray.remote(num_cpus=1)(_simulate)
    running: dict[ray.ObjectRef, Sequence[int]] = {}

    while groups or running:
        while groups and len(running) < 2 * cpus:
            group = groups.pop(0)
            running[task.remote(size, [_seed(seed, i) for i in group])] = group

        (ready, *_), _ = ray.wait(list(running), num_returns=1)

        yield from zip(running.pop(ready), ray.get(ready), strict=True)


def _seed(seed: int, i: int) -> int:
    return int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0])


def _simulate(size: int, seeds: list[int]) -> np.ndarray:
    r"""Simulates trajectories of these seeds, of shape :math:`(N, 64, 2, 64, 64)`."""

    import torch

    from .flow import KolmogorovFlow, coarsen

    torch.set_num_threads(1)

    flow = KolmogorovFlow(size, dt=0.2)
    x = flow.prior(seeds)
    states = []

    for i in range(DISCARDED + KEPT):
        x = flow.transition(x)

        if i >= DISCARDED:
            states.append(coarsen(x, size // SIZE))

    result = torch.stack(states, dim=1).numpy()

    if not np.isfinite(result).all():
        raise FloatingPointError(f"the simulation with seeds {seeds} on {size}² cells diverged")

    return result


# Progress


@contextmanager
def _progress(total: int, left: int) -> Iterator[Callable[[], None]]:
    r"""Shows a bar in a terminal, and lines elsewhere; yields what counts a trajectory."""

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console()
    bar = Progress(
        "Trajectories",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

    start, done, shown = time.monotonic(), total - left, total - left

    def advance() -> None:
        nonlocal done, shown

        done += 1
        bar.advance(task)

        if not console.is_terminal and (done == total or done - shown >= total / 10):
            shown = done
            rest = (time.monotonic() - start) / (done - total + left) * (total - done)
            print(f"{done}/{total} trajectories, about {rest:.0f} s left", flush=True)

    with bar:
        task = bar.add_task("", total=total, completed=done)

        yield advance
