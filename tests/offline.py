r"""Runs that were tracked offline, as they wait for their upload to W&B."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sda_ray.core.config import CONFIG, save_config
from sda_ray.core.files import append_line, write_json
from sda_ray.runs.path import RunPath

__all__ = ["EPOCHS", "ID", "NAME", "STEPS", "WANDB", "attempted", "make_run", "run"]

ID = "abcd1234"
NAME = "misty-river-7"
EPOCHS = 6
STEPS = list(range(1, EPOCHS + 2))  # the last is the picture's

WANDB = {
    "mode": "offline",
    "project": "flows",
    "entity": None,
    "tags": ["first", "second"],
    "group": "width",
    "job_type": "trial",
}

# An attempt at a run, offline: its epochs, and its end by SIGKILL or in good order
ATTEMPT = """
import json, os, signal, sys, time
from pathlib import Path
from sda_ray.runs.tracking import Tracker, Wandb

directory, id, name, options, first, last = sys.argv[1:]
options = json.loads(options)
path = Path(directory)
config = json.loads((path / "config.json").read_text())
tracker = Tracker(path, id, name, config, Wandb(**options | {"tags": tuple(options["tags"])}))

for line in (path / "metrics.jsonl").read_text().splitlines():
    values = json.loads(line)
    step = values.pop("epoch")

    if int(first) <= step <= int(last):
        tracker.log(values, step)

if int(last) == config["epochs"]:
    tracker.log_image("samples", path / "samples.png", int(last) + 1)
    tracker.finish()
else:
    fragments = list(path.glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + 20

    while time.monotonic() < deadline:  # W&B writes once a second
        time.sleep(0.2)

        if any(b"loss_valid" in fragment.read_bytes() for fragment in fragments):
            break

    os.kill(os.getpid(), signal.SIGKILL)
"""


def make_run(runs: Path, id: str = ID, status: str = "finished", **record: Any) -> RunPath:
    r"""Makes what a finished training leaves, apart from weights and W&B's own files."""

    path = RunPath(runs / f"{NAME}_{id}")
    path.directory.mkdir(parents=True)
    save_config(CONFIG | {"epochs": EPOCHS}, path.config)
    write_json(path.record, {"status": status, "id": id, "wandb": WANDB, **record})
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path.samples)

    for epoch in range(1, EPOCHS + 1):
        losses = {"loss_train": 1 / epoch, "loss_valid": 0.1 + 1 / epoch, "lr": 1e-3}
        append_line(path.metrics, {"epoch": epoch, **losses, "seconds": 0.5})

    return path


@pytest.fixture(scope="module")
def attempted(tmp_path_factory: pytest.TempPathFactory, home: Path) -> RunPath:
    r"""A run of two attempts, of which the first was killed in epoch 4."""

    path = make_run(tmp_path_factory.mktemp("attempted"))
    variables = {k: x for k, x in os.environ.items() if not k.startswith("WANDB_")}
    variables |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}

    for first, last in ((1, 3), (4, EPOCHS)):
        words = [str(path.directory), ID, NAME, json.dumps(WANDB), str(first), str(last)]
        subprocess.run([sys.executable, "-c", ATTEMPT, *words], env=variables, timeout=60)
        time.sleep(1.1)  # the names of fragments are times, in seconds

    return path


@pytest.fixture
def run(attempted: RunPath, tmp_path: Path) -> RunPath:
    r"""A copy of this run."""

    copy = tmp_path / "runs" / attempted.directory.name
    shutil.copytree(attempted.directory, copy, symlinks=True)
    return RunPath(copy)
