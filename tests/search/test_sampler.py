r"""Tests for sda_ray.search.sampler: the configurations that a sweep draws."""

import copy
import json
import math
import random
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from playing import SPACE, finished, play, rate, sweep_of
from simulated import Sweeping, draw
from studies import add, lease, no_sync, study

from sda_ray.core.config import CONFIG
from sda_ray.core.errors import UserError
from sda_ray.core.space import choice, integer, loguniform, uniform
from sda_ray.search.promotion import Rules, TrialRecord
from sda_ray.search.pruners import hyperband_brackets
from sda_ray.search.sampler import distributions, importances, propose, view
from sda_ray.search.study import Study
from sda_ray.sweep.definition import Sweep

__all__ = ["lease", "no_sync", "study"]  # fixtures

# Views


def test_all_trials_carry_the_current_space() -> None:
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
    bracket = hyperband_brackets(rules, sweep.name)

    def drawn_without(kin: bool) -> Any:
        changed = [
            replace(r, values={9: 1 - r.values[9]})
            if (bracket(r.index - 1) == bracket(60)) == kin
            else r
            for r in records
        ]

        return sweep.propose(changed)[0]

    assert drawn_without(kin=False) == sweep.propose(records)[0] != drawn_without(kin=True)


def test_sampler_sees_state_and_value_of_each_run(study: Study) -> None:
    complete = study.report(add(study, until=9), {e: 1.0 / e for e in range(1, 10)})
    complete = study.tell(complete, "complete")
    paused = study.report(add(study), {1: 0.7})
    pruned = study.tell(study.report(add(study), {1: 0.8}), "pruned")
    flying = add(study)
    diverged = study.tell(study.report(add(study), {1: 0.1}), "diverged", "exploded")
    failed = study.tell(add(study), "failed", "bug")
    hidden = replace(complete, shown=3)
    gone = replace(diverged, shown=1)

    seen = view([complete, paused, pruned, flying, diverged, failed, hidden, gone])
    states = [TrialState.COMPLETE, *[TrialState.PRUNED] * 2, TrialState.RUNNING]
    assert [t.state for t in seen] == [*states, *[TrialState.PRUNED] * 3]
    assert [t.value for t in seen] == [1 / 9, 0.7, 0.8, None, None, 1 / 3, 0.1]
    assert [t.system_attrs["constraints"] for t in seen] == [[x] for x in (0, 0, 0, 0, 1, 0, 0)]
    assert seen[4].intermediate_values == {}
    assert seen[5].intermediate_values == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert all(t.params and t.distributions for t in seen)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_depend_on_seed_number_and_values_alone(
    tmp_path: Path, study: Study, sampler: str
) -> None:
    for i in range(12):
        study.tell(study.report(add(study), {1: i / 7}), "pruned" if i % 2 else "complete")

    def config(records: list[TrialRecord], seed: int = 0) -> dict[str, Any]:
        drawn = propose(draw, records, seed, sampler)
        assert drawn is not None
        return drawn[0]

    records = study.records()
    renamed = [replace(r, run_id="x", attempt=7, error="?") for r in records]
    assert config(records) == config(renamed)
    assert config(records) != config(records, seed=1)
    assert config(records) != config(records[:-1])

    worse = [replace(r, values={1: 1 - r.values[1]}) for r in records]
    assert (config(records) == config(worse)) == (sampler == "random")


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_rejected_configurations_are_skipped(
    sampler: str, caplog: pytest.LogCaptureFixture
) -> None:
    def space(trial: Any) -> dict[str, Any]:
        size = trial.suggest_int("size", 1, 12)

        return {"batch_size": 0 if size == 7 else size}

    sweep = Sweep("name", CONFIG, space, sampler=sampler)  # checks would have found it
    records = play(sweep, 99, lambda config: 1.0)

    assert sorted(r.config["batch_size"] for r in records) == [*range(1, 7), *range(8, 13)]
    assert "of SPACE: batch_size is 0, but must be" in caplog.text

    with pytest.raises(UserError, match="batch_size is 0"):  # all that it could be
        propose(sweep.draw, [], fixed={"size": 7})


@pytest.mark.parametrize(
    "error", [optuna.TrialPruned("no"), KeyError("no"), ZeroDivisionError("no"), SystemExit("no")]
)
@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_function_that_raises_now_and_then_is_drawn_from_again(
    sampler: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def space(trial: Any) -> dict[str, Any]:
        if (size := trial.suggest_int("size", 1, 12)) == 7:
            raise error

        return {"batch_size": size}

    sweep = Sweep("name", CONFIG, space, sampler=sampler)
    records = play(sweep, 99, lambda config: 1.0)

    assert sorted(r.config["batch_size"] for r in records) == [*range(1, 7), *range(8, 13)]
    assert re.search(
        rf"of SPACE: {type(error).__name__}: .*no.* \(test_sampler.py, line", caplog.text
    )


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_function_that_always_raises_ends_with_its_error_and_line(sampler: str) -> None:
    def space(trial: Any) -> dict[str, Any]:
        return {"batch_size": 1 // (trial.suggest_int("size", 1, 12) > 12)}

    def before(trial: Any) -> dict[str, Any]:
        raise RuntimeError("no data")

    for function, error in ((space, "ZeroDivisionError"), (before, "RuntimeError: no data")):
        with pytest.raises(UserError, match=rf"{error}.* \(test_sampler.py, line \d+\)"):
            Sweep("name", CONFIG, function, sampler=sampler).propose([])


def test_an_error_of_a_sampler_is_not_one_of_the_space() -> None:
    class Broken(optuna.samplers.RandomSampler):
        def sample_independent(self, *args: Any) -> Any:
            raise ZeroDivisionError("in the sampler")

    with pytest.raises(ZeroDivisionError, match="in the sampler"):
        Sweep("name", CONFIG, SPACE, sampler=lambda seed: Broken()).propose([])


def test_importances_are_known_from_ten_complete_runs_on() -> None:
    def value(config: dict[str, Any]) -> float:
        return abs(math.log10(config["learning_rate"]) + 3)

    records = play(sweep_of(sampler="random", pruner="none"), 40, value)
    matter = importances(records)

    shares = {key: share for key, (share, _, _) in matter.items()}

    assert list(shares) == sorted(shares, key=shares.__getitem__, reverse=True)
    assert all(0 <= low <= high <= 1 for _, low, high in matter.values())
    assert matter["learning_rate"][1] > max(high for _, _, high in [*matter.values()][1:])
    assert importances(records) == matter  # whenever it is asked
    assert matter.keys() == SPACE.keys() and next(iter(matter)) == "learning_rate"
    assert [importances(records[:n]) for n in (0, 2, 9)] == [{}, {}, {}]
    assert importances(records[:10]).keys() == SPACE.keys()


# Divergence


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_sweep_whose_runs_all_diverge_continues(sampler: str) -> None:
    assert len(play(sweep_of(sampler=sampler, pruner="none"), 16, lambda config: None)) == 16


def test_divergent_regions_are_left(tmp_path: Path) -> None:
    rules = Rules(32, 9, 1, 3)
    records = Sweeping(
        tmp_path, rules, "tpe", diverges=lambda c, e: c["learning_rate"] > 3e-3
    ).drive()
    halves = [[r.state for r in records[:16]], [r.state for r in records[16:]]]

    assert halves[0].count("diverged") > 0
    assert halves[1].count("diverged") < 8


# Other samplers


def test_gaussian_processes_find_good_values() -> None:
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

    def seen(records: list[TrialRecord]) -> list[Any]:
        return [(r.config, r.finals) for r in records]

    assert all(r.state == "complete" and len(r.finals) == 2 for r in whole)
    assert seen(parts.drive()) == seen(whole)
    assert len({str(r.config) for r in whole}) == 32


def test_generations_learn_from_the_front() -> None:
    sweep = sweep_of(objectives=("loss_valid", "parameters"))
    records: list[TrialRecord] = []

    # Both objectives are best at 1e-3, and worse the further away
    while len(records) < 80:
        drawn = sweep.propose(records)
        x = abs(math.log10(drawn[0]["learning_rate"]) + 3)
        records.append(finished(len(records) + 1, drawn, x, finals=(x, 2 * x)))

    away = [r.values[9] for r in records]
    assert sweep.sampler == "nsga2"
    assert statistics.median(away[60:]) < 0.5 * statistics.median(away[:20])


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

    assert propose(draw, records, 0, sampler, params, distributions(sweep.draw)) is None
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
        record = TrialRecord(len(drawn), str(len(drawn)), "running", 1, 9, config=found[0])
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


# Grid


def test_a_widened_grid_takes_the_untried_configurations() -> None:
    space = {"batch_size": integer(8, 24, step=8), "activation": choice("ELU", "SiLU")}
    wide = {"batch_size": integer(8, 32, step=8), "activation": choice("ELU", "GELU", "SiLU")}
    records = play(sweep_of(space, sampler="grid"), 99, lambda config: 1.0)
    after = play(sweep_of(wide, sampler="grid"), 99, lambda config: 1.0, records)
    configs = [tuple(r.config.values()) for r in after]

    assert (len(records), len(after)) == (6, 12)
    assert set(configs) == {(b, a) for b in (8, 16, 24, 32) for a in ("ELU", "GELU", "SiLU")}


def test_a_grid_finds_the_last_configuration_in_one_draw() -> None:
    sweep = sweep_of({"seed": integer(0, 499)}, sampler="grid")
    first = sweep.propose([])
    trial = copy.copy(first[1])
    records = []

    for seed in range(500):
        trial.params = {"seed": seed}
        records.append(finished(seed + 1, ({"seed": seed}, copy.copy(trial)), 1.0))

    calls = []

    def draw(trial: Any) -> dict[str, Any]:
        calls.append(trial)
        return sweep.draw(trial)

    drawn = propose(draw, records[:7] + records[8:], 0, "grid", current=distributions(sweep.draw))

    assert drawn is not None
    assert (drawn[0], len(calls)) == ({"seed": 7}, 1)


def test_grid_takes_all_combinations_of_a_space_that_branches(study: Study) -> None:
    def space(trial: Any) -> dict[str, Any]:
        size = trial.suggest_int("batch_size", 8, 24, step=8)
        scheduler = trial.suggest_categorical("scheduler", ["linear", "cosine"])

        if scheduler == "cosine":
            return {"batch_size": size, "warmup": trial.suggest_int("warmup", 0, size // 8)}

        return {"batch_size": size}

    drawn = []

    while (found := propose(space, study.records(), 0, "grid")) is not None:
        drawn.append(tuple(found[0].values()))
        study.add(
            TrialRecord(len(drawn), str(len(drawn)), "running", 1, 9, config=found[0]), found[1]
        )

    expected = {(8 * b, *w) for b in (1, 2, 3) for w in [(), *((w,) for w in range(b + 1))]}
    assert len(drawn) == 12 and set(drawn) == expected


def test_a_parameter_that_is_set_needs_no_options_in_a_grid() -> None:
    space = {"learning_rate": loguniform(1e-6, 1.0), "activation": choice("ELU", "SiLU")}
    sweep = Sweep("name", CONFIG | {"epochs": 9}, space, sampler="grid")
    records: list[TrialRecord] = []

    while drawn := sweep.propose(records, {"learning_rate": 1e-3}):
        records.append(finished(len(records) + 1, drawn, 1.0))

    assert {r.config["activation"] for r in records} == {"ELU", "SiLU"}
    assert len(records) == 2

    with pytest.raises(UserError, match="learning_rate has no finite set of options, which"):
        sweep.propose(records)


# Samplers of the user


OBJECTS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=4),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=8),
    "partial": lambda seed: optuna.samplers.PartialFixedSampler(
        {"activation": "SiLU"}, optuna.samplers.RandomSampler(seed=seed)
    ),
}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", OBJECTS)
def test_any_sampler_of_optuna_draws_and_draws_the_same_again(name: str) -> None:
    sweep = sweep_of(sampler=OBJECTS[name], pruner="none")
    records = play(sweep, 16, lambda config: abs(math.log10(config["learning_rate"]) + 3))

    assert len({json.dumps(r.config) for r in records}) == 16
    assert sweep.propose(records[:9])[0] == records[9].config

    if name == "partial":
        assert {r.config["activation"] for r in records} == {"SiLU"}


def test_a_sampler_of_the_user_sees_states_and_values() -> None:
    seen: list[Any] = []

    class Spy(optuna.samplers.RandomSampler):
        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            seen.append([(t.state.name, t.values) for t in study.get_trials() if t != trial])
            return {"learning_rate": 1e-3}

    sweep = sweep_of(sampler=lambda seed: Spy(seed=seed))
    complete, pruned = play(sweep_of(), 2, lambda config: 0.5)
    drawn = sweep.propose([complete, replace(pruned, state="pruned")])

    assert seen == [[], [("COMPLETE", [0.5]), ("PRUNED", [0.5])]]  # the first by the check
    assert drawn[0]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("sampler", "error"),
    [
        (lambda seed: "tpe", "sampler returned 'tpe', but must return an optuna.samplers"),
        (
            lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
            "keeps its state in the study as a pickle",
        ),
    ],
)
def test_other_objects_are_refused_as_samplers_before_the_sweep_starts(
    sampler: Any, error: str
) -> None:
    with pytest.raises(UserError, match=error):
        sweep_of(sampler=sampler)


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
        start = time.process_time()
        assert sweep.propose(records) is not None
        times.append(time.process_time() - start)

    assert sorted(times)[2] < 0.2  # of a core; 0.06 with nothing else going on
