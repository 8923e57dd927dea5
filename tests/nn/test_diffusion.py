r"""Tests of the diffusion: schedules, losses, samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.score import load_score

REFERENCE = Path(__file__).parents[1] / "reference"
RUN = REFERENCE / "runs" / "crimson-cloud-4_6k7cjnx7"


class Gaussian(nn.Module):
    r"""Estimates the noise exactly, if data are normal with a given mean and deviation."""

    def __init__(self, mean: float, std: float, sde: VPSDE | None = None) -> None:
        super().__init__()

        self.mean, self.std = mean, std
        self.sde = sde or VPSDE(nn.Identity(), ())
        self.calls: list[float] = []

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        self.calls.append(t.mean().item())
        t = t.reshape(t.shape + (1,) * (x.dim() - t.dim())) if t.dim() else t
        mu, sigma = self.sde.mu(t), self.sde.sigma(t)

        return sigma * (x - mu * self.mean) / (mu**2 * self.std**2 + sigma**2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(REFERENCE / "golden.npz") as file:
        return {key: torch.as_tensor(x) for key, x in file.items()}


# Schedules


@pytest.mark.parametrize("alpha", ["cos", "lin", "exp"])
def test_time_is_solved_for_exactly(alpha: str) -> None:
    sde = VPSDE(nn.Identity(), (), alpha)
    t = torch.linspace(0.01, 1, 200, dtype=torch.float64)
    ratio = sde.sigma(t) / sde.mu(t)
    assert torch.allclose(sde.time(ratio), t, rtol=1e-9, atol=1e-10)

    ratio = torch.logspace(-2, 2, 100, dtype=torch.float64)
    t = sde.time(ratio)
    assert torch.allclose(sde.sigma(t) / sde.mu(t), ratio, rtol=1e-9)


@pytest.mark.parametrize("alpha", ["lin", "cos", "exp"])
def test_schedules_are_those_of_sda(alpha: str, golden: dict[str, Tensor]) -> None:
    sde = VPSDE(nn.Identity(), (), alpha=alpha)
    t = golden["schedule_t"]

    assert torch.allclose(sde.mu(t), golden[f"mu_vp_{alpha}"], rtol=0, atol=1e-6)
    assert torch.allclose(sde.sigma(t), golden[f"sigma_vp_{alpha}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [1e-3, 1e-2])
@pytest.mark.parametrize("alpha", ["lin", "cos", "exp"])
def test_schedules_keep_their_definitions(alpha: str, eta: float) -> None:
    t = torch.linspace(0, 1, 65, dtype=torch.double)
    sde = VPSDE(nn.Identity(), (), alpha, eta)
    mu = sde.mu(t)

    assert torch.allclose(mu[[0, -1]], torch.tensor([1, eta]).double())
    assert (mu.diff() < 0).all()
    assert torch.allclose(mu**2 + sde.sigma(t) ** 2, torch.tensor(1 + eta**2).double())


@pytest.mark.parametrize("alpha", ["lin", "cos", "exp"])
def test_perturbed_data_have_mean_mu_and_deviation_sigma(alpha: str) -> None:
    sde = VPSDE(nn.Identity(), (256, 256), alpha=alpha)
    x, t = torch.full((4, 256, 256), 3.0), torch.rand(4)
    y = sde(x, t)

    assert y.shape == x.shape
    assert torch.allclose(y.mean((1, 2)), 3 * sde.mu(t), atol=0.05)
    assert torch.allclose(y.std((1, 2)), sde.sigma(t), atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": "tan"}, "alpha is 'tan', but must be one of cos"), ({"eta": 0.0}, "eta is 0")],
)
def test_wrong_schedule_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPSDE(nn.Identity(), (), **arguments)


def test_state_dict_is_that_of_the_network() -> None:
    assert list(VPSDE(nn.Linear(2, 2), (2,)).state_dict()) == ["eps.weight", "eps.bias"]


def test_device_is_that_of_the_network() -> None:
    assert VPSDE(nn.Linear(2, 2, device="meta"), (2,)).device == torch.device("meta")
    assert VPSDE(nn.Identity(), (2,)).device == torch.device("cpu")


# Losses


@torch.no_grad()
def test_loss_is_that_of_sda(golden: dict[str, Tensor]) -> None:
    sde = VPSDE(load_score(RUN).kernel, (6, 64, 64))
    loss = sde.loss(golden["kernel_x"], golden["kernel_t"], golden["loss_noise"])

    assert torch.allclose(loss, golden["loss_value"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_loss_is_the_mean_of_the_errors_of_items(golden: dict[str, Tensor]) -> None:
    sde = VPSDE(load_score(RUN).kernel, (6, 64, 64))
    x, t, noise = golden["kernel_x"], golden["kernel_t"], golden["loss_noise"]
    errors = sde.errors(x, t, noise)

    assert errors.shape == (3,)
    assert torch.allclose(errors.mean(), sde.loss(x, t, noise))

    for i in range(3):
        assert torch.allclose(sde.errors(x[i:][:1], t[i:][:1], noise[i:][:1])[0], errors[i])


def test_loss_of_the_true_noise_is_zero_and_of_none_is_one() -> None:
    x, t, noise = torch.zeros(8, 4, 64, 64), torch.rand(8), torch.randn(8, 4, 64, 64)

    exact = VPSDE(Gaussian(0.0, 0.0), (4, 64, 64))
    assert exact.loss(x, t, noise) < 1e-8

    class Zero(nn.Module):
        def forward(self, x: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
            return torch.zeros_like(x)

    assert abs(VPSDE(Zero(), (4, 64, 64)).loss(x) - 1) < 0.05


def test_loss_draws_times_then_noise_from_its_generator() -> None:
    sde = VPSDE(Gaussian(0.5, 1.0), (3, 8))
    x = torch.randn(16, 3, 8)
    state = torch.get_rng_state()
    loss = sde.loss(x, generator=torch.Generator().manual_seed(1))

    assert torch.get_rng_state().equal(state)
    assert loss == sde.loss(x, generator=torch.Generator().manual_seed(1))
    assert loss != sde.loss(x, generator=torch.Generator().manual_seed(2))

    rng = torch.Generator().manual_seed(1)
    t, noise = torch.rand(16, generator=rng), torch.randn(16, 3, 8, generator=rng)

    assert loss == sde.loss(x, t, noise)

    torch.manual_seed(1)

    assert loss == sde.loss(x)


def test_weights_of_the_loss_are_normalized() -> None:
    sde = VPSDE(Gaussian(0.5, 1.0), (3, 8))
    x, t, noise = torch.randn(16, 3, 8), torch.rand(16), torch.randn(16, 3, 8)
    w = torch.zeros(16, 1, 1)
    w[3] = 7.0

    assert torch.allclose(
        sde.loss(x, t, noise, w=torch.full((16, 1, 1), 5.0)), sde.loss(x, t, noise)
    )
    assert torch.allclose(sde.loss(x, t, noise, w=w), sde.errors(x, t, noise)[3])


def test_gradients_of_the_loss_reach_every_parameter() -> None:
    score = load_score(RUN)
    VPSDE(score.kernel, (6, 64, 64)).loss(torch.randn(2, 6, 64, 64)).backward()

    for name, p in score.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# Samples


def test_samples_are_those_of_sda(golden: dict[str, Tensor]) -> None:
    sde = VPSDE(load_score(RUN).kernel, (6, 64, 64))
    x = sde.sample((1,), steps=8, start=golden["sample_start"])
    end = golden["sample_end_8_steps"]

    assert (x[..., ::5, ::5] - end).norm() / end.norm() < 1e-5
    assert torch.allclose(x[..., ::5, ::5], end, rtol=1e-4, atol=1e-4 * end.abs().max().item())


@pytest.mark.parametrize("corrections", [0, 2])
def test_samples_follow_the_data(corrections: int) -> None:
    sde = VPSDE(Gaussian(2.0, 0.5), (64,))
    x = sde.sample((256,), steps=64, corrections=corrections, tau=0.1)

    assert abs(x.mean() - 2.0) < 0.05
    assert abs(x.std() - 0.5) < 0.05


def test_samples_have_batch_and_event_shape() -> None:
    sde = VPSDE(Gaussian(0.0, 1.0), (3, 8))

    assert sde.sample(steps=2).shape == (3, 8)
    assert sde.sample((4, 5), steps=2).shape == (4, 5, 3, 8)
    assert sde.sample(torch.Size([2]), steps=2, corrections=1).shape == (2, 3, 8)


def test_samples_are_a_function_of_their_generator() -> None:
    sde = VPSDE(Gaussian(0.0, 1.0), (3, 8))
    state = torch.get_rng_state()
    x, y, z = (
        sde.sample((2,), steps=4, corrections=1, generator=torch.Generator().manual_seed(i))
        for i in (0, 0, 1)
    )

    assert torch.get_rng_state().equal(state)
    assert x.equal(y) and not x.equal(z)


def test_each_sample_is_a_function_of_its_own_generator() -> None:
    sde = VPSDE(Gaussian(0.0, 1.0), (3, 8))

    def sample(*seeds: int, shape: tuple[int, ...]) -> Tensor:
        rngs = [torch.Generator().manual_seed(i) for i in seeds]
        return sde.sample(shape, steps=4, corrections=1, generator=rngs)

    x = sample(0, 1, 2, 3, shape=(2, 2))

    assert sample(2, 0, shape=(2,)).equal(x.flatten(0, 1)[[2, 0]])

    with pytest.raises(ValueError, match="There are 2 generators for 3 samples"):
        sample(0, 1, shape=(3,))


def test_reverse_process_yields_every_step_to_the_samples() -> None:
    sde, start = VPSDE(Gaussian(0.0, 1.0), (3, 8)), torch.randn(2, 3, 8)
    steps = list(sde.reverse(start, steps=4))

    assert len(steps) == 4
    assert steps[-1].equal(sde.sample((2,), steps=4, start=start))
    assert not any(x.requires_grad for x in steps) and torch.is_grad_enabled()


def test_corrections_are_scaled_sample_by_sample() -> None:
    sde = VPSDE(Gaussian(0.0, 1.0), (3, 8))
    start = torch.randn(2, 3, 8)
    x = sde.sample(
        (2,), steps=4, corrections=1, start=start, generator=torch.Generator().manual_seed(0)
    )
    start[1] *= 100
    y = sde.sample(
        (2,), steps=4, corrections=1, start=start, generator=torch.Generator().manual_seed(0)
    )

    assert torch.allclose(x[0], y[0], atol=1e-6)


def test_times_fall_from_one() -> None:
    eps = Gaussian(0.0, 1.0)
    VPSDE(eps, (4,)).sample((2,), steps=4)

    assert eps.calls == [1.0, 0.75, 0.5, 0.25]


def test_samples_carry_no_gradient_and_leave_the_network_as_it_was() -> None:
    score = load_score(RUN).eval()
    x = VPSDE(score.kernel, (6, 64, 64)).sample((1,), steps=1)

    assert not x.requires_grad and not score.training
    assert all(p.grad is None and p.requires_grad for p in score.parameters())


def test_sampling_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps is 0, but must be at least 1"):
        VPSDE(Gaussian(0.0, 1.0), (4,)).sample(steps=0)
