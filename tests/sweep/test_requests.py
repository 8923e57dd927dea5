r"""Tests for sda_ray.sweep.requests: what is asked of a driver is done, answered, and does no harm."""

import json
from pathlib import Path
from typing import Any

import pytest
from byhand import Desk as Sweep

from sda_ray.runs.path import RunPath
from sda_ray.sweep.mailbox import mailbox_of, post, wait
from sda_ray.sweep.requests import Desk, attended


class Steered(Sweep):
    r"""Creates a driver by hand, with its desk."""

    def __init__(self, directory: Path, trials: int = 8, **more: Any) -> None:
        self.targets: list[int] = []
        super().__init__(directory, trials, retarget=self.targets.append, **more)
        self.box = mailbox_of(directory)
        self.desk = Desk(self.driver)

    def ask(self, kind: str, **content: Any) -> tuple[str, bool]:
        id = post(self.box, kind, **content)
        self.desk()
        found = wait(self.box, id, lambda: False, patience=0.2)
        assert found is not None and list(self.box.glob(f"*{id}*")) == []

        return found.text, found.good

    def states(self) -> list[str]:
        return [record.state for record in self.study.records()]


@pytest.fixture
def sweep(tmp_path: Path) -> Steered:
    return Steered(tmp_path)


def test_stop_of_the_sweep(sweep: Steered) -> None:
    sweep.driver.suggest("a")
    text, good = sweep.ask("stop")

    assert good and "stops, with 1 run at work" in text and "To carry on: sda-ray sweep" in text
    assert sweep.driver.stopping and sweep.driver.request.exists()
    assert sweep.driver.why == "`sda-ray stop` asked for it"


def test_stop_that_was_meant_for_a_driver_before_is_dropped(tmp_path: Path) -> None:
    first = Steered(tmp_path)
    post(first.box, "stop", attempt=first.lease.attempt)
    post(first.box, "enqueue", items=[{"learning_rate": 0.002}])
    first.lease.release()

    second = Steered(tmp_path)
    second.desk()
    assert not second.driver.stopping
    assert list(second.study.queue().values()) == [{"learning_rate": 0.002}]
    assert second.ask("stop", attempt=second.lease.attempt)[1] and second.driver.stopping


def test_run_at_work_is_stopped_alone_and_for_good(tmp_path: Path) -> None:
    sweep = Steered(tmp_path, trials=2, slots=1)
    sweep.driver.suggest("a")
    assert sweep.ask("stop", trial=1) == ("run 1 stops after its step, at epoch 0 or later", True)
    assert (tmp_path / "stop.1").exists() and not sweep.driver.stopping
    assert sweep.states() == ["running"]

    assert not sweep.tell("a", "stopped", last=3)
    assert sweep.driver.suggest("b") is not None  # its slot is free, and nobody adopts it
    sweep.desk()
    assert sweep.states() == ["stopped", "running"]
    assert not (tmp_path / "stop.1").exists()
    assert sweep.events == ["draw", "draw", "stopped"]

    sweep.tell("b", "complete", last=9)

    with pytest.raises(StopIteration):  # it counts as one of the two
        sweep.driver.suggest("c")

    assert sweep.driver.done
    assert sweep.study.records()[0].last == 3


@pytest.mark.parametrize("end", ["lost", "complete", "failed"])
def test_run_that_ends_before_it_notices_the_stop(sweep: Steered, end: str) -> None:
    sweep.driver.suggest("a")
    sweep.ask("stop", trial=1)

    if end == "lost":
        sweep.driver.lose("a", "killed")
    else:
        sweep.tell("a", end, "an error" if end == "failed" else "", last=9)

    sweep.desk()
    assert sweep.states() == ["stopped" if end == "lost" else end]
    assert not sweep.driver.unwanted


def test_paused_run_is_stopped_once_its_process_has_let_go(tmp_path: Path) -> None:
    sweep = Steered(tmp_path, trials=2, first=1)
    path = RunPath(tmp_path / f"calm-cat-1_{sweep.driver.suggest('a')['run_id']}")  # type: ignore[index]
    path.directory.mkdir()
    path.record.write_text(json.dumps({"status": "paused"}))
    sweep.driver.suggest("b")
    closed = False
    result = {"event": "running", "epochs": [(1, 1.0)], "error": ""}
    assert not sweep.driver.report("a", result, lambda status: lambda: closed)

    assert sweep.ask("stop", trial=1) == ("run 1, which waited at epoch 1, is stopped", True)
    assert sweep.states() == ["running", "running"]
    closed = True
    sweep.tell("b", "running", last=1)  # looks who is closed
    sweep.desk()
    assert sweep.states()[0] == "stopped"
    assert json.loads(path.record.read_text())["status"] == "stopped"
    assert sweep.ask("stop", trial=1) == ("run 1 is stopped already.", False)


def test_paused_run_of_a_closed_sweep_is_stopped(tmp_path: Path) -> None:
    sweep = Steered(tmp_path, trials=4, first=1)

    for name in "ab":
        sweep.driver.suggest(name)

    for name, loss in {"a": 1.0, "b": 2.0}.items():
        result = {"event": "running", "epochs": [(1, loss)], "error": ""}
        sweep.driver.report(name, result, lambda status: lambda: True)

    sweep.study.close()
    assert sweep.states() == ["pruned", "pruned"]
    assert sweep.ask("stop", trial=2)[1]
    assert sweep.states() == ["pruned", "stopped"]


def test_promised_stop_of_a_run_outlives_the_driver(tmp_path: Path) -> None:
    first = Steered(tmp_path)
    first.driver.suggest("a")
    first.ask("stop", trial=1)
    first.lease.release()
    (tmp_path / "stop.99").touch()

    second = Steered(tmp_path)
    spec = second.driver.suggest("a")
    assert spec is not None and spec["index"] == 2  # run 1 is not adopted
    second.desk()
    assert second.states() == ["stopped", "running"]


def test_number_of_trials_is_raised_and_lowered(tmp_path: Path) -> None:
    sweep = Steered(tmp_path, trials=2)
    sweep.driver.suggest("a")
    sweep.driver.suggest("b")
    assert sweep.driver.suggest("c") is None

    text, good = sweep.ask("trials", trials=4)
    assert good and text.endswith("goes on to 4 trials: 2 more")
    assert sweep.driver.suggest("c") is not None

    text, good = sweep.ask("trials", trials=1)
    assert good and text.endswith("is to have 1 trials and has 3: no new ones are started")
    assert sweep.driver.suggest("d") is None
    assert sweep.targets == [4, 1]


@pytest.mark.parametrize("trials", [0, -1, 2.5, True, "3", None, [4]])
def test_number_of_trials_that_is_none_changes_nothing(sweep: Steered, trials: Any) -> None:
    text, good = sweep.ask("trials", trials=trials)

    assert not good and "must be an integer from 1" in text
    assert sweep.targets == [] and sweep.driver.rules.target == 8


def test_queued_configurations_come_first(sweep: Steered) -> None:
    items = [{"learning_rate": 0.002}, {"learning_rate": 0.003}]
    assert sweep.ask("enqueue", items=items) == ("2 configurations queued, to be tried next", True)

    found = [sweep.driver.suggest(name) for name in "abc"]
    rates = [spec["config"]["learning_rate"] for spec in found if spec is not None]
    assert rates[:2] == [0.002, 0.003] and rates[2] not in rates[:2]

    text, good = sweep.ask("enqueue", items=[{"learning_rate": 0.002}])
    assert not good and "has a run already" in text


def test_queue_longer_than_the_sweep_says_so(tmp_path: Path) -> None:
    sweep = Steered(tmp_path, trials=1)
    items = [{"learning_rate": 0.002}, {"learning_rate": 0.003}]

    assert (
        "room for 1 more of its 1 trials and 2 are queued: raise"
        in sweep.ask("enqueue", items=items)[0]
    )


def test_failed_runs_are_tried_again(tmp_path: Path) -> None:
    sweep = Steered(tmp_path, trials=2, slots=1)
    assert sweep.ask("retry") == (f"no run of sweep '{tmp_path.name}' has failed", True)

    first = sweep.driver.suggest("a")
    sweep.tell("a", "failed", "OSError: the disk", last=2)
    text, good = sweep.ask("retry")
    assert good and text == "tried again, from the last checkpoint: run 1"

    again = sweep.driver.suggest("b")
    assert first is not None and again is not None
    assert again["run_id"] == first["run_id"] and again["attempt"] > first["attempt"]
    sweep.tell("b", "complete", last=9)
    assert [(r.index, r.state, r.error) for r in sweep.study.records()] == [(1, "complete", "")]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("abdicate", {}),
        ("stop", {"trial": 99}),
        ("stop", {"trial": True}),
        ("stop", {"trial": {"a": []}}),
        ("enqueue", {}),
        ("enqueue", {"items": "all"}),
        ("enqueue", {"items": [3]}),
        ("enqueue", {"items": [{}]}),
        ("enqueue", {"items": [{"learning_rate": "x"}]}),
        ("enqueue", {"items": [{"unknown": 1}]}),
        ("prior", {}),
        ("prior", {"runs": [{"nonsense": 1}]}),
        ("prior", {"runs": [3]}),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(
    sweep: Steered, kind: str, content: dict[str, Any]
) -> None:
    sweep.driver.suggest("a")
    journal = (sweep.driver.request.parent / "journal").read_bytes()
    text, good = sweep.ask(kind, **content)

    assert not good and len(text) > 10
    assert (sweep.driver.request.parent / "journal").read_bytes() == journal
    assert not sweep.driver.stopping and sweep.driver.suggest("b") is not None


def test_files_that_are_no_requests_do_no_harm(sweep: Steered) -> None:
    sweep.box.mkdir()
    (sweep.box / "a.json").write_text("nonsense")
    (sweep.box / "b.json").mkdir()
    (sweep.box / "c.txt").touch()
    sweep.desk()
    sweep.desk()

    assert sorted(f.name for f in sweep.box.iterdir()) == ["a.answer.json", "b.json", "c.txt"]
    assert sweep.driver.suggest("a") is not None


def test_sweep_that_has_ended_refuses(tmp_path: Path) -> None:
    sweep = Steered(tmp_path, trials=1)
    sweep.driver.suggest("a")
    sweep.tell("a", "complete", last=9)

    with pytest.raises(StopIteration):
        sweep.driver.suggest("b")

    text, good = sweep.ask("trials", trials=9)
    assert not good and "has just ended" in text and sweep.targets == []


def test_sweep_that_stops_takes_requests_for_the_next_time(sweep: Steered) -> None:
    sweep.driver.stop()
    text, good = sweep.ask("trials", trials=9)

    assert good and "The sweep is stopping" in text and sweep.targets == [9]


def test_requests_are_answered_while_the_driver_is_kept_from_it(sweep: Steered) -> None:
    with attended(sweep.driver):
        id = post(sweep.box, "trials", trials=9)
        found = wait(sweep.box, id, lambda: True, patience=5)

    assert found is not None and found.good and sweep.targets == [9]
