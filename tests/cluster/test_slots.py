r"""Tests for sda_ray.cluster.slots: what a cluster may start counts, and is asked for."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cli
from ray.util import get_node_ip_address

from sda_ray.cluster.slots import Growth, NodeType, Slots, _given, _growth

CONFIG = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "min_workers": 0, "max_workers": 4},
        "big": {"resources": {"CPU": 32, "GPU": 8}, "min_workers": 0, "max_workers": 1},
        "cpu": {"resources": {"CPU": 8}, "min_workers": 0, "max_workers": 9},
    },
}


def test_what_may_be_started_is_read_from_the_file_of_the_autoscaler() -> None:
    found = _growth(CONFIG)

    assert [(x.name, x.most) for x in found.types] == [("gpu", 4), ("big", 1), ("cpu", 5)]
    assert found.most == 5
    assert not found.unknown


@pytest.mark.parametrize(
    ("cpus", "gpus", "fits"), [(1, 1, 12), (4, 1, 12), (8, 2, 4), (1, 0, 64), (8, 8, 1), (1, 9, 0)]
)
def test_as_many_trials_fit_as_all_nodes_hold_that_may_be_up(
    cpus: float, gpus: float, fits: int
) -> None:
    slots = Slots(cpus, gpus)
    slots.growth = _growth(CONFIG)

    assert slots._possible() == fits


def test_nodes_of_which_nothing_is_known_may_come() -> None:
    r"""Machines of a lab have what they have: nobody knows before they are up."""

    lab = {"max_workers": 2, "available_node_types": {"local.cluster.node": {"resources": {}}}}

    assert _growth(lab).unknown
    assert _growth(lab | {"head_node_type": "local.cluster.node"}).most == 2
    assert not Growth((NodeType("x", 0, {}),), 0).unknown


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[str]:
    r"""The address of a cluster whose head, on this machine, was given a file."""

    (tmp_path / "x.yaml").write_text(yaml.safe_dump(CONFIG))
    words = ["--gcs-address=192.0.2.1:1", f"--autoscaling-config={tmp_path / 'x.yaml'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield "192.0.2.1:1"
    process.communicate(b"\n")


def test_only_the_file_of_the_cluster_itself_is_taken(monitor: str) -> None:
    assert _given(monitor) == CONFIG
    assert _given("192.0.2.1:2") is None


HEAD = "f" * 51 + "00000"  # the id that Ray's provider for tests gives its head

AUTOSCALER: dict[str, Any] = {
    "cluster_name": "test",
    "file_mounts": {},
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "worker_start_ray_commands": [],
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
    "file_mounts_sync_continuously": False,
    "auth": {},
    "docker": {},
    "max_workers": 3,
    "upscaling_speed": 10,
    "idle_timeout_minutes": 5,
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
}

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}

SWEEP = """from sda_ray import CONFIG, Sweep, loguniform, main

SMALL = {{"window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1)}}
CONFIG = CONFIG | SMALL | {{"batch_size": 8, "epochs": 20}}
sweep = Sweep("small", CONFIG, {{"learning_rate": loguniform(1e-4, 1e-2)}}, trials=2)

if __name__ == "__main__":
    main(sweep)
"""


@pytest.fixture
def cluster(env: dict[str, str]) -> Iterator[str]:
    r"""The address of a cluster of a head that runs no trials, and starts nodes on demand."""

    place = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))
    port = 20_000 + os.getpid() % 10_000
    address = f"{get_node_ip_address()}:{port}"
    provider = {"type": "fake_multinode", "gcs_address": address}
    (place / "x.yaml").write_text(yaml.safe_dump(AUTOSCALER | {"provider": provider}))
    own = {
        **TOKEN,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    words = [
        *("--head", "--block", f"--port={port}"),
        *("--num-cpus=0", "--include-dashboard=false", "--object-store-memory=100000000"),
        *(f"--temp-dir={place / 'r'}", f"--autoscaling-config={place / 'x.yaml'}"),
    ]
    with open(place / "log", "wb") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *words],
            env=env | own | {"RAY_USAGE_STATS_ENABLED": "0"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    try:
        until = time.monotonic() + 120

        while b"Ray runtime started" not in (place / "log").read_bytes():
            late = head.poll() is not None or time.monotonic() > until
            assert not late, (place / "log").read_text()
            time.sleep(0.2)

        yield address
    finally:
        end(place)
        head.wait(60)
        shutil.rmtree(place, ignore_errors=True)


def end(place: Path) -> None:
    r"""Ends all processes whose command line names a directory, as those of its Ray do."""

    for _ in range(3):  # some start others
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(place).encode() in file.read_bytes():
                    os.kill(int(file.parent.name), signal.SIGKILL)

        time.sleep(0.5)


def test_sweep_has_the_cluster_start_nodes_for_all_its_trials(
    cluster: str, cli: Cli, tmp_path: Path
) -> None:
    r"""Ray's own autoscaler starts them, on this machine; at first there is none."""

    (tmp_path / "small.py").write_text(SWEEP.format())
    command = ("sweep", "small.py", "--address", cluster)

    # What no node can ever hold is refused at once
    done = cli(*command, "--cpus-per-trial=2", timeout=120, **TOKEN)
    assert done.returncode == 2
    assert "a trial wants CPU=2, but" in done.stderr
    assert "a node of type small has CPU=1" in done.stderr

    done = cli(*command, timeout=240, **TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = [
        json.loads(file.read_text())["attempts"]
        for file in (tmp_path / "runs").glob("*_*/run.json")
    ]
    assert len(attempts) == 2 and all(len(x) == 1 for x in attempts)
