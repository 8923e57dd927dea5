r"""Tests of the denoising error: one number for runs of any window, alpha and kind."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sda_ray.core.config import ALPHAS, Config
from sda_ray.core.errors import UserError
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.score import MCScoreNet
from sda_ray.training import validation
from sda_ray.training.loop import TrainState, train_epoch
from sda_ray.training.validation import HIGHEST, LOWEST, Denoising

ROUNDING = 2e-4  # of single precision, relative to errors of a hundredth of the noise


@pytest.fixture(scope="module")
def validset(data: Path) -> TrajectoryDataset:
    return TrajectoryDataset(data / "valid.h5", window=3)


@pytest.fixture(scope="module")
def measure(validset: TrajectoryDataset) -> Denoising:
    return Denoising(validset, states=9)


@pytest.fixture(scope="module")
def states(small: Config, data: Path) -> list[TrainState]:
    r"""Networks after no, 5 and 20 epochs."""

    trainset = TrajectoryDataset(data / "train.h5", window=3)
    found = []

    for epochs in (0, 5, 20):
        config = small | {"epochs": 20, "learning_rate": 5e-3, "parametrization": "v"}
        state = TrainState(config, size=16)

        for _ in range(epochs):
            train_epoch(state, trainset)

        found.append(state)

    return found


class WithAlpha(nn.Module):
    r"""The same function of the data, for a network of another schedule."""

    def __init__(self, kernel: nn.Module, alpha: str, other: str) -> None:
        super().__init__()

        self.kernel = kernel
        self.own, self.given = (VPSDE(nn.Identity(), (1, 1, 1), a) for a in (alpha, other))

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        t = t.double()
        s = self.own.time(self.given.sigma(t) / self.given.mu(t))
        scale = (self.own.mu(s) / self.given.mu(t)).reshape(*t.shape, 1, 1, 1)

        return self.kernel((scale * x).float(), s.float())


class Estimating(nn.Module):
    r"""The same function, by a network that estimates v."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()

        self.kernel = kernel
        self.sde = VPSDE(nn.Identity(), (1, 1, 1))

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        mu, sigma = (f(t).reshape(*t.shape, 1, 1, 1) for f in (self.sde.mu, self.sde.sigma))
        v = (self.kernel(x, t) - sigma * x) / mu

        return sigma * x + mu * v


class Wider(nn.Module):
    r"""The same function, by a network of a larger window."""

    def __init__(self, score: MCScoreNet) -> None:
        super().__init__()

        self.score = score

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        y = x.reshape(-1, *x.shape[-3:]).unflatten(1, (-1, 2))

        return self.score(y, t.reshape(-1)).reshape(x.shape)


class Shrinking(nn.Module):
    r"""Takes the best multiple of x(t) for the data."""

    def __init__(self, size: float) -> None:
        super().__init__()

        self.size = size
        self.sde = VPSDE(nn.Identity(), (1, 1, 1))

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        mu, sigma = (f(t).reshape(*t.shape, 1, 1, 1) for f in (self.sde.mu, self.sde.sigma))

        return sigma * x / (mu**2 * self.size + sigma**2)


def test_number_is_that_of_the_function_whatever_computes_it(
    measure: Denoising, states: list[TrainState]
) -> None:
    score = states[-1].score
    value, error = measure(score, "cos")

    for other in ("lin", "exp"):
        converted = MCScoreNet(WithAlpha(score.kernel, "cos", other), 1)
        assert measure(converted, other) == pytest.approx((value, error), rel=ROUNDING)

    assert measure(MCScoreNet(Estimating(score.kernel), 1), "cos") == pytest.approx(
        (value, error), rel=ROUNDING
    )
    assert measure(MCScoreNet(Wider(score), 2), "cos") == pytest.approx(
        (value, error), rel=ROUNDING
    )
    assert abs(measure(score, "lin")[0] - value) > 5 * error  # another function


@pytest.mark.parametrize("alpha", ALPHAS)
def test_levels_are_fixed_and_stratified(
    measure: Denoising, validset: TrajectoryDataset, alpha: str
) -> None:
    items = len(measure.x)
    logs = measure.ratios[measure.levels.argsort()].log()
    step = (torch.tensor(HIGHEST).double().log() - torch.tensor(LOWEST).double().log()) / items
    t = VPSDE(nn.Identity(), (), alpha).time(measure.ratios)

    assert items == 32 and items % len(validset) == 0
    assert torch.allclose(logs.diff(), step)
    assert ((t > 0) & (t < 1)).all()


def test_another_seed_takes_other_segments_levels_and_noise(
    validset: TrajectoryDataset, measure: Denoising
) -> None:
    same, other = (Denoising(validset, 9, seed=seed) for seed in (0, 1))

    for name in ("x", "levels", "noise"):
        assert getattr(measure, name).equal(getattr(same, name))
        assert not getattr(measure, name).equal(getattr(other, name))


def test_it_is_deterministic_and_leaves_the_global_generator_alone(
    validset: TrajectoryDataset, states: list[TrainState]
) -> None:
    before = torch.get_rng_state()
    found = {Denoising(validset, 9)(states[0].score, "cos") for _ in range(2)}

    assert len(found) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_training_lowers_it(measure: Denoising, states: list[TrainState]) -> None:
    untrained, begun, trained = (measure(state.score, "cos")[0] for state in states)

    assert untrained > begun > trained


def test_shrinking_alone_has_one(measure: Denoising) -> None:
    size = float(measure.x.square().mean())
    value, error = measure(MCScoreNet(Shrinking(size), 1), "cos")

    assert abs(value - 1) < 4 * error + 0.01


def test_standard_error_is_that_of_other_draws(
    validset: TrajectoryDataset, states: list[TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    for stream in range(100, 140):
        monkeypatch.setattr(validation, "DENOISING", stream)
        found.append(Denoising(validset, 5)(states[1].score, "cos"))

    values, errors = torch.tensor(found, dtype=torch.float64).unbind(-1)
    assert 0.6 < errors.square().mean().sqrt() / values.std() < 1.6


def test_segments_longer_than_trajectories_are_refused(validset: TrajectoryDataset) -> None:
    with pytest.raises(UserError, match="12 snapshots"):
        Denoising(validset, states=13)
