r"""Tests for sda_ray.search.grid, and that no configuration is drawn twice."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from playing import play, sweep_of
from studies import lease, no_sync, study

from sda_ray.core.config import CONFIG
from sda_ray.core.space import choice, integer
from sda_ray.search.drawing import draw_run
from sda_ray.search.promotion import Record, Rules
from sda_ray.search.sampler import distributions, propose
from sda_ray.search.study import Study

__all__ = ["lease", "no_sync", "study"]  # fixtures

# No configuration twice


def unused(trial: Any) -> dict[str, Any]:
    trial.suggest_int("unused", 0, 9)

    if trial.suggest_categorical("smooth", [False, True]):
        return {"activation": trial.suggest_categorical("activation", ["SiLU", "ELU"])}

    return {}


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp"])
def test_configurations_that_come_to_the_same_are_one(sampler: str) -> None:
    sweep = sweep_of(unused, sampler=sampler, pruner="none")
    records = play(sweep, 9, lambda config: 1.0)

    # SiLU is CONFIG's
    assert {(CONFIG | r.config)["activation"] for r in records} == {"SiLU", "ELU"}
    assert len(records) == 2


def test_lists_and_tuples_are_one() -> None:
    space = {"hidden_channels": choice((8, 16, 32), (16, 32, 64)), "learning_rate": choice(1e-3)}
    sweep = sweep_of(space)
    (record,) = play(sweep, 1, lambda config: 1.0)
    stored = replace(
        record,
        config={k: list(x) if isinstance(x, tuple) else x for k, x in record.config.items()},
    )

    assert len(play(sweep, 9, lambda config: 1.0, [stored])) == 2


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_queued_configuration_that_was_tried_is_left_out_at_once(sampler: str) -> None:
    calls = []
    space = {"learning_rate": choice(1e-4, 1e-3), "activation": choice("ELU", "SiLU")}
    sweep = sweep_of(space, sampler=sampler)
    records = play(sweep, 2, lambda config: 1.0)
    params = dict(records[0].trial.params)

    def draw(trial: Any) -> dict[str, Any]:
        calls.append(trial)
        return sweep.draw(trial)

    assert propose(draw, records, 0, sampler, params) is None
    assert len(calls) <= 1

    more = sweep.propose(records, {"activation": "ELU"})
    assert more[0]["activation"] == "ELU"


@pytest.mark.parametrize("params", [{"learning_rate": 7.0}, {"activation": "none"}])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_queued_parameters_that_the_space_has_not_are_left_out(
    params: dict[str, Any], sampler: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert sweep_of(sampler=sampler).propose([], params) is None
    assert f"{next(iter(params))}=" in caplog.text
    assert "is not in SPACE" in caplog.text


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
def test_no_configuration_is_drawn_twice_until_the_space_is_exhausted(
    study: Study, sampler: str
) -> None:
    def space(trial: Any) -> dict[str, Any]:
        values = {"activation": trial.suggest_categorical("activation", ["ELU", "GELU", "SiLU"])}

        if values["activation"] != "ELU":
            values["kernel_size"] = trial.suggest_int("kernel_size", 3, 7, step=2)

        return values

    drawn = []

    while (found := propose(space, study.records(), 0, sampler)) is not None:
        drawn.append(found[0])
        record = Record(len(drawn), str(len(drawn)), "running", 1, 9, config=found[0])
        study.tell(study.report(study.add(record, found[1]), {1: float(len(drawn))}), "complete")

    assert len({json.dumps(config) for config in drawn}) == len(drawn) == 7


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_that_repeats_itself_does_not_exhaust_a_space(sampler: str) -> None:
    space = {
        "learning_rate": choice(1e-4, 1e-3, 5e-3),
        "weight_decay": choice(0.0, 1e-3, 1e-2),
        "activation": choice("SiLU", "GELU"),
    }

    def value(config: dict[str, Any]) -> float:
        return abs(math.log(config["learning_rate"] / 1e-3)) + config["weight_decay"]

    records = play(sweep_of(space, sampler=sampler, pruner="none"), 99, value)

    assert len({json.dumps(r.config) for r in records}) == len(records) == 18


def test_the_last_configurations_of_a_larger_space_are_found() -> None:
    sweep = sweep_of({"seed": integer(0, 499)}, sampler="random")
    records = play(sweep, 999, lambda config: 1.0)

    assert sorted(r.config["seed"] for r in records) == list(range(500))


def test_it_is_said_that_a_space_is_exhausted(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    def draw_next() -> Record | None:
        return draw_run(study, study.records(), Rules(8, 9), CONFIG, sweep.propose)

    sweep = sweep_of({"activation": choice("ELU", "GELU", "SiLU")})

    assert [draw_next() is not None for _ in range(4)] == [True] * 3 + [False]
    assert caplog.text.count("SPACE has no more configurations: 3 runs of 8 trials.") == 1


# Grid


def test_a_grid_that_was_widened_takes_what_is_not_tried_yet() -> None:
    space = {"batch_size": integer(8, 24, step=8), "activation": choice("ELU", "SiLU")}
    wide = {"batch_size": integer(8, 32, step=8), "activation": choice("ELU", "GELU", "SiLU")}
    records = play(sweep_of(space, sampler="grid"), 99, lambda config: 1.0)
    after = play(sweep_of(wide, sampler="grid"), 99, lambda config: 1.0, records)
    configs = [tuple(r.config.values()) for r in after]

    assert (len(records), len(after)) == (6, 12)
    assert set(configs) == {(b, a) for b in (8, 16, 24, 32) for a in ("ELU", "GELU", "SiLU")}
    assert configs[6:] == sorted(configs[6:])


def test_a_grid_passes_over_what_was_tried_without_drawing_it() -> None:
    sweep = sweep_of({"seed": integer(0, 1999)}, sampler="grid")
    records = [r for r in play(sweep, 3, lambda config: 1.0) if r.index != 2]
    calls = []

    def draw(trial: Any) -> dict[str, Any]:
        calls.append(trial)
        return sweep.draw(trial)

    drawn = propose(draw, records, 0, "grid", current=distributions(sweep.draw))

    assert drawn is not None
    assert (drawn[0], len(calls)) == ({"seed": 1}, 1)


def test_grid_takes_all_combinations_in_order(study: Study) -> None:
    def space(trial: Any) -> dict[str, Any]:
        return {
            "batch_size": trial.suggest_int("batch_size", 8, 24, step=8),
            "scheduler": trial.suggest_categorical("scheduler", ["linear", "cosine"]),
        }

    drawn = []

    while (found := propose(space, study.records(), 0, "grid")) is not None:
        drawn.append(tuple(found[0].values()))
        study.add(Record(len(drawn), str(len(drawn)), "running", 1, 9, config=found[0]), found[1])

    assert drawn == [(b, s) for b in (8, 16, 24) for s in ("linear", "cosine")]
