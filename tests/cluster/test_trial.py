r"""Tests for sda_ray.cluster.trial: many trials in one process, one after the other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sda_ray.cluster.trial import memory_fraction
from sda_ray.core.config import Config, save_config

# Trials as Tune keeps their process: completed, paused by the driver, or cut off by a reset
PROGRAM = """
import gc, json, os, random, shutil, sys, threading
from pathlib import Path

import numpy

from sda_ray.cluster.connect import connected
from sda_ray.core.config import load_config

root, data, count = Path(sys.argv[1]), sys.argv[2], 50
config = load_config(root / "config.json")

def spec(i, seed, **more):
    return {
        "runs": str(root / "runs"), "data": data, "config": config | {"seed": seed},
        "run_id": f"aaaa{i:04d}", "index": i, "attempt": 1, "rungs": [1, 2], "record": {},
        "wandb": {"mode": "disabled" if i % 10 == 8 else "offline"}, "cpus": 1,
        "request": str(root / "stop"), **more,
    }

def measured():
    gc.collect()
    words = Path("/proc/self/statm").read_text().split()
    threads = len(os.listdir("/proc/self/task"))
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE"), threads, len(os.listdir("/proc/self/fd"))

def run(i):
    return json.loads(next((root / "runs").glob(f"*_aaaa{i:04d}/run.json")).read_text())

def curve(i):
    file = next((root / "runs").glob(f"*_aaaa{i:04d}/metrics.jsonl"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [(line["epoch"], line["loss_train"], line["loss_valid"]) for line in lines]

with connected(cpus=1):
    from ray.tune.utils import flatten_dict
    from sda_ray.cluster.trial import Trial

    trial, said, sizes = Trial(spec(0, 0)), [], []

    for i in range(count):
        if i:
            said.append(trial.reset(spec(i, 0 if i == count - 1 else i)))

        trial.train()  # which only says where it is
        result = trial.train()

        while result["event"] == "running" and i % 5 not in (1, 3):
            result = trial.train()

        if i % 5 == 1:
            trial.close("paused")
            trial.close("paused")

        if i % 7 == 6:  # what a trial might leave behind
            random.seed(i); numpy.random.seed(i)
            import torch
            torch.manual_seed(i)

        sizes.append(measured())

    cut = [run(i)["status"] for i in range(3, count, 5)]
    paused = [run(i)["status"] for i in range(1, count, 5)]
    leases = [json.loads(x.read_text())["pid"] for x in (root / "runs").glob("*_*/lease.json")]

    # A directory that vanishes under an open run
    trial.reset(spec(60, 0))
    trial.train()
    trial.train()
    shutil.rmtree(next((root / "runs").glob("*_aaaa0060")))
    said.append(trial.reset(spec(61, 0, rungs=[1])))
    trial.train()
    after = trial.train()["event"]

    # A run of which W&B takes nothing
    said.append(trial.reset(spec(62, 0, wandb={"mode": "offline", "tags": ["a" * 65]})))
    trial.train()
    notes = flatten_dict(trial.train())["notes"]  # as Tune passes it on
    said.append(trial.reset({}))  # whatever comes
    trial.stop()

    import wandb
    print(json.dumps({
        "said": said, "sizes": sizes, "cut": cut, "paused": paused, "leases": leases,
        "first": curve(0), "last": curve(count - 1), "after": after, "notes": notes,
        "unfinished": wandb.run is not None, "modules": sorted(sys.modules),
        "beating": [t.name for t in threading.enumerate() if t.name == "lease"],
    }))
"""


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, data: Path, small: Config, home: Path
) -> dict[str, Any]:
    r"""What became of 50 trials in one process."""

    root = tmp_path_factory.mktemp("trials")
    save_config(small, root / "config.json")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), str(data)],
        env=env | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_process_of_many_trials_does_not_grow(found: dict[str, Any]) -> None:
    memory, threads, files = zip(*found["sizes"], strict=True)

    assert max(memory[10:]) < memory[9] + 8 * 2**20
    assert max(threads[10:]) <= max(threads[:10]) + 1  # a heart that is just about to stop
    assert max(files[10:]) <= max(files[:10]) + 1


def test_trial_is_closed_before_the_next_one(found: dict[str, Any]) -> None:
    assert set(found["cut"]) == {"interrupted"}
    assert set(found["paused"]) == {"paused"}
    assert set(found["leases"]) == {None}
    assert not found["unfinished"]
    assert len(found["beating"]) <= 1


def test_reset_never_fails(found: dict[str, Any]) -> None:
    assert set(found["said"]) == {True}
    assert found["after"] == "running"


def test_trial_says_why_wandb_has_nothing_of_its_run(found: dict[str, Any]) -> None:
    ((subject, text),) = found["notes"]
    assert subject == "W&B" and "Tags must be between 1 and 64 characters" in text


def test_trial_has_the_bits_of_the_first_whatever_came_before(found: dict[str, Any]) -> None:
    assert found["first"][: len(found["last"])] == found["last"] != []


def test_trial_loads_nothing_that_it_does_not_need(found: dict[str, Any]) -> None:
    not_needed = {
        "optuna",
        "matplotlib",
        "scipy",
        "torch._dynamo",
        "sda_ray.search.study",
        "sda_ray.sweep.launch",
    }

    assert not not_needed & {*found["modules"]}


def test_share_of_a_gpu_is_a_limit_that_leaves_room_for_cuda() -> None:
    total = 16 * 2**30

    assert memory_fraction(0.5, total) == 0.5 - 1 / 32
    assert all(4 * memory_fraction(0.25, x * 2**30) < 1 for x in (1, 4, 16, 80))
