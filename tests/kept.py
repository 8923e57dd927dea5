r"""The runs of a sweep, and a retention of their checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sda_ray.core.config import Config
from sda_ray.runs.checkpoint import resumable
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run
from sda_ray.search.promotion import TrialRecord
from sda_ray.sweep.retention import Retention

__all__ = ["MADE", "Keeping", "identity", "keeping", "made", "path_of", "runs", "snapshot"]

# The status of the runs of a sweep, and their epochs
MADE = {
    1: ("paused", 1),
    2: ("paused", 1),
    3: ("paused", 2),
    4: ("finished", 3),
    5: ("finished", 3),
    6: ("diverged", 1),
    7: ("running", 1),
    8: ("failed", 2),
}
STATES = {"finished": "complete", "paused": "running"}


def identity(index: int) -> str:
    return f"{index:08}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path, small: Config) -> Path:
    r"""The runs of a sweep, trained with different seeds."""

    runs = tmp_path_factory.mktemp("room") / "runs"
    disabled = Wandb("disabled")

    for index, (status, last) in MADE.items():
        run = Run(
            runs,
            small | {"seed": index},
            identity(index),
            index,
            wandb=disabled,
            attempt=1,
            record={"sweep": "width", "trial": index},
        )
        training = train_run(run, data, rungs=(1, 2, 3))

        for metrics in training:
            if metrics["epoch"] == last < 3:
                break

        training.close()  # type: ignore[attr-defined]
        run.close(status)

    return runs


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def path_of(runs: Path, index: int) -> RunPath:
    path = RunPath.of_id(runs, identity(index))
    assert path is not None

    return path


def records_of(runs: Path) -> list[TrialRecord]:
    r"""Returns the records in the study of the sweep; lower numbers have lower losses."""

    return [
        TrialRecord(
            index,
            identity(index),
            STATES.get(status, status),
            {"paused": last}.get(status, 3),
            3,
            {epoch: 1 / epoch + index / 100 for epoch in range(1, last + 1)},
            attempt=1,
        )
        for index, (status, last) in MADE.items()
    ]


class Keeping:
    r"""Creates a retention and collects its messages."""

    def __init__(self, runs: Path, **options: Any) -> None:
        self.runs = runs
        self.said: list[str] = []
        self.records = records_of(runs)
        self.retention = Retention(
            runs, "width", lambda: self.records, notify=self.said.append, **options
        )
        self.retention.finish()

    @property
    def left(self) -> set[int]:
        return {index for index in MADE if resumable(path_of(self.runs, index))}


@pytest.fixture
def keeping(runs: Path) -> Callable[..., Keeping]:
    return lambda **options: Keeping(runs, **options)


def snapshot(runs: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
