r"""Tests for sda_ray.cluster.clusterfile, and for the cluster files of the repository."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sda_ray.cluster.clusterfile import check_cluster

ROOT = Path(__file__).parents[2]
FILES = ["cluster.yaml", "cluster.local.yaml"]

# Keys of EC2's RunInstances: Ray hands them on unseen, and a misspelt one fails at the launch.
NODE_KEYS = {
    "BlockDeviceMappings",
    "IamInstanceProfile",
    "ImageId",
    "InstanceMarketOptions",
    "InstanceType",
    "KeyName",
    "MetadataOptions",
    "SecurityGroupIds",
    "SubnetIds",
}

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    r"""Makes a copy of a cluster file as a user would fill it in, with more changes."""

    token = home / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("0" * 64)
    token.chmod(0o600)

    monkeypatch.chdir(tmp_path)

    for name in ("sda_ray", "sweeps", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)

    def make(name: str = "cluster.yaml", changes: dict[str, str] | None = None) -> Path:
        filled = {"ami-CHANGE-ME": "ami-0", "sg-CHANGE-ME": "sg-0", "CHANGE-ME": "192.0.2.1"}
        text = (ROOT / name).read_text()

        for given, wanted in {**filled, **(changes or {})}.items():
            assert given in text or given in filled
            text = text.replace(given, wanted)

        (tmp_path / "filled.yaml").write_text(text)

        return tmp_path / "filled.yaml"

    return make


@pytest.mark.parametrize("name", FILES)
def test_files_of_ours_have_no_fault_once_filled_in(make: Make, name: str) -> None:
    assert check_cluster(make(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_what_is_to_be_changed_is_named_with_its_line(make: Make, name: str) -> None:
    make(name)
    faults = [x for x in check_cluster(ROOT / name) if "CHANGE-ME" in x]
    lines = (ROOT / name).read_text().splitlines()

    assert len(faults) >= 2
    assert all("CHANGE-ME" in lines[int(fault.split()[1]) - 1] for fault in faults)


CASES = {
    "gpus": ({'"GPU": 1}': '"gpus": 1}'}, ["resource 'gpus' is no GPU", "Write GPU"]),
    "gpu": ({'"GPU": 1}': '"gpu": 1}'}, ["resource 'gpu' is no GPU"]),
    "node": ({"min_workers: 0": "min_worker: 0"}, ["types.gpu: ", "'min_worker'"]),
    "token": ({'"~/.ray/auth_token"': '"~/token"'}, ["file_mounts has no '~/.ray/auth_token'"]),
    "mode": ({"chmod 600": "chmod 644"}, ["setup_commands must `chmod 600 ~/.ray/auth_token`"]),
    "auth": (
        {"RAY_AUTH_MODE=token": "RAY_AUTH=token"},
        ["head_start_ray_commands must export RAY_AUTH_MODE", "worker_start_ray_commands must"],
    ),
    "root": ({"SDA_RAY_ROOT": "SDA_ROOT"}, ["must export SDA_RAY_ROOT before `ray start`"]),
    "dashboard": ({"host=127.0.0.1": "host=0.0.0.0"}, ["opens the dashboard to 0.0.0.0"]),
    "port": (
        {"--runtime-env-agent-port=8273": "--runtime-env-agent-port 52368"},
        ["head_start_ray_commands names port 52368", "Choose one below 32768"],
    ),
    "ssh": ({"      SecurityGroupIds:": "      # "}, ["no SecurityGroupIds", "SSH"]),
    "schema": ({"idle_timeout_minutes": "idle_minutes"}, ["the file: ", "'idle_minutes'"]),
    "missing": ({"./LICENSE": "./LICENCE"}, ["./LICENCE does not exist"]),
}


@pytest.mark.parametrize("case", CASES)
def test_fault_is_found(make: Make, case: str) -> None:
    changes, words = CASES[case]
    said = "\n".join(check_cluster(make("cluster.yaml", changes)))

    for word in words:
        assert word in said


def test_token_that_others_can_read_is_a_fault(make: Make, home: Path) -> None:
    file = make()
    (home / ".ray" / "auth_token").chmod(0o644)

    assert check_cluster(file) == [
        "~/.ray/auth_token can be read by others: chmod 600 ~/.ray/auth_token"
    ]


@pytest.mark.parametrize("text", ["", "[", "just words", "cluster_name: x"])
def test_nonsense_is_said_to_be_such(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)

    assert check_cluster(tmp_path / "x.yaml")
    assert check_cluster(tmp_path / "missing.yaml")


def test_command_says_what_is_wrong(make: Make) -> None:
    def run(file: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "sda_ray.cluster.clusterfile", str(file)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}

        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run(make())
    assert (done.returncode, done.stderr) == (0, "")
    done = run(make(changes={"chmod 600": "chmod 644"}))
    assert done.returncode == 1 and "chmod 600" in done.stderr


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_workers_are_spot_gpus_from_none_to_four(config: dict[str, Any]) -> None:
    gpu = config["available_node_types"]["gpu"]

    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 4)
    assert gpu["max_workers"] <= config["max_workers"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_head_is_on_demand_and_runs_no_trials(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]

    assert head["max_workers"] == 0
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


def test_names_are_spelt_as_ray_and_ec2_spell_them(config: dict[str, Any]) -> None:
    for node in config["available_node_types"].values():
        assert set(node["resources"]) <= {"CPU", "GPU"}
        assert set(node["node_config"]) <= NODE_KEYS


def test_nothing_is_open_to_the_world(config: dict[str, Any]) -> None:
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]

    for node in config["available_node_types"].values():
        # Ray's own group, used by nodes without one, opens SSH to all addresses (2.60.0).
        assert node["node_config"]["SecurityGroupIds"]
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_asks_for_the_token(config: dict[str, Any], commands: str) -> None:
    start = config[commands][-1]

    assert "RAY_AUTH_MODE=token" in start.split("ray start")[0]
    assert "SDA_RAY_ROOT=" in start.split("ray start")[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in c for c in config["setup_commands"])


def test_all_that_is_installed_is_sent_and_nothing_else(config: dict[str, Any]) -> None:
    sent = {local for local in config["file_mounts"].values() if local.startswith("./")}

    assert all((ROOT / local).exists() for local in sent)
    assert not sent & {".", "./", "./runs", "./data", "./.git"}
    assert config["rsync_exclude"] == ["**/__pycache__"]  # `**/runs` would be a package of ours


def test_versions_are_pinned(config: dict[str, Any]) -> None:
    installs = [c for c in config["setup_commands"] if "pip install" in c]
    pins = (ROOT / "constraints.txt").read_text()

    assert len(installs) == 1
    assert "-c constraints.txt" in installs[0]
    assert re.search(r"^ray==2\.60\.", pins, re.MULTILINE)
    assert re.search(r"^boto3==", pins, re.MULTILINE)
