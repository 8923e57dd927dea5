r"""The command `sda-ray doctor`: is this machine, or this cluster, fit for sweeps?"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cluster.checkup import examine
from ..core.errors import UserError
from .diagnosis import Finding, judge

__all__ = ["add_doctor_parser", "doctor_command", "look"]

DOCTOR = """
Looks whether this machine, or a cluster, is fit for sweeps: equal versions on all nodes, clocks,
disk, files that nodes see or get through the head, GPUs, W&B, open ports, Ray's token, limits.
Exits with 1 if something is at fault; every fault comes with what to do.

  sda-ray doctor                    this machine
  sda-ray doctor --address auto     all nodes of the Ray that this machine is a node of
  sda-ray doctor cluster.yaml       the file, and then the cluster that it has started
"""

TRIED = 16 * 2**20  # bytes that are sent to measure this
START = 90.0  # seconds that a node may take to answer


def add_doctor_parser(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    r"""Adds `doctor` to the command line, see :func:`sda_ray.cli.runs.add_runs_parser`."""

    parser = command("doctor", "is this machine, or a cluster, fit for sweeps?", DOCTOR)
    parser.add_argument("file", nargs="?", metavar="cluster.yaml", help="the file of a cluster")
    parser.add_argument("--address", help="a Ray cluster, as `auto` (default: this machine alone)")
    parser.add_argument("--wandb", choices=("online",), help="look whether W&B can be reached")
    parser.add_argument("--json", action="store_true", help="for programs")


def doctor_command(args: argparse.Namespace, _: Any = None) -> None:
    r"""Looks, prints a table, and exits with 1 if something is at fault."""

    if args.file:
        findings = list(_check_file(Path(args.file)))

        if not any(x.state == "fault" for x in findings):
            if not args.json:
                _show(findings, args.json)

            sys.exit(_on_cluster(args))
    else:
        findings = look(args.runs, args.address, _server(args.wandb))

    _show(findings, args.json)
    sys.exit(any(x.state == "fault" for x in findings))


def _check_file(file: Path) -> Iterator[Finding]:
    r"""Yields what is wrong with a cluster file."""

    from ..cluster.clusterfile import check_cluster

    faults = check_cluster(file)

    for fault in faults:
        yield Finding(file.name, "file", "fault", fault, "Mend the file.")

    if not faults:
        yield Finding(file.name, "file", "ok", "valid")


def _on_cluster(args: argparse.Namespace) -> int:
    r"""Runs the command on the head of a cluster, and returns its exit code."""

    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")

    if ray is None:
        raise UserError("there is no command `ray` here. Install it: pip install 'ray[default]'")

    more = " --json" * args.json + (" --wandb online" if args.wandb else "")
    command = f"sda-ray doctor --address auto{more}"

    return subprocess.run([ray, "exec", args.file, command]).returncode


def _server(asked: str | None) -> str | None:
    r"""Returns the address of W&B's server, if it is wanted, or there is a key for it."""

    from ..runs.tracking import Wandb
    from ..sweep.places import check_wandb, wandb_server

    if asked != "online":
        try:
            check_wandb(Wandb(mode="online"))
        except UserError:
            return None

    return wandb_server()


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


def _show(findings: list[Finding], as_json: bool) -> None:
    if as_json:
        faults = sum(x.state == "fault" for x in findings)
        print(json.dumps({"faults": faults, "findings": [asdict(x) for x in findings]}, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    console = Console(
        width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False
    )
    table = Table("node", "what", "", "found", "what to do", box=None, pad_edge=False)
    colours = {"ok": "green", "warning": "yellow", "fault": "red"}

    for x in findings:
        table.add_row(x.node, x.what, x.state, x.found, x.do, style=colours[x.state])

    console.print(table)
