r"""Tests for the sda_ray.sampler, seen and danger modules: what a sweep draws next."""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from simulated import Sweeping

from sda_ray.config import CONFIG
from sda_ray.definition import Sweep
from sda_ray.pruner import Record, Rules
from sda_ray.sampler import distributions, propose, view
from sda_ray.space import choice, integer, loguniform, uniform
from sda_ray.stopping import brackets

SPACE = {
    "learning_rate": loguniform(1e-6, 1.0),
    "weight_decay": loguniform(1e-6, 1e-1),
    "activation": choice("ELU", "GELU", "SiLU"),
}


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Leaves out what only a power cut would miss, which is most of the time."""

    monkeypatch.setattr(os, "fsync", lambda handle: None)


def sweep_of(space: Any = SPACE, **settings: Any) -> Sweep:
    return Sweep("name", CONFIG | {"epochs": 9}, space, **settings).check()


def finished(index: int, drawn: Any, value: float, state: str = "complete", **more: Any) -> Record:
    values = {9: value} if state == "complete" else {1: value}
    known = {} if state == "diverged" else values
    record = Record(index, f"{index:08}", state, max(values), 9, known)

    return replace(record, config=drawn[0], trial=drawn[1], **more)


def play(
    sweep: Sweep,
    count: int,
    value: Callable[[dict[str, Any]], float | None],
    records: Sequence[Record] = (),
) -> list[Record]:
    r"""Returns the runs of a sweep, one after the other; those without a value diverge."""

    records = list(records)

    while len(records) < count and (drawn := sweep.propose(records)) is not None:
        x = value(drawn[0])
        state = "diverged" if x is None else "complete"
        records.append(finished(len(records) + 1, drawn, x or 0.0, state))

    return records


def rate(record: Record) -> float:
    return math.log10(record.config["learning_rate"])


# What the sampler sees


def test_all_trials_carry_the_space_as_it_is() -> None:
    narrow = sweep_of({**SPACE, "learning_rate": loguniform(1e-6, 1e-3)})
    wide = sweep_of({**SPACE, "activation": choice("ELU", "GELU", "SiLU", "ReLU")})
    current = distributions(wide.draw)
    records = play(narrow, 12, lambda config: 1.0)

    assert [t.distributions for t in view(records, current)] == [current] * 12
    assert [t.params for t in view(records, current)] == [t.params for t in view(records)]


def test_a_widened_range_is_drawn_from_jointly() -> None:
    narrow = sweep_of({**SPACE, "learning_rate": loguniform(1e-6, 1e-3)})
    records = play(narrow, 24, lambda config: -math.log10(config["learning_rate"]))
    after = play(sweep_of(), 48, lambda config: -math.log10(config["learning_rate"]), records)[24:]

    # It knows which end of the old range was good
    assert sum(rate(r) > -3 for r in after) > 12
    assert sum(rate(r) < -4 for r in after) < 6


def test_runs_that_the_space_does_not_cover_are_not_seen() -> None:
    records = play(sweep_of(), 12, lambda config: 1.0)
    inside = [r for r in records if rate(r) > -3]
    current = distributions(sweep_of({**SPACE, "learning_rate": loguniform(1e-3, 1.0)}).draw)

    assert 0 < len(inside) < 12
    assert [t.number for t in view(records, current)] == [r.index - 1 for r in inside]


def test_runs_brought_in_are_seen_as_complete() -> None:
    (record,) = play(sweep_of(), 1, lambda config: 0.5)
    (trial,) = view([replace(record, source="elsewhere")])

    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.5)


def test_with_several_objectives_complete_runs_are_seen_with_all_of_them() -> None:
    one, other = play(sweep_of(), 2, lambda config: 0.5)
    trials = view([replace(one, finals=(0.5, 3.0)), other], objectives=2)

    assert [t.values for t in trials] == [[0.5, 3.0]]


def test_with_hyperband_a_sampler_sees_the_runs_of_one_bracket() -> None:
    sweep = sweep_of(pruner="hyperband", min_epochs=1)
    rules, rng = sweep.rules, random.Random(0)
    records = play(sweep, 60, lambda config: rng.random())
    bracket = brackets(rules, sweep.name)

    def drawn_without(kin: bool) -> Any:
        changed = [
            replace(r, values={9: 1 - r.values[9]})
            if (bracket(r.index - 1) == bracket(60)) == kin
            else r
            for r in records
        ]

        return sweep.propose(changed)[0]

    assert drawn_without(kin=False) == sweep.propose(records)[0] != drawn_without(kin=True)


# Divergence


@pytest.mark.parametrize("edge", [-3.0, -5.4])
def test_few_runs_diverge_once_the_edge_is_known(edge: float) -> None:
    def value(config: dict[str, Any]) -> float | None:
        x = math.log10(config["learning_rate"])
        return None if x > edge else edge - x + abs(math.log10(config["weight_decay"]) + 3) / 9

    records = play(sweep_of(pruner="none"), 64, value)
    gone = [r.state == "diverged" for r in records]
    best = min(r.values[9] for r in records if r.state == "complete")

    assert sum(gone[32:]) < 16, f"{sum(gone[:32])} of the first half"
    assert best < 0.5  # the edge itself is not given up


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_sweep_whose_runs_all_diverge_goes_on(sampler: str) -> None:
    assert len(play(sweep_of(sampler=sampler, pruner="none"), 16, lambda config: None)) == 16


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


# Other samplers


def test_gaussian_processes_find_what_is_good() -> None:
    space = {"learning_rate": loguniform(1e-6, 1.0), "weight_decay": uniform(0.0, 0.1)}

    def value(config: dict[str, Any]) -> float | None:
        x = math.log10(config["learning_rate"])
        return (x + 3) ** 2 + 10 * config["weight_decay"] if x < -1 else None

    sweep = sweep_of(space, sampler="gp", pruner="none")
    records = play(sweep, 16, value)
    late = records[11:]

    assert sum(abs(rate(r) + 3) < 0.7 for r in late) >= 3
    assert sum(r.state == "diverged" for r in late) <= 1
    assert sweep.propose(records[:11])[0] == records[11].config


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
def test_several_objectives_are_traded_off_to_the_end(tmp_path: Path, sampler: str) -> None:
    rules = Rules(32, 3, None, pruner="none")
    objectives = ("loss_valid", "parameters")
    whole = Sweeping(tmp_path / "whole", rules, sampler, objectives=objectives).drive()
    parts = Sweeping(tmp_path / "parts", replace(rules, target=24), sampler, objectives=objectives)
    parts.drive()
    parts.rules = rules

    def seen(records: list[Record]) -> list[Any]:
        return [(r.config, r.finals) for r in records]

    assert all(r.state == "complete" and len(r.finals) == 2 for r in whole)
    assert seen(parts.drive()) == seen(whole)
    assert len({str(r.config) for r in whole}) == 32


def test_generations_learn_from_the_front() -> None:
    sweep = sweep_of(objectives=("loss_valid", "parameters"))
    records: list[Record] = []

    # Both objectives are best at 1e-3, and worse the further away
    while len(records) < 80:
        drawn = sweep.propose(records)
        x = abs(math.log10(drawn[0]["learning_rate"]) + 3)
        records.append(finished(len(records) + 1, drawn, x, finals=(x, 2 * x)))

    away = [r.values[9] for r in records]
    assert sweep.sampler == "nsga2"
    assert statistics.median(away[60:]) < 0.5 * statistics.median(away[:20])


# Speed


def test_a_draw_is_quick_among_thousands_of_runs() -> None:
    rng = random.Random(0)
    sweep = sweep_of()
    first = sweep.propose([])
    records = []

    for i in range(2000):
        params = {
            "learning_rate": 10 ** rng.uniform(-6, 0),
            "weight_decay": 10 ** rng.uniform(-6, -1),
            "activation": rng.choice(["ELU", "GELU", "SiLU"]),
        }
        trial = view([finished(i + 1, first, rng.random())])[0]
        trial.params = params
        state = rng.choice(["complete", "pruned", "pruned"])
        records.append(finished(i + 1, (params, trial), rng.random(), state))

    times = []

    for _ in range(5):
        start = time.perf_counter()
        assert sweep.propose(records) is not None
        times.append(time.perf_counter() - start)

    assert sorted(times)[2] < 0.2  # 0.03 s, with nothing else going on
