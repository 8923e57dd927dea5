r"""Tests for `sda-ray export` and `sda-ray reproduce`."""

import json
from pathlib import Path

import pytest
from conftest import Cli
from sweeping import make_sweep

from sda_ray import load_sde
from sda_ray.runs.path import RunPath


def test_run_is_exported_and_reproduced(
    cli_here: Cli, settings: list[str], tmp_path: Path
) -> None:
    assert cli_here("train", *settings, "epochs=2").returncode == 0
    (path,) = RunPath.all(tmp_path / "runs")

    done = cli_here("export", path.id, "out")
    assert done.returncode == 0, done.stderr
    assert load_sde(tmp_path / "out", length=8).shape == (8, 2, 16, 16)

    done = cli_here("reproduce", path.name, "--epochs=2")
    assert done.returncode == 0, done.stderr
    assert "the same bits over 2 epochs." in done.stdout

    line, *others = path.metrics.read_text().splitlines()
    line = json.dumps(json.loads(line) | {"loss_train": 0.25})
    path.metrics.write_text("\n".join((line, *others, "")))
    done = cli_here("reproduce", path.name)
    assert done.returncode == 1
    assert "epoch 1 differs: loss_train 0.25 then, " in done.stdout
    assert "Versions, code, device and threads are those of the run." in done.stdout


@pytest.mark.parametrize("words", [("export", "width", "out"), ("reproduce", "width")])
def test_sweep_is_no_run_but_has_a_best_one(
    cli_here: Cli, tmp_path: Path, words: tuple[str, ...]
) -> None:
    study = make_sweep(tmp_path / "runs", "width", 6)
    complete = [trial for trial in study.records() if trial.state == "complete"]
    best = min(complete, key=lambda trial: trial.values[30])
    done = cli_here(*words)

    assert done.returncode == 2
    assert f"takes a run. Its best run is crimson-cloud-{best.index}_{best.run_id}" in done.stderr
    assert "there is no run 'nothing'" in cli_here(words[0], "nothing", *words[2:]).stderr
