r"""Tests that a sweep on a cluster outlives its nodes, without root: all nodes on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Start

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}

SWEEP = """from sda_ray import CONFIG, Sweep, loguniform, main

SMALL = {"window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1)}
CONFIG = CONFIG | SMALL | {"batch_size": 8, "epochs": 150}
sweep = Sweep(
    "small", CONFIG, {"learning_rate": loguniform(1e-4, 1e-2)}, trials=4, pruner="none"
)

if __name__ == "__main__":
    main(sweep)
"""

# A cluster in a process of its own: it does what the lines that it reads say
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

store = {"object_store_memory": 100_000_000}
head = {**store, "num_cpus": 0, "include_dashboard": False, "temp_dir": sys.argv[1]}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = {}

for line in sys.stdin:
    word, name = line.split()

    if word == "add":
        nodes[name] = cluster.add_node(num_cpus=1, **store)
    elif word == "cut":
        cluster.remove_node(nodes.pop(name), allow_graceful=False)

    print("done", cluster.address, flush=True)

cluster.shutdown()
"""

Say = Callable[[str], str]


@pytest.fixture
def cluster(env: dict[str, str]) -> Iterator[Say]:
    r"""Adds nodes to a cluster, whose head runs no trials, and takes them away."""

    place = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))
    Path(env["TMPDIR"], "ray").mkdir(exist_ok=True)  # where Ray 2.60 notes an address
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(place / "r")],
        env=env | TOKEN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None

    def say(line: str) -> str:
        stdin.write(f"{line}\n")
        stdin.flush()
        lines = iter(stdout.readline, "")

        return next(x.split()[1] for x in lines if x.startswith("done "))  # past what Ray says

    try:
        yield say
        process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

        shutil.rmtree(place, ignore_errors=True)


def found(tmp_path: Path) -> list[dict[str, Any]]:
    r"""Returns what the runs say of themselves."""

    return [json.loads(x.read_text()) for x in sorted((tmp_path / "runs").glob("*_*/run.json"))]


def wait(what: str, condition: Callable[[], Any], sweep: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 240

    while not condition():
        assert sweep.poll() is None, (what, *sweep.communicate())
        assert time.monotonic() < until, what
        time.sleep(0.2)


def test_sweep_goes_on_where_there_are_nodes_and_waits_where_there_are_none(
    cluster: Say, start: Start, tmp_path: Path
) -> None:
    r"""A node dies, then the last that is left; and then there is one again."""

    (tmp_path / "small.py").write_text(SWEEP)
    cluster("add one")
    address = cluster("add two")
    sweep = start("sweep", "small.py", "--address", address, **TOKEN)

    def at_work() -> list[dict[str, Any]]:
        return [run for run in found(tmp_path) if "ended" not in run["attempts"][-1]]

    def attempts() -> int:
        return sum(len(run["attempts"]) for run in found(tmp_path))

    # A node dies under its run, which goes on elsewhere: that is not held against it
    wait("both nodes at work", lambda: len(at_work()) == 2, sweep)
    cluster("cut one")
    wait("the run to go on", lambda: attempts() > len(found(tmp_path)), sweep)

    # So does the other one, and there is no room
    before = attempts()
    cluster("cut two")
    time.sleep(40)
    assert attempts() == before

    cluster("add three")
    printed, said = sweep.communicate(timeout=300)
    said = " ".join((printed + said).split())

    assert sweep.returncode == 0, said
    assert "no node has room for a trial of CPU=1 at the moment" in said
    assert [run["status"] for run in found(tmp_path)] == 4 * ["finished"]

    for file in (tmp_path / "runs").glob("*_*/metrics.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
        assert epochs == list(range(1, 151))
