r"""Runs as their owner has them open."""

from pathlib import Path
from typing import Any

import pytest

from sda_ray.core.config import Config
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run

__all__ = ["DISABLED", "finished", "reopen", "runs"]

DISABLED = Wandb("disabled")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def finished(runs: Path, data: Path, small: Config) -> Run:
    run = Run(runs, small, wandb=DISABLED)
    list(train_run(run, data))
    run.close("finished")

    return run


def reopen(run: Run, **options: Any) -> Run:
    return Run(run.path.directory.parent, {}, run.id, wandb=DISABLED, **options)
