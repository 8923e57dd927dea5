r"""Tests for sda_ray.core.lease."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import Start

from sda_ray.core import lease as leases
from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import (
    Conflict,
    Lease,
    LeaseGone,
    LeaseLost,
    check_present,
    holder_alive,
    is_alive,
    read_holder,
    read_notes,
    this_host,
    this_process,
)
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run
from sda_ray.sweep.requests import watch

HOLD = """
import sys, time
from pathlib import Path
from sda_ray.core.lease import Lease
lease = Lease(Path(sys.argv[1]), "run x")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lease.json"


@pytest.fixture
def other(file: Path, env: dict[str, str]) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    r"""Starts another process that holds the lease."""

    started = []

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", HOLD, str(file)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"

        return process

    yield start

    for process in started:
        process.kill()
        process.communicate()


def from_elsewhere(file: Path, **values: Any) -> None:
    r"""Makes the lease one of a holder on another host."""

    content = json.loads(file.read_text()) | {"host": "elsewhere", "boot": "other"} | values
    file.write_text(json.dumps(content))


def test_attempt_numbers_grow(file: Path) -> None:
    for attempt in (1, 2, 3):
        lease = Lease(file, "run x")
        assert lease.attempt == attempt
        lease.release()


def test_attempt_counted_by_the_caller_is_taken_once(file: Path) -> None:
    Lease(file, "run x", attempt=7).release()

    for attempt in (6, 7):
        with pytest.raises(LeaseLost, match=f"attempt {attempt} at run x comes after attempt 7"):
            Lease(file, "run x", attempt=attempt)

    assert Lease(file, "run x", attempt=9).attempt == 9


def test_fenced_holder_writes_nothing(file: Path) -> None:
    old = Lease(file, "run x")
    new = Lease(file, "run x", takeover=True)
    before = file.read_bytes()

    lost = pytest.raises(LeaseLost, match="run x was taken over from attempt 1 by process")

    with lost, old.hold():
        pytest.fail("the old holder went on")

    old.release()
    assert file.read_bytes() == before

    with new.hold():
        pass


def test_notes_are_found_until_the_next_attempt(file: Path) -> None:
    lease = Lease(file, "run x")
    holder = read_holder(file)
    lease.note(address="10.0.0.1:1")
    lease.note(job="7")
    assert read_notes(file) == (holder, {"address": "10.0.0.1:1", "job": "7"})
    assert read_holder(file) == holder and not lease.is_lost()

    lease.release()
    assert read_notes(file)[1]["job"] == "7"

    with pytest.raises(LeaseLost):
        lease.note(job="8")

    Lease(file, "run x").release()
    assert read_notes(file)[1] == {}


def test_released_holder_writes_nothing(file: Path) -> None:
    lease = Lease(file, "run x")
    lease.release()

    with pytest.raises(LeaseLost, match="was released"), lease.hold():
        pytest.fail("a released lease was held")


def test_second_process_is_refused_with_host_pid_and_since(
    file: Path, other: Callable[[], "subprocess.Popen[str]"]
) -> None:
    process = other()
    found = read_holder(file)
    assert found is not None

    with pytest.raises(UserError) as error:
        Lease(file, "run x")

    for part in (f"process {process.pid}", found["host"], found["since"], "run x is in use"):
        assert part in str(error.value)


def test_takeover_kills_the_holder(
    file: Path, other: Callable[[], "subprocess.Popen[str]"]
) -> None:
    process = other()
    process.send_signal(signal.SIGSTOP)
    assert Lease(file, "run x", takeover=True).attempt == 2
    assert process.wait(10) == -signal.SIGKILL


def test_lease_of_a_dead_process_is_taken_at_once(
    file: Path, other: Callable[[], "subprocess.Popen[str]"]
) -> None:
    process = other()
    process.kill()
    process.wait()
    start = time.monotonic()
    assert Lease(file, "run x").attempt == 2
    assert time.monotonic() - start < 30  # one that waits for a heartbeat takes a minute


def test_lease_of_a_zombie_is_taken(
    file: Path, other: Callable[[], "subprocess.Popen[str]"]
) -> None:
    os.kill(other().pid, signal.SIGKILL)
    time.sleep(0.2)  # dead, but not waited for
    assert Lease(file, "run x").attempt == 2


def test_pid_that_belongs_to_another_process_now_is_dead(file: Path) -> None:
    Lease(file, "run x")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"started": "1"}))
    assert not is_alive(file)


def test_released_lease_is_free(file: Path) -> None:
    Lease(file, "run x").release()
    assert not is_alive(file)
    found = read_holder(file)
    assert found is not None and (found["pid"], found["attempt"]) == (None, 1)


def test_silent_holder_on_another_host_is_dead(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Lease(file, "run x").release()
    from_elsewhere(file, pid=1, started="1")
    assert Lease(file, "run x", patience=0.3).attempt == 2
    assert "on elsewhere, which cannot be seen from here" in caplog.text


def test_beating_holder_on_another_host_is_alive(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT", 0.1)
    lease = Lease(file, "run x")
    from_elsewhere(file)
    lease._mine = json.loads(file.read_text())  # as if this process were elsewhere

    with pytest.raises(UserError, match="on elsewhere since"):
        Lease(file, "run x", patience=10)


def test_holder_in_another_container_is_not_judged_by_its_pid(file: Path) -> None:
    Lease(file, "run x")
    from_elsewhere(file, **this_host(), pid=2**22 + 1)
    assert not is_alive(file)  # at once

    from_elsewhere(file, **this_host() | {"space": "pid:[1]"}, pid=2**22 + 1)
    start = time.monotonic()
    assert not is_alive(file, patience=0.3)
    assert time.monotonic() - start >= 0.3


def test_rebooted_machine_is_distinguished_from_another_of_its_name(file: Path) -> None:
    known = bool(this_host()["machine"])
    Lease(file, "run x")
    from_elsewhere(file, **this_host() | {"boot": "other"})
    assert holder_alive(read_holder(file) or {}) is (False if known else None)

    for machine in ("other", ""):
        from_elsewhere(file, **this_host() | {"boot": "other", "machine": machine})
        assert holder_alive(read_holder(file) or {}) is None


def test_lease_of_a_version_that_knew_no_machines_is_watched(file: Path) -> None:
    Lease(file, "run x")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: x for key, x in content.items() if key != "machine"}))
    found = read_holder(file)

    assert found is not None and holder_alive(found) is None
    assert watch(file, found)()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b'{"attempt": 1',
        b'{"attempt": 1, "pid": 1}',
        b'{"attempt": 3, "pid": -1, "started": null}',
        b'{"attempt": 3, "pid": -1, "started": "1", "host": "", "boot": "", "space": "", '
        b'"since": ""}',
    ],
)
def test_damaged_lease_is_free_and_kills_nobody(file: Path, damage: bytes) -> None:
    file.write_bytes(damage)
    assert not is_alive(file)
    Lease(file, "run x", takeover=True)


def test_lease_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run x cannot be taken: .*No such file"):
        Lease(tmp_path / "gone" / "lease.json", "run x")


def test_holder_recovers_once_the_lease_is_readable_again(file: Path) -> None:
    lease = Lease(file, "run x")
    content = file.read_bytes()
    file.unlink()

    with pytest.raises(OSError), lease.hold():
        pytest.fail("held an unreadable lease")

    file.write_bytes(content)

    with lease.hold():
        pass


class Objects:
    r"""A backend without locks, as objects in a bucket: changed by compare and swap alone."""

    def __init__(self) -> None:
        self.record: tuple[bytes, str] | None = None
        self.count = 0

    def read(self) -> tuple[bytes, str] | None:
        return self.record

    def write(self, data: bytes, version: str | None) -> str:
        if version != (None if self.record is None else self.record[1]):
            raise Conflict

        self.count += 1
        self.record = data, str(self.count)

        return str(self.count)

    beat = write

    def lock(self) -> AbstractContextManager[object]:
        return nullcontext()


def test_lease_of_an_object_is_fenced_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects()
    old = Lease(objects, "sweep x")

    with old.hold():
        pass

    with pytest.raises(UserError, match="sweep x is in use by process"):
        Lease(objects, "sweep x")

    monkeypatch.setattr(leases, "_end_process", lambda holder: None)
    new = Lease(objects, "sweep x", takeover=True)
    assert (old.attempt, new.attempt) == (1, 2)

    with pytest.raises(LeaseLost, match="was taken over from attempt 1"), old.hold():
        pytest.fail("the old holder wrote")

    old.release()
    assert (read_holder(objects) or {})["pid"] == os.getpid()

    new.release()
    assert (read_holder(objects) or {"pid": 1})["pid"] is None
    assert Lease(objects, "sweep x").attempt == 3


def test_second_of_two_takers_of_an_object_is_refused() -> None:
    class Raced(Objects):
        def lock(self) -> AbstractContextManager[object]:
            if self.record is None:  # another process is quicker
                self.write(json.dumps(this_process(1)).encode(), None)

            return nullcontext()

    with pytest.raises(UserError, match="is in use by process"):
        Lease(Raced(), "sweep x")


def test_deleted_directory_ends_the_lease(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lease = Lease(tmp_path / "run" / "lease.json", "run x")
    shutil.rmtree(tmp_path / "run")

    with pytest.raises(LeaseGone, match="was deleted or unmounted"), lease.hold():
        pytest.fail("held the lease of a deleted run")

    lease.release()
    assert not (tmp_path / "run").exists()


def test_write_into_a_directory_that_is_being_deleted_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lease = Lease(tmp_path / "run" / "lease.json", "run x")
    deletion = threading.Timer(0.1, shutil.rmtree, [tmp_path / "run"])

    with pytest.raises(LeaseGone, match="was deleted or unmounted"), lease.hold():
        deletion.start()  # the file that is written goes before the lease does
        (tmp_path / "run" / "gone.json").read_bytes()

    lease.release()


def test_lease_without_file_locks_says_how_to_get_them(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)

    with pytest.raises(UserError, match=r"run x cannot be taken: .*cannot be locked .*-o flock"):
        Lease(file, "run x")


def test_deleted_file_is_not_present(tmp_path: Path) -> None:
    (tmp_path / "lease.json").touch()
    check_present(tmp_path / "lease.json")

    for gone in (tmp_path / "x" / "lease.json", tmp_path / "lease.json" / "lease.json"):
        with pytest.raises(LeaseGone, match=r"was deleted or unmounted while it was in use"):
            check_present(gone)


@pytest.mark.parametrize("closed", [False, True])
def test_training_ends_and_nothing_is_made_again(
    tmp_path: Path, small: Config, data: Path, caplog: pytest.LogCaptureFixture, closed: bool
) -> None:
    run = Run(tmp_path / "runs", small, wandb=Wandb("disabled"))
    training = train_run(run, data)
    next(training)
    shutil.rmtree(tmp_path / "runs")

    if closed:
        training.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(LeaseGone):
            next(training)

    run.close("failed")
    assert not (tmp_path / "runs").exists()
    assert caplog.text == ""


@pytest.mark.parametrize("whole", [False, True], ids=["run", "runs"])
def test_command_ends_with_one_message(
    start: Start, settings: list[str], tmp_path: Path, whole: bool
) -> None:
    process = start("train", "epochs=100000", *settings, WANDB_MODE="offline")
    runs = tmp_path / "runs"

    while not list(runs.glob("*_*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]

    (path,) = RunPath.all(runs)
    gone = (
        path.directory.rename(tmp_path / "gone") if not whole else runs.rename(tmp_path / "gone")
    )
    shutil.rmtree(gone)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"sda-ray: {path.directory} was deleted or unmounted")
    assert errors.count("\n") == 1, errors
    assert list(runs.glob("**/*")) == list(runs.glob(".*")) == []
