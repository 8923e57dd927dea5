import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.data.dataset import DataChanged, TrajectoryDataset, fingerprint
from sda_ray.runs.metrics import COSTS
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import Interrupted, Stop, train_run
from sda_ray.training.loop import Diverged, TrainState, epochs
from sda_ray.training.validation import Validation

DISABLED = Wandb("disabled")


class AtEachStep(Stop):
    r"""Creates a wish to stop that comes when `look`, called after every step, says so."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self.look = look

    @property
    def signal(self) -> int | None:  # type: ignore[override]
        return signal.SIGTERM if self.look() else None


def begin(runs: Path, config: Config, id: str | None = None, **record: Any) -> Run:
    return Run(runs, config, id, wandb=DISABLED, record=record)


def history(path: RunPath) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.metrics.read_text().splitlines()]
    return [{k: x for k, x in line.items() if k not in COSTS} for line in lines]


def same(a: RunPath, b: RunPath) -> bool:
    r"""Whether two finished runs have the same weights, moments and history."""

    files = (
        (a.state, b.state),
        (a.checkpoint, b.checkpoint),
        (a.samples, b.samples),
    )
    return history(a) == history(b) and all(x.read_bytes() == y.read_bytes() for x, y in files)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Config, data: Path) -> RunPath:
    r"""A run that was never interrupted."""

    run = begin(tmp_path_factory.mktemp("whole") / "runs", small)
    list(train_run(run, data))
    assert all(0.01 < line["memory"] < 100 for line in run.lines.values())  # GB
    run.close("finished")

    return run.path


def test_run_stopped_after_every_step_equals_uninterrupted(
    tmp_path: Path, small: Config, data: Path, whole: RunPath
) -> None:
    run, attempts = begin(tmp_path / "runs", small), 1

    while not run.path.state.exists():
        try:
            list(train_run(run, data, stop=AtEachStep(lambda: True)))
        except Interrupted:
            run.close("interrupted")
            run, attempts = begin(tmp_path / "runs", small, run.id), attempts + 1

    run.close("finished")
    assert attempts == 10
    assert same(run.path, whole)


def test_other_seed_of_validation_changes_losses_and_no_weight(
    tmp_path: Path, small: Config, data: Path, whole: RunPath
) -> None:
    run = begin(tmp_path / "runs", small | {"valid_seed": 1})
    list(train_run(run, data))
    run.close("finished")
    pairs = list(zip(history(run.path), history(whole), strict=True))

    assert run.path.state.read_bytes() == whole.state.read_bytes()
    assert all(a["loss_train"] == b["loss_train"] for a, b in pairs)
    assert all(a["loss_valid"] != b["loss_valid"] for a, b in pairs)


def test_run_closed_after_every_epoch_equals_uninterrupted(
    tmp_path: Path, small: Config, data: Path, whole: RunPath
) -> None:
    run = begin(tmp_path / "runs", small)

    for _ in range(4):
        training = train_run(run, data)
        next(training, None)
        training.close()  # type: ignore[attr-defined]
        run.close("interrupted")
        run = begin(tmp_path / "runs", small, run.id)

    assert same(run.path, whole)


def test_power_cut_at_any_step_loses_nothing(
    tmp_path: Path, small: Config, data: Path, whole: RunPath
) -> None:
    r"""A power cut is a copy of the directory, taken at a step, that is gone on with."""

    cuts: list[Path] = []

    def cut() -> bool:
        copy = tmp_path / f"cut-{len(cuts)}" / run.path.directory.name
        shutil.copytree(run.path.directory, copy)
        cuts.append(copy)

        return False

    run = Run(tmp_path / "runs", small, wandb=DISABLED, interval=0.0)
    list(train_run(run, data, stop=AtEachStep(cut)))
    run.close("finished")
    assert len(cuts) == 9

    for copy in cuts:
        again = Run(copy.parent, small, run.id, wandb=DISABLED, takeover=True)
        list(train_run(again, data))
        again.close("finished")
        assert same(again.path, whole), copy


def test_metrics_are_on_disk_before_they_are_yielded(
    tmp_path: Path, small: Config, data: Path
) -> None:
    run = begin(tmp_path / "runs", small)

    for metrics in train_run(run, data, rungs=(2,)):
        assert history(run.path)[-1]["epoch"] == metrics["epoch"]
        assert run.path.checkpoint.exists() == (metrics["epoch"] >= 2)


def test_batch_size_does_not_change_the_validation(
    tmp_path: Path, small: Config, data: Path, whole: RunPath
) -> None:
    r"""With a learning rate of nearly nothing, the weights stay as they were."""

    losses = set()

    for batch_size in (7, 32, 102):
        config = small | {"batch_size": batch_size, "learning_rate": 1e-30, "weight_decay": 0.0}
        metrics = next(train_run(begin(tmp_path / "runs", config), data))
        losses.add(metrics["loss_valid"])

    assert len(losses) == 1


def test_init_starts_from_the_weights_of_another_run(
    tmp_path: Path, small: Config, data: Path, whole: RunPath
) -> None:
    config = small | {"seed": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    run = begin(tmp_path / "runs", config, parent=whole.id)
    metrics = next(train_run(run, data, rungs=[1], init=whole.directory))
    assert metrics["loss_valid"] == pytest.approx(history(whole)[-1]["loss_valid"], rel=1e-5)


def test_run_whose_parent_is_gone_does_not_start_from_random_weights(
    tmp_path: Path, small: Config, data: Path
) -> None:
    run = begin(tmp_path / "runs", small, parent="abcd1234")

    with pytest.raises(
        UserError, match="started with the weights of run 'abcd1234', which is gone"
    ):
        next(train_run(run, data))


def test_data_that_were_replaced_are_refused_at_every_opening(
    tmp_path: Path, small: Config, data: Path
) -> None:
    own, other = tmp_path / "data", tmp_path / "other.h5"
    shutil.copytree(data, own)
    run = begin(tmp_path / "runs", small, data=fingerprint(own))
    next(iter(train_run(run, own)))
    run.close("interrupted")
    shutil.copy(own / "train.h5", other)

    with h5py.File(other, "r+") as f:
        f["x"][...] *= 2

    os.utime(other, ns=(0, (own / "train.h5").stat().st_mtime_ns))
    other.rename(own / "train.h5")  # of the same size and time
    run = begin(tmp_path / "runs", small, run.id)

    with pytest.raises(DataChanged, match="no longer those that"):
        next(train_run(run, own))

    run.close("interrupted")
    assert len(history(run.path)) == 1


def test_diverged_run_is_marked_with_the_reason(tmp_path: Path, small: Config, data: Path) -> None:
    run = begin(tmp_path / "runs", small | {"learning_rate": 100.0, "epochs": 50})

    with pytest.raises(Diverged):
        list(train_run(run, data))

    record = json.loads(run.path.record.read_text())
    assert record["status"] == "diverged" and "after epoch" in record["reason"]
    assert not run.path.state.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_set_the_stop_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    with Stop().on_signals() as stop:
        signal.raise_signal(number)
        assert stop.signal == number

    assert signal.getsignal(number) == before


def test_second_ctrl_c_interrupts_at_once() -> None:
    with Stop().on_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    try:
        with Stop().on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_measures_are_taken_where_a_run_is_judged_also_after_a_resume(
    small: Config, data: Path, tmp_path: Path
) -> None:
    measured: dict[str, Any] = {"rungs": [2], "measured": {"denoising": 9, "skill": 9}}
    run = begin(tmp_path / "a", small, **measured)
    list(train_run(run, data))
    run.close("finished")

    steps = iter(range(100))
    part = begin(tmp_path / "b", small, "b" * 8, **measured)

    with pytest.raises(Interrupted):
        list(train_run(part, data, stop=AtEachStep(lambda: next(steps) == 4)))

    part.close("interrupted")
    part = begin(tmp_path / "b", small, "b" * 8)  # as `sda-ray train --resume`
    list(train_run(part, data))
    part.close("finished")

    keys = {"denoising", "denoising_se", "skill", "skill_se"}
    assert [keys & line.keys() for line in history(run.path)] == [set(), keys, keys]
    assert same(run.path, part.path)

    unmeasured = begin(tmp_path / "c", small | {"window": 7}, **measured)

    with pytest.raises(
        UserError, match="window is 7, but the denoising of this sweep is measured"
    ):
        list(train_run(unmeasured, data))

    unmeasured.close("failed")


def test_measure_that_is_no_number_is_a_divergence(small: Config, data: Path) -> None:
    state = TrainState(small, size=16)
    trainset = TrajectoryDataset(data / "train.h5", window=3)
    validation = Validation(TrajectoryDataset(data / "valid.h5", window=3))
    found = []

    with pytest.raises(Diverged, match="skill is inf after epoch 2"):
        for metrics in epochs(
            state,
            trainset,
            validation,
            rungs=[2],
            measures={"skill": lambda score, alpha: (math.inf, 0.0)},
        ):
            found.append(metrics["epoch"])

    assert found == [1]
