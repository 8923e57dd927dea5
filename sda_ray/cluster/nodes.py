r"""Facts about the nodes of a Ray cluster and the machines behind them.

:func:`survey` calls a function on all nodes at once. :func:`examine` is such a function: it gathers
the facts of one machine within seconds and without Ray. Nothing here judges them; see
:mod:`sda_ray.plan.doctor` and :mod:`sda_ray.plan.plan`.
"""

import ipaddress
import os
import platform
import pwd
import resource
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil

from .. import __version__
from ..core import UserError, cgroup_memory, lock_works
from ..data import fingerprint
from ..runs import Entry, cpu_model, entries
from ..storage import local_directory, on_node

PACKAGES = ("ray", "torch", "optuna", "wandb")
SERVER_TIMEOUT = 5.0  # seconds to connect to a server
TIMEOUT = 60.0  # seconds for any other answer of a node
SAMPLE = 16 * 2**20  # bytes sent to measure the bandwidth

HEAD = "node:__internal_head__"  # a resource that the head has, and no other node

Facts = dict[str, Any]


def survey(
    look: Callable[..., Facts],
    *arguments: Any,
    nodes: Iterable[str],
    timeout: float = TIMEOUT,
) -> dict[str, Facts]:
    r"""Calls a function on several nodes at once.

    Arguments:
        look: The function.
        arguments: Its arguments, the same on all nodes.
        nodes: Ray's ids of the nodes.
        timeout: The seconds to wait for all answers together.

    Returns:
        The facts from each node, by id. A node that gives none has `error` alone, the reason.
    """

    import ray

    answers = {id: _call(id, look, *arguments) for id in nodes}
    facts: dict[str, Facts] = {}

    if answers:
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=timeout)

    for id, answer in answers.items():
        try:
            facts[id] = ray.get(answer, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            facts[id] = {"error": f"it has not answered within {timeout:g} s"}
        except Exception as error:  # anything that keeps a worker from starting
            facts[id] = {"error": str(error).strip().split("\n")[-1]}

    return facts


def bandwidth(node: str) -> float:
    r"""Returns the bytes per second from a node to this one, or raises if it does not answer."""

    import ray

    answer = _call(node, lambda: bytes(SAMPLE))
    ray.wait([answer], timeout=TIMEOUT, fetch_local=False)
    start = time.monotonic()
    ray.get(answer, timeout=TIMEOUT)

    return SAMPLE / (time.monotonic() - start)


def clock_skew(node: str) -> float:
    r"""Returns the seconds by which a node's clock is ahead, or raises if it does not answer."""

    import ray

    samples = []

    for _ in range(5):
        sent = time.time()
        clock = ray.get(_call(node, lambda: time.time()), timeout=TIMEOUT)
        received = time.time()
        samples.append((received - sent, clock - (sent + received) / 2))

    return min(samples)[1]  # of the quickest answer


def _call(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    import ray

    return ray.remote(num_cpus=0, max_retries=0, **on_node(node))(function).remote(*arguments)


@contextmanager
def marker(runs: Path) -> Iterator[str]:
    r"""Keeps a file in the directory of runs within the block, and yields its name.

    A node that finds the file has this very directory. Directories made for it are removed again.
    """

    made = [part for part in (runs, *runs.parents) if not part.is_dir()]
    file = runs / f".sda-ray-{secrets.token_hex(8)}"

    try:
        runs.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
        yield file.name
    finally:
        file.unlink(missing_ok=True)

        with suppress(OSError):  # others have begun to use them
            for part in made:
                part.rmdir()


def examine(
    runs: Path,
    token: str = "",
    data: Path | None = None,
    expected: str | None = None,
    remote: bool = False,
    gpus: bool = False,
    url: str | None = None,
) -> Facts:
    r"""Returns facts about this machine and this user on it.

    Arguments:
        runs: The directory of all runs, as the driver calls it.
        token: The name of a file that the driver has put there, see :func:`marker`.
        data: The directory of the data, of which `expected` is the fingerprint.
        remote: Whether trials can do without these directories, by fetching files from the head.
        gpus: Whether to count GPUs.
        url: A server to connect to.
    """

    faults, missing = check_files(runs, token, data, expected, remote) if token else ([], [])

    return {
        "cpu": cpu_model(),
        "limit": memory_limit(),
        "faults": faults,
        "missing": missing,
        "versions": _versions(),
        "sees": bool(token) and (runs / token).is_file(),
        "writes": os.access(_existing(runs), os.W_OK),
        "locks": lock_works(_existing(runs)) or "",
        "free": {
            str(place): shutil.disk_usage(place).free
            for place in {_existing(runs), _existing(_local())}
        },
        "gpus": _count_gpus() if gpus else None,
        "listening": [list(port) for port in listening()],
        "auth": os.environ.get("RAY_AUTH_MODE", ""),
        "token": _token_mode(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "cpus": os.cpu_count() or 1,
        "ray": owner_of(Path("/tmp/ray")),
        "address": os.environ.get("RAY_ADDRESS", ""),
        "unreached": reaches(url) if url else "",
    }


def check_files(
    runs: Path, token: str, data: Path | None, expected: str | None, remote: bool = False
) -> tuple[list[str], list[str]]:
    r"""Checks the directories of a sweep as this machine sees them, see :func:`examine`.

    Returns:
        The faults, and the directories of the head that are missing here.
    """

    faults: list[str] = []
    missing: dict[str, str] = {}

    try:
        if not (runs / token).is_file():
            missing[str(runs)] = (
                f"{runs} is not the one of the sweep, but must be shared by all nodes"
            )
        else:
            with tempfile.NamedTemporaryFile(prefix=".sda-ray-", dir=runs) as file:
                file.write(token.encode())
    except OSError as error:
        faults.append(f"runs cannot be written to {runs}: {error.strerror or error}")

    if data is not None and expected is not None:
        try:
            if fingerprint(data) != expected:
                missing[str(data)] = f"the data in {data} differ from those of the sweep"
        except (UserError, OSError) as error:
            missing[str(data)] = str(error)

    if not remote:
        faults += missing.values()
    elif missing:
        try:
            local_directory("runs")
        except UserError as error:
            faults.append(str(error))

    return faults, list(missing)


def memory_limit() -> int:
    r"""Returns the bytes of memory that processes can use here, by the machine and its cgroups."""

    return int(min(psutil.virtual_memory().total, cgroup_memory()))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "sda_ray": __version__}

    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"

    return versions


def _local() -> Path:
    return Path(os.environ.get("SDA_RAY_LOCAL") or tempfile.gettempdir())


def _existing(place: Path) -> Path:
    return next(part for part in (place, *place.parents) if part.is_dir())


def _count_gpus() -> int | str:
    r"""Returns the number of GPUs that torch sees, or why it cannot tell."""

    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides GPUs that were not requested

    try:
        import torch
    except Exception as error:
        return str(error)

    return torch.cuda.device_count()


def _token_mode() -> int | None:
    r"""Returns the permissions of the file with Ray's token, or None if there is none.

    In a directory that other users cannot enter, those of others do not count.
    """

    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")

    with suppress(OSError):
        mode = file.stat().st_mode & 0o777
        entered = [part.stat().st_mode & 0o011 for part in file.absolute().parents]

        return mode if all(entered) else mode & 0o700

    return None


def owner_of(directory: Path) -> str:
    r"""Returns the owner of a directory that this user cannot write to, else an empty string."""

    if not directory.exists() or os.access(directory, os.W_OK | os.X_OK):
        return ""

    try:
        return pwd.getpwuid(directory.stat().st_uid).pw_name
    except KeyError:
        return f"user {directory.stat().st_uid}"


def reaches(url: str) -> str:
    r"""Returns why a server cannot be reached from here, or an empty string if it can."""

    parsed = urlparse(url)
    port = parsed.port or (80 if parsed.scheme == "http" else 443)

    try:
        socket.create_connection((parsed.hostname or "", port), timeout=SERVER_TIMEOUT).close()
    except OSError as error:
        return f"{parsed.hostname}:{port}: {error}"

    return ""


def listening() -> Iterator[tuple[int, str, str]]:
    r"""Yields the ports open to other machines: port, address, and command of the listener.

    The command is empty if the process belongs to another user. That of a driver of Ray begins with
    `ray::`, as those of Ray's workers do.
    """

    try:
        sockets = psutil.net_connections("tcp")
    except psutil.AccessDenied:  # macOS shows them to root alone
        return

    listeners = {(x.laddr, x.pid) for x in sockets if x.status == psutil.CONN_LISTEN}

    for (ip, port), pid in listeners:
        address = ipaddress.ip_address(ip)
        address = getattr(address, "ipv4_mapped", None) or address

        if not address.is_loopback:
            yield port, str(address), _command(pid)


def _command(pid: int | None) -> str:
    with suppress(psutil.Error, OSError):  # of another user, or ended
        process = psutil.Process(pid or 0)
        command = " ".join(process.cmdline()).strip()
        loaded = [library.path for library in process.memory_maps()]

        return f"ray:: {command}" if any("/ray/_raylet" in x for x in loaded) else command

    return ""


def cluster_status(runs: Path) -> dict[str, Any]:
    r"""Returns the nodes of the cluster that this process is attached to, and the runs on them.

    Returns:
        `address`, `cpus` and `gpus` of the cluster (`used` and `total`), and `nodes`, live ones
        first: `id`, `name`, `ip`, `role` (`head` or `worker`), `state` (`alive` or `dead`), `cpus`,
        `gpus` and `runs`. `elsewhere` has the runs that are running on none of these nodes.
    """

    import ray

    nodes = sorted(ray.nodes(), key=lambda n: (not n["Alive"], HEAD not in n["Resources"]))
    total, free = ray.cluster_resources(), ray.available_resources()
    known = [_node(node) for node in nodes]
    elsewhere = _place_runs(known, entries(runs) if runs.is_dir() else ())

    def use(key: str) -> dict[str, float]:
        has = total.get(key, 0.0)
        return {"used": has - free.get(key, 0.0), "total": has}

    return {
        "address": str(ray.get_runtime_context().gcs_address),
        "cpus": use("CPU"),
        "gpus": use("GPU"),
        "nodes": known,
        "elsewhere": elsewhere,
    }


def _node(node: dict[str, Any]) -> dict[str, Any]:
    resources = node["Resources"] if node["Alive"] else {}

    return {
        "id": node["NodeID"],
        "name": node["NodeManagerHostname"],
        "ip": node["NodeManagerAddress"],
        "role": "head" if HEAD in node["Resources"] else "worker",
        "state": "alive" if node["Alive"] else "dead",
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "runs": [],
    }


def _place_runs(nodes: Sequence[dict[str, Any]], found: Iterable[Entry]) -> list[dict[str, Any]]:
    r"""Adds the running runs to their nodes, by host name, and returns those of no live node."""

    by_name = {node["name"]: node["runs"] for node in nodes if node["state"] != "dead"}
    elsewhere: list[dict[str, Any]] = []

    for entry in (x for x in found if x.status == "running"):
        host = (entry.record.get("attempts") or [{}])[-1].get("host")
        run = {
            "run": entry.path.directory.name,
            "sweep": entry.sweep,
            "trial": entry.record.get("trial"),
            "epoch": entry.epoch or 0,
            "epochs": entry.epochs,
            "host": host,
        }
        by_name.get(host, elsewhere).append(run)

    return elsewhere
