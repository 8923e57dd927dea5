r"""A place for whole sweeps with Ray: a root with data and a script."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sda_ray.cli.main import main
from sda_ray.core.lease import Lease
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import TrialRecord
from sda_ray.search.study import Study

__all__ = ["GRID", "SCRIPT", "Place", "lines", "place"]

SCRIPT = """
from sda_ray import CONFIG, Sweep, choice, loguniform, main

CONFIG = CONFIG | {
    "window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1),
    "epochs": 9, "batch_size": 8,
}
SPACE = {"learning_rate": loguniform(1e-4, 1e-2), "activation": choice("SiLU", "ReLU")}
sweep = Sweep("tiny", CONFIG, SPACE, trials=8, sampler="random", eta=3, min_epochs=1)

if __name__ == "__main__":
    main(sweep)
"""

GRID = (
    SCRIPT.replace("loguniform(1e-4, 1e-2)", "choice(100.0, 1e-3)")
    .replace(', "activation": choice("SiLU", "ReLU")', "")
    .replace('sampler="random", eta=3, min_epochs=1', 'sampler="grid", pruner="none"')
)


class Place:
    r"""Creates a root with data and a script, and runs commands there."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root = root
        self.runs = root / "runs"
        self.env = {k: x for k, x in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))}
        self.env |= {
            "HOME": str(root / "home"),
            "TMPDIR": str(root / "tmp"),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RAY_ADDRESS": "127.0.0.1:1",  # nobody shall go there
        }

        for name in ("home", "tmp"):
            (root / name).mkdir()

        shutil.copytree(data, root / "data")
        (root / "tiny.py").write_text(SCRIPT)

    def start(self, *words: str, **more: Any) -> "subprocess.Popen[str]":
        r"""Starts `python WORDS` or `sda-ray WORDS`; standard error comes with the output."""

        module = [] if words[0].endswith(".py") else ["-m", "sda_ray"]
        return subprocess.Popen(
            [sys.executable, *module, *words],
            env=self.env,
            cwd=more.get("cwd", self.root),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *words: str, code: int = 0, **more: Any) -> str:
        r"""Runs a command to its end and returns its output."""

        process = self.start(*words, **more)
        out, _ = process.communicate(timeout=180)

        assert process.returncode == code, out
        assert "Traceback" not in out, out

        return out

    def records(self, name: str) -> list[TrialRecord]:
        r"""Returns what the study of a sweep says."""

        directory = self.root / "copy"
        directory.mkdir(exist_ok=True)
        shutil.copy(self.runs / "sweeps" / name / "study.journal", directory)
        lease = Lease(directory / "lease.json", "a copy")
        records = Study(directory / "study.journal", name, lease).records()
        lease.release()

        return records

    def path(self, record: TrialRecord) -> RunPath:
        path = RunPath.of_id(self.runs, record.run_id)
        assert path is not None

        return path

    def wait(self, what: Callable[[], Any], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds

        while not (found := what()):
            assert time.monotonic() < deadline, "nothing happens"
            time.sleep(0.05)

        return found

    def same_as_alone(self, record: TrialRecord) -> bool:
        r"""Trains the run of a record alone, and compares the bits."""

        path = self.path(record)
        before = set(self.runs.iterdir())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a trial does
        main(argv=["train", "--config", path.id, f"--root={self.root}", "--wandb=disabled"])
        torch.set_num_threads(threads)
        (new,) = set(self.runs.iterdir()) - before
        here, alone = (
            torch.load(d / "state.pth", weights_only=True) for d in (path.directory, new)
        )

        return here.keys() == alone.keys() and all(torch.equal(here[k], alone[k]) for k in here)


@pytest.fixture(scope="module")
def place(data: Path) -> Iterator[Place]:
    root = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))  # short, for Ray's sockets
    yield Place(root, data)
    shutil.rmtree(root, ignore_errors=True)


def lines(path: RunPath) -> list[Any]:
    return [json.loads(line)["epoch"] for line in path.metrics.read_text().splitlines()]
