r"""The judgement of `sda-ray doctor`: is this machine, or this cluster, fit for sweeps?

:func:`sda_ray.cluster.nodes.examine` gathers the facts of a machine; :func:`judge` says what they
mean and what to do.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ..cluster import Facts, bandwidth, clock_skew, connected, examine, live_nodes, marker, survey
from ..core import UserError
from ..data import unusual

SKEW = (2.0, 60.0)  # seconds between clocks: worth a warning, and a fault
FREE = (5e9, 1e9)  # bytes, likewise
SLOW = 10e6  # bytes per second to the head, below which a warning
DASHBOARD = range(8265, 8315)  # ports that the dashboard tries; others are of its metrics
RAY = ("gcs_server", "raylet", "ray::", "/ray/", "ray.util", "ray start")  # in Ray's commands
TIMEOUT = 90.0  # seconds for all nodes to answer

Judgement = Iterator[tuple[str, str, str, str]]  # subject, state, finding, remedy


@dataclass(frozen=True)
class Finding:
    r"""A finding about a node."""

    node: str
    what: str  # the subject
    state: str  # `ok`, `warning` or `fault`
    found: str
    do: str = ""  # the remedy, unless all is well


def diagnose(runs: Path, data: Path, address: str | None, url: str | None) -> list[Finding]:
    r"""Returns findings about this machine, or about all nodes of the cluster at an address.

    Every wait is bounded: a node that does not answer is a fault.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data, if there is one.
        address: The address of a Ray cluster, or None for this machine alone.
        url: The W&B server to connect to, if any.
    """

    if address is None:
        gpus = bool(shutil.which("nvidia-smi"))
        facts = examine(runs, gpus=gpus, url=url)
        return [*judge("this machine", facts, {}, shared=False), *_data(data)]

    with connected(address):
        return [*_diagnose_nodes(runs, url), *_data(data)]


def _data(data: Path) -> Iterator[Finding]:
    r"""Yields findings about a few states of the data, as this machine sees them."""

    node, file = "this machine", data / "train.h5"

    if not file.exists():
        return

    try:
        odd = list(unusual(file))
    except UserError as error:
        yield Finding(node, "data", "fault", str(error), "Correct or replace the file.")
        return

    if not odd:
        yield Finding(node, "data", "ok", f"{file} has states as networks expect them")

    for text in odd:
        yield Finding(node, "data", "warning", text, "Is it the right file?")


def _diagnose_nodes(runs: Path, url: str | None) -> list[Finding]:
    import ray

    nodes = live_nodes()
    own = ray.get_runtime_context().get_node_id()
    gpus = {id: int(node["Resources"].get("GPU", 0)) for id, node in nodes.items()}
    findings: list[Finding] = []
    driver: Facts = {}

    with ExitStack() as stack:
        token = ""

        with suppress(OSError):  # a directory that cannot be written is a finding
            token = stack.enter_context(marker(runs))

        arguments = (runs, token, None, None, True, any(gpus.values()), url)
        answers = survey(examine, *arguments, nodes=nodes, timeout=TIMEOUT)

    for id in sorted(nodes, key=lambda id: id != own):
        name = nodes[id]["NodeManagerHostname"] + (" (driver)" if id == own else "")
        facts = answers[id] | {"expected_gpus": gpus[id]}

        try:
            if "error" not in facts and id != own:
                facts |= {"skew": clock_skew(id), "rate": bandwidth(id)}
        except Exception as error:  # lost, or too busy to answer
            facts["error"] = str(error).strip().split("\n")[-1]

        if "error" in facts:
            do = "Look at Ray's logs there; is sda_ray installed, and for the same Python?"
            findings.append(Finding(name, "answer", "fault", facts["error"], do))
        else:
            findings += judge(name, facts, driver, shared=True)
            driver = driver or facts

    return findings


def judge(node: str, facts: Facts, driver: Facts, shared: bool) -> Iterator[Finding]:
    r"""Yields the findings about a node, by its facts and those of the driver, none for itself."""

    checks = (_versions, _places, _gpus, _network, _ports, _token, _limits)

    for check in checks:
        for what, state, found, do in check(facts, driver, shared):
            yield Finding(node, what, state, found, do)


def _versions(facts: Facts, driver: Facts, shared: bool) -> Judgement:
    versions, expected = facts["versions"], driver.get("versions", {})
    missing = [name for name, x in versions.items() if x == "none"]
    differ = [
        f"{name} {versions[name]}, not {x}" for name, x in expected.items() if versions[name] != x
    ]

    if missing:
        yield "versions", "fault", f"without {', '.join(missing)}", "pip install sda-ray there."
    elif differ:
        do = "Install the driver's versions there: pip install -c constraints.txt"
        yield "versions", "fault", "; ".join(differ), do
    else:
        yield "versions", "ok", " ".join(f"{name} {x}" for name, x in versions.items()), ""


def _grade(good: bool, tolerable: bool) -> str:
    return "ok" if good else "warning" if tolerable else "fault"


def _places(facts: Facts, driver: Facts, shared: bool) -> Judgement:
    r"""Judges where files are: disks, the directory of runs, and locks there."""

    for place, free in sorted(facts["free"].items()):
        state = _grade(free > FREE[0], free > FREE[1])
        do = "" if state == "ok" else "Make room, or choose another place: --root, SDA_RAY_LOCAL."
        yield "disk", state, f"{free / 1e9:.1f} GB free in {place}", do

    if driver and facts["faults"]:
        do = "Correct its permissions, or set SDA_RAY_LOCAL to another place."
        yield "storage", "fault", "; ".join(facts["faults"]), do
    elif driver and facts["sees"]:
        yield "storage", "ok", "sees the directory of runs", ""
    elif driver:
        state = _grade(facts["rate"] >= SLOW, True)
        do = "Share the root, or use a faster network: checkpoints take long."
        found = f"files go through the head, at {facts['rate'] / 1e6:.0f} MB/s"
        yield "storage", state, found, do * (state != "ok")
    elif facts["writes"]:
        yield "storage", "ok", "the directory of runs is writable", ""
    else:
        do = "Choose another place with --root or --runs, or correct its permissions."
        yield "storage", "fault", "the directory of runs is not writable", do

    if facts["locks"] and (facts["sees"] or not driver):  # leases rely on locks there
        do = "Mount it with locks for all hosts (Lustre: -o flock), or choose another --runs."
        yield "locks", "fault", facts["locks"], do


def _gpus(facts: Facts, driver: Facts, shared: bool) -> Judgement:
    seen, expected = facts["gpus"], facts.get("expected_gpus", 1)

    if seen is None or expected == 0:
        return

    if isinstance(seen, str) or seen < expected:
        found = seen if isinstance(seen, str) else f"torch sees {seen} of {expected}"
        do = "Is it torch for CUDA, and does the driver fit? nvidia-smi shows its version."
        yield "GPU", "fault", found, do
    else:
        yield "GPU", "ok", f"torch sees {seen}", ""


def _network(facts: Facts, driver: Facts, shared: bool) -> Judgement:
    if driver:
        skew = facts["skew"]
        state = _grade(abs(skew) < SKEW[0], abs(skew) < SKEW[1])
        do = "" if state == "ok" else "Set the clocks by NTP: timedatectl set-ntp true"
        yield "clock", state, f"{skew:+.2f} s from the driver's", do

    if facts["unreached"]:
        do = "Open the connection, or use --wandb offline and `sda-ray sync` later."
        yield "W&B", "warning", f"cannot be reached: {facts['unreached']}", do


def _ports(facts: Facts, driver: Facts, shared: bool) -> Judgement:
    safe, others = facts["auth"] == "token", []

    for port, address, command in facts["listening"]:
        if port == 22 or "sshd" in command.partition(" ")[0]:
            continue

        if port == DASHBOARD[0] or (port in DASHBOARD and "dashboard/dashboard.py" in command):
            do = "Start the head with --dashboard-host=127.0.0.1."
            yield "ports", "fault", f"Ray's dashboard listens on {address}:{port}", do
        elif any(word in command for word in RAY):
            if not safe and shared:
                do = (
                    "Anyone who can connect can run code as you: RAY_AUTH_MODE=token on all nodes."
                )
                yield "ports", "fault", f"Ray listens on {address}:{port} without a token", do
                safe = True  # once is enough
        else:
            others.append(f"{port} ({Path(command.split()[0]).name if command else 'unknown'})")

    if others:
        do = "Are they meant to be open to other machines?"
        yield "ports", "warning", f"others are open, too: {', '.join(sorted(set(others)))}", do
    else:
        yield "ports", "ok", "only SSH and Ray are open to other machines", ""


def _token(facts: Facts, driver: Facts, shared: bool) -> Judgement:
    mode = facts["token"]

    if mode is not None and mode & 0o077:
        do = "chmod 600 ~/.ray/auth_token"
        yield "token", "fault", f"other users can read it: mode {mode:o}", do
    elif shared and facts["auth"] != "token":
        do = "Export RAY_AUTH_MODE=token in every start command, with one token for all nodes."
        yield "token", "fault", f"RAY_AUTH_MODE is '{facts['auth']}'", do
    elif shared:
        yield "token", "ok", "RAY_AUTH_MODE is token", ""

    if facts["address"] and not shared:
        found = f"RAY_ADDRESS is {facts['address']}"
        yield "Ray", "ok", f"{found}, which sweeps without --address ignore", ""


def _limits(facts: Facts, driver: Facts, shared: bool) -> Judgement:
    hard, least = facts["files"][1], 64 + 8 * facts["cpus"]

    if 0 <= hard < least:
        yield "files", "fault", f"{hard} can be open, Ray needs {least}", "Raise `ulimit -Hn`."
    else:
        yield "files", "ok", f"{'any number' if hard < 0 else hard} can be open", ""

    if facts["ray"]:
        do = "Start it with --temp-dir of your own; sweeps without --address need nothing."
        state = "fault" if shared else "warning"
        yield "/tmp/ray", state, f"belongs to {facts['ray']}: `ray start` fails here", do
