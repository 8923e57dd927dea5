r"""Tests for sda_ray.cluster.nodes, and for sweeps as jobs of a cluster, on a real one of one node."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PERSONAL
from recorded_code import SCRIPT, spoil

import sda_ray
from sda_ray.cli.cluster import overview
from sda_ray.cluster.nodes import why_waiting

PACKAGE = Path(sda_ray.__file__).parent

# Asks for what there is not, and prints what the cluster says as soon as it has noticed
WANTING = """
import json, sys, time
from pathlib import Path
from sda_ray.cluster.connect import connect
from sda_ray.cluster.nodes import ACTOR, gather

with connect(sys.argv[1]):
    import ray

    trial = type(ACTOR, (), {})
    kept = [ray.remote(num_cpus=n)(trial).remote() for n in (64, 2, 2)]
    deadline = time.monotonic() + 60

    while time.monotonic() < deadline:
        found = gather(Path("nowhere"))

        if len(found["waiting"]) == 2 and found["nodes"][0]["cpus"]["used"] == 2:
            break

        time.sleep(0.5)

    print(json.dumps(found))
"""


def ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    found = [s.getsockname()[1] for s in sockets]

    for s in sockets:
        s.close()

    return found


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    r"""A Ray of one node with 2 CPUs, a token and a dashboard: its address, and the variables."""

    pytest.importorskip("aiohttp_cors", reason="jobs need ray[default]")
    directory = Path("/tmp") / f"sda-{secrets.token_hex(3)}"
    directory.mkdir(mode=0o700)
    (token := directory / "token").write_text(secrets.token_hex(32))
    token.chmod(0o600)
    gcs, dashboard, agent, client = ports(4)
    env = {key: x for key, x in os.environ.items() if not key.startswith(PERSONAL)}
    env |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = open(directory / "log", "w")  # noqa: SIM115
    ray = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--port={gcs}", "--num-cpus=2", "--object-store-memory=100000000"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *(f"--temp-dir={directory / 'r'}", "--node-ip-address=127.0.0.1"),
        ],
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )

    try:
        deadline = time.monotonic() + 120

        while "Ray runtime started" not in (said := (directory / "log").read_text()):
            assert ray.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)

        yield f"127.0.0.1:{gcs}", env
    finally:
        ray.terminate()
        ray.wait(60)
        log.close()
        shutil.rmtree(directory, ignore_errors=True)


def test_reason_why_something_waits() -> None:
    small, large = {"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}
    coming = [{"type": "gpu", "count": 2, "state": "starting", "why": ""}]
    failed = [{"type": "gpu", "count": 1, "state": "failed", "why": "no capacity"}]
    wanted = {"CPU": 1.0, "GPU": 1.0}

    assert why_waiting(wanted, [small, large], []) == "the nodes that could hold it are busy"
    assert "2 more are coming" in why_waiting(wanted, [small], coming)
    assert (
        why_waiting(wanted, [small], failed)
    ) == "no node can ever hold it: the most on one is CPU=2 GPU=0 (no capacity)"
    assert "no node can ever hold it" in why_waiting(wanted, [], [])


def test_names_are_shown_as_plain_text() -> None:
    from rich.console import Console

    node: dict[str, Any] = {
        "id": "1",
        "name": "\x1b[31m[bold]x",
        "ip": "::1",
        "role": "head",
        "state": "draining",
        "cpus": {"used": 1.0, "total": 2.0},
        "gpus": {"used": 0.0, "total": 0.0},
        "memory": None,
        "disk": None,
        "trials": 1,
        "runs": [{"run": "[red]", "sweep": None, "trial": 1, "epoch": 0, "epochs": None}],
        "avoided": {"tiny": "3 workers died"},
    }
    console = Console(width=160)

    with console.capture() as captured:
        console.print(overview({"nodes": [node], "elsewhere": [], "waiting": [], "coming": []}))

    out = captured.get()

    assert "\x1b" not in out and "[bold]x" in out and "[red]" in out and "draining" in out
    assert "sweep 'tiny' starts nothing on" in out and "3 workers died" in out


def test_address_where_nobody_is_is_told_at_once(env: dict[str, str], tmp_path: Path) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sda_ray", "cluster", "status", "--address", "127.0.0.1:1"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 2 and "there is no Ray at '127.0.0.1:1'" in done.stderr
    assert time.monotonic() - begin < 60  # Ray takes minutes


def test_what_waits_is_told_with_the_reason(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, env = cluster
    done = subprocess.run(
        [sys.executable, "-c", WANTING, address],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=180,
    )

    assert done.returncode == 0, done.stderr

    found = json.loads(done.stdout.splitlines()[-1])
    whys = {item["resources"]["CPU"]: (item["count"], item["why"]) for item in found["waiting"]}

    assert whys[64] == (1, "no node can ever hold it: the most on one is CPU=2")
    assert whys[2] == (1, "the nodes that could hold it are busy")

    (node,) = found["nodes"]

    assert node["role"] == "head" and node["state"] == "alive" and node["trials"] == 1
    assert node["cpus"] == {"used": 2.0, "total": 2.0}
    assert 0 < node["memory"]["used"] < node["memory"]["total"]
    assert 0 < node["disk"]["free"] <= node["disk"]["total"]


def test_sweep_is_a_job_and_runs_the_code_that_was_recorded(
    cluster: tuple[str, dict[str, str]], data: Path, tmp_path: Path
) -> None:
    r"""From a checkout that is broken while it runs, which workers would import from otherwise."""

    address, env = cluster
    env = {**env, "PYTHONPATH": str(tmp_path)}
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(PACKAGE, tmp_path / "sda_ray", ignore=shutil.ignore_patterns("origin.*"))
    (tmp_path / "tiny.py").write_text(SCRIPT.replace('"epochs": 27', '"epochs": 270'))
    directory = tmp_path / "runs" / "sweeps" / "tiny"

    def run(*words: str, program: str = "sda_ray", timeout: float = 240) -> str:
        done = subprocess.run(
            [sys.executable, "-m", program, *words],
            cwd=tmp_path,
            env={**env, "PYTHONPATH": str(PACKAGE.parent if words[0] == "attach" else tmp_path)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout + done.stderr

        return done.stdout

    out = run("sweep", "tiny.py", "--detach", "--address", address, "--parallel", "1")

    assert "as job sda-ray-tiny-" in out and "sda-ray stop tiny" in out

    shutil.rmtree(tmp_path / "sda_ray" / "__pycache__", ignore_errors=True)
    whole = {name: (tmp_path / "sda_ray" / f"{name}.py").read_bytes() for name in ("trial", "nn")}
    spoil(tmp_path, *whole)  # before its workers have started
    deadline = time.monotonic() + 240

    while not list(tmp_path.glob("runs/*/run.json")):
        assert time.monotonic() < deadline, (directory / "study.journal").read_text()
        time.sleep(0.2)

    for name, content in whole.items():
        (tmp_path / "sda_ray" / f"{name}.py").write_bytes(content)

    found = json.loads(run("cluster", "status", "--address", address, "--json"))
    at_work = [x for node in found["nodes"] for x in node["runs"]]

    assert [x["sweep"] for x in at_work] in (["tiny"], []), found  # none between two of them
    assert [node["trials"] for node in found["nodes"]] == [1], found

    out = run("attach", "tiny", timeout=300)

    assert "Best configuration" in out

    code = json.loads((directory / "sweep.json").read_bytes())["code"]
    records = [json.loads(file.read_bytes()) for file in tmp_path.glob("runs/*/run.json")]

    assert len(records) == 4
    assert {x["code"] for record in records for x in record["attempts"]} == {code}
