r"""Tests for sda_ray.core.presence, and for what becomes of a run whose directory vanishes."""

import shutil
from pathlib import Path

import pytest
from conftest import Start

from sda_ray.core.config import Config
from sda_ray.core.presence import Vanished, check_present, is_present
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train


def test_what_is_gone_is_not_present(tmp_path: Path) -> None:
    (tmp_path / "lease.json").touch()
    check_present(tmp_path / "lease.json")

    for gone in (tmp_path / "x" / "lease.json", tmp_path / "lease.json" / "lease.json"):
        assert not is_present(gone)

        with pytest.raises(Vanished, match=r"was deleted or unmounted while it was in use"):
            check_present(gone)


@pytest.mark.parametrize("closed", [False, True])
def test_training_ends_and_nothing_is_made_again(
    tmp_path: Path, small: Config, data: Path, caplog: pytest.LogCaptureFixture, closed: bool
) -> None:
    run = Run(tmp_path / "runs", small, wandb=Wandb("disabled"))
    training = train(run, data)
    next(training)
    shutil.rmtree(tmp_path / "runs")

    if closed:
        training.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(Vanished):
            next(training)

    run.close("failed")
    assert not (tmp_path / "runs").exists()
    assert caplog.text == ""


@pytest.mark.parametrize("whole", [False, True], ids=["run", "runs"])
def test_command_ends_with_one_message(
    start: Start, settings: list[str], tmp_path: Path, whole: bool
) -> None:
    process = start("train", "epochs=100000", *settings, WANDB_MODE="offline")
    runs = tmp_path / "runs"

    while not list(runs.glob("*_*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]

    (path,) = RunPath.all(runs)
    gone = (
        path.directory.rename(tmp_path / "gone") if not whole else runs.rename(tmp_path / "gone")
    )
    shutil.rmtree(gone)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"sda-ray: {path.directory} was deleted or unmounted")
    assert errors.count("\n") == 1, errors
    assert list(runs.glob("**/*")) == list(runs.glob(".*")) == []
