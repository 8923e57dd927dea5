r"""Tests for sda_ray.cluster.nodes, and for sweeps as jobs of a cluster, on a real one of one node."""

import json
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
from recorded_code import SCRIPT, spoil

import sda_ray
from sda_ray.cli.cluster import overview

PACKAGE = Path(sda_ray.__file__).parent

# Holds both CPUs, and prints the status of the cluster
BUSY = """
import json, sys, time
from pathlib import Path
from sda_ray.cluster.connect import connected, live_nodes
from sda_ray.cluster.nodes import bandwidth, clock_skew, cluster_status, survey
from sda_ray.cluster.nodes import examine

with connected(sys.argv[1]):
    import ray

    class Trial:
        def ready(self):
            pass

    trial = ray.remote(num_cpus=2)(Trial).remote()
    ray.get(trial.ready.remote())
    deadline = time.monotonic() + 60

    while (status := cluster_status(Path("nowhere")))["cpus"]["used"] < 2:
        assert time.monotonic() < deadline, status
        time.sleep(0.2)

    (id,) = live_nodes()
    status["skew"], status["rate"] = clock_skew(id), bandwidth(id)
    status["answers"] = survey(lambda: {"cpus": 2}, nodes=[id])
    status["errors"] = survey(examine, "a text", nodes=[id])
    print(json.dumps(status))
"""


def ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    found = [s.getsockname()[1] for s in sockets]

    for s in sockets:
        s.close()

    return found


@pytest.fixture(scope="module")
def cluster(home: Path, environment: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    r"""A Ray of one node with 2 CPUs, a token and a dashboard: its address, and the variables."""

    pytest.importorskip("aiohttp_cors", reason="jobs need ray[default]")
    directory = Path("/tmp") / f"sda-{secrets.token_hex(3)}"
    directory.mkdir(mode=0o700)
    (token := directory / "token").write_text(secrets.token_hex(32))
    token.chmod(0o600)
    gcs, dashboard, agent, client = ports(4)
    env = environment | {
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


def test_names_are_shown_as_plain_text() -> None:
    from rich.console import Console

    node: dict[str, Any] = {
        "id": "1",
        "name": "\x1b[31m[bold]x",
        "ip": "::1",
        "role": "head",
        "state": "alive",
        "cpus": 2.0,
        "gpus": 0.0,
        "runs": [{"run": "[red]", "sweep": None, "trial": 1, "epoch": 0, "epochs": None}],
    }
    console = Console(width=160)
    used = {"cpus": {"used": 1.0, "total": 2.0}, "gpus": {"used": 0.0, "total": 0.0}}

    with console.capture() as captured:
        console.print(overview({"nodes": [node], "elsewhere": [], **used}))

    out = captured.get()

    assert "\x1b" not in out and "[bold]x" in out and "[red]" in out and "alive" in out
    assert "1 of 2 CPUs and 0 of 0 GPUs are in use" in out


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


def test_status_and_survey_of_a_cluster(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, env = cluster
    done = subprocess.run(
        [sys.executable, "-c", BUSY, address],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=180,
    )

    assert done.returncode == 0, done.stderr

    status = json.loads(done.stdout.splitlines()[-1])
    (node,) = status["nodes"]

    assert status["cpus"] == {"used": 2.0, "total": 2.0}
    assert status["address"].endswith(address.rpartition(":")[2])
    assert (node["role"], node["state"], node["cpus"]) == ("head", "alive", 2.0)
    assert status["answers"] == {node["id"]: {"cpus": 2}}
    assert "no attribute 'parents'" in status["errors"][node["id"]]["error"]
    assert abs(status["skew"]) < 5 and status["rate"] > 0


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

    assert "in the background" in out and "sda-ray stop tiny" in out

    shutil.rmtree(tmp_path / "sda_ray" / "__pycache__", ignore_errors=True)
    whole = {
        name: (tmp_path / "sda_ray" / f"{name}.py").read_bytes()
        for name in ("cluster/trial", "nn/unet")
    }
    spoil(tmp_path, *whole)  # before its workers have started
    deadline = time.monotonic() + 240

    while not list(tmp_path.glob("runs/*/run.json")):
        assert time.monotonic() < deadline, (directory / "study.journal").read_text()
        time.sleep(0.2)

    for name, content in whole.items():
        (tmp_path / "sda_ray" / f"{name}.py").write_bytes(content)

    found = json.loads(run("cluster", "status", "--address", address, "--json"))
    running = [x for node in found["nodes"] for x in node["runs"]]

    assert [x["sweep"] for x in running] in (["tiny"], []), found  # none between two of them
    assert found["cpus"]["used"] == 1, found

    out = run("attach", "tiny", timeout=300)

    assert "Best configuration" in out

    code = json.loads((directory / "sweep.json").read_bytes())["code"]
    records = [json.loads(file.read_bytes()) for file in tmp_path.glob("runs/*/run.json")]

    assert len(records) == 4
    assert {x["code"] for record in records for x in record["attempts"]} == {code}
