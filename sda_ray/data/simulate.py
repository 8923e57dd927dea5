r"""Generation of data sets of Kolmogorov flow, in parallel on Ray.

A data set consists of trajectories of 128 states after a random one, of which the last 64 are kept
and averaged down to 64 × 64 cells. They are split by index into `train.h5` (80 %), `valid.h5` and
`test.h5` (10 % each).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..cluster.connect import connect
from ..core.errors import UserError
from .generation import (
    SHAPE,
    create_files,
    find_missing,
    lock_directory,
    write_trajectory,
)
from .hdf5 import Origin

__all__ = [
    "PRESETS",
    "simulate",
]

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
