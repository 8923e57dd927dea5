r"""Tests for the sda_ray.search.pruners module: final verdicts."""

import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import HyperbandPruner, MedianPruner, PatientPruner, PercentilePruner
from optuna.trial import TrialState
from simulated import Crash, Sweeping, diverges, outcomes

from sda_ray.search.promotion import FINAL, Rules, TrialRecord, best_at_rung, rank_key
from sda_ray.search.pruners import hyperband_brackets, prune_rule

STEADY = {"n_startup_trials": 5, "n_warmup_steps": 2, "interval_steps": 2}

# What a user of Optuna would write for min_epochs=2, epochs=18, eta=3
OPTUNA: dict[str, Callable[[], Any]] = {
    "median": lambda: MedianPruner(**STEADY),
    "percentile": lambda: PercentilePruner(40.0, **STEADY),
    "patience": lambda: PatientPruner(None, 4),
    "hyperband": lambda: HyperbandPruner(2, 18, 3),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "percentile": {"percentile": 40.0},
    "patience": {"patience": 4},
}


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Leaves out what only a power cut would miss, which is most of the time."""

    monkeypatch.setattr(os, "fsync", lambda handle: None)


def rules_of(pruner: str, target: int = 16) -> Rules:
    return Rules(target, 18, 2, 3, pruner=pruner)


def run(index: int, *values: float, state: str = "running", **more: Any) -> TrialRecord:
    known = dict(enumerate(values, start=1))

    return replace(TrialRecord(index, f"{index:08}", state, len(values), 18, known), **more)


# Optuna


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pruner", FINAL)
def test_verdicts_are_those_of_optuna_on_the_same_history(pruner: str, seed: int) -> None:
    rules, rng = rules_of(pruner), random.Random(seed)
    stops = prune_rule(rules, "name", **SETTINGS.get(pruner, {}))
    study = optuna.create_study(study_name="name", pruner=OPTUNA[pruner]())
    trials: dict[int, optuna.Trial] = {}
    records: list[TrialRecord] = []
    said = []

    # Up to four runs at a time make an epoch in turn, each on a curve of its own
    while len(records) < 60 or trials:
        if len(trials) < 4 and len(records) < 60:
            records.append(run(len(records) + 1))
            trials[len(records)] = study.ask()

        index = rng.choice(list(trials))
        record, trial = records[index - 1], trials[index]
        epoch = record.last + 1
        value = (index * 7919 % 61) / 61 + rng.random() / epoch
        record = replace(record, values={**record.values, epoch: value}, until=epoch)
        trial.report(value, epoch)

        if epoch == 18:
            record = replace(record, state="complete")
            study.tell(trial, value)
        elif rng.random() < 0.01:
            record = replace(record, state="failed")
            study.tell(trial, state=TrialState.FAIL)
        elif epoch in rules.rungs:
            others = [r for r in records if r.index != index]
            said.append(stops(record, sorted([*others, record], key=lambda r: r.index)))
            assert said[-1] == trial.should_prune()

            if said[-1]:
                record = replace(record, state="pruned")
                study.tell(trial, state=TrialState.PRUNED)

        records[index - 1] = record

        if record.state != "running":
            del trials[index]

    assert 5 < said.count(True) < len(said)


def test_brackets_of_hyperband_are_those_of_optuna() -> None:
    study = optuna.create_study(study_name="name", pruner=HyperbandPruner(2, 18, 3))
    bracket = hyperband_brackets(rules_of("hyperband"), "name")

    # Optuna notes each rung that a run passes: a bracket has one rung fewer than the one before
    for i in range(40):
        trial = study.ask()
        trial.report(-float(i), 18)
        trial.should_prune()

    assert [bracket(i) for i in range(40)] == [3 - len(t.system_attrs) for t in study.trials]
    assert {bracket(i) for i in range(40)} == {0, 1, 2}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", FINAL)
def test_a_pruner_of_the_user_judges_as_the_one_of_that_name(name: str) -> None:
    rng = random.Random(0)
    records = [
        run(i, *(rng.random() for _ in range(n)), state="complete" if n == 18 else "pruned")
        for i, n in enumerate([18, 2, 18, 6, 18, 18, 2, 18, 18, 2, 6, 6] * 3, start=1)
    ]
    named = prune_rule(rules_of(name), "name", **SETTINGS.get(name, {}))
    own = prune_rule(rules_of("Own()"), "name", pruner=OPTUNA[name]())
    asked = [run(i, *(rng.random() for _ in range(n))) for i in range(37, 45) for n in (2, 6)]
    verdicts = [own(r, [*records, r]) for r in asked]

    assert verdicts == [named(r, [*records, r]) for r in asked]
    assert name == "patience" or set(verdicts) == {True, False}


def test_a_pruner_of_the_user_is_asked_at_every_min_epochs(tmp_path: Path) -> None:
    class Odd(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.last_step == 4 and trial.number % 2 == 1

    rules = rules_of("Odd()", 6)
    assert rules.rungs == (2, 4, 6, 8, 10, 12, 14, 16, 18)

    records = Sweeping(tmp_path, rules, stops=prune_rule(rules, "name", pruner=Odd())).drive()
    assert [(r.state, r.last) for r in records] == [("complete", 18), ("pruned", 4)] * 3


# What counts


def test_divergence_is_never_a_good_value() -> None:
    rules = rules_of("hyperband")
    bracket = hyperband_brackets(rules, "name")
    first = [i for i in range(1, 40) if bracket(i - 1) == 0]
    stops = prune_rule(rules, "name")
    asked = run(first[1], 0.5, 0.5)

    assert stops(asked, [run(first[0], 0.1, 0.1, state="pruned"), asked])
    assert not stops(asked, [run(first[0], 0.1, 0.1, state="diverged"), asked])
    assert not stops(asked, [run(first[0], 0.1, state="diverged"), asked])


def test_diverged_runs_are_no_standard() -> None:
    complete = [run(i, *[1.0] * 18, state="complete") for i in range(1, 5)]
    asked = run(6, 2.0, 2.0)
    stops = prune_rule(rules_of("median"), "name")

    assert stops(asked, [*complete, run(5, *[1.0] * 18, state="complete"), asked])
    assert not stops(asked, [*complete, run(5, *[1.0] * 17, state="diverged"), asked])


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_hidden_values_are_hidden_from_verdicts(pruner: str) -> None:
    rules = rules_of(pruner)
    bracket = hyperband_brackets(rules, "name")
    kin = [i for i in range(1, 60) if bracket(i - 1) == 0]
    known = [run(i, *[1.0] * 18, state="complete") for i in kin[:5]]
    asked = run(kin[5], *[2.0] * 6)
    stops = prune_rule(rules, "name")

    assert stops(asked, [*known, asked])
    assert not stops(asked, [*(replace(r, shown=2) for r in known), asked])


@pytest.mark.parametrize("pruner", FINAL)
def test_verdicts_depend_on_the_runs_alone(pruner: str) -> None:
    rng = random.Random(0)
    records = [
        run(i, *(rng.random() for _ in range(n)), state="complete" if n == 18 else "pruned")
        for i, n in enumerate([18, 2, 18, 6, 18, 18, 2, 18, 18, 2, 6, 6] * 3, start=1)
    ]
    rules = rules_of(pruner)
    asked = [run(37, *(rng.random() for _ in range(n))) for n in (2, 6) for _ in range(8)]
    once = [prune_rule(rules, "name")(r, [*records, r]) for r in asked]
    stops = prune_rule(rules, "name")

    assert [stops(r, [*records, r]) for r in reversed(asked)] == once[::-1]


# Whole sweeps


@pytest.mark.parametrize("pruner", FINAL)
def test_extended_sweep_equals_one_that_was_larger_at_once(tmp_path: Path, pruner: str) -> None:
    def sweeping(part: str, target: int) -> Sweeping:
        rules = rules_of(pruner, target)
        stops = prune_rule(rules, "name", **SETTINGS.get(pruner, {}))

        return Sweeping(tmp_path / part, rules, "tpe", diverges=diverges, stops=stops)

    def seen(records: list[TrialRecord]) -> list[Any]:
        return [(r.config, r.visible, r.outcome) for r in records]

    whole = sweeping("whole", 16).drive()
    sweeping("parts", 8).drive()

    assert seen(sweeping("parts", 16).drive()) == seen(whole)
    assert {"complete", "pruned"} <= {r.state for r in whole}


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_sweep_that_is_killed_again_and_again_ends_the_same(tmp_path: Path, pruner: str) -> None:
    rules = rules_of(pruner, 8)
    whole = Sweeping(tmp_path / "whole", rules, stops=prune_rule(rules, "name")).drive()
    parts = Sweeping(tmp_path / "parts", rules, stops=prune_rule(rules, "name"))
    crashes = 0

    while True:
        try:
            parts.appends = 0
            records = parts.drive(crash=7)
            break
        except Crash:
            crashes += 1

    assert crashes > 10
    assert list(outcomes(records)) == list(outcomes(whole))


def test_a_sweep_ends_with_a_finished_model_though_all_were_stopped(tmp_path: Path) -> None:
    rules = replace(rules_of("patience", 5), finalists=2)
    stops = prune_rule(rules, "name", patience=1)
    records = Sweeping(tmp_path, rules, stops=lambda record, records: True).drive()

    assert [r.state for r in records].count("complete") == 2
    assert all(r.shown == 2 for r in records if r.state == "complete")
    assert not stops(run(1, 2.0, 1.0), [run(1, 2.0, 1.0)])


# An objective that is measured at rungs alone


def test_values_at_rungs_alone_are_judged_as_such() -> None:
    nan = math.nan
    good, bad = run(1, nan, 0.5, nan, 0.4), run(2, nan, 0.7, nan, 0.8)
    between = run(3, nan, 0.6, nan)

    assert [r.value for r in (good, bad, between)] == [0.4, 0.8, 0.6]
    assert between.curve == {2: 0.6, 3: 0.6} and run(4, nan).curve == {}
    assert sorted((bad, between, good), key=rank_key) == [good, bad, between]
    assert best_at_rung(2, [good, bad, between], Rules(9, 18, 2, 3)) == [good]

    # Four epochs, or two rungs, after the best one
    stops = prune_rule(rules_of("patience"), "name", patience=4)
    verdicts = [
        stops(record := run(1, nan, 0.5, nan, *later), [record])
        for later in (
            (0.6,),
            (0.6, nan, 0.7),
            (0.6, nan, 0.7, nan, 0.6),
            (0.6, nan, 0.7, nan, 0.4),
        )
    ]
    assert verdicts == [False, False, True, False]
