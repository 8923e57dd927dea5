r"""Tests that a full disk loses nothing: the journal of a study waits, and a run goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opened import DISABLED, finished, reopen, runs

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import is_alive
from sda_ray.runs.checkpoint import load_checkpoint
from sda_ray.runs.run import Run
from sda_ray.runs.train import Interrupted, Stop, train_run
from sda_ray.training.loop import Diverged

__all__ = ["finished", "runs"]  # fixtures

# Journals


FULL = """
import logging, resource, signal, sys, threading, time
from pathlib import Path
import sda_ray.search.journal
from sda_ray.core.lease import Lease
from sda_ray.search.study import Study
from studies import add

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logging.basicConfig(format="%(message)s")
directory = Path(sys.argv[1])
journal = directory / "study.journal"
study = Study(journal, "test", Lease(directory / "lease.json", "x"))
record = add(study, until=9)
before = journal.read_bytes()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

def fails():
    try:
        study.report(record, {e: 1 / e for e in range(1, 10)})
    except OSError:
        assert journal.read_bytes() == before
    else:
        raise SystemExit("written in spite of the limit")

limit(len(before) + 200)  # room for one of nine values
"""


def run_full(directory: Path, code: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", FULL + code, str(directory)]
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(tests.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests, env=env)
    assert done.returncode == 0, done.stderr

    return done


def test_append_to_a_full_disk_is_undone_and_tried_again_until_there_is_room(
    tmp_path: Path,
) -> None:
    code = """
def room():
    while not tries:
        time.sleep(0.01)
    time.sleep(0.5)
    assert journal.read_bytes() == before
    limit(soft)

tries = []
study.journal.give_up = lambda: tries.append(1)
threading.Thread(target=room).start()
record = study.report(record, {e: 1 / e for e in range(1, 10)})
assert len(tries) > 1
assert record.last == 9
assert [r.last for r in Study(journal, "test", study.journal.lease).records()] == [9]
"""
    done = run_full(tmp_path, code)
    (said,) = done.stderr.splitlines()

    assert "study.journal cannot be written: No space left on device. Waiting for room." in said


def test_wait_for_room_ends_in_time_or_with_the_wish_to_stop(tmp_path: Path) -> None:
    code = """
study.journal.give_up = lambda: True
fails()
study.journal.give_up = lambda: False
sda_ray.search.journal.PATIENCE = 0.3
fails()
limit(soft)
assert study.report(record, {1: 1.0}).values == {1: 1.0}
"""
    run_full(tmp_path, code)


# Checkpoints


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    r"""A disk of half a megabyte."""

    directory = tmp_path / "disk"
    directory.mkdir()

    if os.geteuid() or os.system(f"mount -t tmpfs -o size=700k none {directory} 2> /dev/null"):
        pytest.skip("only root can mount a small disk")

    yield directory
    os.system(f"umount -l {directory}")


def fill(disk: Path) -> Path:
    file = disk / "filler"

    with open(file, "wb", buffering=0) as f, pytest.raises(OSError, match="No space left"):
        while True:
            f.write(b"x" * 4096)

    return file


def test_full_disk_keeps_the_old_checkpoint_and_training_goes_on(
    disk: Path, small: Config, data: Path, caplog: pytest.LogCaptureFixture, finished: Run
) -> None:
    run = Run(disk / "runs", small, wandb=DISABLED)
    training = train_run(run, data, rungs=(1, 2, 3))
    assert next(training)["epoch"] == 1
    filler = fill(disk)
    assert next(training)["epoch"] == 2
    assert "no checkpoint was saved, and the one before stays: [Errno 28]" in caplog.text
    found = load_checkpoint(run.path)
    assert found is not None and found[1]["epoch"] == 1

    filler.unlink()
    list(training)
    lines = run.path.metrics.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert run.path.state.read_bytes() == finished.path.state.read_bytes()
    run.close("finished")


@pytest.mark.parametrize(("full", "why"), [(True, "no checkpoint could be saved"), (False, "")])
def test_stop_on_a_full_disk_says_that_no_checkpoint_is_saved(
    disk: Path, tmp_path: Path, small: Config, data: Path, full: bool, why: str
) -> None:
    run, stop = Run((disk if full else tmp_path) / "runs", small, wandb=DISABLED), Stop()
    training = train_run(run, data, rungs=(1,), stop=stop)
    next(training)
    stop.signal = signal.SIGTERM

    if full:
        fill(disk)

    with pytest.raises(Interrupted) as interrupted:
        next(training)

    assert str(interrupted.value) == why
    run.close("interrupted")


def test_full_disk_at_the_end_is_no_success_and_can_be_mended(
    disk: Path, small: Config, data: Path, finished: Run
) -> None:
    run = Run(disk / "runs", small, wandb=DISABLED)
    training = train_run(run, data)
    next(training)
    filler = fill(disk)

    with pytest.raises(UserError, match=f"Make room and finish it with .*--resume {run.id}"):
        list(training)

    run.close("interrupted")
    assert not is_alive(run.path.lease)
    assert not run.path.state.exists()
    assert json.loads(run.path.record.read_text())["status"] != "finished"

    filler.unlink()
    again = reopen(run)
    list(train_run(again, data))
    assert again.record["status"] == "finished"
    assert run.path.state.read_bytes() == finished.path.state.read_bytes()
    again.close("finished")


def test_run_that_diverges_on_a_full_disk_has_diverged(
    disk: Path, small: Config, data: Path
) -> None:
    run = Run(
        disk / "runs",
        small | {"learning_rate": 100.0, "epochs": 50, "batch_size": 1},
        wandb=DISABLED,
    )
    fill(disk)

    with pytest.raises(Diverged):
        list(train_run(run, data))

    run.close("failed")
