r"""How fast and how large a training is on some hardware, measured by a few steps of it.

Small networks take a time for each operation on tensors, large ones for each floating point
operation. Both are fitted to what was measured, and so tell the time of networks that were not.
"""

import itertools
import math
import resource
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cluster.connect import connect, on_node
from ..cluster.nodes import bandwidth
from ..cluster.slots import Slots, fitting
from ..core.config import Config
from ..data.dataset import DataInfo, TrajectoryDataset
from ..sweep.preflight import look_here
from .cost import Cost, measure

__all__ = [
    "MORE",
    "SECONDS",
    "Node",
    "Sample",
    "Speed",
    "epoch_seconds",
    "fit",
    "look",
    "speed_of",
    "take_steps",
]

SECONDS = 6.0  # of training steps, for all networks on a node together
START = 60.0  # seconds that a process may take to start
LIMIT = SECONDS + 4  # seconds after which a probe is ended
REACH = 60.0  # seconds that a node may take to look at the files
COPIES = 8  # probes at a time on a node, at most
OPERATION = 1e-4  # seconds for an operation on tensors, at most: they take 5 to 20 µs
GRID = 1000
REPEATS = 3  # steps of the same size, at least, of which the median counts
MORE = 2**27  # bytes that a trial takes beside its training: W&B's client, the picture at the end
SLACK = {False: 1.5, True: 1.1}  # bytes for each byte of tensors, at least: scratch, fragments
LARGE = 2**28  # bytes of tensors from which on the rest grows with them
FORWARD = 0.3  # of a step's operations on tensors are in the forward pass
SAMPLES = 64, 2  # steps of the sampler and items, at the end of a run


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


def epoch_seconds(config: Config, cost: Cost, speed: Speed, info: DataInfo) -> tuple[float, float]:
    r"""Returns the seconds that an epoch takes, and those after the last one, for the samples."""

    n, valid = info.trajectories["train"], info.trajectories["valid"]
    steps = math.ceil(n / config["batch_size"])
    items = math.ceil(32 / valid) * valid * (2 if config["ema"] else 1)
    calls = math.ceil(items / 32)
    step, item = cost.flops / config["batch_size"], cost.forward
    forward = FORWARD * cost.operations

    return (
        speed.seconds(step * n + item * items, cost.operations * steps + forward * calls),
        speed.seconds(item * math.prod(SAMPLES), forward * SAMPLES[0]),
    )


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


@dataclass(frozen=True)
class Node:
    r"""Creates the description of a node that can hold trials.

    Arguments:
        name: Its host name.
        kind: Its hardware: models and counts.
        fit: The number of trials that its CPUs and GPUs hold at a time.
        memory: The bytes of memory of the machine, or of one of its GPUs if trials use them.
        gpus: The number of GPUs.
        id: Ray's id.
        faults: What keeps trials from running there.
        missing: Directories of the head that it does not see, and need not.
        speed: What was measured on a node of this kind.
        note: Why nothing was, and how files get to the head.
    """

    name: str
    kind: str
    fit: int
    memory: int
    gpus: int = 0
    id: str = ""
    faults: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    speed: Speed | None = None
    note: str = ""


def look(
    slots: Slots,
    configs: Sequence[Config],
    info: DataInfo | None,
    runs: Path,
    data: Path,
    address: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Node]:
    r"""Looks at all nodes that can hold a trial, and takes training steps on one of each kind.

    Arguments:
        slots: The resources of a trial.
        configs: What to train, from small to large; nothing if empty.
        info: What the data should be, if they can be used.
        runs: The directory of all runs.
        data: The directory of the data.
        address: The address of a Ray cluster, or None for this machine.
        say: Told what goes on.

    Returns:
        The nodes; none, if there are none yet and the cluster may start some.

    Raises:
        UserError: If no node can ever hold a trial.
    """

    say("starting Ray" if address is None else f"attaching to the Ray at {address}")

    with connect(address), _token(runs) as token:
        import ray

        found = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
        able = {id: n for id, n in found.items() if fitting(slots.wanted, n["Resources"])}

        if not able:
            slots.check()

        say(f"looking at {len(able)} node{'s' * (len(able) != 1)}")
        nodes = _inspect(able, slots, runs, data, info, token, address is not None)

        for kind in dict.fromkeys(node.kind for node in nodes if not node.faults):
            usable = [node for node in nodes if node.kind == kind and not node.faults]
            which = min(usable, key=lambda node: str(data) in node.missing)

            if str(data) in which.missing:  # the first trial fetches them, which may take long
                known: dict[str, Any] = {
                    "note": f"unknown: {which.name} has not got the data yet."
                }
                nodes = [replace(x, **known) if x.kind == kind else x for x in nodes]
                continue

            say(f"measuring on {kind}")
            known = _probe(which, slots, configs, data) if configs else {}
            nodes = [replace(x, **known) if x.kind == kind else x for x in nodes]

        for i, node in enumerate(nodes):
            if node.missing and not node.faults:
                nodes[i] = replace(node, note=f"{_seen_from(node)} {node.note}".strip())

    return nodes


def _seen_from(node: Node) -> str:
    r"""Returns what it means for trials that a node does not see all files."""

    try:
        speed = f" at {bandwidth(node.id) / 1e6:.3g} MB/s"
    except Exception:  # busy, or lost meanwhile: a trial will tell
        speed = ""

    missing = " and ".join(node.missing)

    return f"{node.name} does not see {missing}: files go through the head{speed}."


@contextmanager
def _token(runs: Path) -> Iterator[str]:
    r"""Leaves a file in the directory of runs for as long as it is entered, and yields its name.

    Directories that had to be made are removed again.
    """

    made = []

    for part in (runs, *runs.parents):
        if part.is_dir():
            break

        made.append(part)

    file = runs / f".sda-ray-{secrets.token_hex(8)}"

    try:
        runs.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
        yield file.name
    finally:
        file.unlink(missing_ok=True)

        with suppress(OSError):  # someone else has begun to use them
            for part in made:
                part.rmdir()


def _inspect(
    found: dict[str, dict[str, Any]],
    slots: Slots,
    runs: Path,
    data: Path,
    info: DataInfo | None,
    token: str,
    away: bool,
) -> list[Node]:
    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(look_here)
    expected = None if info is None else info.fingerprint
    asked = {
        id: task.options(**on_node(id)).remote(runs, data, expected, token, away) for id in found
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=REACH) if asked else None
    nodes = []

    for id, n in found.items():
        name, resources = n["NodeManagerHostname"], n["Resources"]
        model, memory, missing = "", 0, []

        try:
            model, memory, faults, missing = ray.get(asked[id], timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            faults = [f"it has not answered within {REACH:g} s"]
        except Exception as error:  # whatever keeps a worker from starting
            told = str(error).strip().split("\n")[-1]
            faults = [f"no trial can start there: {told}"]

        nodes.append(
            Node(
                name=name,
                kind=_kind(model, resources, "GPU" in slots.wanted),
                fit=fitting(slots.wanted, resources),
                memory=memory,
                gpus=int(resources.get("GPU", 0)),
                id=id,
                faults=tuple(f"node {name}: {fault}" for fault in faults),
                missing=tuple(missing),
            )
        )

    return nodes


def _kind(model: str, resources: dict[str, float], gpu: bool) -> str:
    cpus = f"{resources.get('CPU', 0):g} CPUs"
    types = [x.partition(":")[2] for x in resources if x.startswith("accelerator_type:")]

    if gpu:
        return f"{resources.get('GPU', 0):g}x {' '.join(types) or 'GPU'}, {cpus}"

    return f"{cpus} ({model})" if model else cpus


def _probe(node: Node, slots: Slots, configs: Sequence[Config], data: Path) -> dict[str, Any]:
    r"""Takes training steps on a node. Returns what is known of nodes of its kind then."""

    import ray

    cpus, gpus = (slots.wanted.get(key, 0) for key in ("CPU", "GPU"))
    copies = min(node.fit, slots.most or COPIES, COPIES)
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=2)(_Probe)
    probes = [actor.options(**on_node(node.id)).remote() for _ in range(copies)]

    try:
        started = {probe.start.remote(): probe for probe in probes}
        ready, _ = ray.wait(list(started), num_returns=copies, timeout=START)
        ray.get(ready)
        found = _found([started[x] for x in ready], configs, data, cpus, gpus > 0)
    except Exception as error:  # out of memory, a driver that does not fit, …
        told = str(error).strip().split("\n")[-1]
        return {"note": f"unknown: training steps on {node.name} have failed: {told}"}
    finally:
        for probe in probes:
            ray.kill(probe)

    if not ready:
        return {"note": f"unknown: {node.name} is busy, and starts no trial within {START:g} s."}

    if not found:
        return {"note": f"unknown: a step of a single item takes more than {LIMIT:g} s."}

    dataset = TrajectoryDataset(data / "train.h5", 1)
    size, trajectories = dataset.shape[-1], len(dataset)
    steps = {(x.which, x.batch) for _, x, _ in found}
    costs = {(i, n): measure(configs[i] | {"batch_size": n}, size) for i, n in steps}
    speed = speed_of(
        [sample for _, sample, _ in found],
        [costs[x.which, x.batch] for _, x, _ in found],
        base=max(base for base, _, _ in found),
        gpu=gpus > 0,
    )

    most, wanted_most = max(n for _, n in steps), max(c["batch_size"] for c in configs)
    note = (
        f"times are extrapolated from batches of {most}, and may be shorter: those of "
        f"{wanted_most} are too slow here for a probe of {LIMIT:g} s."
        if most < min(wanted_most, trajectories)
        else ""
    )

    return {"speed": speed, "memory": found[0][2] or node.memory, "note": note}


class _Probe:
    r"""Creates a process that takes training steps, and can be asked meanwhile for what it has."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, Sample, int]] = []

    def start(self) -> None:
        from ..runs import run, train  # noqa: F401  # all that a trial imports

    def take_steps(self, *args: Any) -> None:
        for sample in take_steps(*args):
            self.samples.append(sample)

    def found(self) -> list[tuple[int, Sample, int]]:
        return self.samples


def _found(probes: Sequence[Any], *args: Any) -> list[tuple[int, Sample, int]]:
    r"""Returns what processes measure at the same time, to the end or within the limit."""

    import ray

    asked = [probe.take_steps.remote(*args) for probe in probes]
    done = ray.wait(asked, num_returns=len(asked), timeout=LIMIT)[0] if asked else []
    ray.get(done)  # raises what they raised
    told = [probe.found.remote() for probe in probes]
    told = ray.wait(told, num_returns=len(told), timeout=1)[0] if told else []

    return [sample for samples in ray.get(told) for sample in samples]
