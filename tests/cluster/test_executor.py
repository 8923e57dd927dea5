r"""Tests for sda_ray.cluster.executor: a process without a sign of life is found, and nothing else is."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from byhand import ManualDriver

from sda_ray.cluster.executor import AWAY, BEATS, Lookout, Vigil, end
from sda_ray.core.lease import HEARTBEAT, Lease, read_holder
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import TrialRecord

HOLD = """
import sys, time
from pathlib import Path
from sda_ray.core.lease import Lease
lease = Lease(Path(sys.argv[1]), "a run")
print("held", flush=True)
time.sleep(60)
"""

RECORD = TrialRecord(1, "abcdefgh", "running", 9, 9, attempt=1)


@pytest.fixture
def path(tmp_path: Path) -> RunPath:
    path = RunPath(tmp_path / "calm-cat-1_abcdefgh")
    path.directory.mkdir()

    return path


@pytest.fixture
def process(path: RunPath, env: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(path.lease)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def wait(vigil: Vigil, seconds: float) -> None:
    r"""Lets time pass for the watch: it has looked all the while, and seen nothing new."""

    vigil.seen = {index: (sign, since - seconds) for index, (sign, since) in vigil.seen.items()}


def test_process_that_is_silent_for_long_is_found_and_ended(
    tmp_path: Path, path: RunPath, process: "subprocess.Popen[str]"
) -> None:
    vigil = Vigil(tmp_path, 30.0)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert vigil.look([RECORD]) == []
    wait(vigil, 29.0)
    assert vigil.look([RECORD]) == []
    wait(vigil, 2.0)
    ((record, silent),) = vigil.look([RECORD])
    assert record == RECORD and silent > 30

    said = end(path, record, silent)
    assert f"from process {process.pid} on " in said and "stopped" in said
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert said in (path.directory / "stacks.txt").read_text()


def test_heartbeat_and_new_attempt_are_signs_of_life(
    tmp_path: Path, path: RunPath, process: "subprocess.Popen[str]"
) -> None:
    vigil = Vigil(tmp_path, 30.0)
    vigil.look([RECORD])
    wait(vigil, 31.0)
    os.utime(path.lease)
    assert vigil.look([RECORD]) == []
    wait(vigil, 31.0)
    assert [r for r, _ in vigil.look([RECORD])] == [RECORD]


def test_start_may_take_longer(tmp_path: Path, path: RunPath) -> None:
    vigil = Vigil(tmp_path, 30.0)
    vigil.look([RECORD])
    wait(vigil, 31.0)
    assert vigil.look([RECORD]) == []
    wait(vigil, 60.0)
    assert len(vigil.look([RECORD])) == 1


def test_driver_that_was_frozen_itself_blames_nobody(
    tmp_path: Path, path: RunPath, process: "subprocess.Popen[str]"
) -> None:
    vigil = Vigil(tmp_path, 30.0)
    vigil.look([RECORD])
    wait(vigil, 100.0)
    vigil.looked -= AWAY + 1
    assert vigil.look([RECORD]) == []


def test_missed_heartbeat_is_no_silence_however_short_the_limit(tmp_path: Path) -> None:
    assert Vigil(tmp_path, 0.1).limit >= BEATS * HEARTBEAT > HEARTBEAT


def test_run_without_a_directory_or_a_process_is_ended_without_harm(
    tmp_path: Path, path: RunPath
) -> None:
    vigil = Vigil(tmp_path, 30.0)
    assert vigil.path(TrialRecord(2, "zzzzzzzz", "running", 9, 9)) is None
    assert read_holder(path.lease) is None
    assert "from process None" in end(path, RECORD, time.monotonic())


def test_process_of_which_the_machine_is_not_known_is_left_alone(path: RunPath) -> None:
    Lease(path.lease, "a run")
    content = json.loads(path.lease.read_text())
    path.lease.write_text(json.dumps({k: x for k, x in content.items() if k != "machine"}))

    assert f"from process {os.getpid()} on " in end(path, RECORD, 31.0)


# As Ray 2.60 says it of a node that has lost its network, before it takes the node for dead
CUT = "The actor b3848af is unavailable: The actor is temporarily unavailable: RpcError.\n"


def test_trial_whose_node_dies_before_its_first_report_is_lost_to_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"NodeID": "dead", "Alive": False}, {"NodeID": "well", "Alive": True}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    (tmp_path / "error.txt").write_text(CUT)
    manual = ManualDriver(tmp_path / "sweep")
    lookout = Lookout(manual.driver)

    for name, node in {"a": "dead", "b": "well"}.items():
        spec = manual.driver.suggest(name)
        assert spec is not None
        manual.driver.losses.places[spec["index"]] = (node, node)
        lookout.lose(SimpleNamespace(trial_id=name, error_file=str(tmp_path / "error.txt")))

    assert [*manual.driver.live] == ["a", "b"]  # not known yet

    lookout._settle_doubts()
    assert [*manual.driver.live] == ["b"]

    lookout.doubts = {name: (reason, 0.0) for name, (reason, _) in lookout.doubts.items()}
    lookout._settle_doubts()  # a minute later
    assert [*manual.driver.live] == []
    assert [record.worker_deaths for record in manual.study.records()] == [0, 1]
