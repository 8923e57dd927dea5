r"""Tests of averaged weights, from the average itself to what a run leaves of it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from sda_ray.core.config import Config
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.score import load_score
from sda_ray.runs.checkpoint import load_checkpoint
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train
from sda_ray.training.averaging import average_of, follow
from sda_ray.training.loop import TrainState, epochs, train_epoch
from sda_ray.training.validation import DRAWS, Validation

DISABLED = Wandb("disabled")


@pytest.fixture
def trainset(data: Path) -> TrajectoryDataset:
    return TrajectoryDataset(data / "train.h5", window=3)


@pytest.fixture
def validation(data: Path) -> Validation:
    return Validation(TrajectoryDataset(data / "valid.h5", window=3))


@pytest.mark.parametrize(("n", "decay"), [(1, 2 / 11), (5, 0.4), (80, 0.9), (10**6, 0.9)])
def test_average_follows_faster_at_first(n: int, decay: float) -> None:
    module = nn.Linear(3, 2).double()
    average = average_of(module)
    before = average.weight.clone()
    nn.init.normal_(module.weight)
    follow(average, module, 0.9, n)

    assert torch.allclose(average.weight, decay * before + (1 - decay) * module.weight)


def test_average_is_of_the_parameters_only_and_does_not_learn() -> None:
    module = nn.BatchNorm1d(3)
    average = average_of(module)
    module.running_mean = torch.ones(3)
    follow(average, module, 0.9, 1)

    assert average.running_mean is not None and average.running_mean.equal(torch.zeros(3))
    assert not average.training and not any(p.requires_grad for p in average.parameters())


def test_every_step_is_averaged_and_learning_is_left_alone(
    small: Config, trainset: TrajectoryDataset
) -> None:
    plain, state = TrainState(small, 16), TrainState(small | {"ema": 0.3}, 16)
    average = copy.deepcopy(state.score)
    steps = 0

    def check(state: TrainState) -> None:
        nonlocal steps
        steps += 1
        follow(average, state.score, 0.3, steps)

    for _ in range(2):
        assert train_epoch(plain, trainset) == train_epoch(state, trainset, check)

    assert steps == 6 and state.average is not None

    for p, q, r, s in zip(
        plain.score.parameters(),
        state.score.parameters(),
        state.average.parameters(),
        average.parameters(),
        strict=True,
    ):
        assert p.equal(q) and r.equal(s) and not q.equal(r)


def test_loss_valid_is_that_of_the_average_and_the_raw_one_is_logged(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    plain = list(epochs(TrainState(small, 16), trainset, validation))
    state = TrainState(small | {"ema": 0.999}, 16)
    found = list(epochs(state, trainset, validation))

    assert [m["loss_valid_raw"] for m in found] == [m["loss_valid"] for m in plain]
    assert all(m["loss_valid"] != m["loss_valid_raw"] for m in found)
    assert validation(state.result_sde, DRAWS) == (
        found[-1]["loss_valid"],
        found[-1]["loss_valid_se"],
    )
    assert all("loss_valid_raw" not in m for m in plain)


def test_state_holds_the_average_and_the_checkpoint_both(
    small: Config, data: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, small | {"epochs": 1, "ema": 0.999}, wandb=DISABLED)
    list(train(run, data))
    run.close("finished")

    checkpoint = load_checkpoint(run.path)
    assert checkpoint is not None
    tensors, state = checkpoint[0], torch.load(run.path.state, weights_only=True)

    for name, p in load_score(run.path.directory).named_parameters():
        assert p.equal(state[name]) and p.equal(tensors[f"average.{name}"])

    assert not state["kernel.network.heads.0.weight"].equal(
        tensors["score.kernel.network.heads.0.weight"]
    )


def test_average_begins_with_the_weights_of_another_run(small: Config) -> None:
    weights = TrainState(small | {"seed": 1}, 16).score.state_dict()
    state = TrainState(small | {"ema": 0.9}, 16)
    state.begin(weights)

    for score in (state.score, state.result):
        assert all(x.equal(weights[key]) for key, x in score.state_dict().items())
