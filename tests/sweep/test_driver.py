r"""Tests for sda_ray.sweep.driver: failures, lost workers, and the wish to stop."""

import time
from pathlib import Path
from typing import Any

import pytest
from byhand import Desk
from simulated import Sweeping

from sda_ray.core.lease import Lease
from sda_ray.search.promotion import Rules


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_three_runs_that_fail_alike_stop_the_sweep(desk: Desk) -> None:
    for name in "abcd":
        desk.driver.suggest(name)

    for i, name in enumerate("abc"):
        assert not desk.driver.hopeless
        assert not desk.tell(name, "failed", f"OSError: /runs/run-{i}/x.h5 is gone (step {i})")

    assert desk.driver.hopeless
    assert desk.driver.request.exists()  # those in flight are told to stop

    with pytest.raises(StopIteration):
        desk.driver.suggest("e")


def test_driver_that_was_taken_over_does_not_stop_the_trials_of_another(desk: Desk) -> None:
    other = Lease(desk.lease.file, "the sweep", takeover=True)
    desk.driver.stop()

    assert desk.driver.stopping
    assert not desk.driver.request.exists()
    other.release()


@pytest.mark.parametrize("last", ["RuntimeError: this", "OSError: that"])
def test_runs_that_fail_for_different_reasons_do_not_stop_it(desk: Desk, last: str) -> None:
    for name in "abc":
        desk.driver.suggest(name)

    for name, error in zip("abc", ("OSError: this", "OSError: this", last), strict=True):
        desk.tell(name, "failed", error)

    assert not desk.driver.hopeless
    assert desk.driver.suggest("d") is not None


def test_failures_after_a_success_do_not_stop_it(desk: Desk) -> None:
    for name in "abcd":
        desk.driver.suggest(name)

    desk.tell("a", "complete", last=9)

    for name in "bcd":
        desk.tell(name, "failed", "OSError: this")

    assert not desk.driver.hopeless


def test_one_run_that_fails_is_replaced(tmp_path: Path) -> None:
    first: list[Any] = []

    def fails(config: dict[str, Any], epoch: int) -> bool:
        first.append(config)
        return config == first[0]

    records = Sweeping(tmp_path, Rules(4, 9), fails=fails).drive()

    assert [r.state for r in records] == ["failed", *["complete"] * 4]
    assert records[0].error == "RuntimeError: epoch 1"


def test_lost_worker_is_adopted_five_times(desk: Desk) -> None:
    desk.slots = 1
    spec = desk.driver.suggest("0")
    assert spec is not None

    for i in range(5):
        desk.driver.lose(str(i), "killed")
        again = desk.driver.suggest(str(i + 1))
        assert again is not None
        assert again["run_id"] == spec["run_id"]
        assert again["attempt"] == i + 2

    desk.driver.lose("5", "killed")
    assert [r.state for r in desk.study.records()] == ["failed"]
    assert desk.study.records()[0].error == "its worker died 6 times, last of: killed"
    assert desk.events == ["draw", *["lost", "adopt"] * 5, "failed"]


def test_divergence_is_told_at_once_and_not_tried_again(desk: Desk) -> None:
    desk.driver.suggest("a")

    assert not desk.tell("a", "diverged", "loss_train is nan", last=2)
    assert [(r.state, r.error) for r in desk.study.records()] == [
        ("diverged", "loss_train is nan")
    ]
    assert desk.driver.suggest("b") is not None
    assert [r.index for r in desk.study.records()] == [1, 2]


def test_paused_run_is_not_started_before_its_process_has_let_go(tmp_path: Path) -> None:
    desk = Desk(tmp_path, trials=1, first=1)
    desk.driver.suggest("a")
    closed = False
    result = {"event": "running", "epochs": [(1, 1.0)], "error": ""}
    desk.driver.suggest("other")
    desk.study.records()

    # It would be the finalist at once, were it not for the wish to stop
    desk.driver.stopping = True
    assert not desk.driver.report("a", result, lambda status: lambda: closed)
    desk.driver.stopping = False

    assert desk.driver.suggest("b") is None
    closed = True
    spec = desk.driver.suggest("b")
    assert spec is not None
    assert spec["attempt"] == 2


def test_run_at_a_rung_goes_on_without_a_pause_if_it_is_the_one_to_be_promoted(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, trials=1, first=1)
    desk.driver.suggest("a")

    assert desk.tell("a", "running", last=1)  # as the finalist
    assert [(r.until, r.shown) for r in desk.study.records()] == [(9, 1)]


def test_stop_lets_trials_save_and_starts_nothing(desk: Desk) -> None:
    desk.driver.suggest("a")
    desk.driver.stop()

    assert desk.driver.request.exists()
    assert not desk.tell("a", "interrupted", last=2)

    with pytest.raises(StopIteration):
        desk.driver.suggest("b")

    assert not desk.driver.done
    assert [(r.state, r.last) for r in desk.study.records()] == [("running", 2)]


def test_old_wish_to_stop_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    desk = Desk(tmp_path)

    assert not desk.driver.request.exists()
    assert desk.driver.suggest("a") is not None


def test_after_two_failures_of_wandb_the_rest_starts_offline_and_it_is_said_once(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    def mode(name: str) -> str:
        spec = desk.driver.suggest(name)
        assert spec is not None and spec["wandb"]["project"] == "flows"

        return str(spec["wandb"]["mode"])

    assert [mode(name) for name in "abc"] == ["online"] * 3

    for last in (1, 2, 3):  # one failure, however often it is reported
        assert desk.tell("a", "running", last=last, unreached="no key")

    desk.tell("b", "complete", last=9)
    assert mode("d") == "online" and caplog.text == ""

    desk.tell("c", "complete", last=9, unreached="no key")
    desk.tell("d", "complete", last=9, unreached="no key")
    assert [mode(name) for name in "ef"] == ["offline"] * 2
    assert caplog.text.count("the rest of the sweep starts offline") == 1
    assert caplog.text.count("The last one was told: no key") == 1


def test_slots_are_not_exceeded(desk: Desk) -> None:
    desk.slots = 2

    assert [desk.driver.suggest(name) is not None for name in "abc"] == [True, True, False]


def test_deaths_are_counted_by_all_drivers_together(tmp_path: Path) -> None:
    for name in "abc":
        desk = Desk(tmp_path / "study", slots=1)

        for i in range(2):
            assert desk.driver.suggest(f"{name}{i}") is not None
            desk.driver.lose(f"{name}{i}", "killed")

        desk.lease.release()

    assert desk.study.records()[0].state == "failed"


def test_lost_nodes_are_never_held_against_a_run(desk: Desk) -> None:
    desk.slots = 1

    for i in range(20):
        spec = desk.driver.suggest(str(i))
        assert spec is not None and spec["index"] == 1
        desk.driver.lose(str(i), "its node has died", "node")

    assert [(r.state, r.lost) for r in desk.study.records()] == [("running", 0)]


@pytest.mark.parametrize("killed", [False, True], ids=["told", "killed"])
def test_run_short_of_memory_is_tried_again_once_from_its_checkpoint(
    desk: Desk, killed: bool
) -> None:
    desk.slots = 1

    def shorten(name: str) -> None:
        if killed:
            desk.driver.lose(name, "a peak of 7.00 GiB", "memory")
        else:
            assert not desk.tell(name, "memory", "a peak of 7.00 GiB", last=2)

    first, again = desk.driver.suggest("a"), None
    assert first is not None and not first["short"]
    shorten("a")
    again = desk.driver.suggest("b")
    assert again is not None and again["run_id"] == first["run_id"] and again["short"] == 1
    shorten("b")

    (record,) = desk.study.records()
    assert record.state == "failed" and "a peak of 7.00 GiB" in record.error
    assert desk.events == ["draw", "memory", "adopt", "failed"]
    third = desk.driver.suggest("c")
    assert third is not None and third["index"] == 2


def test_three_runs_without_enough_memory_stop_the_sweep(desk: Desk) -> None:
    desk.slots = 1

    for i in range(6):
        assert not desk.driver.hopeless
        desk.driver.suggest(str(i))
        desk.tell(str(i), "memory", f"out of memory, with a peak of {i}.5 GiB")

    assert desk.driver.hopeless


def test_all_objectives_of_a_complete_run_are_told(tmp_path: Path) -> None:
    desk = Desk(tmp_path, objectives=("loss_valid", "parameters"))
    desk.driver.suggest("a")
    epochs = [(e, 1.0 / e) for e in range(1, 10)]
    result = {"event": "complete", "epochs": epochs, "error": "", "finals": [1 / 9, 512.0]}
    desk.driver.report("a", result, lambda status: lambda: True)

    (record,) = desk.study.records()
    assert (record.state, record.finals) == ("complete", (1 / 9, 512.0))


def test_sweep_stops_before_its_time_is_up(tmp_path: Path) -> None:
    desk = Desk(tmp_path, deadline=time.monotonic() + 1000.0)
    desk.driver.suggest("a")
    desk.driver.tick()
    assert not desk.driver.request.exists()

    epochs = [(1, 1.0)]
    result = {"event": "running", "epochs": epochs, "error": "", "longest": 499.0}
    desk.driver.report("a", result, lambda status: lambda: True)
    desk.driver.tick()
    assert not desk.driver.request.exists()

    desk.driver.longest = 500.0  # twice that could be too late, and half the time is over
    desk.driver.start -= 1000.0
    desk.driver.tick()
    assert desk.driver.stopping and desk.driver.request.exists()
    assert desk.driver.why == "its time is up"


def test_house_is_kept_now_and_then_and_its_error_stops_the_sweep_in_order(
    tmp_path: Path,
) -> None:
    kept = []
    desk = Desk(tmp_path, house=lambda: kept.append(1))
    desk.driver.tick()
    assert kept == []

    desk.driver.kept -= 10.0
    desk.driver.tick()
    desk.driver.tick()
    assert kept == [1]

    def fails() -> None:
        raise OSError("no disk")

    desk.driver.house, desk.driver.kept = fails, 0.0
    desk.driver.tick()
    assert desk.driver.stopping and isinstance(desk.driver.fault, OSError)


def test_queued_configuration_that_does_not_fit_is_left_out(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.study.enqueue({"learning_rate": "nonsense"})
    desk.study.enqueue({"learning_rate": 0.002})
    spec = desk.driver.suggest("a")

    assert spec is not None and spec["config"]["learning_rate"] == 0.002
    assert "is left out" in caplog.text
    assert desk.study.queue() == {}
