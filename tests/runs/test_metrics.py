r"""Tests for sda_ray.runs.metrics: what a run is judged by is read from its files."""

import json
import math
from pathlib import Path

import pytest

from sda_ray.core.config import Config, save_config
from sda_ray.core.errors import UserError
from sda_ray.nn.score import make_score, network_settings
from sda_ray.runs.metrics import Cost, History, best, cost_of, finals
from sda_ray.runs.path import RunPath


@pytest.fixture
def path(tmp_path: Path, small: Config) -> RunPath:
    path = RunPath(tmp_path / "calm-cat-1_abcdefgh")
    path.directory.mkdir()
    save_config(small, path.config)
    lines = [{"epoch": e, "loss_valid": 1 / e, "seconds": 2.5, "lr": 0.1} for e in (1, 2)]
    path.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.record.write_text(json.dumps({"status": "finished", "energy": 7}))

    return path


def test_values_come_in_the_order_of_the_objectives(path: RunPath, small: Config) -> None:
    parameters = sum(p.numel() for p in make_score(**network_settings(small)).parameters())
    names = ("loss_valid", "parameters", "seconds", "energy", "lr")

    assert finals(path, names) == [0.5, parameters, 5.0, 7.0, 0.1]


def test_the_best_epoch_is_judged_as_the_last_one_is() -> None:
    losses = {1: 5.0, 2: 3.0, 3: 0.5, 4: 2.5, 5: 1.0, 6: 2.0}
    lines = [{"epoch": e, "loss_valid": x} for e, x in losses.items()]

    assert best(lines, {2, 4, 6}) == lines[5]
    assert best(lines[:5], {2, 4, 6}) == lines[2]
    assert best(lines[:4], {2, 4, 6}) == lines[3]


def test_cost_of_a_run_has_its_pace_and_memory_of_late(tmp_path: Path) -> None:
    path = RunPath(tmp_path)
    lines = [{"epoch": e, "seconds": 9.0 if e < 5 else 2.0} for e in range(1, 11)]
    lines[8]["memory"] = 3.5
    path.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert cost_of(path, 9)[:3] == (4 * 9 + 5 * 2, 2, 3.5)
    assert cost_of(path, 10)[:3] == (4 * 9 + 6 * 2, 2, None)
    assert cost_of(path, 0) == cost_of(None, 3) == Cost()


def test_objective_that_is_no_number_is_named(path: RunPath) -> None:
    with pytest.raises(UserError, match=r"has no number 'status'.*loss_valid.* and parameters"):
        finals(path, ("loss_valid", "status"))


def test_repeated_epoch_is_compared_by_what_its_line_has(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 1, "loss_train": 0.5, "loss_valid": 1.0, "seconds": 3.0}\n')
    history = History(file)
    again = {"epoch": 1, "loss_train": 0.5, "loss_valid": 1.0, "seconds": 4.0, "new": math.nan}
    history.lines[1]["memory"], again["memory"] = 1.0, 2.0

    assert history.differences(again) == ""
    assert history.differences(again | {"loss_valid": 2.0}) == "loss_valid 1.0 before, 2.0 now"
