r"""Tests that a run that is extended ends in the same bits as a longer one trained at once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sda_ray.cli.session import resume_run, start_run
from sda_ray.core.config import Config, load_config
from sda_ray.core.errors import UserError
from sda_ray.runs.checkpoint import read_checkpoint
from sda_ray.runs.metrics import COSTS
from sda_ray.runs.path import RunPath
from sda_ray.runs.record import read_record
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import Interrupted, Stop, check_extension, find_start, train_run

DISABLED = Wandb("disabled")
MORE: Config = {"ema": 0.9, "dropout": 0.1, "warmup": 3}


def trained(runs: Path, config: Config, data: Path) -> RunPath:
    run = Run(runs, config, wandb=DISABLED)
    list(train_run(run, data))
    run.close("finished")

    return run.path


def history(path: RunPath) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.metrics.read_text().splitlines()]
    return [{k: x for k, x in line.items() if k not in COSTS} for line in lines]


def extended(runs: Path, path: RunPath, data: Path, epochs: int) -> RunPath:
    before = set(RunPath.all(runs))
    start_run(runs, data, {"epochs": epochs}, "cpu", DISABLED, extend=path.id)
    (child,) = set(RunPath.all(runs)) - before

    return child


def same(a: RunPath, b: RunPath) -> bool:
    files = [(a.state, b.state), (a.checkpoint, b.checkpoint), (a.samples, b.samples)]
    return history(a) == history(b) and all(x.read_bytes() == y.read_bytes() for x, y in files)


@pytest.fixture(scope="module")
def shorter(
    tmp_path_factory: pytest.TempPathFactory, small: Config, data: Path
) -> Callable[[str], RunPath]:
    r"""Finished runs by their scheduler."""

    runs, found = tmp_path_factory.mktemp("shorter"), {}
    lengths = {"constant": 2, "wsd": 11, "linear": 1}

    def get(scheduler: str) -> RunPath:
        if scheduler not in found:
            config = small | MORE | {"scheduler": scheduler, "epochs": lengths[scheduler]}
            config["warmup"] = min(config["warmup"], config["epochs"])
            found[scheduler] = trained(runs, config, data)

        return found[scheduler]

    return get


@pytest.fixture
def copied(shorter: Callable[[str], RunPath], tmp_path: Path) -> Callable[[str], RunPath]:
    r"""Copies of the finished runs, for tests that change them."""

    def copy(scheduler: str) -> RunPath:
        path = shorter(scheduler)
        return RunPath(shutil.copytree(path.directory, tmp_path / path.directory.name))

    return copy


@pytest.mark.parametrize(("scheduler", "epochs"), [("constant", 4), ("wsd", 13)])
def test_extended_run_equals_the_longer_one_trained_at_once(
    copied: Callable[[str], RunPath], data: Path, tmp_path: Path, scheduler: str, epochs: int
) -> None:
    parent = copied(scheduler)
    before = {file: file.read_bytes() for file in parent.directory.iterdir() if file.is_file()}
    child = extended(tmp_path, parent, data, epochs)
    whole = trained(tmp_path / "whole", load_config(child.config), data)

    assert load_config(child.config) == load_config(parent.config) | {"epochs": epochs}
    assert same(child, whole) and len(history(child)) == epochs
    assert read_record(child)["parent"] == parent.id and read_record(child)["exact"]
    assert before == {file: file.read_bytes() for file in before}

    if scheduler == "wsd":
        assert child.decay.read_bytes() == whole.decay.read_bytes()


def test_extended_run_of_a_sweep_is_judged_as_the_longer_one_would_be(
    tmp_path: Path, small: Config, data: Path
) -> None:
    def swept(name: str, epochs: int) -> RunPath:
        config = small | {"scheduler": "constant", "epochs": epochs}
        run = Run(tmp_path / name, config, wandb=DISABLED, record={"rungs": [1, 2]})
        list(train_run(run, data))
        run.close("finished")

        return run.path

    child = extended(tmp_path / "runs", swept("runs", 2), data, 3)

    assert same(child, swept("whole", 3)) and read_record(child)["exact"]


def test_extended_run_that_is_killed_before_its_first_checkpoint_is_still_exact(
    copied: Callable[[str], RunPath], data: Path, tmp_path: Path
) -> None:
    parent = copied("constant")
    whole = extended(tmp_path, parent, data, 4)
    child = RunPath(tmp_path / "cut-short-9_abcdefgh")
    child.directory.mkdir()
    shutil.copy(whole.config, child.config)
    shutil.copy(whole.record, child.record)
    child.metrics.write_bytes(whole.metrics.read_bytes()[:150])
    record = read_record(whole) | {"id": child.id, "status": "running", "attempts": []}
    child.record.write_text(json.dumps(record))

    resume_run(tmp_path, data, child.id, "cpu", DISABLED)
    assert same(child, whole)


def test_unfinished_run_is_extended_from_within_an_epoch(
    small: Config, data: Path, tmp_path: Path
) -> None:
    class Fifth(Stop):
        def __init__(self) -> None:
            self.left = 5

        @property
        def signal(self) -> int | None:  # type: ignore[override]
            self.left -= 1
            return 15 if self.left == 0 else None

    config = small | {"scheduler": "constant", "epochs": 3}
    run = Run(tmp_path, config, wandb=DISABLED)

    with pytest.raises(Interrupted):
        list(train_run(run, data, stop=Fifth()))

    run.close("interrupted")
    assert find_start(run.path)[1] == {"epoch": 1, "step": 2}

    child = extended(tmp_path, run.path, data, 4)
    assert same(child, trained(tmp_path / "whole", config | {"epochs": 4}, data))


def test_wsd_keeps_the_checkpoint_at_the_start_of_its_decay(
    shorter: Callable[[str], RunPath],
) -> None:
    path = shorter("wsd")
    _, info = read_checkpoint(path.decay)

    assert info == {"epoch": 10, "step": 0}
    assert find_start(path)[1] == info
    assert not shorter("constant").decay.exists()


def test_start_of_the_decay_is_kept_by_the_next_attempt_if_need_be(
    small: Config, data: Path, tmp_path: Path
) -> None:
    config = small | {"scheduler": "wsd", "epochs": 11}
    run = Run(tmp_path, config, wandb=DISABLED)

    for metrics in train_run(run, data):
        if metrics["epoch"] == 10:
            break

    run.close("interrupted")
    assert find_start(run.path)[1] == {"epoch": 10, "step": 0}
    kept = run.path.checkpoint.read_bytes()

    run = Run(tmp_path, config, run.id, wandb=DISABLED)
    list(train_run(run, data))
    run.close("finished")
    assert run.path.decay.read_bytes() == kept


def test_start_of_the_decay_that_cannot_be_kept_hinders_no_later_checkpoint(
    small: Config, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, small | {"scheduler": "wsd", "epochs": 11}, wandb=DISABLED)
    run.path.decay.mkdir()
    list(train_run(run, data))
    run.close("finished")

    assert read_checkpoint(run.path.checkpoint)[1]["epoch"] == 11
    assert "checkpoint.decay.pth cannot be kept, so the run cannot be extended" in caplog.text


def test_schedule_that_decays_over_all_epochs_is_refused_with_the_reason(
    shorter: Callable[[str], RunPath],
) -> None:
    path = shorter("linear")

    with pytest.raises(UserError, match="'linear' decays over all epochs") as e:
        check_extension(path, {"epochs": 8})

    assert f"sda-ray train --init {path.id} epochs=8" in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"epochs=N alone, not nothing"),
        ({"epochs": 8, "ema": 0.5}, r"epochs=N alone, not ema, epochs\. .* --init"),
        ({"epochs": 2}, r"epochs is 2, but must be above 2"),
    ],
)
def test_other_changes_are_refused(
    shorter: Callable[[str], RunPath], changes: Config, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_extension(shorter("constant"), changes)


def test_damaged_or_missing_checkpoints_are_named_and_nothing_is_begun(
    copied: Callable[[str], RunPath], data: Path, tmp_path: Path
) -> None:
    parent = copied("wsd")
    parent.decay.write_bytes(parent.decay.read_bytes()[:1000])

    with pytest.raises(UserError, match=r"no checkpoint of epoch 10 .*decay\.pth is damaged"):
        extended(tmp_path, parent, data, 13)

    os.unlink(parent.decay)

    with pytest.raises(UserError, match=r"no checkpoint of epoch 10 or before.*--init"):
        extended(tmp_path, parent, data, 13)

    assert list(RunPath.all(tmp_path)) == [parent]


def test_other_data_are_refused(
    copied: Callable[[str], RunPath], data: Path, tmp_path: Path
) -> None:
    parent = copied("constant")
    parent.record.write_text(json.dumps(read_record(parent) | {"data": "other"}))

    with pytest.raises(UserError, match="was trained on other data"):
        extended(tmp_path, parent, data, 4)


def test_extension_of_a_run_that_is_not_exact_is_not_either(
    copied: Callable[[str], RunPath], data: Path, tmp_path: Path
) -> None:
    parent = copied("constant")
    parent.record.write_text(json.dumps(read_record(parent) | {"exact": False}))

    assert read_record(extended(tmp_path, parent, data, 3))["exact"] is False


def test_extension_with_other_threads_warns(
    copied: Callable[[str], RunPath],
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parent = copied("constant")
    record = read_record(parent)
    record["attempts"][0]["threads"] = torch.get_num_threads() + 1
    parent.record.write_text(json.dumps(record))
    child = extended(tmp_path, parent, data, 3)

    assert "was trained with another threads" in caplog.text
    assert read_record(child)["exact"] is False
