r"""`sda-ray doctor`: is this machine, or this cluster, fit for sweeps?"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.nodes import examine

__all__ = ["Finding", "judge", "look"]

SKEW = (2.0, 60.0)  # seconds between clocks: worth a warning, and a fault
FREE = (5e9, 1e9)  # bytes, likewise
SLOW = 10e6  # bytes a second through the head, below which a warning
DASHBOARD, TRIES = 8265, 50  # its port, and how many it tries from there on
RAY = ("gcs_server", "raylet", "ray::", "/ray/", "ray.util", "ray start")  # in Ray's commands
TRIED = 16 * 2**20  # bytes that are sent to measure this
START = 90.0  # seconds that a node may take to answer

Judged = Iterator[tuple[str, str, str, str]]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    r"""Creates what was found: on which node, about what, `ok`, `warning` or `fault`."""

    node: str
    what: str
    state: str
    found: str
    do: str = ""


def look(runs: Path, address: str | None, url: str | None) -> list[Finding]:
    r"""Looks at this machine, or at all nodes of a cluster."""

    if address is None:
        gpus = bool(shutil.which("nvidia-smi"))

        return [*judge("here", examine(runs, "", gpus, url), {}, shared=False)]

    from ..cluster.connect import connect

    with connect(address):
        return _look_at_nodes(runs, url)


def _look_at_nodes(runs: Path, url: str | None) -> list[Finding]:
    import ray

    from ..cluster.connect import on_node

    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    here = ray.get_runtime_context().get_node_id()
    order = [here, *(id for id in nodes if id != here)]
    actor = ray.remote(num_cpus=0, max_restarts=0)(_Examiner)
    findings: list[Finding] = []

    with _left(runs) as token:
        actors = {id: actor.options(**on_node(id)).remote() for id in order}
        gpus = {id: nodes[id]["Resources"].get("GPU", 0) for id in order}
        asked = {id: x.examine.remote(runs, token, gpus[id] > 0, url) for id, x in actors.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=START)
        mine: dict[str, Any] = {}
        content = ray.put(os.urandom(TRIED))

        for id in order:
            name = nodes[id]["NodeManagerHostname"] + (" (driver)" if id == here else "")

            try:
                facts = ray.get(asked[id], timeout=0.1)
                facts |= _measure(actors[id], content, remote=id != here)
            except Exception as error:  # whatever keeps a worker from starting
                told = str(error).strip().split("\n")[-1]
                do = "Look at Ray's logs there; is sda_ray installed, and for the same Python?"
                findings.append(Finding(name, "answer", "fault", told, do))
                continue

            facts["wanted"] = int(gpus[id])
            findings += judge(name, facts, mine, shared=True)
            mine = mine or facts

    return findings


def _measure(actor: Any, content: Any, remote: bool) -> dict[str, float]:
    r"""Returns by how much a node's clock differs, and how fast it gets what the driver has."""

    import ray

    ways = []

    for _ in range(5):
        sent = time.time()
        told = ray.get(actor.clock.remote(), timeout=START)
        back = time.time()
        ways.append((back - sent, told - (sent + back) / 2))

    taken = ray.get(actor.take.remote([content]), timeout=START) if remote else 0.0

    return {"skew": min(ways)[1], "rate": TRIED / taken if taken else 0.0}


class _Examiner:
    r"""Creates a process on a node that looks around there."""

    def examine(self, *args: Any) -> dict[str, Any]:
        return examine(*args)

    def clock(self) -> float:
        return time.time()

    def take(self, content: list[Any]) -> float:
        import ray

        start = time.perf_counter()
        ray.get(content[0])

        return time.perf_counter() - start


@contextmanager
def _left(runs: Path) -> Iterator[str]:
    r"""Leaves a file in the directory of runs for as long as it is entered, and yields its name."""

    file = runs / f".sda-ray-{secrets.token_hex(8)}"

    with suppress(OSError):  # no such directory yet, or not ours: found out otherwise
        file.touch()

    try:
        yield file.name
    finally:
        file.unlink(missing_ok=True)


def judge(
    node: str, facts: dict[str, Any], driver: dict[str, Any], shared: bool
) -> Iterator[Finding]:
    r"""Yields what is to be thought of a node.

    Arguments:
        node: Its name.
        facts: What it says, see :func:`sda_ray.cluster.nodes.examine`.
        driver: What the driver's node says; nothing for itself.
        shared: Whether it is a node of a cluster.
    """

    for check in (_versions, _clock, _disk, _storage, _gpus, _wandb, _ports, _token, _limits):
        for what, state, found, do in check(facts, driver, shared):
            yield Finding(node, what, state, found, do)


def _versions(facts: Facts, driver: Facts, shared: bool) -> Judged:
    versions, wanted = facts["versions"], driver.get("versions", {})
    missing = [name for name, x in versions.items() if x == "none"]
    differ = [
        f"{name} {versions[name]}, not {x}" for name, x in wanted.items() if versions[name] != x
    ]

    if missing:
        yield "versions", "fault", f"without {', '.join(missing)}", "pip install sda-ray there."
    elif differ:
        do = "Install the driver's versions there: pip install -c constraints.txt"
        yield "versions", "fault", "; ".join(differ), do
    else:
        yield "versions", "ok", " ".join(f"{name} {x}" for name, x in versions.items()), ""


def _clock(facts: Facts, driver: Facts, shared: bool) -> Judged:
    if not driver:
        return

    skew = facts["skew"]
    state = "ok" if abs(skew) < SKEW[0] else "warning" if abs(skew) < SKEW[1] else "fault"
    do = "" if state == "ok" else "Let the clocks be set by NTP: timedatectl set-ntp true"
    yield "clock", state, f"{skew:+.2f} s from the driver's", do


def _disk(facts: Facts, driver: Facts, shared: bool) -> Judged:
    for place, free in sorted(facts["free"].items()):
        state = "ok" if free > FREE[0] else "warning" if free > FREE[1] else "fault"
        do = "" if state == "ok" else "Make room, or give another place: --root, SDA_RAY_LOCAL."
        yield "disk", state, f"{free / 1e9:.1f} GB free in {place}", do


def _storage(facts: Facts, driver: Facts, shared: bool) -> Judged:
    if not driver:
        if facts["writes"]:
            yield "storage", "ok", "the directory of runs can be written", ""
        else:
            do = "Give another place with --root or --runs, or mend its permissions."
            yield "storage", "fault", "the directory of runs cannot be written", do
    elif facts["sees"]:
        yield "storage", "ok", "sees the directory of runs", ""
    else:
        rate, slow = facts["rate"], facts["rate"] < SLOW
        do = "Share the root, or take a faster network: checkpoints take long." if slow else ""
        found = f"files go through the head, at {rate / 1e6:.0f} MB/s"
        yield "storage", "warning" if slow else "ok", found, do


def _gpus(facts: Facts, driver: Facts, shared: bool) -> Judged:
    seen, wanted = facts["gpus"], facts.get("wanted")

    if seen is None:
        return

    if isinstance(seen, str) or seen < (1 if wanted is None else wanted):
        told = seen if isinstance(seen, str) else f"torch sees {seen} of {wanted or 'its'}"
        do = "Is it torch for CUDA, and does the driver fit? nvidia-smi says which it is."
        yield "GPU", "fault", told, do
    else:
        yield "GPU", "ok", f"torch sees {seen}", ""


def _wandb(facts: Facts, driver: Facts, shared: bool) -> Judged:
    if facts["unreached"]:
        do = "Open the way, or take --wandb offline and `sda-ray sync` later."
        yield "W&B", "warning", f"cannot be reached: {facts['unreached']}", do


def _ports(facts: Facts, driver: Facts, shared: bool) -> Judged:
    safe, others = facts["auth"] == "token", []

    for port, address, command in facts["listening"]:
        if port == 22 or "sshd" in command.partition(" ")[0]:
            continue

        if _is_dashboard(port, command):
            do = "Start the head with --dashboard-host=127.0.0.1."
            yield "ports", "fault", f"Ray's dashboard listens on {address}:{port}", do
        elif any(word in command for word in RAY):
            if not safe and shared:
                do = "Whoever reaches it runs what they like: RAY_AUTH_MODE=token on all nodes."
                yield "ports", "fault", f"Ray listens on {address}:{port} without a token", do
                safe = True  # once is enough
        else:
            others.append(f"{port} ({Path(command.split()[0]).name if command else 'unknown'})")

    if others:
        do = "Are they meant to be open to other machines?"
        yield "ports", "warning", f"others listen, too: {', '.join(sorted(set(others)))}", do
    else:
        yield "ports", "ok", "nothing but SSH and Ray listens for other machines", ""


def _is_dashboard(port: int, command: str) -> bool:
    r"""Tells whether a port is the dashboard's own, not one of its metrics (44227 as a rule)."""

    if "dashboard/dashboard.py" not in command:
        return port == DASHBOARD

    given = re.search(r"--port=(\d+)", command)
    first = int(given[1]) if given else DASHBOARD

    return first <= port < first + TRIES


def _token(facts: Facts, driver: Facts, shared: bool) -> Judged:
    mode = facts["token"]

    if mode is not None and mode & 0o077:
        yield "token", "fault", f"others may read it: mode {mode:o}", "chmod 600 ~/.ray/auth_token"
    elif shared and facts["auth"] != "token":
        do = "Export RAY_AUTH_MODE=token in every start command, with one token for all nodes."
        yield "token", "fault", f"RAY_AUTH_MODE is '{facts['auth']}'", do
    elif shared:
        yield "token", "ok", "RAY_AUTH_MODE is token", ""

    if facts["address"] and not shared:
        found = f"RAY_ADDRESS is {facts['address']}"
        yield "Ray", "ok", f"{found}, which sweeps without --address leave alone", ""


def _limits(facts: Facts, driver: Facts, shared: bool) -> Judged:
    hard, least = facts["files"][1], 64 + 8 * facts["cpus"]

    if 0 <= hard < least:
        yield "files", "fault", f"{hard} may be open, Ray takes {least}", "Raise `ulimit -Hn`."
    else:
        yield "files", "ok", f"{'any number' if hard < 0 else hard} may be open", ""

    if facts["ray"]:
        do = "Start it with --temp-dir of your own; sweeps without --address need nothing."
        state = "fault" if shared else "warning"
        yield "/tmp/ray", state, f"belongs to {facts['ray']}: `ray start` fails here", do
