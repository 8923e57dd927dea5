r"""Tests for sda_ray.cluster.connect: a cluster that starts nodes for the trials that wait."""

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
import ray
import yaml
from conftest import Cli
from ray.util import get_node_ip_address

from sda_ray.cluster.connect import Slots


def test_a_cluster_that_grows_is_asked_for_as_many_trials_as_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [{"NodeID": x, "Alive": True, "Resources": {"CPU": 2.0}} for x in ("one", "two")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    slots = Slots(1, 0, most=3)
    assert slots() == 3

    slots = Slots(1, 0, most=8)
    slots.avoided = {"one": "node one: 3 workers in a row died there"}
    assert slots() == 2

    slots.grows = True
    assert slots() == 8


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

    # Ray has no public call that says whether a cluster grows
    done = cli(*command, timeout=240, **TOKEN)
    assert done.returncode == 2
    assert "a trial wants CPU=1, but node " in done.stderr
    assert "if the cluster starts nodes on demand, give --parallel" in done.stderr

    done = cli(*command, "--parallel=2", timeout=240, **TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = [
        json.loads(file.read_text())["attempts"]
        for file in (tmp_path / "runs").glob("*_*/run.json")
    ]
    assert len(attempts) == 2 and all(len(x) == 1 for x in attempts)
