r"""Tests for sda_ray.search.promotion: what a sweep decides, whatever happens to it."""

import math
import os
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import Crash, Sweeping, diverges, fails, loss

from sda_ray.search.promotion import (
    Rules,
    TrialRecord,
    average_seeds,
    best_at_rung,
    count_trials,
    decide,
    rank_key,
    unhide,
)

RULES = Rules(target=9, epochs=9, min_epochs=1, eta=3)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Leaves out what only a power cut would miss, which is most of the time."""

    monkeypatch.setattr(os, "fsync", lambda handle: None)


def run(index: int, *values: float, state: str = "running", **more: Any) -> TrialRecord:
    r"""Returns a run with values from epoch 1 on, at the rung that it has reached."""

    until = next((rung for rung in RULES.rungs if rung >= len(values)), 9)
    known = dict(enumerate(values, start=1))

    return replace(TrialRecord(index, f"{index:08}", state, until, 9, known), **more)


# Rungs


@pytest.mark.parametrize(
    ("rules", "rungs"),
    [
        (Rules(1, 27, 1, eta=3), (1, 3, 9, 27)),
        (Rules(1, 256, 16), (16, 32, 64, 128, 256)),
        (Rules(1, 256, 9, eta=3), (9, 28, 85, 256)),
        (Rules(1, 60, 2, eta=3), (2, 6, 20, 60)),
        (Rules(1, 60, 5, eta=3), (5, 20, 60)),
        (Rules(1, 60, 40), (40, 60)),
        (Rules(1, 18, 2, eta=4), (2, 4, 18)),
        (Rules(1, 5, 5), (5,)),
        (Rules(1, 5, None), (5,)),
        (Rules(1, 1, 1), (1,)),
        (Rules(1, 27, 1, eta=3, pruner="hyperband"), (1, 3, 9, 27)),
        (Rules(1, 10, 3, pruner="median"), (3, 6, 9, 10)),
        (Rules(1, 6, 2, pruner="patience"), (2, 4, 6)),
        (Rules(1, 5, None, pruner="none"), (5,)),
        (Rules(1, 60, 2, recorded=(2, 6, 18, 54)), (2, 6, 18, 54, 60)),
    ],
)
def test_rungs_grow_by_eta_up_to_the_full_budget(rules: Rules, rungs: tuple[int, ...]) -> None:
    assert rules.rungs == rungs


def test_top_is_the_best_part_of_a_rung_rounded_down() -> None:
    records = [run(i, float(10 - i)) for i in range(1, 9)]

    assert [r.index for r in best_at_rung(1, records, RULES)] == [8, 7]
    assert best_at_rung(3, records, RULES) == []
    assert best_at_rung(1, records[:2], RULES) == []


def test_ties_are_settled_by_age() -> None:
    assert [r.index for r in best_at_rung(1, [run(i, 1.0) for i in (3, 2, 1)], RULES)] == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_never_good(bad: float) -> None:
    records = [run(1, bad), run(2, 5.0), run(3, 6.0)]

    assert [r.index for r in best_at_rung(1, records, RULES)] == [2]
    assert best_at_rung(1, [run(i, bad) for i in range(9)], RULES) == []
    assert sorted(records, key=rank_key)[-1].index == 1


def test_divergence_is_the_worst_value_at_every_rung_that_a_run_was_bound_for() -> None:
    gone = run(1, 0.1, 0.1, state="diverged")
    records = [gone, run(2, 5.0), run(3, 6.0)]

    assert [r.index for r in best_at_rung(1, records, RULES)] == [2]
    assert (
        best_at_rung(3, [gone, run(2, 1.0, 1.0, 1.0), run(3, 2.0, 2.0, 2.0)], RULES)[0].index == 2
    )
    assert best_at_rung(9, [gone] * 3, RULES) == []
    assert sorted([run(4, 7.0), gone], key=rank_key)[-1] is gone


def test_complete_runs_are_ordered_by_value_and_before_all_others() -> None:
    short = run(1, 3.0, state="complete", epochs=1)
    long = run(2, 9.0, 9.0, 4.0, state="complete", epochs=3)
    paused = run(3, *[0.1] * 6)

    assert sorted([paused, long, short], key=rank_key) == [short, long, paused]


# Decisions


def test_orphans_come_first_then_promotions_then_draws() -> None:
    records = [run(1, 3.0), run(2, 2.0), run(3, 1.0), run(4, 1.0, 1.0)]

    assert decide(records, (), RULES).kind == "adopt"
    action = decide(records, {4}, RULES)
    assert (action.kind, action.record, action.until) == ("promote", records[2], 3)
    assert decide(records, {3, 4}, RULES).kind == "draw"


def test_queued_configurations_come_before_promotions_if_there_is_room() -> None:
    records = [run(i, float(i)) for i in (1, 2, 3)]

    assert decide(records, (), RULES, queued=True).kind == "draw"
    assert decide(records, (), replace(RULES, target=3), queued=True).record == records[0]


def test_promotions_come_from_the_highest_rung() -> None:
    high = [run(i, 9.0, 9.0, float(i)) for i in (1, 2, 3)]
    low = [run(i, 0.1 * i) for i in (4, 5, 6)]
    action = decide([*low, *high], (), RULES)

    assert (action.kind, action.record, action.until) == ("promote", high[0], 9)


def test_runs_in_flight_are_waited_for_before_finalists_are_made() -> None:
    rules = replace(RULES, target=2, finalists=2)
    records = [run(1, 1.0), run(2, 2.0, 1.0, 1.0, 1.0)]

    assert decide(records, {2}, replace(rules, finalists=1)).kind == "wait"
    assert decide([run(1, 1.0), run(2)], {2}, rules).kind == "wait"

    action = decide(records, {2}, rules)  # it has the full budget, and more finalists are wanted
    assert (action.kind, action.record, action.shown) == ("promote", records[0], 1)


def test_failed_runs_are_replaced_a_few_times() -> None:
    failed = [run(i, state="failed") for i in range(1, 6)]

    assert decide(failed[:3], (), RULES).kind == "draw"
    assert decide(failed[:4], (), RULES).kind == "stop"
    assert decide(failed, (), replace(RULES, excused=4)).kind == "draw"
    assert decide(failed[:4], (), replace(RULES, target=16)).kind == "draw"


def test_an_exhausted_space_ends_the_sweep_with_a_finalist() -> None:
    assert decide([], (), RULES, exhausted=True).kind == "stop"
    assert decide([run(1, 1.0)], (), RULES, exhausted=True).until == 9


def test_closed_runs_are_promoted_when_a_sweep_is_extended() -> None:
    records = [run(i, float(i), state="pruned") for i in (1, 2, 3)]

    assert decide(records, (), replace(RULES, target=3)).record == records[0]


# Seeds


def replica(index: int, of: int, *values: float, state: str = "complete") -> TrialRecord:
    return run(index, *values, state=state, replica_of=of, until=9)


def test_a_configuration_gets_further_seeds_once_it_may_go_to_the_end() -> None:
    rules = replace(RULES, target=3, seeds=3)
    waits = [run(i, 9.0, 9.0, float(i)) for i in (1, 2)]
    promoted = run(3, 1.0, 1.0, 0.5, until=9)
    action = decide([*waits, promoted], {3}, rules)

    assert (action.kind, action.record, action.until) == ("replicate", promoted, 9)

    records = [*waits, promoted, replica(4, 3, state="running")]
    assert decide(records, {3}, rules).record == records[3]  # its process has died
    assert decide(records, {3, 4}, rules).record == promoted

    records.append(replica(5, 3, *[1.0] * 9))
    assert decide(records, {3, 4}, rules).kind == "wait"
    assert decide(records, {3, 4}, replace(rules, target=4)).kind == "draw"
    assert count_trials(records) == 3


@pytest.mark.parametrize("state", ["diverged", "failed", "stopped"])
def test_a_configuration_whose_first_run_is_over_gets_no_further_seeds(state: str) -> None:
    over = run(1, *[1.0] * 4, state=state, until=9)

    assert decide([over], (), replace(RULES, target=1, seeds=2, finalists=0)).kind != "replicate"


def test_further_seeds_do_not_compete_at_rungs() -> None:
    records = [run(1, 2.0), run(2, 3.0), run(3, 4.0), replica(4, 9, 1.0)]

    assert [r.index for r in best_at_rung(1, records, RULES)] == [1]


def test_a_configuration_is_compared_by_the_mean_over_seeds_that_are_complete() -> None:
    lucky = run(1, *[1.0] * 9, state="complete")
    steady = run(2, *[2.0] * 9, state="complete")
    records = [lucky, steady, replica(3, 1, *[6.0] * 9), replica(4, 1, 8.0, state="running")]
    best, other = sorted(average_seeds(records), key=rank_key)

    assert (best.index, best.value, best.error_over_seeds) == (2, 2.0, None)
    assert (other.index, other.value, other.seeds) == (1, 3.5, (1.0, 6.0))
    assert other.error_over_seeds == pytest.approx(2.5)
    assert other.values == lucky.values  # its own


def test_means_of_means_are_the_same() -> None:
    first = run(1, *[1.0] * 9, state="complete", finals=(1.0, 8.0))
    records = [first, replace(replica(2, 1, *[3.0] * 9), finals=(3.0, 4.0))]
    (once,) = average_seeds(records)

    assert once.finals == (2.0, 6.0)
    assert average_seeds([once, records[1]]) == [once]


def test_queued_configurations_come_before_further_seeds() -> None:
    records = [run(1, *[1.0] * 9, state="complete")]
    rules = replace(RULES, target=2, seeds=2)

    assert decide(records, (), rules, queued=True).kind == "draw"
    assert decide(records, (), replace(rules, target=1), queued=True).kind == "replicate"


def test_a_configuration_one_of_whose_seeds_diverges_has_diverged() -> None:
    records = [run(1, *[1.0] * 9, state="complete"), replica(2, 1, 5.0, state="diverged")]
    (only,) = average_seeds(records)

    assert only.state == "diverged" and only.error.startswith("run 2")


# What finalists do is hidden


def test_hidden_values_do_not_count_until_the_rule_promotes() -> None:
    hidden = run(1, *[1.0] * 9, state="complete", shown=1, until=9)
    others = [run(2, 2.0), run(3, 0.5)]

    assert unhide([hidden, *others], RULES)[0].shown == 1
    assert best_at_rung(3, [hidden, *others], RULES) == []

    best = [run(2, 2.0), run(3, 3.0)]
    assert unhide([hidden, *best], RULES)[0].shown == 3  # best of 3, but alone at the next rung


def test_hidden_divergence_does_not_count_until_the_rule_promotes() -> None:
    hidden = run(1, 1.0, 1.0, state="diverged", shown=1, until=9)
    others = [run(2, 2.0), run(3, 0.5)]

    assert [r.index for r in best_at_rung(1, [hidden, *others], RULES)] == [3]

    best = [run(2, 2.0), run(3, 3.0)]
    revealed = unhide([hidden, *best], RULES)
    assert revealed[0].shown is None
    assert [r.index for r in best_at_rung(1, revealed, RULES)] == [2]


def test_revelations_wait_for_promotions_that_come_first() -> None:
    hidden = run(1, *[2.0] * 9, state="complete", shown=1, until=9)
    better = run(2, 1.0)
    records = [hidden, better, *(run(i, 5.0) for i in range(3, 7))]

    assert [r.index for r in best_at_rung(1, records, RULES)] == [2, 1]
    assert unhide(records, RULES)[0].shown == 1


# Whole sweeps


def simulate(directory: Path, rng: random.Random, slots: int, rules: Rules) -> Sweeping:
    sweeping = Sweeping(directory, rules, diverges=diverges, fails=fails)

    while True:
        try:
            sweeping.drive(slots, rng)
            return sweeping
        except Crash:
            continue


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 4),
    target=st.integers(1, 10),
    finalists=st.integers(0, 3),
    first=st.sampled_from([None, 1, 2]),
    seeds=st.integers(1, 3),
)
def test_any_interleaving_ends_in_a_consistent_study(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    slots: int,
    target: int,
    finalists: int,
    first: int | None,
    seeds: int,
) -> None:
    rules = Rules(target, 9, first, 3, finalists, seeds=seeds)
    directory = tmp_path_factory.mktemp("sweep")
    sweeping = simulate(directory, random.Random(seed), slots, rules)
    records = sweeping.drive()  # once more: nothing is left to do

    # What was sent to the end was sent there with each seed
    replicas = Counter(r.replica_of for r in records)
    sent = [r for r in records if not r.replica_of and r.until == 9 and r.state != "pruned"]
    whole = [r for r in sent if r.state == "complete"]
    assert all(replicas[r.index] == seeds - 1 for r in whole)
    assert {*replicas} <= {0, *(r.index for r in sent)}

    # Nothing lost, twice, or left open
    own = [r for r in records if not r.replica_of]
    failed = [r for r in own if r.state == "failed"]
    assert [r.index for r in records] == list(range(1, len(records) + 1))
    assert len({r.run_id for r in records}) == len(records)
    assert len({str(r.config) for r in records}) == len(records)
    assert all(r.state in ("complete", "pruned", "diverged", "failed") for r in records)
    assert len(own) - len(failed) == target or len(failed) >= 4
    assert len(list(sweeping.runs.iterdir())) <= len(records)

    # Each run got as far as it was sent
    for r in records:
        if r.state == "complete":
            assert r.last == 9
            assert sorted(r.values) == list(range(1, 10))
        elif r.state == "pruned":
            assert r.last in rules.rungs[:-1]

    # There are finished models
    complete = sum(r.state == "complete" for r in own)
    assert complete >= min(finalists, complete + sum(r.paused for r in own))

    # Promoted were those among the best, as the values were then
    for record, then in sweeping.promotions:
        rung = max(e for e in rules.rungs if e < record.until)
        rivals = [
            math.inf if r.state == "diverged" else r.visible[rung]
            for r in then
            if rung in r.visible
        ]
        better = sum(x < record.values[rung] for x in rivals)
        assert better < (len(rivals) + sum(r.state == "diverged" for r in then)) / 3


@pytest.mark.parametrize("seed", range(3))
def test_a_serial_sweep_is_successive_halving_as_published(tmp_path: Path, seed: int) -> None:
    rules = Rules(14, 9, 1, 3, finalists=0)
    records = Sweeping(tmp_path, rules).drive()
    losses = [[r.values.get(rung) for rung in rules.rungs] for r in records]

    # Algorithm 2 of Li et al. with one worker, over the configurations that were drawn
    at: list[dict[int, float]] = [{}, {}, {}]  # value by run at each rung
    drawn = 0

    while True:
        for k in (1, 0):
            best = sorted(at[k], key=lambda i: (at[k][i], i))[: len(at[k]) // 3]
            candidates = [i for i in best if i not in at[k + 1]]

            if candidates:
                i = candidates[0]
                at[k + 1][i] = loss(records[i].config, rules.rungs[k + 1])
                break
        else:
            if drawn == 14:
                break

            at[0][drawn] = loss(records[drawn].config, 1)
            drawn += 1

    assert losses == [[rung.get(i) for rung in at] for i in range(14)]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize(("diverging", "seeds"), [(False, 1), (True, 1), (True, 2)])
def test_extended_sweep_equals_one_that_was_larger_at_once(
    tmp_path: Path, sampler: str, diverging: bool, seeds: int
) -> None:
    rules = Rules(32, 9, 1, 3, seeds=seeds)
    more: dict[str, Any] = {"diverges": diverges} if diverging else {}
    whole = Sweeping(tmp_path / "whole", rules, sampler, **more).drive()
    parts = Sweeping(tmp_path / "parts", rules, sampler, **more)

    for target in (1, 5, 16, 32):
        parts.rules = replace(rules, target=target)
        records = parts.drive()

        assert sum(r.state == "complete" for r in records) >= 1

    seen = [
        [(r.config, r.visible, r.outcome) for r in unhide(rs, rules) if not r.replica_of]
        for rs in (whole, records)
    ]
    assert seen[0] == seen[1]


def test_decide_is_quick_for_thousands_of_runs() -> None:
    rng = random.Random(0)
    records = [run(i, rng.random(), state="pruned") for i in range(1, 2001)]
    start = time.process_time()
    decide(records, (), replace(RULES, target=4000))

    assert time.process_time() - start < 0.5
