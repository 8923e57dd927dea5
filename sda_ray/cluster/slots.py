r"""How many trials fit at a time, on what is up of a cluster and on what it may start."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import UserError
from .connect import local_cpus, local_gpus, on_node

__all__ = [
    "Growth",
    "NodeType",
    "Slots",
    "drain",
    "fitting",
    "growth",
    "leaving_nodes",
]

logger = logging.getLogger(__name__)

FRESH = 1.0  # seconds that a count of the nodes holds
PATIENCE = 20.0  # seconds without room for a trial after which that is said
LAST = 60.0  # … after which the sweep ends, if all nodes that are up are avoided
BAD = "node "  # how reasons begin that are held against a node
HEAD = "node:__internal_head__"  # a resource that the head has, and no other node
ASK = 30.0  # seconds that the head may take to tell what its autoscaler has been given


def fitting(wanted: dict[str, float], resources: dict[str, float]) -> int:
    r"""Returns the number of trials that fit on a node. A share of a GPU lies on a single one."""

    def count(key: str, x: float) -> int:
        here = round(1e4 * resources.get(key, 0))  # as Ray counts; 1 // 0.1 is 9

        if key == "GPU" and x < 1:
            return here // 10_000 * (10_000 // max(1, round(1e4 * x)))

        return here // max(1, round(1e4 * x))

    return min(count(key, x) for key, x in wanted.items())


class Slots:
    r"""Creates the count of the trials that fit at a time.

    Arguments:
        cpus: The CPUs of a trial.
        gpus: The GPUs of a trial.
        most: The most trials at a time, if not as many as fit.
    """

    def __init__(self, cpus: float, gpus: float, most: int | None = None) -> None:
        self.wanted = {key: x for key, x in {"CPU": cpus, "GPU": gpus}.items() if x > 0}
        self.most = most
        self.avoided: Mapping[str, str] = {}  # nodes where no trial may start -> why
        self.forgive: Callable[[], bool] = lambda: False  # gives some of them back, if it can
        self.growth: Growth | None = None  # what the cluster may start, once it was checked
        self._count = 0
        self._counted = self._room = -FRESH
        self._said = False

    def __call__(self) -> int:
        r"""Returns the number of trials that fit on the nodes of the cluster, as it is now.

        What the cluster may start counts as well; nodes that are leaving or avoided do not.

        Raises:
            UserError: If all nodes have long been avoided.
        """

        if (now := time.monotonic()) - self._counted > FRESH:
            self._count, self._counted = self._look(), now
            self._room = now if self._count or self._room < 0 else self._room
            self._complain(now - self._room)

        return self._count if self.most is None else min(self._count, self.most)

    def _look(self) -> int:
        here = {node["NodeID"]: self._on(node["Resources"]) for node in _nodes()}
        gone = leaving_nodes() if here else set()
        avoided = sum(here.get(id, 0) for id in self.avoided)
        able = sum(x for id, x in here.items() if id not in self.avoided and id not in gone)

        return max(able, self._possible() - avoided)

    def _possible(self) -> int:
        if self.growth is None:
            return 0

        return self.growth.fit([self._on(kind.resources) for kind in self.growth.types])

    def _complain(self, seconds: float) -> None:
        r"""Says once that there is no room for a trial, or that there never will be again."""

        if seconds == 0:
            self._said = False
            return

        bad = [why for why in self.avoided.values() if why.startswith(BAD)]
        fit = {node["NodeID"] for node in _nodes() if self._on(node["Resources"])}

        if seconds > LAST and bad and fit <= set(self.avoided) and not self.forgive():
            raise UserError(
                f"there is no node left for a trial: {'; '.join(dict.fromkeys(bad))}. Look at "
                "Ray's logs on them (/tmp/ray/session_latest/logs), then carry on with the same "
                "command."
            )

        if seconds > PATIENCE and not self._said:
            self._said = True
            wanted = " ".join(f"{key}={x:g}" for key, x in self.wanted.items())
            logger.warning(
                "no node has room for a trial of %s at the moment: the sweep waits for one to "
                "join. `ray status` says what the cluster has.",
                wanted,
            )

    def _on(self, resources: dict[str, float]) -> int:
        return fitting(self.wanted, resources)

    def local(self) -> int:
        r"""Returns the number of trials that fit in a Ray of our own on this machine."""

        here = self._on(_here())

        return here if self.most is None else min(here, self.most)

    def check_local(self) -> None:
        r"""Raises a UserError if a Ray of our own on this machine could never hold a trial."""

        self._check([("this machine", _here())])

    def check(self) -> None:
        r"""Raises a UserError if no node can ever hold a trial: Ray would wait for ever.

        Nodes that the cluster starts when they are wanted need not be up.
        """

        self.growth = growth()
        found = [(f"node {n['NodeManagerHostname']}", n["Resources"]) for n in _nodes()]

        if self.growth is not None and self.growth.unknown:
            return

        for kind in () if self.growth is None else self.growth.types:
            found.append((f"a node of type {kind.name}", kind.resources))

        self._check(found)

    def _check(self, nodes: Sequence[tuple[str, dict[str, float]]]) -> None:
        if any(self._on(resources) for _, resources in nodes):
            return

        has = dict.fromkeys(
            f"{name} has " + " ".join(f"{key}={found.get(key, 0):g}" for key in ("CPU", "GPU"))
            for name, found in nodes
        )
        wanted = " ".join(f"{key}={x:g}" for key, x in self.wanted.items())
        raise UserError(
            f"a trial wants {wanted}, but {', '.join(has)}. Lower --cpus-per-trial or "
            "--gpus-per-trial."
        )


def _here() -> dict[str, float]:
    return {"CPU": local_cpus(), "GPU": local_gpus()}


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True)
class NodeType:
    r"""Creates a kind of node that a cluster starts when it is wanted.

    Arguments:
        name: Its name.
        most: The most nodes of it at a time.
        resources: What such a node has, if that is known before one is up.
    """

    name: str
    most: int
    resources: dict[str, float]


@dataclass(frozen=True)
class Growth:
    r"""Creates what a cluster may start.

    Arguments:
        types: The types of nodes.
        most: The most nodes at a time, of all types, beside the head.
    """

    types: tuple[NodeType, ...]
    most: int

    @property
    def unknown(self) -> bool:
        r"""Whether nodes may come of which nobody knows yet what they have."""

        return self.most > 0 and any(x.most > 0 and not x.resources for x in self.types)

    def fit(self, on: Sequence[int]) -> int:
        r"""Returns how many trials fit when all is up, if so many fit on a node of each type."""

        total, left = 0, self.most

        for count, kind in sorted(zip(on, self.types, strict=True), key=lambda x: -x[0]):
            nodes = min(left, kind.most)
            total, left = total + count * nodes, left - nodes

        return total


def growth() -> Growth | None:
    r"""Returns what the cluster to which this process is attached may start, if it starts any."""

    import ray

    address = ray.get_runtime_context().gcs_address
    found = _given(address)
    heads = [n for n in ray.nodes() if n["Alive"] and HEAD in n["Resources"]]
    here = ray.get_runtime_context().get_node_id()

    if found is None and heads and heads[0]["NodeID"] != here:
        task = ray.remote(num_cpus=0, max_retries=0)(_given)

        with suppress(ray.exceptions.RayError):  # unknown then
            asked = task.options(**on_node(heads[0]["NodeID"])).remote(address)
            found = ray.get(asked, timeout=ASK)

    return None if found is None else _growth(found)


def _given(address: str) -> dict[str, Any] | None:
    r"""Returns what the autoscaler of a head on this machine was given, if there is one.

    Ray 2.60 has no call for this: a monitor runs on any head, mostly without a file.
    """

    import yaml

    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, yaml.YAMLError):
            words = file.read_bytes().decode(errors="replace").split("\0")
            options = dict(word.split("=", 1) for word in words if "=" in word)

            if options.get("--gcs-address") == address and "--autoscaling-config" in options:
                given = Path(options["--autoscaling-config"]).expanduser()
                found = yaml.safe_load(given.read_text())

                return found if isinstance(found, dict) else None

    return None


def _growth(config: dict[str, Any]) -> Growth:
    most = config.get("max_workers", 0)
    head = config.get("head_node_type")
    types = [
        NodeType(
            name,
            min(most, node.get("max_workers", most)),
            {key: float(x) for key, x in (node.get("resources") or {}).items()},
        )
        for name, node in (config.get("available_node_types") or {}).items()
        if name != head or node.get("max_workers", 0) > 0
    ]

    return Growth(tuple(types), most)


def leaving_nodes() -> set[str]:
    r"""Returns the nodes that are being drained: nothing new is placed there."""

    import ray
    from ray._private.state import state  # Ray 2.60 has no public call

    assert ray.is_initialized()

    return set(state.get_draining_nodes())


def drain(node: str, why: str, when: float = 0) -> None:
    r"""Lets nothing new be placed on a node.

    Arguments:
        node: Its id.
        why: The reason, for those who ask Ray.
        when: When it will be gone, in seconds since the epoch; 0 for nobody knows.
    """

    import ray
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    # As `ray drain-node` does in Ray 2.60
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    client.drain_node(
        node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), why, int(1000 * when)
    )
