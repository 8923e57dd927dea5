r"""Tests for sda_ray.report.frames: sweeps and runs as tables."""

import json
import math
from pathlib import Path

import pytest
from sweeping import make_sweep, make_sweep_of_seeds

from sda_ray import load_runs, load_sweep
from sda_ray.core.errors import UserError
from sda_ray.core.lease import LeaseLost
from sda_ray.search.promotion import rank_key


def test_trials_are_those_of_the_study_in_its_order(tmp_path: Path) -> None:
    study = make_sweep(tmp_path, "width", 12, epochs=8, ends={3: "failed"})
    records = sorted(study.records(), key=rank_key)
    sweep = load_sweep("width", tmp_path)
    trials = sweep.trials

    assert trials["number"].tolist() == [r.index for r in records]
    assert trials["status"].tolist() == [r.status for r in records]
    assert trials["learning_rate"].tolist() == [r.config["learning_rate"] for r in records]
    assert sweep.best["number"] == records[0].index
    assert sweep.best["directory"].name.endswith(records[0].run_id)

    curves = sweep.curves().groupby("number")["loss_valid"]

    for r, value in zip(records, trials["loss_valid"], strict=True):
        assert value == r.value or (math.isnan(value) and r.value is None)
        assert curves.get_group(r.index).tolist() == list(r.values.values())


def test_study_cannot_be_changed(tmp_path: Path) -> None:
    make_sweep(tmp_path, "width", 3, epochs=4)
    journal = tmp_path / "sweeps" / "width" / "study.journal"
    before = journal.read_bytes()
    study = load_sweep("width", tmp_path).study

    with pytest.raises(LeaseLost, match="opened for reading only"):
        study.ask()

    assert journal.read_bytes() == before
    assert study.best_value == load_sweep("width", tmp_path).best["loss_valid"]


def test_all_runs_are_one_table_with_their_settings(tmp_path: Path) -> None:
    make_sweep(tmp_path, "width", 3, epochs=4)
    runs = load_runs(tmp_path)

    assert len(runs) == 3 and set(runs["sweep"]) == {"width"}
    assert set(runs["epochs"]) == {4} and "learning_rate" in runs and "config" not in runs
    assert load_runs(tmp_path / "none").empty


def test_unknown_and_unfinished_sweeps_are_named(tmp_path: Path) -> None:
    make_sweep(tmp_path, "width", 2, epochs=4, ends=dict.fromkeys(range(20), "failed"))

    with pytest.raises(UserError, match="no sweep 'depth'"):
        load_sweep("depth", tmp_path)

    with pytest.raises(UserError, match="no run of sweep 'width' is complete"):
        _ = load_sweep("width", tmp_path).best


def test_further_seeds_are_told_from_the_runs_that_they_repeat(tmp_path: Path) -> None:
    make_sweep_of_seeds(tmp_path, "seeds", 12)
    trials, best = load_sweep("seeds", tmp_path).trials, load_sweep("seeds", tmp_path).best
    whole = trials[trials["status"] == "complete"]
    first = whole[whole["number"] == best["number"]].iloc[0]

    assert whole["seed"].tolist() == [0, 1, 2] * (len(whole) // 3)  # beside each other
    assert whole["replica_of"].iloc[:3].fillna(0).tolist() == [0, first["number"], first["number"]]
    assert best["loss_valid_mean"] == pytest.approx(first["loss_valid"] + 0.01)
    assert best["loss_valid_mean_se"] == pytest.approx(0.01 / 3**0.5)

    # Also once fewer are wanted
    file = tmp_path / "sweeps" / "seeds" / "sweep.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"definition": record["definition"] | {"seeds": 1}}))
    assert load_sweep("seeds", tmp_path).trials.equals(trials)


def test_sweep_whose_record_lacks_a_key_of_config_has_tables(tmp_path: Path) -> None:
    make_sweep(tmp_path, "width", 12)
    file = tmp_path / "sweeps" / "width" / "sweep.json"
    record = json.loads(file.read_text())
    del record["definition"]["config"]["seed"]  # as a version before it would
    file.write_text(json.dumps(record))

    assert len(load_sweep("width", tmp_path).trials) == 12
