r"""Tests for sda_ray.report.findings: a report says what the study says."""

import itertools
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from studies import no_sync  # noqa: F401
from sweeping import EPOCH, START, make_sweep, make_sweep_of_seeds

from sda_ray.core.errors import UserError
from sda_ray.report.findings import Findings, read_findings
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import TrialRecord, rank_key
from sda_ray.search.study import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_sweep(tmp_path, "width", 24, ends={3: "diverged", 5: "failed"})


@pytest.fixture
def findings(tmp_path: Path, study: Study) -> Findings:
    return read_findings(tmp_path, "width")


def test_trials_are_those_of_the_study_from_best_to_worst(
    study: Study, findings: Findings
) -> None:
    records = sorted(study.records(), key=rank_key)

    assert [t.record.run_id for t in findings.trials] == [r.run_id for r in records]
    assert [t.record.value for t in findings.trials] == [r.values[r.last] for r in records]
    assert findings.spent == sum(r.last for r in records)
    assert sum(t.seconds for t in findings.trials) == pytest.approx(EPOCH * findings.spent)
    assert {t.record.status for t in findings.trials} == {
        "complete",
        "pruned",
        "diverged",
        "failed",
    }
    assert findings.best is not None and findings.best.record.run_id == records[0].run_id
    assert list(findings.shares) == []  # too few are complete


def test_configurations_are_compared_by_the_mean_over_seeds(tmp_path: Path) -> None:
    records = make_sweep_of_seeds(tmp_path, "seeds", 24).records()
    findings = read_findings(tmp_path, "seeds")
    replicas = [t for t in findings.trials if t.record.replica_of]

    assert len(findings.trials) == len(records) and findings.best is not None
    assert len(replicas) == 2 * len(findings.complete)
    assert all(t.why.startswith("another seed of run ") for t in replicas)
    assert findings.uncertainty(findings.best) == pytest.approx(0.01 / 3**0.5)
    assert "the mean of 3 seeds" in next(findings.found())
    assert not any("One seed" in text for text in findings.doubts())
    assert not {t.record.run_id for t in replicas} & {*findings.expected}


def test_each_run_has_a_reason_why_it_stopped(findings: Findings) -> None:
    rungs = findings.rules.rungs
    assert rungs == (1, 3, 7, 15, 30)

    for trial in findings.trials:
        record = trial.record
        reached = [t.record.values.get(record.last) for t in findings.trials]
        better = sum(x is not None and x < record.values[record.last] for x in reached)
        expected = {
            "complete": "trained to the end",
            "failed": "it failed & <ended>",
            "diverged": "it diverged & <ended>",
        }.get(record.state, f"rank {better + 1} of {len(reached) - reached.count(None)} at epoch ")
        assert trial.why.startswith(expected)

        if record.state == "pruned":
            go_on = int(trial.why.rpartition(": ")[2].replace("none", "0").split()[0])
            assert better + 1 > go_on
            assert go_on <= sum(t.record.last > record.last for t in findings.trials) + 1


def test_epochs_are_placed_into_the_attempts_that_trained_them(findings: Findings) -> None:
    for trial in findings.trials:
        assert len(trial.times) == trial.record.last
        inside = [any(b < x <= e + 1e-3 for b, e, _ in trial.attempts) for x in trial.times]
        assert all(inside)

    times = sorted(x for trial in findings.trials for x in trial.times)
    assert times == pytest.approx([START + EPOCH * (i + 1) for i in range(findings.spent)])


def test_history_has_each_complete_run_when_it_was_complete(findings: Findings) -> None:
    assert sorted(y for _, y, _ in findings.history) == sorted(
        t.record.value or 0 for t in findings.complete
    )

    for spent, _, name in findings.history:
        (trial,) = (t for t in findings.complete if t.name == name)
        assert START + EPOCH * spent == pytest.approx(trial.times[-1])


def test_random_search_is_the_mean_best_over_all_orders(findings: Findings) -> None:
    values = sorted(findings.expected.values())[:5]
    few = replace(findings)
    few.__dict__["expected"] = dict(zip("abcde", values, strict=True))

    for n, (spent, mean) in enumerate(few.random_search, start=1):
        assert spent == 30 * n
        assert mean == pytest.approx(
            statistics.mean(min(x) for x in itertools.combinations(values, n))
        )

    assert len(few.random_search) == 5


def test_paused_runs_are_expected_to_improve_as_complete_ones_did(findings: Findings) -> None:
    for trial in findings.trials:
        record, found = trial.record, findings.expected.get(trial.record.run_id)

        if record.state == "complete":
            assert found == trial.record.value
        elif record.state in ("failed", "diverged"):
            assert found is None
        else:
            factors = [
                (t.record.value or 0) / t.record.values[record.last] for t in findings.complete
            ]
            assert found == pytest.approx(record.values[record.last] * statistics.median(factors))


def test_best_at_the_boundary_of_its_range_is_doubted(findings: Findings) -> None:
    best = findings.best
    assert best is not None
    drawn = best.record.trial
    names = ("learning_rate", "weight_decay")

    for x, at in ((1e-4, True), (1e-3, False), (9.9e-3, True)):
        params = {**drawn.params, "learning_rate": x, "weight_decay": 1e-3}
        trial = type("T", (), {"params": params, "distributions": drawn.distributions})
        moved = replace(best, record=replace(best.record, trial=trial))
        assert list(findings.at_boundary(moved)) == [names[0]] * at


def test_a_sweep_without_directories_or_results_has_a_report(
    tmp_path: Path, study: Study, findings: Findings
) -> None:
    before = [trial.record.value for trial in findings.trials]

    for path in list(RunPath.all(tmp_path)):
        shutil.rmtree(path.directory)

    bare = read_findings(tmp_path, "width")
    assert [trial.record.value for trial in bare.trials] == before
    assert any(f"directories of {len(before)} runs are gone" in text for text in bare.doubts())
    assert bare.history == [] and bare.correlations() == []

    with pytest.raises(UserError, match="no sweep 'depth'"):
        read_findings(tmp_path, "depth")


def test_correlation_is_of_the_order_at_a_rung_with_that_at_the_end(tmp_path: Path) -> None:
    make_sweep(tmp_path, "all", 8, pruner="none")
    findings = read_findings(tmp_path, "all")
    assert findings.correlations() == []  # there are no rungs

    ruled = replace(findings, rules=replace(findings.rules, min_epochs=10, recorded=(10,)))
    ((rung, tau, count),) = ruled.correlations()
    assert (rung, round(tau, 9), count) == (10, 1.0, 8)

    def turned(record: TrialRecord) -> TrialRecord:
        return replace(record, values=record.values | {10: -record.values[10]})

    trials = [replace(t, record=turned(t.record)) for t in findings.trials]
    ((_, tau, _),) = replace(ruled, trials=trials).correlations()
    assert round(tau, 9) == -1.0
