r"""Tests for sda_ray.sweep.failures: what Ray says of a lost worker is understood."""

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sda_ray.core.lease import Lease
from sda_ray.search.promotion import TrialRecord
from sda_ray.search.study import Study
from sda_ray.sweep.failures import Losses, alike


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


def test_node_that_leaves_is_avoided(study: Study, caplog: pytest.LogCaptureFixture) -> None:
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
