r"""What a cluster is at: `sda-ray cluster status`.

Nodes and what waits are what Ray says; which run is where is what the run directories say.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json
from ..core.lease import holder
from ..runs.inventory import Entry, entries
from .connect import connect, on_node
from .slots import fitting

__all__ = ["gather", "status_command", "why_waiting"]

ANSWER = 20.0  # seconds in which a node tells its memory and disk
HEAD = "node:__internal_head__"
ACTOR = "Trial"  # the class of those that train


def status_command(args: argparse.Namespace) -> None:
    r"""Shows the nodes of a cluster, what runs there, and what waits for what."""

    try:
        with connect(args.address):
            found = gather(args.runs)
    except UserError as error:
        raise UserError(
            f"{error} Give --address to look at another cluster. A sweep that runs on one machine "
            "alone has a Ray of its own: sda-ray attach SWEEP"
        ) from error

    if args.json:
        print(json.dumps(found, indent=2))
    else:
        from rich.console import Console

        from ..cli.overview import overview

        Console(width=None if sys.stdout.isatty() else 160).print(overview(found))


def gather(runs: Path) -> dict[str, Any]:
    r"""Returns what the cluster that this process is attached to is at.

    Arguments:
        runs: The directory of all runs.

    Returns:
        `nodes`, those that live first: `id`, `name`, `ip`, `role` (`head` or `worker`), `state`
        (`alive`, `draining` or `dead`), `cpus` and `gpus` (`used` and `total`), `memory` (`used`
        and `total`) and `disk` (`free` and `total`) in bytes, None for nodes that do not answer,
        `trials`, the number of processes that train, `runs` and `avoided`, which sweeps start
        nothing there and why. `elsewhere`, the runs under way that are on none of them.
        `waiting`: `resources`, `count` and `why`. `coming`: nodes that the cluster starts or could
        not start, with `type`, `count`, `state` and `why`.
    """

    import ray
    from ray._private.state import state

    draining, free = state.get_draining_nodes(), state.available_resources_per_node()
    nodes = sorted(ray.nodes(), key=lambda n: (not n["Alive"], HEAD not in n["Resources"]))
    asked = _ask([n["NodeID"] for n in nodes if n["Alive"]])
    found = [
        _node(n, draining, free.get(n["NodeID"], {}), asked.get(n["NodeID"], {})) for n in nodes
    ]
    elsewhere = _place_runs(found, entries(runs) if runs.is_dir() else (), _actors())

    for sweep, avoided in _avoided(runs):
        for node in found:
            if node["id"] in avoided:
                node["avoided"][sweep] = str(avoided[node["id"]])

    status = _autoscaler(ray.get_runtime_context().gcs_address)
    coming = _coming(status)
    whole = [n["Resources"] for n in nodes if n["Alive"]]

    return {
        "address": str(ray.get_runtime_context().gcs_address),
        "nodes": found,
        "elsewhere": elsewhere,
        "waiting": [
            {"resources": wanted, "count": count, "why": why_waiting(wanted, whole, coming)}
            for wanted, count in _demands(status)
        ],
        "coming": coming,
    }


def _node(
    node: dict[str, Any], draining: Iterable[str], free: dict[str, float], told: dict[str, Any]
) -> dict[str, Any]:
    total = node["Resources"] if node["Alive"] else {}
    used = {key: total.get(key, 0.0) - free.get(key, 0.0) for key in ("CPU", "GPU")}
    leaves = "draining" if node["NodeID"] in draining else "alive"

    return {
        "id": node["NodeID"],
        "name": node["NodeManagerHostname"],
        "ip": node["NodeManagerAddress"],
        "role": "head" if HEAD in node["Resources"] else "worker",
        "state": leaves if node["Alive"] else "dead",
        "cpus": {"used": used["CPU"], "total": total.get("CPU", 0.0)},
        "gpus": {"used": used["GPU"], "total": total.get("GPU", 0.0)},
        "memory": told.get("memory"),
        "disk": told.get("disk"),
        "trials": 0,
        "runs": [],
        "avoided": {},
    }


def _ask(ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    r"""Returns what nodes say of their memory and disk; those that do not answer are left out."""

    import ray

    def tell() -> dict[str, Any]:  # needs nothing of ours on the node
        import os
        import shutil
        import tempfile

        disk = shutil.disk_usage(os.environ.get("SDA_RAY_LOCAL") or tempfile.gettempdir())
        told: dict[str, Any] = {"disk": {"free": disk.free, "total": disk.total}}

        with open("/proc/meminfo") as f:
            memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in f}

        total = memory["MemTotal"]
        told["memory"] = {"used": total - memory["MemAvailable"], "total": total}

        return told

    task = ray.remote(num_cpus=0, max_retries=0)(tell)
    asked = {task.options(**on_node(id)).remote(): id for id in ids}
    done = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)[0] if asked else []
    told = {}

    for answer in done:
        with suppress(Exception):  # it died meanwhile, or is no Linux
            told[asked[answer]] = ray.get(answer)

    return told


def _actors() -> list[tuple[str, int]]:
    r"""Returns the node and process number of each process that trains."""

    from ray._private.state import state

    alive = state.actor_table(None, actor_state_name="ALIVE").values()

    return [
        (actor["Address"]["NodeID"], actor["Pid"])
        for actor in alive
        if actor["ActorClassName"].split(".")[-1] == ACTOR
    ]


def _place_runs(
    nodes: Sequence[dict[str, Any]], found: Iterable[Entry], actors: Sequence[tuple[str, int]]
) -> list[dict[str, Any]]:
    r"""Notes on nodes what runs there, and returns the runs whose node is not among them."""

    here = {node["id"]: node for node in nodes if node["state"] != "dead"}
    by_pid: dict[Any, list[Any]] = defaultdict(list)
    by_name: dict[Any, list[Any]] = defaultdict(list)
    elsewhere: list[dict[str, Any]] = []

    for id, pid in actors:
        if id in here:
            here[id]["trials"] += 1
            by_pid[pid, here[id]["name"]].append(here[id])

    for node in here.values():
        by_name[node["name"]].append(node)

    for entry in found:
        if entry.status != "running":
            continue

        attempts = entry.record.get("attempts") or [{}]
        name, holds = attempts[-1].get("host"), holder(entry.path.lease) or {}
        fits = by_pid.get((holds.get("pid"), name)) or by_name.get(name) or []
        run = {
            "run": entry.path.directory.name,
            "sweep": entry.sweep,
            "trial": entry.record.get("trial"),
            "epoch": entry.epoch or 0,
            "epochs": entry.epochs,
            "host": name,
        }
        (fits[0]["runs"] if fits else elsewhere).append(run)

    return elsewhere


def _avoided(runs: Path) -> Iterable[tuple[str, dict[str, str]]]:
    r"""Yields sweeps and the ids of the nodes that their drivers avoid, with the reasons."""

    for file in sorted(runs.glob("sweeps/*/head.json")):
        with suppress(UserError, AttributeError):
            if isinstance(avoided := read_json(file).get("avoided"), dict) and avoided:
                yield file.parent.name, avoided


def _autoscaler(address: str) -> Any:
    r"""Returns what the cluster says of its growth, which it does without an autoscaler, too."""

    from ray.autoscaler.v2.sdk import get_cluster_status

    with suppress(Exception):  # a part of Ray 2.60 that it calls experimental
        return get_cluster_status(address)

    return None


def _demands(status: Any) -> list[tuple[dict[str, float], int]]:
    r"""Returns what is asked for and not there, and how often."""

    if status is None:
        return []

    demands = status.resource_demands
    counts: dict[tuple[tuple[str, float], ...], int] = defaultdict(int)

    for demand in [*demands.placement_group_demand, *demands.ray_task_actor_demand]:
        for request in demand.bundles_by_count:
            wanted = {k: x for k, x in request.bundle.items() if x and not k.startswith("node:")}
            wanted = {k: x for k, x in wanted.items() if "_group_" not in k}  # of Ray's own

            if wanted:
                counts[tuple(sorted(wanted.items()))] += request.count

    return [(dict(key), count) for key, count in counts.items()]


def _coming(status: Any) -> list[dict[str, Any]]:
    if status is None:
        return []

    found = [
        {"type": n.ray_node_type_name, "count": 1, "state": "starting", "why": n.details or ""}
        for n in status.pending_nodes
    ]
    found += [
        {"type": x.ray_node_type_name, "count": x.count, "state": state, "why": x.details or ""}
        for launches, state in (
            (status.pending_launches, "asked for"),
            (status.failed_launches, "failed"),
        )
        for x in launches
    ]

    return found


def why_waiting(
    wanted: dict[str, float], nodes: Sequence[dict[str, float]], coming: Sequence[dict[str, Any]]
) -> str:
    r"""Returns why a demand is not met.

    Arguments:
        wanted: The resources of the demand.
        nodes: All resources of each node.
        coming: The nodes that the cluster starts, see :func:`gather`.
    """

    if any(fitting(wanted, resources) for resources in nodes):
        return "the nodes that could hold it are busy"

    started = sum(node["count"] for node in coming if node["state"] != "failed")

    if started:
        return f"no node that is up can hold it; {started} more {'is' if started == 1 else 'are'} coming"

    largest = {key: max((n.get(key, 0.0) for n in nodes), default=0.0) for key in wanted}
    most = " ".join(f"{key}={x:g}" for key, x in largest.items())
    why = "; ".join(dict.fromkeys(x["why"] for x in coming if x["why"]))

    return f"no node can ever hold it: the most on one is {most}" + f" ({why})" * bool(why)
