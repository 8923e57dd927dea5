import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sda_ray.core.config import Config
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.diffusion import VPSDE
from sda_ray.training.loop import TrainState, train_epoch
from sda_ray.training.validation import Validation


@pytest.fixture(scope="module")
def validset(data: Path) -> TrajectoryDataset:
    return TrajectoryDataset(data / "valid.h5", window=3)


@pytest.fixture(scope="module")
def trained(small: Config, data: Path) -> VPSDE:
    r"""A network that is good enough to have its loss at small times."""

    trainset = TrajectoryDataset(data / "train.h5", window=3)
    state = TrainState(small | {"epochs": 40, "learning_rate": 5e-3}, size=16)

    for _ in range(40):
        train_epoch(state, trainset)

    return state.sde


@torch.no_grad()
def plain(sde: VPSDE, validset: TrajectoryDataset, draws: int, items: int = 32) -> Tensor:
    r"""Returns upstream's estimate over and over: means over items at uniform times."""

    generator = torch.Generator().manual_seed(0)
    means = []

    for _ in range(draws):
        indices = torch.arange(items) % len(validset)
        starts = torch.randint(validset.starts, (items,), generator=generator)
        x = validset.windows(indices, starts)
        t = torch.rand(items, generator=generator)
        means.append(sde.errors(x, t, torch.randn(x.shape, generator=generator)).mean())

    return torch.stack(means).double()


@pytest.fixture(scope="module")
def redrawn(trained: VPSDE, validset: TrajectoryDataset) -> tuple[Tensor, Tensor]:
    r"""The losses and standard errors of 100 draws."""

    found = [Validation(validset, draw=draw)(trained) for draw in range(100)]
    losses, errors = torch.tensor(found, dtype=torch.float64).unbind(-1)

    return losses, errors


def test_batch_size_does_not_change_the_loss(small: Config, validset: TrajectoryDataset) -> None:
    losses = {
        Validation(validset)(TrainState(small | {"batch_size": n}, size=16).sde)
        for n in (7, 32, 102)
    }
    assert len(losses) == 1


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_do_not_change_the_loss(
    small: Config, validset: TrajectoryDataset, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sde = TrainState(small, size=16).sde
    expected = Validation(validset)(sde)
    monkeypatch.setattr(Validation, "chunk", chunk)
    assert Validation(validset)(sde) == pytest.approx(expected, rel=1e-6)


def test_every_trajectory_is_used_equally_often(validset: TrajectoryDataset) -> None:
    for least, items in ((1, 4), (32, 32), (33, 36)):
        validation = Validation(validset, least=least)
        assert len(validation.first.x) == len(validation.first.noise) == items


def test_times_are_one_per_part_and_weigh_its_length(validset: TrajectoryDataset) -> None:
    items = Validation(validset).first
    parts = (items.t.sqrt() * 32).floor()
    assert parts.sort().values.tolist() == list(range(32))
    assert items.weights.equal((2 * parts.double() + 1) / 32)
    assert items.weights.mean().item() == 1


def test_a_loss_that_is_the_same_at_all_times_has_no_error(validset: TrajectoryDataset) -> None:
    class Even(VPSDE):
        def errors(self, x: Tensor, t: Tensor, noise: Tensor, c: Tensor | None = None) -> Tensor:
            return torch.full_like(t, 1.25)

    sde = Even(torch.nn.Identity(), validset.shape)
    losses = {Validation(validset, draw=draw)(sde)[0] for draw in range(3)}
    assert losses == {1.25}


def test_mean_of_several_draws_is_that_of_them_alone(
    small: Config, validset: TrajectoryDataset
) -> None:
    sde = TrainState(small, size=16).sde
    alone = [Validation(validset, draw=draw)(sde) for draw in (5, 6, 7)]
    loss, error = Validation(validset, draw=5)(sde, draws=3)
    assert loss == pytest.approx(sum(x for x, _ in alone) / 3, rel=1e-12)
    assert error == pytest.approx(math.sqrt(sum(e * e for _, e in alone)) / 3, rel=1e-12)
    assert Validation(validset, draw=5)(sde, draws=1) == alone[0]


def test_expectation_over_redraws_is_that_of_uniform_times_with_less_variance(
    trained: VPSDE, validset: TrajectoryDataset, redrawn: tuple[Tensor, Tensor]
) -> None:
    uniform, ours = plain(trained, validset, 100), redrawn[0]
    error = math.sqrt((uniform.var() + ours.var()) / 100)
    assert abs(uniform.mean() - ours.mean()) < 4 * error
    assert ours.var() < uniform.var() / 10


def test_standard_error_is_that_of_redraws(redrawn: tuple[Tensor, Tensor]) -> None:
    losses, errors = redrawn
    assert errors.square().mean().sqrt().item() == pytest.approx(losses.std().item(), rel=0.3)
    assert (errors > 0).all()


def test_all_configs_see_the_same_windows_times_and_noise(validset: TrajectoryDataset) -> None:
    a, b = Validation(validset), Validation(validset)
    others = Validation(validset, draw=1), Validation(validset, seed=1)

    for name in ("x", "t", "noise"):
        assert getattr(a.first, name).equal(getattr(b.first, name))
        assert not any(getattr(a.first, name).equal(getattr(x.first, name)) for x in others)
