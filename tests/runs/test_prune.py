r"""Tests that nobody misses a checkpoint that was given back."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from kept import identity, made, path_of, runs
from simulated import Sweeping, outcomes

from sda_ray.core.config import Config
from sda_ray.runs.checkpoint import load_checkpoint, prune_run, resumable
from sda_ray.runs.metrics import read_history
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run
from sda_ray.search.promotion import Rules

__all__ = ["made", "runs"]  # fixtures


def go_on(runs: Path, index: int, data: Path, **options: Any) -> Run:
    run = Run(runs, {}, identity(index), attempt=2, takeover=True, **options)
    list(train_run(run, data, rungs=(1, 2, 3)))
    run.close("finished")

    return run


def test_run_whose_checkpoint_was_given_back_ends_in_the_same_bits(
    runs: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = runs.with_name("undisturbed")
    shutil.copytree(runs, other)
    undisturbed = go_on(other, 3, data, wandb=Wandb("disabled"))
    assert "restarted" not in undisturbed.record["attempts"][-1]

    path = path_of(runs, 3)
    lines = path.metrics.read_text()
    assert prune_run(path, "width") > 0
    caplog.set_level(logging.INFO, "sda_ray")
    go_on(runs, 3, data, wandb=Wandb("disabled"))
    record = json.loads(path.record.read_text())

    assert path.state.read_bytes() == undisturbed.path.state.read_bytes()
    assert path.metrics.read_text().startswith(lines)
    assert sorted(read_history(path.metrics)) == [1, 2, 3]
    assert len(path.metrics.read_text().splitlines()) == 3
    assert record["exact"] is True and record["status"] == "finished"
    restarted = [attempt.get("restarted") for attempt in record["attempts"]]
    assert restarted == [None, "it has no checkpoint"]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path.directory.name}: it has no checkpoint: it restarts at epoch 0, to the same bits."
    ]


def test_repeated_epochs_are_not_sent_to_wandb_again(
    tmp_path: Path, data: Path, small: Config
) -> None:
    offline, record = Wandb("offline"), {"sweep": "width"}
    run = Run(tmp_path / "runs", small, "a" * 8, wandb=offline, attempt=1, record=record)
    training = train_run(run, data, rungs=(2, 3))
    next(training), next(training)
    training.close()  # type: ignore[attr-defined]
    run.close("paused")
    prune_run(run.path, "width")
    again = Run(tmp_path / "runs", {}, "a" * 8, wandb=offline, attempt=2)
    list(train_run(again, data))
    again.close("finished")
    logs = sorted(run.path.directory.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    losses = [str(read_history(run.path.metrics)[e]["loss_valid"]).encode() for e in (1, 2, 3)]
    deadline = time.monotonic() + 10

    while losses[2] not in logs[1].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)  # wandb 0.31 writes the rest some ms after the end

    assert [[loss in log.read_bytes() for loss in losses] for log in logs] == [
        [True, True, False],
        [False, False, True],
    ]


def test_reason_for_a_restart_is_the_right_one(runs: Path, data: Path) -> None:
    for file in resumable(path_of(runs, 1)):  # as if it had been killed before its first one
        file.unlink()

    for file in resumable(path_of(runs, 2)):
        file.write_bytes(b"damaged")

    for index, why in (
        (1, "it has no checkpoint"),
        (2, "it has no whole checkpoint"),
    ):
        run = go_on(runs, index, data, wandb=Wandb("disabled"))
        assert run.record["attempts"][-1]["restarted"] == why


@pytest.mark.parametrize("count", range(4))
def test_deletion_killed_at_any_file_leaves_a_whole_run(
    runs: Path, data: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(runs, 3)
    shutil.copy(path_of(runs, 3).checkpoint, path.decay)
    assert len(resumable(path)) == 3
    unlink = Path.unlink
    done = 0

    def unlink_some(file: Path, missing_ok: bool = False) -> None:
        nonlocal done

        if file in resumable(path):
            if done == count:
                raise KeyboardInterrupt

            done += 1

        unlink(file, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_some)

        try:
            prune_run(path, "width")
        except KeyboardInterrupt:
            assert count < 3

    found = load_checkpoint(path)
    assert (found is None) == (count >= 2)
    assert found is None or found[1]["epoch"] == 2  # the newest, or none
    run = go_on(runs, 3, data, wandb=Wandb("disabled"))
    assert run.record["exact"] is True
    assert sorted(run.lines) == [1, 2, 3] and path.state.exists()


def test_sweep_whose_paused_runs_keep_no_checkpoint_ends_the_same(tmp_path: Path) -> None:
    r"""A run that passes rungs again is not paused there again, nor promoted twice."""

    rules = Rules(27, 27, 1, 3)
    whole = Sweeping(tmp_path / "whole", rules).drive()
    runs = tmp_path / "bare" / "runs"
    trained = []

    def forget(config: dict[str, Any], epoch: int) -> bool:
        trained.append(epoch)

        for path in RunPath.all(runs):  # the one that trains is about to write its own
            path.checkpoint.unlink(missing_ok=True)

        return False

    bare = Sweeping(tmp_path / "bare", rules, fails=forget).drive()

    assert list(outcomes(bare)) == list(outcomes(whole))
    assert [r.attempt for r in bare] == [r.attempt for r in whole]
    assert len(trained) > sum(r.last for r in bare)

    for record in bare:
        path = RunPath.of_id(runs, record.run_id)
        assert path is not None
        lines = path.metrics.read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, record.last + 1))
