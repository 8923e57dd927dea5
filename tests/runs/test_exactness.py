r"""Tests that every setting leaves a run exact: stopped anywhere and resumed, the same bits."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sda_ray.core.config import SCHEDULERS, Config
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.runs.checkpoint import load_checkpoint, save_checkpoint
from sda_ray.runs.metrics import COSTS
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import Interrupted, Stop, train_run
from sda_ray.training.loop import TrainState, train_epoch

DISABLED = Wandb("disabled")

ALL: Config = {
    "ema": 0.9,
    "grad_clip": 0.5,
    "warmup": 2,
    "dropout": 0.2,
    "betas": (0.8, 0.95),
    "alpha": "exp",
    "parametrization": "v",
    "scheduler": "wsd",
    "epochs": 20,
}

EACH: list[Config] = [
    *({key: x} for key, x in ALL.items() if key not in ("scheduler", "epochs")),
    *({"scheduler": scheduler} for scheduler in SCHEDULERS),
    {"precision": "bf16"},
    ALL,
    ALL | {"precision": "bf16"},
]


class Halt(Exception):
    pass


class EachTime(Stop):
    r"""Creates a wish to stop after every step but the first few of each attempt."""

    def __init__(self, every: int) -> None:
        self.left = every

    @property
    def signal(self) -> int | None:  # type: ignore[override]
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


@pytest.fixture
def trainset(data: Path) -> TrajectoryDataset:
    return TrajectoryDataset(data / "train.h5", window=3)


def advance(state: TrainState, trainset: TrajectoryDataset, steps: int) -> Iterator[float]:
    r"""Trains for a number of steps and yields the losses of whole epochs."""

    def after_step(state: TrainState) -> None:
        nonlocal steps
        steps -= 1

        if not steps:
            raise Halt

    try:
        while True:
            yield train_epoch(state, trainset, after_step)
    except Halt:
        pass


def history(path: RunPath) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.metrics.read_text().splitlines()]
    return [{k: x for k, x in line.items() if k not in COSTS} for line in lines]


@pytest.mark.parametrize("settings", EACH, ids=str)
def test_stopped_within_an_epoch_and_resumed_equals_uninterrupted(
    small: Config, trainset: TrajectoryDataset, tmp_path: Path, settings: Config
) -> None:
    config = small | settings
    whole = TrainState(config, 16)
    losses = list(advance(whole, trainset, steps=8))

    first, path = TrainState(config, 16), RunPath(tmp_path)
    found = list(advance(first, trainset, steps=4))
    save_checkpoint(path, first.tensors(), first.info())

    torch.manual_seed(1)  # what is left in the global generator does not matter
    second, checkpoint = TrainState(config, 16), load_checkpoint(path)
    assert checkpoint is not None
    second.load(*checkpoint)
    found += list(advance(second, trainset, steps=4))

    a, b = whole.tensors(), second.tensors()
    assert found == losses and a.keys() == b.keys()
    assert all(x.equal(b[key]) for key, x in a.items())


@pytest.mark.parametrize("settings", EACH[:7] + EACH[-3:-2], ids=str)
def test_every_setting_changes_the_bits(
    small: Config, trainset: TrajectoryDataset, settings: Config
) -> None:
    states = [TrainState(small | more, 16) for more in ({}, settings)]

    for state in states:
        list(advance(state, trainset, steps=4))

    a, b = (dict(state.result.named_parameters()) for state in states)
    assert not all(x.equal(b[key]) for key, x in a.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_stopped_every_few_steps_equals_uninterrupted(
    small: Config, data: Path, tmp_path: Path, precision: str
) -> None:
    config = small | ALL | {"precision": precision, "epochs": 12}

    def attempt(runs: Path, id: str | None, every: int) -> tuple[RunPath, bool]:
        run = Run(runs, config, id, wandb=DISABLED)

        try:
            list(train_run(run, data, stop=EachTime(every)))
        except Interrupted:
            run.close("interrupted")
            return run.path, False

        run.close("finished")
        return run.path, True

    whole, _ = attempt(tmp_path / "whole", None, 10**6)
    path, done = attempt(tmp_path / "parts", None, 7)

    while not done:
        path, done = attempt(tmp_path / "parts", path.id, 7)

    assert history(path) == history(whole) and len(history(whole)) == 12

    for name in ("state", "checkpoint", "decay", "samples"):
        assert getattr(path, name).read_bytes() == getattr(whole, name).read_bytes(), name
