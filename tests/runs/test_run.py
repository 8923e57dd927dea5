r"""Tests for sda_ray.runs.run: the files of a run, and who may write them."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import DISABLED, finished, reopen, runs

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.nn.score import load_score
from sda_ray.runs.run import Run
from sda_ray.runs.train import train_run
from sda_ray.training.loop import TrainState

__all__ = ["finished", "runs"]  # fixtures


def metrics(epoch: int, **values: float) -> dict[str, Any]:
    return {"epoch": epoch, "loss_valid": 0.5, "seconds": 1.0, **values}


# Files


def test_finished_run_has_the_files_of_the_contract(finished: Run, small: Config) -> None:
    path = finished.path
    names = {file.name for file in path.directory.iterdir()} - {"diff.patch"}  # of a checkout
    expected = {"config.json", "state.pth", "checkpoint.pth", "metrics.jsonl", "run.json"}
    assert names == expected | {"samples.png", "lease.json", "lease.lock"}

    config = json.loads(path.config.read_text())
    assert config == {k: list(v) if isinstance(v, tuple) else v for k, v in small.items()}
    lines = [json.loads(line) for line in path.metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert path.samples.read_bytes().startswith(b"\x89PNG")
    assert load_score(path.directory)
    assert re.fullmatch(r"[a-z]+-[a-z]+-1_[a-z0-9]{8}", path.directory.name)


def test_runs_never_share_a_directory(runs: Path, small: Config) -> None:
    opened = [Run(runs, small, wandb=DISABLED) for _ in range(3)]
    assert len({run.path.directory for run in opened}) == 3
    assert [run.path.name.rpartition("-")[2] for run in opened] == ["1", "2", "3"]


def test_number_of_a_trial_ends_the_name(runs: Path, small: Config) -> None:
    run = Run(runs, small, id="abcd1234", number=0, wandb=DISABLED)
    assert run.path.name.endswith("-0")


def test_record_says_where_the_bits_come_from_and_nothing_of_the_environment(
    runs: Path, small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2-of-mine")
    run = Run(runs, small, wandb=DISABLED, record={"data": "abc"})
    text = run.path.record.read_text()
    record = json.loads(text)
    attempt = record["attempts"][0]

    assert (record["status"], record["exact"], record["data"]) == ("running", True, "abc")
    assert {"host", "device", "threads", "versions", "commit", "dirty"} <= attempt.keys()
    assert attempt["versions"]["torch"] == torch.__version__

    for value in (value for value in os.environ.values() if len(value) > 8):
        assert json.dumps(value)[1:-1] not in text


def test_run_that_was_killed_before_its_config_is_begun_again(runs: Path, small: Config) -> None:
    (runs / "misty-river-1_abcd1234").mkdir(parents=True)
    run = Run(runs, small, id="abcd1234", wandb=DISABLED)
    assert run.path.directory == runs / "misty-river-1_abcd1234"
    assert run.config == small


def test_run_that_was_killed_before_its_name_is_named(runs: Path, small: Config) -> None:
    (runs / ".abcd1234").mkdir(parents=True)
    run = Run(runs, small, id="abcd1234", number=7, wandb=DISABLED)
    assert re.fullmatch(r"[a-z]+-[a-z]+-7_abcd1234", run.path.directory.name)
    assert [file.name for file in runs.iterdir()] == [run.path.directory.name]
    run.log(metrics(1))
    assert run.path.metrics.exists()


def test_stale_link_of_a_killed_attempt_is_removed(runs: Path, small: Config) -> None:
    run = Run(runs, small, wandb=DISABLED)
    run.close("interrupted")
    (runs / f".{run.id}").symlink_to(run.path.directory.name)
    reopen(run)
    assert not (runs / f".{run.id}").is_symlink()


def test_leftovers_of_killed_writers_are_removed(finished: Run) -> None:
    aside = finished.path.directory / ".checkpoint.pth.0123abcd.tmp"
    aside.touch()
    reopen(finished)
    assert not aside.exists()


def test_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path, small: Config) -> None:
    (tmp_path / "runs").touch()

    with pytest.raises(UserError, match=r"a run in .*runs cannot be written: .*File exists"):
        Run(tmp_path / "runs", small, wandb=DISABLED)


def test_open_that_fails_gives_the_lease_back(finished: Run) -> None:
    content = finished.path.config.read_text()
    finished.path.config.write_text("{")

    with pytest.raises(UserError, match=r"config\.json is damaged"):
        reopen(finished)

    finished.path.config.write_text(content)
    reopen(finished)


def test_second_owner_is_refused(runs: Path, small: Config) -> None:
    run = Run(runs, small, wandb=DISABLED)

    with pytest.raises(UserError, match=f"run {run.path.directory.name} is in use by process"):
        reopen(run)


def test_owner_that_lost_the_run_changes_nothing(
    runs: Path, small: Config, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Run(runs, small, wandb=DISABLED)
    training = train_run(old, data)
    next(training)
    new = reopen(old, takeover=True)
    list(train_run(new, data))
    new.close("finished")
    before = {file: file.read_bytes() for file in new.path.directory.iterdir()}

    with pytest.raises(RuntimeError, match="was taken over"):
        list(training)

    old.close("failed")
    assert "run.json keeps its status" in caplog.text
    assert {file: file.read_bytes() for file in new.path.directory.iterdir()} == before


def test_close_may_be_repeated_and_frees_the_run(runs: Path, small: Config) -> None:
    run = Run(runs, small, wandb=DISABLED)
    run.close("interrupted")
    run.close("failed")
    assert json.loads(run.path.record.read_text())["status"] == "interrupted"
    Lease(run.path.lease, "the run")


# Metrics


def test_torn_last_line_is_cut_off_and_its_epoch_done_again(
    runs: Path, small: Config, data: Path, finished: Run
) -> None:
    whole = finished.path.metrics.read_bytes()
    other = Run(runs, small, wandb=DISABLED)
    next(train_run(other, data))  # its generator is closed: a checkpoint at epoch 1
    other.close("interrupted")
    lines = whole.splitlines(keepends=True)
    other.path.metrics.write_bytes(lines[0] + lines[1][:20])

    again = reopen(other)
    list(train_run(again, data))
    assert list(again.lines) == [1, 2, 3]

    for epoch, line in finished.lines.items():
        assert {**again.lines[epoch], "seconds": 0} == {**line, "seconds": 0}

    assert len(other.path.metrics.read_bytes().splitlines()) == 3


def test_redone_epochs_are_compared_not_appended(
    runs: Path, small: Config, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(runs, small, wandb=DISABLED)
    run.log(metrics(1))
    before = run.path.metrics.read_bytes()
    run.log(metrics(1, seconds=2.0))
    assert caplog.text == "" and run.record["exact"]

    run.log(metrics(1, loss_valid=0.25))
    assert "epoch 1 of" in caplog.text and "loss_valid 0.5 before, 0.25 now" in caplog.text
    assert not run.record["exact"]
    assert run.path.metrics.read_bytes() == before


def test_resume_with_other_threads_is_marked_inexact(
    finished: Run, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)

    try:
        run = reopen(finished)
    finally:
        torch.set_num_threads(before)

    assert "resumes with another threads than it started with" in caplog.text
    assert json.loads(run.path.record.read_text())["exact"] is False
    assert [attempt["number"] for attempt in run.record["attempts"]] == [1, 2]


# Checkpoints


def test_checkpoints_come_at_the_interval_and_cost_little(runs: Path, small: Config) -> None:
    assert not Run(runs, small, wandb=DISABLED).due
    run = Run(runs, small, wandb=DISABLED, interval=0.0)
    due, start = [run.due], time.monotonic()
    run.save(TrainState(small, size=16))
    cost = time.monotonic() - start
    due.append(run.due)
    time.sleep(cost / 0.03)
    due.append(run.due)
    assert due == [True, False, True]


def test_checkpoint_at_the_same_step_is_not_saved_twice(runs: Path, small: Config) -> None:
    run, state = Run(runs, small, wandb=DISABLED), TrainState(small, size=16)
    run.save(state)
    run.save(state)
    assert run.path.checkpoint.exists() and not run.path.previous.exists()


def test_two_damaged_checkpoints_start_the_run_again_to_the_same_bits(
    finished: Run, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = finished.path.state.read_bytes()
    finished.path.state.unlink()
    finished.path.checkpoint.write_bytes(b"damaged")
    finished.path.previous.write_bytes(b"damaged")
    again = reopen(finished)
    list(train_run(again, data))
    assert finished.path.state.read_bytes() == state
    assert "has no whole checkpoint: it restarts" in caplog.text
    assert "came out different" not in caplog.text


def test_checkpoint_of_another_config_is_a_clear_error(
    runs: Path, small: Config, finished: Run, data: Path
) -> None:
    other = Run(runs, small | {"embedding": 16}, wandb=DISABLED)
    shutil.copy(finished.path.checkpoint, other.path.checkpoint)

    with pytest.raises(UserError, match=r"checkpoint\.pth does not fit config\.json: 'score"):
        next(train_run(other, data))
