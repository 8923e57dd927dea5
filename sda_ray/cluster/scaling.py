r"""What a cluster may start beyond what is up: the node types of its autoscaler's file.

A trial is asked for before there is a node for it, which is what lets Ray start one.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .connect import on_node

__all__ = ["Growth", "NodeType", "drain", "growth", "leaving_nodes", "node_of"]

HEAD = "node:__internal_head__"  # a resource that the head has, and no other node
ASK = 30.0  # seconds that the head may take to tell what its autoscaler has been given


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


def node_of(actor: Any) -> tuple[str, str]:
    r"""Returns the id and the name of the node of an actor, dead or alive; else nothing."""

    import ray
    from ray._private.state import actors  # Ray 2.60 has no public call without a dashboard

    if actor is None:
        return "", ""

    found = actors(actor._actor_id.hex()) or {}
    id = (found.get("Address") or {}).get("NodeID", "")
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}

    return id, names.get(id, "")
