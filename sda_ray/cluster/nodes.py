r"""What the nodes of a cluster are like: whether they reach the files, and how fast they train.

Nodes of the same hardware are of one kind. On one node of each kind, as many trials as fit at a
time take a few training steps at once, each with a trial's own resources.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.config import Config
from ..data.dataset import DataInfo, TrajectoryDataset
from ..plan.cost import measure
from ..plan.probe import SECONDS, Sample, Speed, speed_of, take_steps
from ..storage.server import bandwidth
from ..sweep.places import look_here
from .connect import connect, on_node
from .slots import Slots, fitting

__all__ = ["Node", "look"]

START = 60.0  # seconds that a process may take to start
LIMIT = SECONDS + 4  # seconds after which a probe is ended
REACH = 60.0  # seconds that a node may take to look at the files
COPIES = 8  # probes at a time on a node, at most


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
