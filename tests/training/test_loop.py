r"""Tests for sda_ray.training.loop: the same bits, whatever comes between."""

import copy
import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sda_ray.core.config import CONFIG, Config, schedule
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.training.loop import Diverged, TrainState, epochs, train_epoch
from sda_ray.training.rng import rng
from sda_ray.training.validation import DRAWS, Validation

SIZE = 16


@pytest.fixture
def trainset(data: Path) -> TrajectoryDataset:
    return TrajectoryDataset(data / "train.h5", window=3)


@pytest.fixture
def validation(data: Path) -> Validation:
    return Validation(TrajectoryDataset(data / "valid.h5", window=3))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


class Halt(Exception):
    pass


def halt_after(steps: int) -> Callable[[TrainState], None]:
    def after_step(state: TrainState) -> None:
        nonlocal steps
        steps -= 1

        if steps == 0:
            raise Halt

    return after_step


def seen(
    state: TrainState, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor]]:
    r"""Trains for an epoch and returns the (indices, starts) of its windows."""

    drawn = []
    windows = trainset.windows

    def record(indices: Tensor, starts: Tensor) -> Tensor:
        drawn.append((indices, starts))
        return windows(indices, starts)

    with monkeypatch.context() as context:
        context.setattr(trainset, "windows", record)
        train_epoch(state, trainset)

    return drawn


# Random numbers


def test_step_draws_the_same_numbers_whatever_came_before(
    small: Config, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = TrainState(small, SIZE)
    train_epoch(late, trainset)
    drawn = seen(late, trainset, monkeypatch)

    torch.manual_seed(1)
    torch.rand(100)
    fresh = TrainState(small, SIZE)
    fresh.epoch, fresh.step = 1, 1
    fresh.losses = torch.zeros(1)
    again = seen(fresh, trainset, monkeypatch)

    assert len(drawn) == 3 and len(again) == 2

    for a, b in zip(drawn[1:], again, strict=True):
        assert a[0].equal(b[0]) and a[1].equal(b[1])


def test_training_leaves_the_global_generator_alone(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    before = torch.get_rng_state()
    list(epochs(TrainState(small, SIZE), trainset, validation))
    assert torch.get_rng_state().equal(before)


def test_seed_decides_the_weights(small: Config) -> None:
    states = [TrainState(small | {"seed": seed}, SIZE).tensors() for seed in (0, 0, 1)]
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


# Epochs


def test_every_trajectory_once_per_epoch_with_the_last_partial_batch(
    small: Config, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(small | {"batch_size": 7}, SIZE)
    orders = []

    for _ in range(2):
        drawn = seen(state, trainset, monkeypatch)
        assert [len(indices) for indices, _ in drawn] == [7, 7, 6]
        orders.append(torch.cat([indices for indices, _ in drawn]))
        assert orders[-1].sort().values.tolist() == list(range(20))

    assert not orders[0].equal(orders[1])


def test_starts_are_uniform_over_all_windows(
    small: Config, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainState, "update", lambda self, n: None)
    state = TrainState(small | {"batch_size": 20}, SIZE)
    starts = torch.cat([s for _ in range(50) for _, s in seen(state, trainset, monkeypatch)])
    counts = torch.bincount(starts, minlength=trainset.starts)
    assert len(counts) == 12 - 3 + 1
    chi2 = ((counts - 100.0) ** 2 / 100).sum()
    assert chi2 < 27.9  # 99.9 % of 9 degrees of freedom


@pytest.mark.parametrize("batch_size", [7, 20])
def test_loss_train_is_a_mean_over_items(
    small: Config,
    trainset: TrajectoryDataset,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    state = TrainState(small | {"batch_size": batch_size}, SIZE)
    items: list[float] = []

    def loss(x: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.rand(len(x), generator=generator)
        errors = state.sde.errors(x, t, torch.randn(x.shape, generator=generator))
        items.extend(errors.tolist())

        return errors.mean()

    monkeypatch.setattr(state.sde, "loss", loss)
    loss_train = train_epoch(state, trainset)
    assert len(items) == 20
    assert math.isclose(loss_train, sum(items) / 20, rel_tol=1e-6)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "exponential"])
def test_lr_follows_the_schedule(
    small: Config, trainset: TrajectoryDataset, validation: Validation, scheduler: str
) -> None:
    config = small | {"scheduler": scheduler, "epochs": 4}
    lrs = [m["lr"] for m in epochs(TrainState(config, SIZE), trainset, validation)]
    assert lrs == [1e-3 * schedule(scheduler, e / 4) for e in range(4)]


def test_update_is_that_of_adamw(small: Config, trainset: TrajectoryDataset) -> None:
    state = TrainState(small, SIZE)
    score = copy.deepcopy(state.score)
    optimizer = torch.optim.AdamW(score.parameters(), lr=1e-3, weight_decay=1e-3, fused=True)

    for k in range(3):
        for p, q in zip(state.score.parameters(), score.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.manual_seed(k))
            q.grad = p.grad.clone()

        state.update(k + 1)
        optimizer.step()

    assert equal(dict(state.score.state_dict()), dict(score.state_dict()))
    assert all(p.grad is None for p in state.score.parameters())


def test_metrics_of_an_epoch(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    found = list(epochs(TrainState(small, SIZE), trainset, validation))
    keys = {"epoch", "loss_train", "loss_valid", "loss_valid_se", "lr", "seconds"}
    assert [m["epoch"] for m in found] == [1, 2, 3]
    assert all(m.keys() == keys for m in found)
    assert found[-1]["loss_valid"] < found[0]["loss_valid"]


# Interruption


def train_to_the_end(
    state: TrainState, trainset: TrajectoryDataset, validation: Validation
) -> list[dict[str, object]]:
    metrics = list(epochs(state, trainset, validation))
    return [{k: x for k, x in m.items() if k != "seconds"} for m in metrics]


def test_loss_that_a_run_is_judged_by_is_the_mean_of_several_draws(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    state, found = TrainState(small | {"epochs": 3}, SIZE), []

    for metrics in epochs(state, trainset, validation, rungs=[2]):
        expected = [validation(state.sde), validation(state.sde, DRAWS)]
        found.append((metrics["loss_valid"], metrics["loss_valid_se"]))
        assert found[-1] == expected[metrics["epoch"] in (2, 3)]  # the last is a rung, too

    errors = [error for _, error in found]
    assert max(errors[1:]) < 0.75 * errors[0]  # a half of it, but for chance


def test_same_seed_trains_the_same_bits(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    a, b = TrainState(small, SIZE), TrainState(small, SIZE)
    assert train_to_the_end(a, trainset, validation) == train_to_the_end(b, trainset, validation)
    assert equal(a.tensors(), b.tensors())


@pytest.mark.parametrize("steps", range(1, 10))
def test_interrupted_at_any_step_and_resumed_equals_uninterrupted(
    small: Config, trainset: TrajectoryDataset, validation: Validation, steps: int
) -> None:
    whole = TrainState(small, SIZE)
    metrics = train_to_the_end(whole, trainset, validation)

    first = TrainState(small, SIZE)

    with pytest.raises(Halt):
        list(epochs(first, trainset, validation, halt_after(steps)))

    saved, info = copy.deepcopy(first.tensors()), first.info()
    assert info == {"epoch": (steps - 1) // 3, "step": (steps - 1) % 3 + 1}

    second = TrainState(small | {"seed": 0}, SIZE)
    second.load(saved, info)
    assert train_to_the_end(second, trainset, validation) == metrics[info["epoch"] :]
    assert equal(second.tensors(), whole.tensors())


def test_checkpoint_of_another_network_is_refused_untouched(small: Config) -> None:
    state = TrainState(small, SIZE)
    before = copy.deepcopy(state.tensors())

    for other, reason in (
        ({"embedding": 16}, "'score.kernel.embedding.2.weight' is torch.float32 of shape"),
        ({"hidden_blocks": (1, 2)}, "'score.kernel.network.*' is unknown"),
    ):
        with pytest.raises(ValueError, match=reason):
            state.load(TrainState(small | other, SIZE).tensors(), {"epoch": 0, "step": 0})

    tensors = state.tensors()
    tensors.pop("losses")

    with pytest.raises(ValueError, match="'losses' is missing"):
        state.load(tensors, {"epoch": 0, "step": 0})

    assert equal(state.tensors(), before)


# Divergence


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
def test_loss_that_is_not_finite_or_explodes_ends_the_training(
    small: Config, trainset: TrajectoryDataset, validation: Validation, value: float
) -> None:
    state = TrainState(small, SIZE)

    with torch.no_grad():
        for p in state.score.parameters():
            p.fill_(value)

    with pytest.raises(Diverged, match=r"loss_train is \S+ after epoch 1"):
        list(epochs(state, trainset, validation))


def test_learning_rate_that_is_far_too_high_ends_the_training(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    config = small | {"learning_rate": 100.0, "epochs": 50}

    with pytest.raises(Diverged, match=r"loss_\w+ is \S+ after epoch \d+"):
        list(epochs(TrainState(config, SIZE), trainset, validation))


def test_training_is_that_of_the_plain_formulation(
    trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    r"""The losses of 50 steps of the small network, in single precision."""

    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    reference = importlib.import_module("reference")
    config = CONFIG | {"hidden_channels": (16, 32, 64), "hidden_blocks": (1, 1, 1), "window": 3}
    ours, theirs = TrainState(config, SIZE), TrainState(config, SIZE)
    reference.plain_network(theirs)
    plain_step = reference.plain_step(theirs)
    losses, expected = [], []

    for k in range(50):
        x = trainset.windows(torch.arange(4), torch.full((4,), k % trainset.starts))
        loss = ours.sde.loss(x, generator=rng(0, 0, k))
        loss.backward()
        ours.update(n=k + 1)
        losses.append(float(loss.detach()))
        expected.append(plain_step(x, rng(0, 0, k)))

    assert expected[-1] < expected[0]
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
