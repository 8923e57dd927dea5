r"""Tests of the guidance by observations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import GaussianNoise, make_chain
from torch import Tensor, nn

from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.guidance import DPSGaussianScore, GaussianScore, MMPSGaussianScore
from sda_ray.nn.score import load_score

REFERENCE = Path(__file__).parents[1] / "reference"
RUN = REFERENCE / "runs" / "crimson-cloud-4_6k7cjnx7"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(REFERENCE / "golden.npz") as file:
        return {key: torch.as_tensor(x) for key, x in file.items()}


@pytest.fixture(scope="module")
def prior() -> VPSDE:
    return VPSDE(load_score(RUN), shape=())


def observe(x: Tensor) -> Tensor:
    return x[..., ::2, :, ::4, ::4]


def assert_close(x: Tensor, y: Tensor, tolerance: float) -> None:
    assert (x - y).norm() <= tolerance * y.norm()
    assert (x - y).abs().max() <= tolerance * y.abs().max()


def test_gaussian_score_is_that_of_sda(golden: dict[str, Tensor], prior: VPSDE) -> None:
    score = GaussianScore(golden["guide_y"], observe, std=0.1, sde=prior, gamma=1e-2)
    eps = score(golden["chain_x"], golden["guide_t"])

    assert_close(eps[..., ::5, ::5], golden["guide_eps"], 1e-4)


def test_joint_dps_score_is_that_of_sda(golden: dict[str, Tensor], prior: VPSDE) -> None:
    score = DPSGaussianScore(golden["guide_y"], observe, prior, zeta=1.0, joint=True)
    eps = score(golden["chain_x"], golden["guide_t"])

    assert_close(eps[..., ::5, ::5], golden["dps_eps"], 1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "detached", "dps"])
def test_members_are_guided_independently(
    kind: str, golden: dict[str, Tensor], prior: VPSDE
) -> None:
    def score(y: Tensor) -> nn.Module:
        if kind == "dps":
            return DPSGaussianScore(y, observe, prior)
        else:
            return GaussianScore(y, observe, 0.1, prior, detach=kind == "detached")

    x, y, t = golden["chain_x"], golden["guide_y"], torch.tensor([0.2, 0.7])
    both = score(y)(x, t)

    for i in range(2):
        assert_close(score(y[i : i + 1])(x[i : i + 1], t[i]), both[i : i + 1], 1e-5)


def test_joint_and_own_norm_agree_on_a_single_member(
    golden: dict[str, Tensor], prior: VPSDE
) -> None:
    x, y, t = golden["chain_x"][:1], golden["guide_y"][:1], golden["guide_t"]
    own, joint = (DPSGaussianScore(y, observe, prior, joint=j)(x, t) for j in (False, True))

    assert own.equal(joint)


def test_one_number_may_be_observed_of_each_member(
    golden: dict[str, Tensor], prior: VPSDE
) -> None:
    x, t = golden["chain_x"][:2], golden["guide_t"]
    one, row = (
        DPSGaussianScore(torch.ones(2).reshape(shape), A, prior)(x, t)
        for shape, A in (
            ((2,), lambda x: x.flatten(1).mean(1)),
            ((2, 1), lambda x: x.flatten(1).mean(1, keepdim=True)),
        )
    )

    assert_close(one, row, 1e-6)


class Normal(nn.Module):
    r"""Estimates the noise in standard normal data, exactly."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        sde = VPSDE(nn.Identity(), ())
        t = t.reshape(t.shape + (1,) * (x.dim() - t.dim())) if t.dim() else t

        return sde.sigma(t) * x / (sde.mu(t) ** 2 + sde.sigma(t) ** 2)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_gaussian_score_is_exact_for_normal_data(t: float) -> None:
    std, sde, time = 0.5, VPSDE(Normal(), ()), torch.tensor(t).double()
    x, y = torch.randn(2, 8).double(), torch.randn(2, 8).double()
    mu, sigma = sde.mu(time), sde.sigma(time)

    # For such data, the variance of what is not known of x at time t is sigma² / (mu² + sigma²).
    score = GaussianScore(y, lambda x: x, std, sde, gamma=mu**2 / (mu**2 + sigma**2))

    mean, var = y / (1 + std**2), std**2 / (1 + std**2)
    exact = sigma * (x - mu * mean) / (mu**2 * var + sigma**2)

    assert torch.allclose(score(x, time), exact, rtol=1e-4)


def test_gaussian_score_is_the_gradient_of_the_log_likelihood() -> None:
    t, sde = torch.tensor(0.3).double(), VPSDE(Normal(), ())
    x, y = torch.randn(1, 5).double(), torch.randn(1, 3).double()
    mu, sigma = sde.mu(t), sde.sigma(t)

    def log_p(x: Tensor) -> Tensor:
        x = (x - sigma * sde.eps(x, t)) / mu
        return -((y - x[:, :3]) ** 2 / (0.2**2 + 1e-2 * (sigma / mu) ** 2)).sum() / 2

    score = GaussianScore(y, lambda x: x[:, :3], 0.2, sde)(x, t)
    h = 1e-5 * torch.eye(5).double()
    slope = torch.stack([(log_p(x + e) - log_p(x - e)) / 2e-5 for e in h])

    assert torch.allclose(sde.eps(x, t) - sigma * slope, score, atol=1e-7)


@pytest.mark.parametrize("joint", [False, True])
def test_perfect_fit_is_not_guided_and_finite(joint: bool) -> None:
    sde, t, x = VPSDE(Normal(), ()), torch.tensor(0.3), torch.randn(2, 5)
    y = (x - sde.sigma(t) * sde.eps(x, t)) / sde.mu(t)
    eps = DPSGaussianScore(y, lambda x: x, sde, joint=joint)(x, t)

    assert torch.allclose(eps, sde.eps(x, t))


@pytest.mark.parametrize("detach", [False, True])
def test_scores_carry_no_gradient_and_ask_for_none(
    detach: bool, golden: dict[str, Tensor], prior: VPSDE
) -> None:
    x, y, t = golden["chain_x"], golden["guide_y"], golden["guide_t"]

    for score in (
        GaussianScore(y, observe, 0.1, prior, detach=detach),
        DPSGaussianScore(y, observe, prior),
    ):
        assert not score(x, t).requires_grad

    assert not x.requires_grad
    assert all(p.grad is None for p in prior.parameters())


@pytest.mark.parametrize("kind", ["gaussian", "dps", "mmps"])
def test_guided_samples_are_drawn_by_the_same_sampler(
    kind: str, golden: dict[str, Tensor], prior: VPSDE
) -> None:
    y = golden["guide_y"]
    score = {
        "gaussian": GaussianScore(y, observe, 0.1, prior),
        "dps": DPSGaussianScore(y, observe, prior),
        "mmps": MMPSGaussianScore(y, observe, 0.1, prior, iterations=1),
    }[kind]
    sde = VPSDE(score, shape=(5, 2, 64, 64))
    x = sde.sample((2,), steps=2, corrections=1, tau=0.5)

    assert x.shape == (2, 5, 2, 64, 64)
    assert x.isfinite().all() and not x.requires_grad


# Definitions


def jacobian(f: Any, x: Tensor) -> Tensor:
    J = torch.autograd.functional.jacobian(f, x)

    return J.reshape(-1, x.numel()) if isinstance(J, Tensor) else J[0]


@pytest.mark.parametrize("t", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("given", [{"L": 6, "d": 3, "every": 2}, {"L": 9, "every": 4, "std": 1}])
def test_moment_matching_is_exact_for_normal_data(given: dict[str, Any], t: float) -> None:
    chain, time = make_chain(**given), torch.tensor(t).double()
    y = chain.simulate(torch.Generator().manual_seed(1))[1]
    x = torch.randn(4, *chain.shape).double()
    sde = VPSDE(GaussianNoise(*chain.joint()), chain.shape)
    score = MMPSGaussianScore(y, chain.A, chain.std, sde, iterations=30, tolerance=1e-13)
    exact = GaussianNoise(*chain.posterior(y))

    assert torch.allclose(score(x, time), exact(x, time), rtol=1e-7, atol=1e-9)


class Curved(nn.Module):
    r"""A noise estimate whose derivative is not constant; it is symmetric if V is W transposed."""

    W: Tensor
    V: Tensor

    def __init__(self, W: Tensor, V: Tensor, alpha: str = "cos") -> None:
        super().__init__()

        self.register_buffer("W", W)
        self.register_buffer("V", V)
        self.schedule = (VPSDE(nn.Identity(), (), alpha),)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        mu, sigma = self.schedule[0].mu(t), self.schedule[0].sigma(t)

        return sigma * x + 0.3 * mu**2 * torch.tanh(x @ self.W) @ self.V


def saturate(x: Tensor) -> Tensor:
    return x[..., ::2] / (1 + x[..., ::2].abs())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_dps_and_moment_matching_keep_their_definitions(t: float) -> None:
    W, x, y = torch.randn(6, 6).double() / 3, torch.randn(1, 6).double(), torch.rand(3).double()
    sde, time = VPSDE(Curved(W, W.T), (6,)), torch.tensor(t).double()
    mu, sigma = sde.mu(time), sde.sigma(time)

    def denoise(x: Tensor) -> Tensor:
        return (x - sigma * sde.eps(x, time)) / mu

    error, eps = y - saturate(denoise(x)), sde.eps(x, time)
    J = jacobian(lambda x: saturate(denoise(x)), x)
    H = jacobian(saturate, denoise(x))

    dps = DPSGaussianScore(y, saturate, sde, zeta=0.7)
    s = 2 * 0.7 * error @ J / error.norm()
    assert torch.allclose(dps(x, time), eps - sigma * s)

    std = torch.tensor([0.1, 0.2, 0.3]).double()
    mmps = MMPSGaussianScore(y, saturate, std, sde, iterations=9, tolerance=0)
    cov = (std**2).diag() + sigma**2 / mu * J @ H.T
    s = torch.linalg.solve(cov, error.T).T @ J
    assert torch.allclose(mmps(x, time), eps - sigma * s)


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("alpha", ["exp", "cos"])
def test_moment_matching_is_that_of_azula(alpha: str, iterations: int) -> None:
    r"""The numbers are made by `tests/reference/make_mmps.py`, which explains them."""

    with np.load(REFERENCE / "mmps.npz") as file:
        numbers = {key: torch.as_tensor(x) for key, x in file.items()}

    x = numbers["x"]
    sde = VPSDE(Curved(numbers["W"], torch.eye(8).double(), alpha), (8,), alpha)
    score = MMPSGaussianScore(numbers["y"], saturate, 0.2, sde, iterations, tolerance=0)

    for t, mean in zip(numbers["t"], numbers[f"{alpha}_{iterations}"], strict=True):
        eps = (x - sde.mu(t) * mean) / sde.sigma(t)

        assert torch.allclose(score(x, t), eps, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(sde.eps(x, t), eps, rtol=1e-3)


def test_moment_matching_ends_where_the_covariance_is_not_positive() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
            return x * torch.tensor([[2.0], [0.5]])  # V is negative for the first

    sde, t, x = VPSDE(Wrong(), (5,)), torch.tensor(0.7), torch.randn(2, 5)
    eps = MMPSGaussianScore(torch.zeros(5), lambda x: x, 0.1, sde)(x, t)

    assert eps.isfinite().all()
    assert eps[0].equal(sde.eps(x, t)[0]) and not eps[1].equal(sde.eps(x, t)[1])


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["gaussian", "dps", "mmps"])
def test_guidance_in_half_precision_is_that_in_full(
    kind: str, t: float, golden: dict[str, Tensor], prior: VPSDE
) -> None:
    x, y, time = golden["chain_x"][:1], golden["guide_y"][:1], torch.tensor(t)
    half = VPSDE(load_score(RUN).half(), ())
    low, full = (
        {
            "gaussian": lambda: GaussianScore(y, observe, 0.1, sde),  # noqa: B023
            "dps": lambda: DPSGaussianScore(y, observe, sde),  # noqa: B023
            "mmps": lambda: MMPSGaussianScore(y, observe, 0.1, sde, iterations=1),  # noqa: B023
        }[kind]()
        for sde in (half, prior)
    )
    eps = low.half()(x.half(), time.half())

    assert eps.dtype == torch.half and eps.isfinite().all()
    assert_close(eps.float(), full(x, time), 0.1)


@pytest.mark.parametrize("given", [{}, {"alpha": "lin", "eta": 1e-2}])
def test_alpha_that_is_not_of_the_prior_is_refused(given: dict[str, Any]) -> None:
    prior = VPSDE(nn.Identity(), (), alpha="lin")

    for guided in (
        GaussianScore(torch.zeros(2), lambda x: x, 0.1, prior),
        DPSGaussianScore(torch.zeros(2), lambda x: x, prior),
    ):
        with pytest.raises(ValueError, match=r"guides a prior of alpha='lin' and eta=0\.001, but"):
            VPSDE(guided, (), **given)

        assert VPSDE(guided, (), alpha="lin").curve == "lin"
