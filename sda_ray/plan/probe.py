r"""How fast and how large a training is on some hardware, measured by a few steps of it.

Small networks take a time for each operation on tensors, large ones for each floating point
operation. Both are fitted to what was measured, and so tell the time of networks that were not.
"""

import itertools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import Config
from .cost import Cost

__all__ = ["MORE", "SECONDS", "Sample", "Speed", "fit", "speed_of", "take_steps"]

SECONDS = 6.0  # of training steps, for all networks on a node together
OPERATION = 1e-4  # seconds for an operation on tensors, at most: they take 5 to 20 µs
GRID = 1000
REPEATS = 3  # steps of the same size, at least, of which the median counts
MORE = 2**27  # bytes that a trial takes beside its training: W&B's client, the picture at the end
SLACK = {False: 1.5, True: 1.1}  # bytes for each byte of tensors, at least: scratch, fragments
LARGE = 2**28  # bytes of tensors from which on the rest grows with them


@dataclass(frozen=True)
class Sample:
    r"""Creates the measurement of one size of step.

    Arguments:
        which: The number of the network.
        batch: The number of items.
        seconds: The time of a step.
        memory: The most bytes of the process until then.
    """

    which: int
    batch: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Speed:
    r"""Creates what a trial takes on a kind of node.

    Arguments:
        operation: The seconds for each operation on tensors.
        flop: The seconds for each floating point operation.
        base: The bytes of a process that trains nothing yet.
        factor: The bytes taken for each byte of tensors beside weights and moments.
    """

    operation: float
    flop: float
    base: int
    factor: float

    def seconds(self, flops: float, operations: float) -> float:
        r"""Returns the seconds that so many operations take."""

        return self.flop * flops + self.operation * operations

    def memory(self, cost: Cost) -> int:
        r"""Returns the bytes that a trial takes at the most."""

        return round(self.base + cost.state + self.factor * (cost.peak - cost.state))


def fit(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    r"""Fits times by a sum of two parts, none of them negative, in relative terms.

    Arguments:
        points: Floating point operations, operations on tensors and seconds.

    Returns:
        The seconds for each floating point operation, and for each operation on tensors.
    """

    def error(flop: float, operation: float) -> float:
        return sum(((flop * f + operation * n) / s - 1) ** 2 for f, n, s in points)

    def rest(operation: float) -> float:
        r"""Returns the best seconds for each floating point operation, given the other ones."""

        part = sum(f / s * (1 - operation * n / s) for f, n, s in points)
        return max(0.0, part / sum((f / s) ** 2 for f, _, s in points))

    # The error is convex: a fine grid from 0 finds its least value.
    grid = [OPERATION * (i / GRID) ** 2 for i in range(GRID + 1)]
    operation = min(grid, key=lambda x: error(rest(x), x))

    return rest(operation), operation


def speed_of(
    samples: Sequence[Sample], costs: Sequence[Cost], base: int, gpu: bool = False
) -> Speed:
    r"""Returns what samples say of the hardware.

    Arguments:
        samples: What was measured.
        costs: The cost of the step of each.
        base: The bytes of the process before.
        gpu: Whether it was measured on a GPU.
    """

    both = list(zip(samples, costs, strict=True))
    flop, operation = fit([(c.flops, c.operations, x.seconds) for x, c in both])
    rest, cost = max(((x.memory - base - c.state, c) for x, c in both), key=lambda x: x[1].peak)
    tensors, least = cost.peak - cost.state, SLACK[gpu]
    base += 0 if gpu else MORE

    if cost.peak > LARGE:
        return Speed(operation, flop, base, max(least, rest / tensors))

    return Speed(operation, flop, base + max(0, round(rest - least * tensors)), least)


def take_steps(
    configs: Sequence[Config], data: Path, cpus: float, gpu: bool, seconds: float = SECONDS
) -> Iterator[tuple[int, Sample, int]]:
    r"""Takes training steps as :func:`sda_ray.runs.train.train` does, and leaves nothing behind.

    Batches grow from one item up to the config's, as long as time remains for it.

    Arguments:
        configs: Networks, of which the first takes the least.
        data: The directory of the data.
        cpus: The CPUs of the trial.
        gpu: Whether to train on a GPU.
        seconds: The time for all of it.

    Yields:
        The bytes of the process before, what was measured, and the bytes of the GPU, if any.
    """

    import torch

    from ..data.dataset import TrajectoryDataset
    from ..nn.precision import make_deterministic
    from ..training.loop import TrainState

    torch.set_num_threads(max(1, int(cpus)))
    device = "cuda" if gpu else "cpu"

    if gpu:  # as `train` does
        make_deterministic()

    base, memory = _memory(device)
    total = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    start = time.monotonic()

    for i, config in enumerate(configs):
        dataset = TrajectoryDataset(data / "train.h5", config["window"])
        # A compiler would take longer than all of this, for each size of batch
        state = TrainState(config | {"compile": "off"}, dataset.shape[-1], device)
        until = start + seconds * (i + 1) / len(configs)

        for batch, took in _batches(state, dataset, until):
            yield base, Sample(i, batch, took, memory()), total

        del state


def _batches(state: Any, dataset: Any, until: float) -> Iterator[tuple[int, float]]:
    r"""Yields sizes of batches and the times of a step, the config's own last if time allows."""

    import torch

    from ..training.loop import train_epoch

    class Enough(Exception):
        pass

    most, batch = min(state.config["batch_size"], len(dataset)), 1
    synchronize: Callable[[], None] = (
        torch.cuda.synchronize if state.device.type == "cuda" else lambda: None
    )

    while True:
        times = [time.monotonic()]
        state.config = state.config | {"batch_size": batch}

        def after_step(state: Any, times: list[float] = times) -> None:
            synchronize()
            times.append(time.monotonic())
            step = times[-1] - times[-2]

            if len(times) > 1 + REPEATS or times[-1] + step > until:
                raise Enough

        while True:  # an epoch may be a single step
            state.epoch, state.step, state.losses = 0, 0, torch.zeros(0)

            try:
                train_epoch(state, dataset, after_step)
            except Enough:
                break

        steps = [b - a for a, b in itertools.pairwise(times)]
        steps = sorted(steps[1:] or steps)  # the first one is slower
        took = steps[len(steps) // 2]
        yield batch, took

        # The next size takes a first step and another one
        larger = min(4 * batch, most)

        if batch == most or time.monotonic() + 2 * took * larger / batch > until:
            return

        batch = larger


def _memory(device: str) -> tuple[int, Callable[[], int]]:
    r"""Returns the bytes that are taken now, and what returns the most bytes from now on."""

    import torch

    if device == "cuda":
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        context = 0 if torch.cuda.device_count() != 1 else max(0, total - free - held)

        return context, lambda: context + torch.cuda.max_memory_reserved()

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on

    return _status("VmRSS"), lambda: _status("VmHWM")


def _status(key: str) -> int:
    r"""Returns the bytes of this process now (`VmRSS`) or at the most (`VmHWM`)."""

    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS
