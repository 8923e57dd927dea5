r"""Tests of the skill in brief: a cheap number for skill, which calls bad networks bad."""

import math
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch
from chains import GaussianNoise
from networks import small as make_small
from torch import Tensor, nn

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.score import MCScoreNet
from sda_ray.training import validation
from sda_ray.training.loop import TrainState, train_epoch
from sda_ray.training.validation import Ensembles

STATES = 5


class Kernel(nn.Module):
    r"""A network of windows that is a function."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], network: nn.Module) -> None:
        super().__init__()

        self.f = f
        self.network = network

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return self.f(x, t)


@pytest.fixture(scope="module")
def measure(data: Path) -> Ensembles:
    return Ensembles(TrajectoryDataset(data / "valid.h5", window=3), STATES)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    r"""Normal trajectories, smooth in space and time, of a known covariance."""

    place, time = torch.arange(8.0).double(), torch.arange(STATES).double()
    side = torch.exp(-2 * torch.sin(torch.pi / 8 * (place[:, None] - place)) ** 2)
    steps = 0.9 ** (time[:, None] - time).abs()
    cov = torch.kron(torch.kron(steps, torch.eye(2).double()), torch.kron(side, side))
    cov = cov + 1e-3 * torch.eye(len(cov)).double()
    z = torch.randn(8, len(cov), generator=torch.Generator().manual_seed(0), dtype=cov.dtype)
    file = tmp_path_factory.mktemp("gaussian") / "valid.h5"

    with h5py.File(file, "w") as f:
        x = z @ torch.linalg.cholesky(cov).T
        f.create_dataset("x", data=x.view(8, STATES, 2, 8, 8).float().numpy())

    return file, cov


def exact(cov: Tensor, mean: float = 0.0, alpha: str = "cos") -> MCScoreNet:
    kernel = GaussianNoise(cov.new_full((len(cov),), mean), cov, alpha)

    return MCScoreNet(kernel, order=STATES // 2)


def test_the_true_network_is_the_best(gaussian: tuple[Path, Tensor]) -> None:
    file, cov = gaussian
    measure = Ensembles(TrajectoryDataset(file, window=3), STATES)
    best, error = measure(exact(cov), "cos")
    values, vectors = torch.linalg.eigh(cov)
    long_waves = (vectors * values.where(values > 1, 1e-3)) @ vectors.T
    blocks = torch.block_diag(
        *cov.reshape(STATES, 128, STATES, 128).diagonal(0, 0, 2).movedim(-1, 0)
    )

    for wrong in (
        exact(cov / 4),  # too narrow
        exact(4 * cov),  # too wide
        exact(cov, mean=4.0),  # biased, which observations mend in part
        exact(long_waves),  # blurred
        exact(blocks),  # blind to time
    ):
        assert measure(wrong, "cos")[0] > 1.02 * best

    assert 0 < error < best


@pytest.mark.parametrize("alpha", ["lin", "exp"])
def test_alpha_is_of_no_account(gaussian: tuple[Path, Tensor], alpha: str) -> None:
    file, cov = gaussian
    measure = Ensembles(TrajectoryDataset(file, window=3), STATES)
    expected = measure(exact(cov), "cos")

    assert measure(exact(cov, alpha=alpha), alpha) == pytest.approx(expected, rel=1e-5)
    assert measure(exact(cov, alpha=alpha), "cos") != pytest.approx(expected, rel=1e-2)


def test_a_function_has_one_skill_in_all_parametrizations(measure: Ensembles) -> None:
    score = make_small(parametrization="v")
    bare = make_small()  # of the same weights, without the parametrization
    bare.load_state_dict(score.state_dict(), strict=False)
    sde = VPSDE(nn.Identity(), (6, 16, 16))

    def converted(x: Tensor, t: Tensor) -> Tensor:
        t, y = t[..., None, None, None], bare.kernel(x, t)

        return sde.sigma(t) * x + sde.mu(t) * y

    network = MCScoreNet(Kernel(converted, bare.kernel), order=1)

    assert measure(network, "cos") == pytest.approx(measure(score, "cos"), rel=1e-5)
    assert measure(bare, "cos") != pytest.approx(measure(score, "cos"), rel=1e-2)


def test_training_makes_it_smaller(small: Config, data: Path, measure: Ensembles) -> None:
    trainset = TrajectoryDataset(data / "train.h5", window=3)
    config = small | {"epochs": 40, "learning_rate": 5e-3, "parametrization": "v"}
    state, skills = TrainState(config, size=16), []

    for _ in range(40):
        if state.epoch in (0, 10):
            skills.append(measure(state.result, "cos")[0])

        train_epoch(state, trainset)

    skills.append(measure(state.result, "cos")[0])
    assert skills == sorted(skills, reverse=True) and skills[2] < 0.95 * skills[0]


def test_it_is_the_same_each_time_and_draws_from_no_other_generator(
    measure: Ensembles, data: Path
) -> None:
    score, before = make_small(parametrization="v"), torch.get_rng_state()
    found = measure(score, "cos")
    again = Ensembles(TrajectoryDataset(data / "valid.h5", window=5), STATES)

    assert again(score, "cos") == measure(score, "cos") == found
    assert torch.get_rng_state().equal(before)
    assert all(p.grad is None for p in score.parameters())


def test_chunks_and_windows_do_not_change_what_is_drawn(
    measure: Ensembles, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = make_small(parametrization="v")
    expected = measure(score, "cos")
    monkeypatch.setattr(validation.Validation, "chunk", 1)

    assert measure(score, "cos") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [math.nan, 1e30])
def test_members_that_diverge_have_no_skill(measure: Ensembles, size: float) -> None:
    kernel = Kernel(lambda x, t: size * x, nn.Identity())
    assert measure(MCScoreNet(kernel, order=1), "cos") == (math.inf, math.inf)


def test_it_takes_as_many_evaluations_as_it_says(measure: Ensembles) -> None:
    evaluations = 0

    def count(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += x.shape[:2].numel()
        return x

    measure(MCScoreNet(Kernel(count, nn.Identity()), order=1), "cos")
    assert evaluations == validation.ITEMS * validation.MEMBERS * validation.STEPS * (STATES - 2)


def test_trajectories_must_be_long_enough(data: Path) -> None:
    with pytest.raises(UserError, match="trajectories of 12 snapshots"):
        Ensembles(TrajectoryDataset(data / "valid.h5", window=3), 13)


def test_another_seed_takes_other_segments_observations_and_noise(
    data: Path, measure: Ensembles
) -> None:
    validset = TrajectoryDataset(data / "valid.h5", window=3)
    same, other = (Ensembles(validset, STATES, seed=seed) for seed in (0, 1))

    assert measure.x.equal(same.x) and not measure.x.equal(other.x)
    assert measure.y.equal(same.y) and not (measure.y - measure.A(measure.x)).equal(
        other.y - other.A(other.x)
    )
