r"""Runs from elsewhere, and a sweep that covers them."""

from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from sda_ray.core.config import CONFIG, Config
from sda_ray.core.lease import Lease
from sda_ray.core.space import choice, loguniform
from sda_ray.data.dataset import fingerprint
from sda_ray.runs.path import RunPath, sweep_directory
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run
from sda_ray.search.promotion import TrialRecord
from sda_ray.search.study import Study
from sda_ray.sweep.definition import Sweep
from sda_ray.sweep.prior_runs import Prior, Refusal, collect
from sda_ray.sweep.record import Options

__all__ = [
    "OFF",
    "SMALL_SWEEP",
    "SPACE",
    "by_id",
    "bytes_of",
    "collected",
    "elsewhere",
    "options_of",
    "record_of",
    "records",
    "runs",
    "sweep",
]

OFF = Wandb("disabled")
SPACE: dict[str, Any] = {
    "learning_rate": loguniform(1e-4, 1e-2),
    "activation": choice("SiLU", "ReLU"),
}


@pytest.fixture(scope="module")
def elsewhere(data: Path, small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""A directory of three runs: two finished ones, of which one has seed 7, and one stopped."""

    runs = tmp_path_factory.mktemp("elsewhere")
    record = {"data": fingerprint(data)}

    changes: list[Config] = [{}, {"seed": 7, "activation": "ReLU"}, {"ema": 0.5}]

    for number, more in enumerate(changes, 1):
        run = Run(runs, small | more, f"{number}" * 8, number, OFF, record=record)

        for metrics in train_run(run, data):
            if "ema" in more and metrics["epoch"] == 2:
                break

        run.close("interrupted" if "ema" in more else "finished")

    return runs


SMALL_SWEEP = Sweep("x", {**CONFIG, **SMALL}, SPACE, min_epochs=1)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()

    return tmp_path / "runs"


@pytest.fixture
def sweep() -> Sweep:
    return SMALL_SWEEP.check()


def record_of(sweep: Sweep, info: Any) -> dict[str, Any]:
    return {
        "name": sweep.name,
        "trials": sweep.trials,
        "definition": sweep.definition(),
        "fingerprint": info.fingerprint,
        "options": {},
    }


def options_of(runs: Path, data: Path) -> Options:
    return Options(runs.parent, runs, data)


def records(runs: Path, name: str) -> list[TrialRecord]:
    directory = sweep_directory(runs, name)
    lease = Lease(directory / "lease.json", name)

    try:
        return Study(directory / "study.journal", name, lease).records()
    finally:
        lease.release()


def collected(
    sources: list[Path], sweep: Sweep, runs: Path, data: Path
) -> tuple[list[Prior], list[Refusal]]:
    found = list(collect(sources, sweep, runs, data))
    refused = [x for x in found if isinstance(x, Refusal)]

    return [x for x in found if isinstance(x, Prior)], refused


def bytes_of(directory: Path) -> dict[str, Any]:
    r"""Returns the files in a directory, with their times and bytes."""

    return {
        str(path.relative_to(directory)): (
            path.stat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in [directory, *directory.rglob("*")]
    }


def by_id(directory: Path, id: str) -> Path:
    path = RunPath.of_id(directory, id)
    assert path is not None

    return path.directory
