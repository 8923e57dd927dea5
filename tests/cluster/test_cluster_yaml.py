r"""Tests for cluster.yaml: what Ray's own check finds, and what it does not."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]

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


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_schema_of_ray_is_met(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


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
    assert {"**/runs", "**/data", "**/.git"} <= set(config["rsync_exclude"])


def test_versions_are_pinned(config: dict[str, Any]) -> None:
    installs = [c for c in config["setup_commands"] if "pip install" in c]
    pins = (ROOT / "constraints.txt").read_text()

    assert len(installs) == 1
    assert "-c constraints.txt" in installs[0]
    assert re.search(r"^ray==2\.60\.", pins, re.MULTILINE)
    assert re.search(r"^boto3==", pins, re.MULTILINE)
