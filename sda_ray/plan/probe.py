r"""How fast the nodes of a cluster train and how much memory that takes, measured by a few steps.

Nodes of the same hardware are of one kind. On one node of each kind, as many trials as fit at a time
take training steps at once, each with a trial's own resources. The smallest, the median and the
largest network are measured; the times of others are interpolated by floating point operations.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from ..cluster import Facts, Slots, connected, examine, fitting, live_nodes, marker, survey
from ..core import Config
from ..data import DataInfo, TrajectoryDataset
from ..storage import on_node

if TYPE_CHECKING:
    from .cost import Cost  # which imports torch

SECONDS = 6.0  # of training steps, for all networks on a node together
LIMIT = 30.0  # seconds after which a probe is ended: a single step may take long
START = 60.0  # seconds that a process may take to start
COPIES = 8  # probes at a time on a node, at most
REPEATS = 3  # steps of the same size, at least, of which the median counts
MORE = 2**27  # bytes that a trial takes beside its training: W&B's client, the picture at the end
SLACK = {False: 1.5, True: 1.1}  # bytes for each byte of tensors, at least: scratch, fragments
LARGE = 2**28  # bytes of tensors from which on the process grows in proportion to them
CHUNK = 32  # items in a forward pass of the validation


@dataclass(frozen=True)
class Sample:
    r"""The measurement of one size of step."""

    which: int  # the number of the network
    batch: int  # items
    seconds: float  # of a step
    memory: int  # the most bytes of the process until then


@dataclass(frozen=True)
class Speed:
    r"""What a trial takes on a kind of node."""

    points: tuple[tuple[float, float], ...]  # FLOPs and seconds of the steps measured, in order
    base: int  # bytes of a process that trains nothing yet
    factor: float  # bytes for each byte of tensors beside weights and moments

    def seconds(self, flops: float) -> float:
        r"""Returns the seconds of a step, given its floating point operations.

        Between two measurements the time is a power of the operations. A step smaller than all of
        them takes as long as the smallest; a larger one takes its time in proportion.
        """

        xs, ys = np.log(np.array(self.points)).T
        beyond = max(0.0, math.log(flops) - xs[-1])

        return math.exp(np.interp(math.log(flops), xs, ys) + beyond)

    def memory(self, cost: Cost) -> int:
        r"""Returns the most bytes that a trial takes."""

        return round(self.base + cost.state + self.factor * (cost.peak - cost.state))


def epoch_seconds(config: Config, cost: Cost, speed: Speed, info: DataInfo) -> float:
    r"""Returns the seconds of an epoch. The samples at the end of a run take at most 3 % more."""

    n, valid = info.trajectories["train"], info.trajectories["valid"]
    batch = config["batch_size"]
    items = math.ceil(CHUNK / valid) * valid * (2 if config["ema"] else 1)
    step = n // batch * speed.seconds(cost.flops)
    step += speed.seconds(cost.flops * (n % batch) / batch) if n % batch else 0.0

    return step + speed.seconds(CHUNK * cost.forward) * math.ceil(items / CHUNK)


def speed_of(
    samples: Sequence[Sample], costs: Sequence[Cost], base: int, gpu: bool = False
) -> Speed:
    r"""Returns the speed that samples show: each with the cost of its step, and the bytes before."""

    both = list(zip(samples, costs, strict=True))
    times: dict[float, list[float]] = defaultdict(list)

    for sample, cost in both:
        times[cost.flops].append(sample.seconds)

    points = tuple(sorted((flops, statistics.median(x)) for flops, x in times.items()))
    excess, cost = max(((x.memory - base - c.state, c) for x, c in both), key=lambda x: x[1].peak)
    tensors, least = cost.peak - cost.state, SLACK[gpu]
    base += 0 if gpu else MORE

    if cost.peak > LARGE:
        return Speed(points, base, max(least, excess / tensors))

    return Speed(points, base + max(0, round(excess - least * tensors)), least)


def take_steps(
    configs: Sequence[Config], data: Path, cpus: float, gpu: bool, seconds: float = SECONDS
) -> Iterator[tuple[int, Sample, int]]:
    r"""Takes training steps as :func:`sda_ray.runs.train.train_run` does, and leaves nothing behind.

    Batches grow from one item up to the config's, as long as time remains for it. The first config
    takes the least.

    Yields:
        The bytes of the process before, the measurement, and the bytes of the GPU, if any.
    """

    import torch

    from ..nn import make_deterministic
    from ..training import TrainState

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

    from ..training import train_epoch

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
    r"""Returns the bytes that are taken now, and a function for the most bytes so far."""

    import torch

    if device == "cuda":
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        context = 0 if torch.cuda.device_count() != 1 else max(0, total - free - held)

        return context, lambda: context + torch.cuda.max_memory_reserved()

    unit = 1 if sys.platform == "darwin" else 1024  # bytes

    return (
        psutil.Process().memory_info().rss,
        lambda: unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


@dataclass(frozen=True)
class Node:
    r"""A node that can hold trials."""

    name: str  # its host name
    kind: str  # its hardware: models and counts
    fit: int  # trials that its CPUs and GPUs hold at a time
    memory: int  # bytes of the machine, or of one of its GPUs if trials use them
    id: str = ""  # Ray's
    faults: tuple[str, ...] = ()  # what keeps trials from running there
    missing: tuple[str, ...] = ()  # directories of the head that it does not see, and need not
    speed: Speed | None = None  # measured on a node of this kind
    note: str = ""  # why there is no speed, and how files get to the head


def probe_nodes(
    slots: Slots,
    configs: Sequence[Config],
    peak: int,
    info: DataInfo | None,
    runs: Path,
    data: Path,
    address: str | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Node]:
    r"""Surveys all nodes that can hold a trial, and takes training steps on one of each kind.

    Nothing is trained if there are no networks; the first of them takes the least, and the largest
    has a peak of that many bytes. There are no nodes yet if the cluster starts them on demand.

    Raises:
        UserError: If no node can ever hold a trial.
    """

    report("starting Ray" if address is None else f"attaching to the Ray at {address}")

    with connected(address), marker(runs) as token:
        able = {
            id: record
            for id, record in live_nodes().items()
            if fitting(slots.wanted, record["Resources"])
        }

        if not able:
            slots.check()

        report(f"surveying {len(able)} node{'s' * (len(able) != 1)}")
        expected = None if info is None else info.fingerprint
        facts = survey(examine, runs, token, data, expected, address is not None, nodes=able)
        nodes = [_node(record, facts[id], slots) for id, record in able.items()]

        for kind in dict.fromkeys(node.kind for node in nodes if not node.faults):
            usable = [node for node in nodes if node.kind == kind and not node.faults]
            chosen = min(usable, key=lambda node: str(data) in node.missing)

            known: dict[str, Any] = {}

            if str(data) in chosen.missing:  # the first trial fetches them, which may take long
                known["note"] = f"unknown: {chosen.name} does not have the data yet."
            elif configs:
                report(f"measuring on {kind}")
                known = _measure(chosen, slots, configs, peak, data)

            note = known.pop("note", "")
            nodes = [
                replace(x, note=f"{x.note} {note}".strip(), **known) if x.kind == kind else x
                for x in nodes
            ]

    return nodes


def _node(record: dict[str, Any], facts: Facts, slots: Slots) -> Node:
    name, resources = record["NodeManagerHostname"], record["Resources"]
    error = facts.get("error")
    faults = facts["faults"] if error is None else [f"no trial can start there: {error}"]
    missing = tuple(facts.get("missing", ()))
    route = f"{name} does not see {' and '.join(missing)}: files go through the head."

    return Node(
        name=name,
        kind=_kind(facts.get("cpu", ""), resources, "GPU" in slots.wanted),
        fit=fitting(slots.wanted, resources),
        memory=facts.get("limit", 0),
        id=record["NodeID"],
        faults=tuple(f"node {name}: {fault}" for fault in faults),
        missing=missing,
        note=route if missing else "",
    )


def _kind(model: str, resources: dict[str, float], gpu: bool) -> str:
    cpus = f"{resources.get('CPU', 0):g} CPUs"
    types = [x.partition(":")[2] for x in resources if x.startswith("accelerator_type:")]

    if gpu:
        return f"{resources.get('GPU', 0):g}x {' '.join(types) or 'GPU'}, {cpus}"

    return f"{cpus} ({model})" if model else cpus


def _measure(
    node: Node, slots: Slots, configs: Sequence[Config], peak: int, data: Path
) -> dict[str, Any]:
    r"""Takes training steps on a node. Returns `speed`, `memory` and `note` of nodes of its kind."""

    import ray

    from .cost import measure

    cpus, gpus = (slots.wanted.get(key, 0) for key in ("CPU", "GPU"))
    copies = min(node.fit, slots.most or COPIES, COPIES)
    copies = copies if gpus else max(1, min(copies, node.memory // max(1, peak)))
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Probe)
    probes = [actor.options(**on_node(node.id)).remote() for _ in range(copies)]

    try:
        started = {probe.start.remote(): probe for probe in probes}
        ready, _ = ray.wait(list(started), num_returns=copies, timeout=START)
        ray.get(ready)

        if not ready:
            return {"note": f"unknown: {node.name} starts no trial within {START:g} s."}

        steps = [started[x].take_steps.remote(configs, data, cpus, gpus > 0) for x in ready]
        done, _ = ray.wait(steps, num_returns=len(steps), timeout=LIMIT)
        samples = [sample for taken in ray.get(done) for sample in taken]
    except Exception as error:  # out of memory, a driver that does not fit, …
        reason = str(error).strip().split("\n")[-1]
        return {"note": f"unknown: training steps on {node.name} have failed: {reason}"}
    finally:
        for probe in probes:
            ray.kill(probe)

    if not samples:
        return {"note": f"unknown: a few training steps take more than {LIMIT:g} s."}

    dataset = TrajectoryDataset(data / "train.h5", 1)
    sizes = {(x.which, x.batch) for _, x, _ in samples}
    costs = {(i, n): measure(configs[i] | {"batch_size": n}, dataset.shape[-1]) for i, n in sizes}
    speed = speed_of(
        [sample for _, sample, _ in samples],
        [costs[x.which, x.batch] for _, x, _ in samples],
        max(base for base, _, _ in samples),
        gpus > 0,
    )
    most, wanted = max(n for _, n in sizes), max(c["batch_size"] for c in configs)
    note = (
        f"times are extrapolated from batches of {most}, and may be shorter: those of {wanted} "
        f"are too slow here for a probe of {SECONDS:g} s."
        if most < min(wanted, len(dataset))
        else ""
    )

    return {"speed": speed, "memory": samples[0][2] or node.memory, "note": note}


class _Probe:
    r"""An actor that takes training steps. Those of a node start at the same time."""

    def start(self) -> None:
        from ..runs import (
            Run,  # noqa: F401  # all that a trial imports
            train_run,  # noqa: F401
        )

    def take_steps(self, *args: Any) -> list[tuple[int, Sample, int]]:
        return list(take_steps(*args))
