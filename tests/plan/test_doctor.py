r"""Tests for sda_ray.plan.doctor, and the facts that it judges."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from sda_ray.cluster.nodes import examine, listening, owner_of, reaches
from sda_ray.plan.doctor import judge


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, Any]:
    r"""What a machine says that all is well with."""

    found = examine(tmp_path)
    quiet = {"listening": [], "token": 0o600, "auth": "token", "ray": "", "address": ""}

    return found | quiet | {"free": {"/": 10**12}, "files": (1024, 10**6)}


def states(facts: dict[str, Any], driver: dict[str, Any], shared: bool = True) -> dict[str, str]:
    r"""Returns what is not well, with what is found."""

    findings = [*judge("node", facts, driver, shared)]
    assert all(bool(x.do) == (x.state != "ok") for x in findings)  # always what to do

    return {f"{x.what}: {x.state}": x.found for x in findings if x.state != "ok"}


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server.getsockname()[1]


def test_facts_of_this_machine_are_found(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    found = examine(tmp_path, "token")

    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"].keys() >= {"sda_ray", "ray", "torch", "optuna", "wandb"}
    assert found["sees"]
    assert found["free"][str(tmp_path)] > 0
    assert not examine(tmp_path / "none", "token")["sees"]


def test_machine_that_is_well_has_no_fault(facts: dict[str, Any]) -> None:
    assert states(facts, {}) == {}
    assert states(facts | {"skew": 0.1, "rate": 1e9}, facts) == {}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"skew": -5.0}, "clock: warning"),
        ({"skew": 500.0}, "clock: fault"),
        ({"free": {"/": 2 * 10**9}}, "disk: warning"),
        ({"free": {"/": 10**8}}, "disk: fault"),
        ({"sees": False, "rate": 1e6}, "storage: warning"),
        ({"faults": ["no room"], "sees": False}, "storage: fault"),
        ({"locks": "files in /runs cannot be locked"}, "locks: fault"),
        ({"gpus": 0, "expected_gpus": 2}, "GPU: fault"),
        ({"gpus": "no module named torch", "expected_gpus": 2}, "GPU: fault"),
        ({"unreached": "api.wandb.ai:443: timed out"}, "W&B: warning"),
        ({"auth": ""}, "token: fault"),
        ({"token": 0o644}, "token: fault"),
        ({"files": (64, 64)}, "files: fault"),
        ({"ray": "root"}, "/tmp/ray: fault"),
        ({"listening": [[8265, "0.0.0.0", ""]]}, "ports: fault"),
        ({"listening": [[8266, "0.0.0.0", "/x/ray/dashboard/dashboard.py"]]}, "ports: fault"),
        ({"listening": [[111, "::", ""]]}, "ports: warning"),
    ],
)
def test_each_fault_has_its_finding(
    facts: dict[str, Any], change: dict[str, Any], expected: str
) -> None:
    node = facts | {"skew": 0.0, "rate": 1e9, "sees": True} | change

    assert [*states(node, facts)] == [expected]


def test_ray_without_token_is_a_fault_and_with_one_is_not(facts: dict[str, Any]) -> None:
    gcs = [6379, "0.0.0.0", "/x/ray/core/src/ray/gcs/gcs_server --log_dir=/x"]
    metrics = [44227, "0.0.0.0", "python /x/ray/dashboard/dashboard.py --port=8265"]
    ssh = [22, "0.0.0.0", ""]
    node = facts | {"listening": [gcs, metrics, ssh]}

    assert states(node, {}) == {}
    assert "ports: fault" in states(node | {"auth": ""}, {})


def test_locks_are_judged_where_the_directory_of_runs_is_used(facts: dict[str, Any]) -> None:
    local = facts | {
        "locks": "locks in /runs hold on each host for itself",
        "rate": 1e9,
        "skew": 0.0,
    }

    assert [*states(local, {})] == ["locks: fault"]
    assert states(local | {"sees": False}, facts) == {}


def test_other_version_is_a_fault_that_names_both(facts: dict[str, Any]) -> None:
    other = facts | {"versions": facts["versions"] | {"torch": "1.0"}, "skew": 0.0, "rate": 1e9}
    torch = facts["versions"]["torch"]

    assert states(other | {"sees": True}, facts) == {"versions: fault": f"torch 1.0, not {torch}"}


def test_port_that_is_open_to_others_is_found_with_its_process(open_port: int) -> None:
    found = {port: (address, command) for port, address, command in listening()}

    assert found[open_port][0] == "0.0.0.0"
    assert Path(sys.executable).name in found[open_port][1]


def test_port_on_loopback_is_none_of_them() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as four,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
    ):
        ports = {port for port, _, _ in listening()}
        assert not ports & {four.getsockname()[1], six.getsockname()[1]}


def test_port_for_all_of_both_families_is_found() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        assert server.getsockname()[1] in {port for port, _, _ in listening()}


def test_server_is_reached_or_not(open_port: int) -> None:
    assert reaches(f"http://127.0.0.1:{open_port}") == ""
    assert "127.0.0.1:1" in reaches("http://127.0.0.1:1")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_directory_of_another_user_has_an_owner() -> None:
    assert owner_of(Path("/")) == "root"


def test_directory_of_ours_or_none_has_no_other_owner(tmp_path: Path) -> None:
    assert owner_of(tmp_path) == owner_of(tmp_path / "none") == ""


def test_command_examines_this_machine_without_ray(cli: Cli, home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("x")
    token.chmod(0o600)
    started = time.monotonic()
    done = cli("doctor", "--json")
    found = json.loads(done.stdout)

    assert found["faults"] == sum(x["state"] == "fault" for x in found["findings"])
    assert done.returncode == (found["faults"] > 0)
    assert {"versions", "disk", "storage", "ports", "files"} <= {
        x["what"] for x in found["findings"]
    }
    assert all(x["do"] for x in found["findings"] if x["state"] != "ok")
    assert "storage" in cli("doctor").stdout
    assert "`sda-ray plan x.py` checks a sweep" in cli("doctor", "x.py").stderr
    assert time.monotonic() - started < 60


DRIVER = """
import json, sys
from sda_ray.cluster.connect import connected
from sda_ray.cluster.nodes import listening
with connected(sys.argv[1]):
    print(json.dumps([command for _, _, command in listening() if "sys.argv[1]" in command]))
"""


@pytest.fixture
def cluster(env: dict[str, str], home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    r"""A head with a second node, without a token: its address, and the variables."""

    program = f"""
import sys
from ray.cluster_utils import Cluster
options = dict(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)
cluster = Cluster(True, head_node_args=options | dict(temp_dir={str(home / "c")!r}))
cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
    (home / "ray").mkdir(exist_ok=True)  # Ray 2.60 writes an address there, and does not make it
    variables = {**env, "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "300"}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []

    try:
        for line in process.stdout:
            said.append(line)

            if line.startswith("address "):
                break

        assert said and said[-1].startswith("address "), "".join(said)
        yield said[-1].split()[1], variables
        process.communicate("", timeout=120)
    finally:
        process.kill()
        process.communicate()


def test_every_node_of_a_cluster_is_examined(
    cluster: tuple[str, dict[str, str]], cli: Cli, tmp_path: Path
) -> None:
    address, variables = cluster
    (tmp_path / "runs").mkdir()
    done = cli("doctor", f"--address={address}", "--json", timeout=400, **variables)
    found = json.loads(done.stdout)["findings"]
    known = {(x["what"], x["state"], x["found"]) for x in found}
    told = {kind: [x["found"] for x in found if x["what"] == kind] for kind, _, _ in known}

    assert done.returncode == 1
    assert len(told["versions"]) == 2  # nodes
    assert len(told["clock"]) == 1
    assert ("storage", "ok", "sees the directory of runs") in known
    assert ("token", "fault", "RAY_AUTH_MODE is 'disabled'") in known
    assert any("without a token" in text for text in told["ports"])
    assert [*(tmp_path / "runs").iterdir()] == []

    # A driver is one of Ray's processes, whatever its command
    command = [sys.executable, "-c", DRIVER, address]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    commands = json.loads(done.stdout.splitlines()[-1])

    assert commands and all(command.startswith("ray:: ") for command in commands)
