r"""What the nodes of a cluster, and the machines they are on, say of themselves.

Facts only; :mod:`sda_ray.plan.doctor` judges them. Nodes and what waits are what Ray says; which run
is where is what the run directories say.
"""

import ipaddress
import os
import platform
import pwd
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from .. import __version__
from ..core.errors import UserError
from ..core.files import read_json
from ..core.lease import holder
from ..runs.inventory import Entry, entries
from .connect import on_node
from .slots import fitting

__all__ = [
    "PACKAGES",
    "bandwidth",
    "examine",
    "gather",
    "listening",
    "owner_of",
    "reaches",
    "why_waiting",
]

PACKAGES = ("ray", "torch", "optuna", "wandb")
GPUS = 60.0  # seconds that torch may take to find GPUs
REACH = 5.0  # seconds that a server may take to answer
LISTEN = "0A"  # what the kernel calls the state of a socket that waits for connections
COUNT = "import torch; print(torch.cuda.device_count())"
ANSWER = 20.0  # seconds in which a node tells its memory and disk
HEAD = "node:__internal_head__"
ACTOR = "Trial"  # the class of those that train
SOME = 16 * 2**20  # bytes that measure the way here
PATIENCE = 60.0  # seconds that a node may take to send them


def examine(runs: Path, token: str, gpus: bool, url: str | None) -> dict[str, Any]:
    r"""Returns what this machine, and this user on it, are like.

    Arguments:
        runs: The directory of all runs, as the driver calls it.
        token: The name of a file that the driver has left there.
        gpus: Whether to look for GPUs.
        url: The server that shall be reached from here, if any.
    """

    local = Path(os.environ.get("SDA_RAY_LOCAL") or tempfile.gettempdir())

    return {
        "host": socket.gethostname(),
        "versions": _versions(),
        "sees": bool(token) and (runs / token).is_file(),
        "writes": os.access(runs if runs.is_dir() else _parent(runs), os.W_OK),
        "free": {str(place): _free(place) for place in {_parent(runs), _parent(local)}},
        "gpus": _count_gpus() if gpus else None,
        "listening": [list(found) for found in listening()],
        "auth": os.environ.get("RAY_AUTH_MODE", ""),
        "token": _token(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "cpus": os.cpu_count() or 1,
        "ray": owner_of(Path("/tmp/ray")),
        "address": os.environ.get("RAY_ADDRESS", ""),
        "unreached": reaches(url) if url else "",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sda_ray": __version__}

    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"

    return found


def _parent(place: Path) -> Path:
    return next(part for part in (place, *place.parents) if part.is_dir())


def _free(place: Path) -> int:
    return shutil.disk_usage(place).free


def _count_gpus() -> int | str:
    r"""Returns how many GPUs torch sees, or why it cannot tell."""

    # Ray hides them from a process that has not asked for any.
    env = {key: x for key, x in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}

    try:
        done = subprocess.run(
            [sys.executable, "-c", COUNT], env=env, capture_output=True, text=True, timeout=GPUS
        )
    except subprocess.TimeoutExpired:
        return f"torch has not answered within {GPUS:g} s"

    if done.returncode:
        return (done.stderr.strip().splitlines() or ["torch cannot be imported"])[-1]

    return int(done.stdout)


def _token() -> int | None:
    r"""Returns the permissions of the file with Ray's token, or None if there is none.

    In a directory that others cannot enter they count for nothing.
    """

    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")

    with suppress(OSError):
        mode = file.stat().st_mode & 0o777
        open_to = [part.stat().st_mode & 0o011 for part in file.absolute().parents]

        return mode if all(open_to) else mode & 0o700

    return None


def owner_of(directory: Path) -> str:
    r"""Returns whom a directory belongs to that we cannot write to, else nothing."""

    if not directory.exists() or os.access(directory, os.W_OK | os.X_OK):
        return ""

    try:
        return pwd.getpwuid(directory.stat().st_uid).pw_name
    except KeyError:
        return f"user {directory.stat().st_uid}"


def reaches(url: str) -> str:
    r"""Returns why a server cannot be reached from here, or nothing if it can."""

    parsed = urlparse(url)
    port = parsed.port or (80 if parsed.scheme == "http" else 443)

    try:
        socket.create_connection((parsed.hostname or "", port), timeout=REACH).close()
    except OSError as error:
        return f"{parsed.hostname}:{port}: {error}"

    return ""


def listening() -> Iterator[tuple[int, str, str]]:
    r"""Yields ports that other machines may connect to, with address and command of who listens.

    The command is empty if the process is another user's. That of a driver of Ray begins with
    `ray::`, as those of Ray's workers do.
    """

    seen, commands = set(), _sockets()

    for file in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with suppress(OSError):
            for line in file.read_text().splitlines()[1:]:
                fields = line.split()
                place, _, port = fields[1].partition(":")
                address = _address(place)

                if fields[3] != LISTEN or address.is_loopback or (port, fields[9]) in seen:
                    continue

                seen.add((port, fields[9]))
                yield int(port, 16), str(address), commands.get(fields[9], "")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    r"""Returns the address that the kernel prints as words of 32 bits in its own byte order."""

    words = [bytes.fromhex(text[i : i + 8]) for i in range(0, len(text), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)

    return mapped or address


def _sockets() -> dict[str, str]:
    r"""Returns the commands of the processes that have sockets open, by the sockets' numbers."""

    found = {}

    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or another user's
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()

            if "/ray/_raylet" in (process / "maps").read_text():  # a driver opens a port, too
                command = f"ray:: {command}"

            for handle in (process / "fd").iterdir():
                with suppress(OSError):
                    target = os.readlink(handle)

                    if target.startswith("socket:["):
                        found[target[8:-1]] = command

    return found


def bandwidth(node: str) -> float:
    r"""Returns the bytes a second that come here from a node, given Ray's id of it.

    Raises:
        Exception: If it does not answer within a minute.
    """

    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(_some_bytes)
    ref = task.options(**on_node(node)).remote()
    ray.wait([ref], timeout=PATIENCE, fetch_local=False)
    start = time.monotonic()
    ray.get(ref, timeout=PATIENCE)

    return SOME / (time.monotonic() - start)


def _some_bytes() -> bytes:
    return bytes(SOME)


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
