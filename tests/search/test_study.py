r"""Tests for sda_ray.search.study: the record of a sweep."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from playing import sweep_of
from simulated import Crash, Sweeping, diverges, draw, outcomes
from studies import add, lease, no_sync, study

from sda_ray.core.config import CONFIG
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.core.space import choice
from sda_ray.search.promotion import Rules, TrialRecord
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study, draw_run

__all__ = ["lease", "no_sync", "study"]  # fixtures

RULES = Rules(target=6, epochs=9, min_epochs=1, eta=3)


# What is written


def test_run_enters_the_journal_with_one_line(tmp_path: Path, study: Study) -> None:
    journal = tmp_path / "study.journal"
    before = journal.read_bytes().count(b"\n")
    add(study)

    assert journal.read_bytes().count(b"\n") == before + 1


def test_opening_a_study_again_writes_nothing(tmp_path: Path, lease: Lease, study: Study) -> None:
    add(study)
    before = (tmp_path / "study.journal").read_bytes()
    records = Study(tmp_path / "study.journal", "test", lease).records()

    assert [r.run_id for r in records] == ["run00001"]
    assert (tmp_path / "study.journal").read_bytes() == before


def test_journal_that_lacks_the_start_of_a_run_is_damaged(
    tmp_path: Path, lease: Lease, study: Study
) -> None:
    journal = tmp_path / "study.journal"
    first, second = add(study), add(study)
    study.report(study.report(second, {1: 0.2}), {2: 0.1})
    lines = journal.read_text().splitlines(True)
    start = next(i for i, line in enumerate(lines) if f'"{first.run_id}"' in line)
    journal.write_text("".join(lines[:start] + lines[start + 1 :]))

    with pytest.raises(UserError, match="lacks the start of a run"):
        Study(journal, "test", None)

    journal.write_text("".join(lines[: start + 1]))  # an older copy

    assert Study(journal, "test", None).records()[0].run_id == first.run_id


@pytest.mark.parametrize("value", ['"high"', "null", "NaN"])
def test_parameter_that_is_no_number_is_damage(
    tmp_path: Path, lease: Lease, study: Study, value: str
) -> None:
    journal = tmp_path / "study.journal"
    rate = json.dumps(add(study).trial.params["learning_rate"])
    head, found, tail = journal.read_text().partition(f'"learning_rate":{rate}')
    assert found
    journal.write_text(f'{head}"learning_rate":{value}{tail}')

    with pytest.raises(UserError, match=r"journal is damaged: the record of a run is wrong: "):
        Study(journal, "test", None)


# Records


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("complete", TrialState.COMPLETE),
        ("pruned", TrialState.PRUNED),
        ("diverged", TrialState.PRUNED),
        ("failed", TrialState.FAIL),
    ],
)
def test_states_survive_a_reload(
    tmp_path: Path, lease: Lease, study: Study, state: str, expected: TrialState
) -> None:
    record = study.report(add(study, until=9), {1: 0.5, 2: 0.25})
    study.tell(record, state, "why" if state in ("diverged", "failed") else "")
    again = Study(tmp_path / "study.journal", "test", lease)
    (found,) = again.records()

    assert (found.state, found.values) == (state, {1: 0.5, 2: 0.25})
    assert found.error == ("why" if state in ("diverged", "failed") else "")
    assert again.study.trials[0].state == expected
    assert found.config == record.config


def test_closed_run_that_resumes_has_a_new_record_that_supersedes_the_old(study: Study) -> None:
    study.tell(study.report(add(study), {1: 0.5}), "pruned")
    (closed,) = study.records()
    revived = study.start(closed, 3, None)

    assert study.records() == [revived]
    assert (revived.index, revived.run_id, revived.attempt) == (1, "run00001", 2)
    assert (revived.state, revived.until, revived.values) == ("running", 3, {1: 0.5})
    assert revived.config == closed.config
    assert revived.trial.user_attrs["supersedes"] == closed.trial.number
    assert [t.state for t in study.study.trials] == [TrialState.PRUNED, TrialState.RUNNING]


def test_trials_that_are_no_runs_are_skipped(study: Study) -> None:
    study.study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))
    add(study)

    assert len(study.records()) == 1


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_sweep_killed_after_any_append_ends_the_same(tmp_path: Path, sampler: str) -> None:
    rules = replace(RULES, target=4)
    queue = [{"learning_rate": rate} for rate in (2e-3, 1e-2, 2e-3)]

    def begin(study: Study) -> None:
        attrs = study.study.user_attrs

        for n, params in enumerate(queue, start=1):
            if f"queue/{n}" not in attrs:
                assert study.enqueue(params) == n

    whole = Sweeping(tmp_path / "whole", rules, sampler, diverges)
    expected = list(outcomes(whole.drive(begin=begin)))
    assert [config["learning_rate"] for _, config, *_ in expected[:2]] == [2e-3, 1e-2]
    assert whole.appends > 20

    for crash in range(1, whole.appends + 1):
        sweeping = Sweeping(tmp_path / str(crash), rules, sampler, diverges)

        with pytest.raises(Crash):
            sweeping.drive(crash=crash, begin=begin)

        assert list(outcomes(sweeping.drive(begin=begin))) == expected


@pytest.mark.parametrize("seed", range(4))
def test_decisions_of_several_slots_outlive_the_driver(tmp_path: Path, seed: int) -> None:
    sweeping = Sweeping(tmp_path, replace(RULES, target=9), "tpe", diverges)
    rng = random.Random(seed)
    before: dict[str, TrialRecord] = {}
    deaths = 0

    while True:
        try:
            sweeping.drive(3, rng, sweeping.appends + rng.randint(2, 30))
            break
        except Crash:
            deaths += 1
            lease = Lease(tmp_path / "lease.json", "the sweep")
            now = {r.run_id: r for r in Study(sweeping.journal, "simulated", lease).records()}
            lease.release()

        assert before.keys() <= now.keys()

        for id, old in before.items():
            assert now[id].config == old.config
            assert now[id].until >= old.until
            assert old.visible.items() <= now[id].visible.items()

        before = now

    assert deaths > 1


def test_extended_sweep_resumes_in_the_same_directories(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, RULES)
    before = {r.run_id: r for r in sweeping.drive()}
    sweeping.rules = replace(RULES, target=24)
    after = {r.run_id: r for r in sweeping.drive()}
    gone_on = [r for id, r in after.items() if id in before and r.last > before[id].last]

    assert before.keys() < after.keys()
    assert gone_on, "no run was promoted by the extension"
    assert len(list(sweeping.runs.iterdir())) == len(after) == 24


def test_values_of_one_report_are_appended_at_once(tmp_path: Path, study: Study) -> None:
    record = add(study, until=9)
    appended: list[bytes] = []
    append = study.journal._append
    study.journal._append = lambda data: (appended.append(data), append(data))[1]  # type: ignore
    study.report(record, {e: 1 / e for e in range(1, 10)})
    study.report(record, {e: 1 / e for e in range(1, 10)})
    study.tell(record, "diverged", "exploded")

    assert [data.count(b"\n") for data in appended] == [9, 3]


def test_values_beyond_the_rung_of_a_run_wait(study: Study) -> None:
    record = study.report(add(study, until=3), {e: 1 / e for e in range(1, 10)})
    assert list(record.values) == [1, 2, 3]
    assert study.tell(record, "complete") == record  # it waits at its rung

    record = study.report(study.extend(record, 9, None), {e: 1 / e for e in range(1, 10)})
    assert study.tell(record, "complete").state == "complete"


def test_records_that_have_not_changed_are_not_made_again(study: Study) -> None:
    for _ in range(4):
        add(study)

    before = study.records()
    changed = study.report(before[1], {1: 0.5})
    after = study.records()

    assert after[1] == changed
    assert [a is b for a, b in zip(after, before, strict=True)] == [True, False, True, True]

    study.set_shown(before[2], 1)
    assert [r.shown for r in study.records()] == [None, None, 1, None]


def test_several_objectives_are_all_kept(tmp_path: Path, lease: Lease) -> None:
    objectives = ("loss_valid", "parameters", "seconds")
    sweeping = Sweeping(tmp_path / "sweep", replace(RULES, min_epochs=None), objectives=objectives)
    done = sweeping.drive()
    study = Study(sweeping.journal, "simulated", lease, objectives)

    assert len(study.study.directions) == 3
    assert study.records() == done

    for r in done:
        assert r.finals == (r.values[9], *[1 / r.config["learning_rate"]] * 2)

    drawn = propose(draw, done, sampler="random", objectives=3)
    assert drawn is not None
    brought = TrialRecord(
        7, "prior", "complete", 9, 9, {9: 0.5}, source="x", finals=(0.5, 1.0, 2.0)
    )
    assert study.add(brought, drawn[1]).finals == (0.5, 1.0, 2.0)

    pruned = study.report(study.add(TrialRecord(8, "next", "running", 9, 9), drawn[1]), {1: 0.5})
    assert study.tell(pruned, "pruned").state == "pruned"


def test_attempts_that_others_count_are_remembered_for_closed_runs(
    tmp_path: Path, lease: Lease, study: Study
) -> None:
    closed = study.tell(study.report(add(study), {1: 0.5}), "pruned")
    assert study.record_attempt(closed, 5).attempt == 5
    assert study.record_attempt(study.records()[0], 3).attempt == 5

    again = Study(tmp_path / "study.journal", "test", lease)
    assert again.start(again.records()[0], 3, None).attempt == 6


# Others look at it


def test_optuna_alone_reads_the_study_as_dashboards_do(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, RULES, diverges=diverges)
    records = sweeping.drive()
    script = """
import json, sys, optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
storage = JournalStorage(JournalFileBackend(sys.argv[1]))
(study,) = optuna.get_all_study_summaries(storage)
study = optuna.load_study(study_name=study.study_name, storage=storage)
print(json.dumps([[t.state.name, t.value, t.intermediate_values] for t in study.trials]))
print(json.dumps(study.best_value))
"""
    command = [sys.executable, "-c", script, str(sweeping.journal)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    trials, best = map(json.loads, done.stdout.splitlines())
    newest = {r.trial.number: r for r in records}

    for number, (state, value, curve) in enumerate(trials):
        assert state != "RUNNING"

        if number in newest:
            record = newest[number]
            assert {int(e): x for e, x in curve.items()} == record.values
            assert (state == "COMPLETE") == (record.state == "complete")
            assert state == "PRUNED" or value == record.values[9]

    assert best == min(r.values[9] for r in records if r.state == "complete")


def test_exhausted_space_is_reported(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    def draw_next() -> TrialRecord | None:
        return draw_run(study, study.records(), Rules(8, 9), CONFIG, sweep.propose)

    sweep = sweep_of({"activation": choice("ELU", "GELU", "SiLU")})

    assert [draw_next() is not None for _ in range(4)] == [True] * 3 + [False]
    assert caplog.text.count("SPACE has no more configurations: 3 runs of 8 trials.") == 1
