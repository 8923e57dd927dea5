r"""Tests for sda_ray.runs.evaluation: its numbers are of the network, whatever happens meanwhile."""

import json
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from kept import made, path_of, runs

from sda_ray.assimilation.operators import PANEL, parse
from sda_ray.core.errors import UserError
from sda_ray.core.files import locked
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.score import load_sde
from sda_ray.runs.evaluation import (
    Evaluation,
    EvaluationSettings,
    evaluate_runs,
    map_here,
    read_evaluation,
    summarize,
)
from sda_ray.runs.figures import draw_evaluation

__all__ = ["made", "runs"]  # fixtures

TINY = EvaluationSettings(trajectories=2, members=3, steps=2)
OBSERVATIONS = ("samples", "circle", "subsample-4")


def evaluate(
    runs: Path, data: Path, indices: Iterable[int] = (4,), settings: Any = TINY, **options: Any
) -> Any:
    paths = [path_of(runs, i) for i in indices]

    return evaluate_runs(paths, data, settings, OBSERVATIONS, **options)


def results(runs: Path, index: int = 4) -> Any:
    evaluation = read_evaluation(path_of(runs, index))
    assert evaluation is not None

    return evaluation.results


def interrupted(function: Any, tasks: Iterable[Any]) -> Any:
    yield from islice(map_here(function, tasks), 3)
    raise KeyboardInterrupt


def test_evaluation_that_was_interrupted_ends_in_the_same_numbers(runs: Path, data: Path) -> None:
    other = runs.with_name("undisturbed")
    shutil.copytree(runs, other)
    evaluate(other, data, (4, 5))

    with pytest.raises(KeyboardInterrupt):
        evaluate(runs, data, (4, 5), map_tasks=interrupted)

    done = {i: results(runs, i) for i in (4, 5)}
    assert sum(len(rows) for run in done.values() for rows in run.values()) == 3
    evaluate(runs, data, (4, 5), map_tasks=lambda f, tasks: map_here(f, list(tasks)[::-1]))

    for i in (4, 5):
        assert results(runs, i) == results(other, i)

    assert results(runs, 4) != results(runs, 5)


def test_finished_evaluation_computes_nothing_and_more_trajectories_add_to_it(
    runs: Path, data: Path
) -> None:
    evaluate(runs, data)
    before = results(runs)
    computed = []

    def counting(function: Any, tasks: Iterable[Any]) -> Any:
        for task, result in map_here(function, tasks):
            computed.append(task)
            yield task, result

    evaluate(runs, data, map_tasks=lambda *_: pytest.fail("starts a Ray for nothing"))
    evaluate(runs, data, settings=EvaluationSettings(3, 3, 2), map_tasks=counting)
    assert {task.trajectory for task in computed} == {2}

    for observation, rows in before.items():
        assert {i: results(runs)[observation][i] for i in rows} == rows


@pytest.mark.parametrize("change", ["weights", "settings", "data"])
def test_results_of_another_kind_are_replaced(
    runs: Path, data: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(runs, data)
    before, settings, place = results(runs), TINY, data

    if change == "weights":
        shutil.copy(path_of(runs, 5).state, path_of(runs, 4).state)
    elif change == "settings":
        settings = EvaluationSettings(2, 3, 2, seed=1)
    else:
        place = tmp_path / "other"
        shutil.copytree(data, place)
        shutil.copy(data / "valid.h5", place / "test.h5")

    evaluate(runs, place, settings=settings)

    assert "was evaluated in another way" in capsys.readouterr().out
    assert results(runs).keys() == before.keys()
    assert all(results(runs)[name]["0"] != rows["0"] for name, rows in before.items())


def test_damaged_run_is_reported_and_the_others_are_evaluated(runs: Path, data: Path) -> None:
    damaged = path_of(runs, 4)
    damaged.state.write_bytes(damaged.state.read_bytes()[:1000])

    with locked(path_of(runs, 5).directory / "evaluation.lock"):
        found, errors = evaluate(runs, data, (3, 4, 5))

    assert not found
    assert "is not finished" in errors[path_of(runs, 3)]
    assert "damaged" in errors[damaged]
    assert "Another process may be evaluating" in errors[path_of(runs, 5)]
    found, errors = evaluate(runs, data, (4, 5))
    assert [*found] == [path_of(runs, 5)] and [*errors] == [damaged]


def test_networks_that_diverge_or_do_not_fit_keep_no_others_back(
    runs: Path, data: Path, tmp_path: Path
) -> None:
    wild = path_of(runs, 4)
    state = torch.load(wild.state, weights_only=True)
    name = next(key for key in state if key.endswith("weight") and "network" in key)
    torch.save(state | {name: state[name] * 1e30}, wild.state)

    found, errors = evaluate(runs, data, (4, 5), draw=draw_evaluation)

    assert not errors
    assert results(runs, 4)["circle"]["0"]["members"] < 2
    assert results(runs, 5)["circle"]["0"]["members"] == 3
    assert not any(key == "crps" for key in summarize(found[wild])["circle"])

    large = tmp_path / "large"
    large.mkdir()

    with h5py.File(large / "test.h5", "w") as f:
        f["x"] = np.random.default_rng(0).normal(size=(4, 8, 2, 32, 32)).astype(np.float32)

    _, errors = evaluate(runs, large)
    assert "is for fields of [16, 16]" in errors[wild]


def test_numbers_are_those_of_their_definitions(runs: Path, data: Path) -> None:
    fields: dict[str, Any] = {}
    path = path_of(runs, 4)
    evaluate(runs, data, draw=lambda path, name, x: fields.update({name: x}))
    values = results(runs)["circle"]["0"]
    truth, x = (torch.from_numpy(fields["circle"][key]) for key in ("truth", "members"))
    y, A, std = fields["circle"]["y"], parse(PANEL["circle"].operator), PANEL["circle"].std
    error = A(x).numpy() - y

    np.testing.assert_array_equal(truth, TrajectoryDataset(data / "test.h5", 1).x[0, :8])
    assert values["residual"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert values["chi2"] == pytest.approx((error**2).mean() / std**2, rel=1e-5)
    assert values["mse"] == pytest.approx(float((x.mean(0) - truth).square().mean()), rel=1e-5)
    assert 0.5 * std < (y - A(truth).numpy()).std() < 2 * std
    assert load_sde(path.directory).shape[0] <= len(truth)


def test_summary_pools_before_it_takes_roots() -> None:
    rows = [
        {"members": 4.0, "crps": 0.1, "mse": 0.04, "variance": 0.02, "chi2": 1.5, "ranks": [1]},
        {"members": 4.0, "crps": 0.2, "mse": 0.09, "variance": 0.05, "chi2": 0.5, "ranks": [2]},
        {"members": 1},  # an ensemble of which one member alone did not diverge
    ]
    results: Any = {"circle": {str(i): row for i, row in enumerate(rows)}}
    summary = summarize(Evaluation("1.1", "", "", {}, results))["circle"]

    assert summary["crps"] == pytest.approx((0.15, 0.1, 0.2))
    assert summary["chi2"] == pytest.approx((1, 0.5, 1.5))
    assert summary["rmse"] == pytest.approx((0.065**0.5, 0.2, 0.3))
    assert summary["spread"][0] == pytest.approx(0.035**0.5)
    assert summary["spread_skill"][0] == pytest.approx((0.035 / (0.065 - 0.035 / 4)) ** 0.5)


def test_figures_come_with_their_numbers(runs: Path, data: Path) -> None:
    path = path_of(runs, 4)
    evaluate(runs, data, draw=draw_evaluation)
    directory = path.directory / "evaluation"
    curves = {f"{name}-spectra" for name in OBSERVATIONS} | {"circle-ranks", "subsample-4-ranks"}
    stems = {f"{name}-{kind}" for name in OBSERVATIONS for kind in ("fields", "strip")} | curves
    expected = {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}

    names = {file.name for file in directory.iterdir()}
    assert names == expected | {f"{stem}.csv" for stem in stems}
    table = np.genfromtxt(directory / "circle-spectra.csv", delimiter=",", names=True)
    assert table.dtype.names == ("k", "truth", "low", "median", "high")
    assert table["k"].tolist() == [*range(1, len(table) + 1)]
    assert (table["low"] <= table["median"]).all() and (table["truth"] > 0).all()

    table = np.genfromtxt(directory / "circle-fields.csv", delimiter=",", names=True)
    assert {"state", "x", "y", "truth", "mean", "spread"} <= {*(table.dtype.names or ())}
    assert len(table) == 3 * 16 * 16


def test_evaluation_that_is_damaged_is_explained(runs: Path, data: Path) -> None:
    path = path_of(runs, 4)
    path.evaluation.write_text('{"version": "x"}')

    _, errors = evaluate(runs, data)

    assert "evaluation.json is damaged" in errors[path]
    assert json.loads(path.evaluation.read_text()) == {"version": "x"}


def test_more_than_there_is_is_refused(runs: Path, data: Path) -> None:
    with pytest.raises(UserError, match="has 4"):
        evaluate(runs, data, settings=EvaluationSettings(trajectories=5))

    with pytest.raises(UserError, match="'assim' does not fit"):
        evaluate_runs([path_of(runs, 4)], data, TINY, ("assim",))
