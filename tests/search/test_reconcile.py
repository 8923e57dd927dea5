r"""Tests for sda_ray.search.reconcile: the study survives crashes of driver and trials."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from ordeal import Ordeal
from simulated import Crash, Sweeping, loss, outcomes

from sda_ray.core.lease import Lease
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import Rules, TrialRecord, decide
from sda_ray.search.reconcile import (
    DirectoryState,
    catch_up,
    read_directories,
    reconcile,
)
from sda_ray.search.study import Study

RULES = Rules(target=6, epochs=9, min_epochs=1, eta=3)
VALUE = 7  # the code of an intermediate value in Optuna's journal
FINAL = ("complete", "diverged", "stopped")


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    r"""Leaves out what only a power cut would miss, which is most of the time."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


# The pure function

LOSSES = {e: 1.0 / e for e in range(1, 10)}


def run(last: int, until: int, state: str = "running", **more: Any) -> TrialRecord:
    values = {e: LOSSES[e] for e in range(1, last + 1)}

    return TrialRecord(1, "aaaaaaaa", state, until, 9, values, attempt=2, **more)


def said(status: str, last: int, attempt: int = 2, reason: str = "") -> DirectoryState:
    values = {e: LOSSES[e] for e in range(1, last + 1)}

    return DirectoryState(
        status, values, attempt, reason, (LOSSES[last],) if status == "finished" else ()
    )


def brief(record: TrialRecord, found: DirectoryState | None) -> list[str]:
    r"""Returns the kinds of changes, and what comes next."""

    after, status = (record, "") if found is None else reconcile(record, found, RULES.rungs)
    changes = {
        "count": after.attempt > record.attempt,
        "extend": after.until > record.until,
        "report": after.values != record.values,
        after.state: after.state != record.state,
        "mark": bool(status),
    }
    action = decide([after], (), replace(RULES, target=1))

    return [kind for kind, changed in changes.items() if changed] + [f"then {action.kind}"]


@pytest.mark.parametrize(
    ("record", "found", "expected"),
    [
        # In flight when the driver died
        (run(0, 1), None, ["then adopt"]),
        (run(0, 3), said("running", 0), ["then adopt"]),
        (run(1, 3), said("running", 2), ["report", "then adopt"]),
        (run(1, 3), said("interrupted", 1), ["then adopt"]),
        (run(1, 3), said("failed", 1), ["then adopt"]),
        (run(2, 3), said("running", 1), ["then adopt"]),  # its metrics are gone
        (run(1, 3), said("running", 2, attempt=4), ["count", "report", "then adopt"]),
        # At a rung
        (run(1, 3), said("running", 3), ["count", "report", "mark", "then promote"]),
        (run(1, 1), said("running", 1), ["count", "mark", "then promote"]),
        (run(1, 1), said("paused", 1), ["then promote"]),
        (run(1, 1), None, ["then promote"]),
        (run(1, 1), said("running", 1, 5), ["count", "mark", "then promote"]),
        # At its end
        (run(8, 9), said("finished", 9), ["report", "complete", "then stop"]),
        (run(9, 9), said("finished", 9), ["complete", "then stop"]),
        (run(9, 9), said("running", 9), ["then adopt"]),  # its weights are not written yet
        (run(9, 9), None, ["then adopt"]),
        (run(2, 9), said("diverged", 2), ["diverged", "then stop"]),
        (run(2, 9), said("diverged", 2, attempt=1), ["then adopt"]),  # said before the last start
        (run(2, 9), said("stopped", 3), ["report", "stopped", "then stop"]),
        (run(2, 9), said("stopped", 3, attempt=1), ["report", "then adopt"]),  # and taken up again
        # A journal that is older than the directory
        (run(0, 1), said("finished", 9), ["extend", "report", "complete", "then stop"]),
        (run(1, 1), said("diverged", 4), ["extend", "report", "diverged", "then stop"]),
        (run(0, 1), said("running", 4), ["count", "extend", "report", "mark", "then promote"]),
        (run(1, 3), said("paused", 3), ["report", "then promote"]),
        (run(1, 1), said("paused", 3), ["extend", "report", "then promote"]),
        # Closed
        (run(9, 9, "complete"), said("finished", 9), ["then stop"]),
        (run(1, 1, "pruned"), said("paused", 1), ["then promote"]),
        (run(1, 1, "pruned"), said("running", 1), ["count", "mark", "then promote"]),
        (run(1, 1, "pruned"), said("paused", 1, attempt=7), ["count", "then promote"]),
        (run(2, 3, "pruned"), said("paused", 3), ["report", "then promote"]),
        (run(1, 1, "pruned"), said("paused", 3), ["extend", "report", "then promote"]),
        (run(8, 9, "complete"), said("finished", 9), ["report", "then stop"]),
        (run(1, 1, "failed"), said("running", 1), ["count", "mark", "then draw"]),
        (run(9, 9, "complete", source="elsewhere"), said("running", 2), ["then draw"]),
    ],
)
def test_changes_by_state_of_record_and_directory(
    record: TrialRecord, found: DirectoryState | None, expected: list[str]
) -> None:
    assert brief(record, found) == expected


def test_run_that_is_ahead_of_the_journal_stays_hidden_until_the_rule_promotes_it() -> None:
    record, _ = reconcile(run(0, 1), said("finished", 9))

    assert (record.state, record.values, record.shown) == ("complete", LOSSES, 1)
    assert record.outcome == "pruned"


def test_end_that_is_no_number_is_a_divergence() -> None:
    found = replace(said("finished", 9), finals=(float("nan"),))
    record, _ = reconcile(run(9, 9), found)

    assert (record.state, record.finals) == ("diverged", ())


numbers = st.integers(0, 9)
records = st.builds(
    run,
    last=numbers,
    until=st.sampled_from([1, 3, 9]),
    state=st.sampled_from(["running", "complete", "pruned", "diverged", "stopped", "failed"]),
    shown=st.sampled_from([None, 1, 3]),
    source=st.sampled_from(["", "elsewhere"]),
)
founds = st.builds(
    said,
    status=st.sampled_from(["", "running", "paused", "interrupted", "stopped", "diverged"]),
    last=numbers,
    attempt=st.integers(0, 4),
) | st.just(said("finished", 9))


@given(old=records, found=founds)
def test_reconciling_loses_nothing_and_has_an_end(old: TrialRecord, found: DirectoryState) -> None:
    new, status = reconcile(old, found, RULES.rungs)

    assert (new.index, new.run_id, new.source) == (old.index, old.run_id, old.source)
    assert old.values.items() <= new.values.items()
    assert new.attempt >= old.attempt
    assert new.state == old.state or old.state == "running"
    assert old.source == "" or new == old

    if new.state == "complete" != old.state:
        assert new.values == LOSSES

    # Once more, as the directory is by then, there is nothing to do
    now = replace(found, status="marked", attempt=new.attempt) if status else found
    assert reconcile(new, now, RULES.rungs) == (new, "")


def test_values_that_a_journal_has_lost_are_restored_once(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, RULES)
    before = sweeping.drive()
    paused = next(r for r in before if r.state == "pruned" and r.last > 1)
    lines = sweeping.journal.read_bytes().splitlines(keepends=True)

    def is_kept(line: bytes) -> bool:
        record = json.loads(line)
        last = {r.trial.number: r.last for r in before if r is paused or r.state == "complete"}

        return record["op_code"] != VALUE or last.get(record["trial_id"]) != record["step"]

    sweeping.journal.write_bytes(b"".join(line for line in lines if is_kept(line)))
    lease = Lease(tmp_path / "lease.json", "the sweep")
    study = Study(sweeping.journal, "simulated", lease)
    lost = [r.index for r, old in zip(study.records(), before, strict=True) if r.last < old.last]
    assert paused.index in lost and len(lost) > 1

    catch_up(study, sweeping.runs, RULES.rungs)
    assert list(outcomes(study.records())) == list(outcomes(before))
    journal = sweeping.journal.read_bytes()
    catch_up(study, sweeping.runs, RULES.rungs)
    assert sweeping.journal.read_bytes() == journal
    lease.release()

    assert list(outcomes(sweeping.drive())) == list(outcomes(before))


def test_number_of_an_attempt_outlives_a_damaged_record(tmp_path: Path) -> None:
    path = RunPath(tmp_path / "run-1_aaaaaaaa")
    path.directory.mkdir()
    Lease(path.lease, "the run", attempt=3).release()
    path.record.write_text('{"status": ')

    found = read_directories([run(1, 3)], tmp_path)

    assert found == {"aaaaaaaa": DirectoryState(attempt=3)}
    assert brief(run(1, 3), found["aaaaaaaa"])[0] == "count"


# Whole sweeps


class Sweeps(Ordeal):
    r"""Looks at such a sweep after each step, and at its end."""

    # What holds

    @precondition(lambda self: not self.dead)
    @rule()
    def reload(self) -> None:
        again = Study(self.sweeping.journal, "simulated", self.lease, self.sweeping.objectives)

        assert again.records() == self.study.records()
        assert again.queue() == self.study.queue()

    @invariant()
    def nothing_is_lost_or_taken_back(self) -> None:
        if self.dead:
            return

        seen = self.study.records()
        own = [r for r in seen if not (r.source or r.replica_of) and r.state != "failed"]
        now = {r.run_id: r for r in seen}

        assert [r.index for r in seen] == list(range(1, len(seen) + 1))
        assert len(now) == len({str(r.config) for r in seen}) == len(seen)
        assert len(own) <= self.sweeping.rules.target + self.asked
        assert all(r.values == {e: loss(r.config, e) for e in r.values} for r in seen)
        assert all(r.last <= r.until for r in seen)
        assert self.known.keys() <= now.keys()

        for id, old in self.known.items():
            new = now[id]
            assert new.config == old.config
            assert new.until >= old.until
            assert new.attempt >= old.attempt
            assert old.visible.items() <= new.visible.items()
            assert new.state == old.state or old.state not in FINAL

        self.known = now

    def teardown(self) -> None:
        try:
            if hasattr(self, "sweeping"):
                self._end()
        finally:
            shutil.rmtree(self.directory)

    def _end(self) -> None:
        r"""Lets the sweep come to its end, and looks at it."""

        if not self.dead:
            self.die()

        while True:
            try:
                seen = self.sweeping.drive(self.slots)
            except Crash:  # asked to stop, by runs that failed alike
                continue

            if self._full(seen):  # and not stopped by too many that failed
                break

        self.dead, before = False, self.sweeping.journal.read_bytes()
        self.lease = Lease(self.directory / "sweep" / "lease.json", "the sweep")
        self.study = Study(
            self.sweeping.journal, "simulated", self.lease, self.sweeping.objectives
        )
        self.nothing_is_lost_or_taken_back()
        self.die()

        rules, own = self.sweeping.rules, [r for r in seen if not r.source]
        assert all(r.state in (*FINAL, "pruned", "failed") for r in seen)
        assert all(list(r.values) == list(range(1, 10)) for r in own if r.state == "complete")
        assert all(r.last in rules.rungs[:-1] for r in own if r.state == "pruned")
        assert all(len(r.finals) == len(self.study.objectives) for r in seen if r.finals)
        queued = [r.queued for r in seen if r.queued is not None]
        assert len(set(queued)) == len(queued)

        if self.sweeping.stops is None:
            paused = any(r.state == "pruned" for r in own)
            whole = [r for r in own if r.state == "complete" and not r.replica_of]
            assert len(whole) >= rules.finalists or not paused
            seeds = Counter(r.replica_of for r in own)
            assert all(seeds[r.index] == rules.seeds - 1 for r in whole)

        # No directory is a stranger's or a second one, and nothing is left to do
        paths = list(RunPath.all(self.sweeping.runs))
        assert len({p.id for p in paths}) == len(paths)
        assert {p.id for p in paths} <= {r.run_id for r in seen}
        assert list(outcomes(self.sweeping.drive())) == list(outcomes(seen))
        assert self.sweeping.journal.read_bytes() == before

    def _full(self, seen: list[TrialRecord]) -> bool:
        own = [r for r in seen if not (r.source or r.replica_of)]
        failed = sum(r.state == "failed" for r in own)

        return len(own) - failed >= self.sweeping.rules.target


TestSweeps = Sweeps.TestCase
TestSweeps.settings = settings(stateful_step_count=40, suppress_health_check=list(HealthCheck))


def test_epochs_that_the_journal_had_lost_are_all_in_a_complete_run() -> None:
    sweeps = Sweeps()
    sweeps.begin(wanted=1, slots=1, finalists=0, kind="promotion")
    sweeps.suggest()
    sweeps.train(count=1, i=0, told=0)
    sweeps.suggest()
    sweeps.train(count=5, i=0, told=0)
    sweeps.bring(rate=0.0001)
    sweeps.bring(rate=0.001)
    sweeps.teardown()  # looks whether the run has all its epochs
