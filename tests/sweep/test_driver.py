r"""Tests for sda_ray.sweep.driver: failures, lost workers, and the wish to stop."""

import inspect
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from byhand import ManualDriver
from optuna.trial import TrialState
from simulated import Sweeping

from sda_ray.core.lease import Lease
from sda_ray.search.promotion import Rules, TrialRecord
from sda_ray.search.study import Study
from sda_ray.sweep.driver import Losses, alike


@pytest.fixture
def manual(tmp_path: Path) -> ManualDriver:
    return ManualDriver(tmp_path)


def test_three_runs_that_fail_alike_stop_the_sweep(manual: ManualDriver) -> None:
    for name in "abcd":
        manual.driver.suggest(name)

    for i, name in enumerate("abc"):
        assert not manual.driver.hopeless
        assert not manual.tell(name, "failed", f"OSError: /runs/run-{i}/x.h5 is gone (step {i})")

    assert manual.driver.hopeless
    assert manual.driver.request.exists()  # those in flight are told to stop

    with pytest.raises(StopIteration):
        manual.driver.suggest("e")


def test_only_runs_with_a_checkpoint_count_as_saved(manual: ManualDriver) -> None:
    for name in "abcd":
        manual.driver.suggest(name)

    manual.tell("a", "interrupted", "its node leaves the cluster, and its disk is full")
    manual.driver.stop()
    manual.tell("b", "interrupted", "no checkpoint could be saved")
    manual.tell("c", "interrupted")
    manual.driver.lose("d", "killed")

    assert manual.driver.unsaved == {2, 4}


def test_driver_that_was_taken_over_does_not_stop_the_trials_of_another(
    manual: ManualDriver,
) -> None:
    other = Lease(manual.lease.backend, "the sweep", takeover=True)
    manual.driver.stop()

    assert manual.driver.stopping
    assert not manual.driver.request.exists()
    other.release()


@pytest.mark.parametrize("last", ["RuntimeError: this", "OSError: that"])
def test_runs_that_fail_for_different_reasons_do_not_stop_it(
    manual: ManualDriver, last: str
) -> None:
    for name in "abc":
        manual.driver.suggest(name)

    for name, error in zip("abc", ("OSError: this", "OSError: this", last), strict=True):
        manual.tell(name, "failed", error)

    assert not manual.driver.hopeless
    assert manual.driver.suggest("d") is not None


def test_failures_after_a_success_do_not_stop_it(manual: ManualDriver) -> None:
    for name in "abcd":
        manual.driver.suggest(name)

    manual.tell("a", "complete", last=9)

    for name in "bcd":
        manual.tell(name, "failed", "OSError: this")

    assert not manual.driver.hopeless


def test_one_run_that_fails_is_replaced(tmp_path: Path) -> None:
    first: list[Any] = []

    def fails(config: dict[str, Any], epoch: int) -> bool:
        first.append(config)
        return config == first[0]

    records = Sweeping(tmp_path, Rules(4, 9), fails=fails).drive()

    assert [r.state for r in records] == ["failed", *["complete"] * 4]
    assert records[0].error == "RuntimeError: epoch 1"


def test_lost_worker_is_adopted_five_times(manual: ManualDriver) -> None:
    manual.slots = 1
    spec = manual.driver.suggest("0")
    assert spec is not None

    for i in range(5):
        manual.driver.lose(str(i), "killed")
        again = manual.driver.suggest(str(i + 1))
        assert again is not None
        assert again["run_id"] == spec["run_id"]
        assert again["attempt"] == i + 2

    manual.driver.lose("5", "killed")
    assert [r.state for r in manual.study.records()] == ["failed"]
    assert manual.study.records()[0].error == "its worker died 6 times, last of: killed"
    assert manual.events == ["draw", *["lost", "adopt"] * 5, "failed"]


def test_divergence_is_told_at_once_and_not_tried_resume_command(manual: ManualDriver) -> None:
    manual.driver.suggest("a")

    assert not manual.tell("a", "diverged", "loss_train is nan", last=2)
    assert [(r.state, r.error) for r in manual.study.records()] == [
        ("diverged", "loss_train is nan")
    ]
    assert manual.driver.suggest("b") is not None
    assert [r.index for r in manual.study.records()] == [1, 2]


def test_paused_run_is_not_started_before_its_process_has_let_go(tmp_path: Path) -> None:
    manual = ManualDriver(tmp_path, trials=1, first=1)
    manual.driver.suggest("a")
    closed = False
    result = {"event": "running", "epochs": [(1, 1.0)], "error": ""}
    manual.driver.suggest("other")
    manual.study.records()

    # It would be the finalist at once, were it not for the wish to stop
    manual.driver.stopping = True
    assert not manual.driver.report("a", result, lambda status: lambda: closed)
    manual.driver.stopping = False

    assert manual.driver.suggest("b") is None
    closed = True
    spec = manual.driver.suggest("b")
    assert spec is not None
    assert spec["attempt"] == 2


def test_run_at_a_rung_goes_on_without_a_pause_if_it_is_the_one_to_be_promoted(
    tmp_path: Path,
) -> None:
    manual = ManualDriver(tmp_path, trials=1, first=1)
    manual.driver.suggest("a")

    assert manual.tell("a", "running", last=1)  # as the finalist
    assert [(r.until, r.shown) for r in manual.study.records()] == [(9, 1)]


def test_stop_lets_trials_save_and_starts_nothing(manual: ManualDriver) -> None:
    manual.driver.suggest("a")
    manual.driver.stop()

    assert manual.driver.request.exists()
    assert not manual.tell("a", "interrupted", last=2)

    with pytest.raises(StopIteration):
        manual.driver.suggest("b")

    assert not manual.driver.done
    assert [(r.state, r.last) for r in manual.study.records()] == [("running", 2)]


def test_node_that_leaves_is_avoided(manual: ManualDriver) -> None:
    manual.driver.suggest("a")
    result = {"event": "interrupted", "epochs": [], "error": "", "leaving": True}
    manual.driver.report("a", result | {"node": "one", "host": "spot"}, lambda status: bool)

    assert not manual.driver.stopping
    assert manual.driver.losses.avoided == {"one": "spot is leaving"}


def test_old_wish_to_stop_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    manual = ManualDriver(tmp_path)

    assert not manual.driver.request.exists()
    assert manual.driver.suggest("a") is not None


def test_after_two_failures_of_wandb_the_rest_starts_offline_and_it_is_said_once(
    manual: ManualDriver, caplog: pytest.LogCaptureFixture
) -> None:
    def mode(name: str) -> str:
        spec = manual.driver.suggest(name)
        assert spec is not None and spec["wandb"]["project"] == "flows"

        return str(spec["wandb"]["mode"])

    assert [mode(name) for name in "abc"] == ["online"] * 3

    for last in (1, 2, 3):  # one failure, however often it is reported
        assert manual.tell("a", "running", last=last, unreached="no key")

    manual.tell("b", "complete", last=9)
    assert mode("d") == "online" and caplog.text == ""

    manual.tell("c", "complete", last=9, unreached="no key")
    manual.tell("d", "complete", last=9, unreached="no key")
    assert [mode(name) for name in "ef"] == ["offline"] * 2
    assert caplog.text.count("the rest of the sweep starts offline") == 1
    assert caplog.text.count("The last one was told: no key") == 1


def test_note_of_trials_is_said_once(
    manual: ManualDriver, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        manual.driver.suggest(name)
        manual.tell(name, "running", last=1, notes=[("W&B", f"nothing of {name}")])

    assert "nothing of a" in caplog.text and "nothing of b" not in caplog.text


def test_more_paused_runs_than_python_may_recurse_are_pruned_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # only a power cut would miss it
    count = sys.getrecursionlimit() + 100
    manual = ManualDriver(tmp_path, trials=count, first=1, stops=lambda record, records: True)
    manual.driver.rules = Rules(count, 9, 1, pruner="median")
    config, drawn = manual.driver.propose([], None)

    for index in range(1, count + 1):
        record = TrialRecord(index, f"{index:08}", "running", 1, 9, {1: 1.0}, config=config)
        manual.study.add(record, drawn)

    assert manual.driver.suggest("a") is not None  # the finalist
    assert manual.events == count * ["pruned"] + ["promote"]


def test_slots_are_not_exceeded(manual: ManualDriver) -> None:
    manual.slots = 2

    assert [manual.driver.suggest(name) is not None for name in "abc"] == [True, True, False]


def test_deaths_are_counted_by_all_drivers_together(tmp_path: Path) -> None:
    for name in "abc":
        manual = ManualDriver(tmp_path / "study", slots=1)

        for i in range(2):
            assert manual.driver.suggest(f"{name}{i}") is not None
            manual.driver.lose(f"{name}{i}", "killed")

        manual.lease.release()

    assert manual.study.records()[0].state == "failed"


def test_lost_nodes_are_never_held_against_a_run(manual: ManualDriver) -> None:
    manual.slots = 1

    for i in range(20):
        spec = manual.driver.suggest(str(i))
        assert spec is not None and spec["index"] == 1
        manual.driver.lose(str(i), "its node has died", "node")

    assert [(r.state, r.worker_deaths) for r in manual.study.records()] == [("running", 0)]


@pytest.mark.parametrize("killed", [False, True], ids=["told", "killed"])
def test_run_short_of_memory_is_tried_again_once_from_its_checkpoint(
    manual: ManualDriver, killed: bool
) -> None:
    manual.slots = 1

    def shorten(name: str) -> None:
        if killed:
            manual.driver.lose(name, "a peak of 7.00 GiB", "memory")
        else:
            assert not manual.tell(name, "memory", "a peak of 7.00 GiB", last=2)

    first, again = manual.driver.suggest("a"), None
    assert first is not None and not first["short"]
    shorten("a")
    again = manual.driver.suggest("b")
    assert again is not None and again["run_id"] == first["run_id"] and again["short"] == 1
    shorten("b")

    (record,) = manual.study.records()
    assert record.state == "failed" and "a peak of 7.00 GiB" in record.error
    assert manual.events == ["draw", "memory", "adopt", "failed"]
    third = manual.driver.suggest("c")
    assert third is not None and third["index"] == 2


def test_three_runs_without_enough_memory_stop_the_sweep(manual: ManualDriver) -> None:
    manual.slots = 1

    for i in range(6):
        assert not manual.driver.hopeless
        manual.driver.suggest(str(i))
        manual.tell(str(i), "memory", f"out of memory, with a peak of {i}.5 GiB")

    assert manual.driver.hopeless


def test_all_objectives_of_a_complete_run_are_told(tmp_path: Path) -> None:
    manual = ManualDriver(tmp_path, objectives=("loss_valid", "parameters"))
    manual.driver.suggest("a")
    epochs = [(e, 1.0 / e) for e in range(1, 10)]
    result = {"event": "complete", "epochs": epochs, "error": "", "finals": [1 / 9, 512.0]}
    manual.driver.report("a", result, lambda status: lambda: True)

    (record,) = manual.study.records()
    assert (record.state, record.finals) == ("complete", (1 / 9, 512.0))


def test_sweep_stops_before_its_time_is_up(tmp_path: Path) -> None:
    manual = ManualDriver(tmp_path, deadline=time.monotonic() + 1000.0)
    manual.driver.suggest("a")
    manual.driver.tick()
    assert not manual.driver.request.exists()

    epochs = [(1, 1.0)]
    result = {"event": "running", "epochs": epochs, "error": "", "longest": 499.0}
    manual.driver.report("a", result, lambda status: lambda: True)
    manual.driver.tick()
    assert not manual.driver.request.exists()

    manual.driver.longest = 500.0  # twice that could be too late, and half the time is over
    manual.driver.start -= 1000.0
    manual.driver.tick()
    assert manual.driver.stopping and manual.driver.request.exists()
    assert manual.driver.why == "its time is up"


def test_house_is_kept_now_and_then_and_its_error_stops_the_sweep_in_order(
    tmp_path: Path,
) -> None:
    kept = []
    manual = ManualDriver(tmp_path, house=lambda: kept.append(1))
    manual.driver.tick()
    assert kept == []

    manual.driver.kept -= 10.0
    manual.driver.tick()
    manual.driver.tick()
    assert kept == [1]

    def fails() -> None:
        raise OSError("no disk")

    manual.driver.house, manual.driver.kept = fails, 0.0
    manual.driver.tick()
    assert manual.driver.stopping and isinstance(manual.driver.fault, OSError)


def test_queued_configuration_that_does_not_fit_is_left_out(
    manual: ManualDriver, caplog: pytest.LogCaptureFixture
) -> None:
    manual.study.enqueue({"learning_rate": "nonsense"})
    manual.study.enqueue({"learning_rate": 0.002})
    spec = manual.driver.suggest("a")

    assert spec is not None and spec["config"]["learning_rate"] == 0.002
    assert "is left out" in caplog.text
    assert manual.study.queue() == {}


def test_any_number_of_paused_runs_is_pruned_for_one_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    manual = ManualDriver(tmp_path, 300, 1, stops=lambda record, records: True)
    _, drawn = manual.driver.propose([], None)
    config = {"learning_rate": 1e-3}

    for i in range(1, 301):
        record = TrialRecord(i, f"{i:08}", "running", 1, 9, {1: 1.0}, attempt=1, config=config)
        manual.study.add(record, drawn)

    # Nothing nests for each run, which a sweep of 1,000 would not survive
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 200)

    try:
        spec = manual.driver.suggest("a")  # the least number of finished models is 1
    finally:
        sys.setrecursionlimit(limit)

    assert spec is not None and spec["index"] == 1
    assert manual.events == ["pruned"] * 300 + ["promote"]


# Failures outside the trials


def test_errors_are_alike_paths_and_numbers_apart() -> None:
    same = [f"OSError: /runs/run-{i}/x.h5 is gone (step {i})" for i in range(3)]

    assert alike(same)
    assert not alike(same[:2])
    assert not alike([*same, "OSError: something else"])


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    lease = Lease(tmp_path / "lease.json", "the sweep")
    yield Study(tmp_path / "study.journal", "test", lease)
    lease.release()


def add(study: Study) -> TrialRecord:
    index = 1 + len(study.records())
    record = TrialRecord(
        index, f"run{index:05}", "running", 1, 9, attempt=1, config={"seed": index}
    )

    return study.add(record, optuna.trial.create_trial(state=TrialState.RUNNING))


def test_run_is_given_up_after_its_sixth_death_and_its_second_lack_of_memory(
    study: Study, tmp_path: Path
) -> None:
    r"""All drivers count together; lost nodes are free, however many they are."""

    record = add(study)

    for _ in range(20):
        assert Losses().count(study, record, "node", "a power cut") == ""

    assert Losses().count(study, record, "memory", "3 GB used") == ""
    assert "out of memory 2 times, last of: 3 GB" in Losses().count(
        study, study.records()[0], "memory", "3 GB used"
    )

    for _ in range(5):
        assert Losses().count(study, study.records()[0], "worker", "x") == ""

    again = Losses().count(study, study.records()[0], "worker", "SIGSEGV")
    assert again == "its worker died 6 times, last of: SIGSEGV"


def test_node_is_avoided_once_three_workers_in_a_row_have_died_there(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    losses = Losses()
    records = [add(study) for _ in range(4)]

    for record in records[:3]:
        losses.places[record.index] = ("id-1", "bad")

    losses.places[4] = ("id-2", "good")
    losses.count(study, records[0], "worker", "x")
    losses.count(study, records[1], "worker", "x")
    losses.acquit(3)  # comes to its end there
    losses.count(study, records[2], "worker", "x")
    losses.count(study, records[3], "worker", "x")
    losses.count(study, records[0], "node", "x")
    losses.count(study, records[0], "memory", "x")
    losses.count(study, records[0], "worker", "x")
    assert losses.avoided == {}

    losses.count(study, records[1], "worker", "cudaErrorECCUncorrectable")
    assert list(losses.avoided) == ["id-1"]
    assert "node bad: 3 workers in a row died there, last of: cudaErrorECC" in caplog.text


def test_node_that_leaves_is_avoided_from_then_on(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    losses = Losses()
    losses.leave(1)  # of a Ray of our own: nobody knows another place
    losses.places[1] = ("id-1", "spot")
    losses.leave(1)
    losses.leave(1)

    assert losses.avoided == {"id-1": "spot is leaving"}
    assert caplog.text.count("Node spot leaves the cluster") == 1


def die(losses: Losses, study: Study, index: int, node: str, times: int = 1) -> str:
    r"""Lets workers of a run die on a node, and returns why the run is given up, or nothing."""

    losses.places[index], said = (node, node), ""

    for _ in range(times):
        record = next(record for record in study.records() if record.index == index)
        said = losses.count(study, record, "worker", "SIGSEGV")

    return said


def end(losses: Losses, index: int, node: str) -> None:
    r"""Lets a run come to its own end on a node."""

    losses.places[index] = (node, node)
    losses.acquit(index)


def test_node_where_one_run_alone_died_is_given_back_with_the_run_given_up(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    losses = Losses()
    add(study)
    die(losses, study, 1, "one", times=2)
    assert losses.avoided == {}

    die(losses, study, 1, "one")
    end(losses, 1, "one")
    assert list(losses.avoided) == ["one"]

    assert die(losses, study, 1, "two", times=2) == ""
    assert list(losses.avoided) == ["one"]

    assert "its worker died 6 times" in die(losses, study, 1, "two")
    assert losses.avoided == {}
    assert "Trials may start on node one again: only run 1 died" in caplog.text


def test_node_where_one_run_alone_died_is_given_back_when_another_ends_there(
    study: Study,
) -> None:
    losses = Losses()
    add(study)
    die(losses, study, 1, "one", times=3)
    end(losses, 2, "two")
    assert list(losses.avoided) == ["one"]

    end(losses, 2, "one")
    assert losses.avoided == {}

    die(losses, study, 1, "two", times=2)
    assert losses.strikes == {}  # it is known for it


def test_node_where_two_runs_died_stays_avoided(study: Study) -> None:
    losses = Losses()

    for _ in range(3):
        add(study)

    die(losses, study, 1, "one", times=2)
    die(losses, study, 2, "one")
    end(losses, 3, "one")
    assert not losses.forgive()

    die(losses, study, 1, "two", times=3)
    assert list(losses.avoided) == ["one", "two"]

    assert "died 6 times" in die(losses, study, 1, "three")
    assert list(losses.avoided) == ["one"]


def test_run_for_whose_deaths_nodes_were_forgiven_is_not_held_against_nodes(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    losses = Losses()

    for _ in range(3):
        add(study)

    assert not losses.forgive()

    die(losses, study, 1, "one", times=3)
    die(losses, study, 2, "two", times=2)
    die(losses, study, 3, "two")
    assert losses.forgive() and list(losses.avoided) == ["two"]
    assert not losses.forgive()
    assert caplog.text.count("Trials may start on") == 1

    die(losses, study, 1, "three", times=2)
    die(losses, study, 2, "three", times=2)
    assert list(losses.avoided) == ["two"]


def test_node_that_leaves_is_never_given_back(study: Study) -> None:
    losses = Losses()

    for _ in range(3):
        add(study)

    # One where somebody has died, one that is avoided for it, one where somebody dies later
    die(losses, study, 1, "one", times=2)
    die(losses, study, 2, "two", times=3)

    for index, node in enumerate(("one", "two", "three"), 1):
        losses.places[index] = (node, node)
        losses.leave(index)

    end(losses, 3, "one")
    die(losses, study, 1, "three", times=3)
    assert not losses.forgive()

    assert "died 6 times" in die(losses, study, 1, "four")
    assert losses.avoided == {node: f"{node} is leaving" for node in ("one", "two", "three")}
