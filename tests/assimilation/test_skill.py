r"""Tests for sda_ray.assimilation.skill: closed forms, and ensembles that are wrong on purpose."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from sda_ray.assimilation import (
    bootstrap,
    chi_square,
    cross_spectral_error,
    crps,
    divergence_ratio,
    earth_movers_distance,
    energy,
    enstrophy,
    log_likelihood,
    rank_histogram,
    rmse,
    spectral_error,
    spread,
    spread_skill,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "crps.json"

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    GENERATOR.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def ensemble(
    members: int, count: int, width: float = 1.0, bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Draws truths about a mean that varies, and members about the same mean."""

    mean = 3 * normal(count)

    return mean + bias + width * normal(members, count), mean + normal(count)


def posterior(width: float = 1.0, bias: float = 0.0, count: int = 20_000) -> tuple[Tensor, ...]:
    r"""Draws from the posterior of a standard normal that is observed with a std of 0.5.

    Returns the members, the truth, the observation and the standard deviation of its noise.
    """

    std = 0.5
    truth = normal(count)
    y = truth + std * normal(count)
    variance = std**2 / (1 + std**2)
    x = y / (1 + std**2) + bias + width * math.sqrt(variance) * normal(8, count)

    return x, truth, y, torch.tensor(std)


def shares(x: Tensor, truth: Tensor) -> Tensor:
    counts = rank_histogram(x, truth)
    assert counts.shape == (len(x) + 1,) and counts.sum() == truth.numel()

    return counts / counts.sum()


# CRPS


@pytest.mark.parametrize("members", [2, 3, 8, 17])
def test_crps_is_the_double_sum_over_pairs(members: int) -> None:
    x, truth = normal(members, 4, 5), normal(4, 5)
    x[1] = x[0]

    pairs = (x[:, None] - x[None, :]).abs().sum((0, 1)) / (2 * members * (members - 1))
    assert torch.allclose(crps(x, truth), (x - truth).abs().mean(0) - pairs, rtol=1e-12)


def test_crps_is_that_of_scoringrules() -> None:
    for case in json.loads(REFERENCE.read_text()):
        expected = torch.tensor(case["crps"], dtype=torch.float64)
        x, truth = (torch.tensor(case[k], dtype=torch.float64) for k in ("x", "truth"))
        assert torch.allclose(crps(x, truth), expected, rtol=1e-12)


@pytest.mark.parametrize("members", [2, 8, 64])
def test_expectation_of_the_crps_does_not_depend_on_the_members(members: int) -> None:
    x, truth = ensemble(members, 100_000)

    assert crps(x, truth).mean().item() == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)


@given(
    st.integers(2, 9),
    st.floats(0.01, 100),
    st.floats(-1e6, 1e6),
    st.integers(0, 2**32 - 1),
)
def test_crps_moves_and_scales_with_the_data(
    members: int, scale: float, offset: float, seed: int
) -> None:
    GENERATOR.manual_seed(seed)
    x, truth = normal(members, 3), normal(3)
    expected = scale * crps(x, truth)

    assert torch.allclose(crps(offset + scale * x, offset + scale * truth), expected, atol=1e-8)
    assert torch.allclose(crps(-scale * x.flip(0), -scale * truth), expected, atol=1e-12)


# Spread and skill


def test_spread_and_rmse_are_those_of_gaussians() -> None:
    x, truth = ensemble(4, 100_000, width=2.0, bias=1.0)

    assert spread(x).item() == pytest.approx(2, abs=0.02)
    assert rmse(x, truth).item() == pytest.approx(math.sqrt(1 + 1 + 4 / 4), abs=0.02)
    assert rmse(truth[None], truth) == 0


@pytest.mark.parametrize("members", [2, 8])
@pytest.mark.parametrize("width", [0.8, 1.0, 1.25])
def test_spread_skill_is_the_width_whatever_the_number_of_members(
    members: int, width: float
) -> None:
    x, truth = ensemble(members, 200_000, width)

    assert spread_skill(x, truth).item() == pytest.approx(width, abs=0.01)

    uncorrected = spread(x) / rmse(x, truth)
    assert uncorrected.item() == pytest.approx(
        width / math.sqrt(1 + width**2 / members), abs=0.01
    )  # 0.77 for 0.8 and 8 members


def test_spread_skill_is_infinite_if_the_mean_is_the_truth() -> None:
    assert spread_skill(torch.tensor([[-1.0], [1.0]]), torch.zeros(1)) == torch.inf


# Ranks


def test_ranks_of_a_calibrated_ensemble_are_uniform() -> None:
    assert torch.allclose(shares(*ensemble(4, 100_000)), torch.tensor(0.2), atol=0.005)


def test_ties_take_a_rank_at_random() -> None:
    x, truth = torch.zeros(3, 40_000), torch.zeros(40_000)
    assert torch.allclose(shares(x, truth), torch.tensor(0.25), atol=0.01)

    x[0], x[2] = -1, 1
    assert torch.allclose(shares(x, truth), torch.tensor([0, 0.5, 0.5, 0]), atol=0.01)

    assert torch.equal(rank_histogram(x, truth, seed=1), rank_histogram(x, truth, seed=1))
    assert not torch.equal(rank_histogram(x, truth, seed=1), rank_histogram(x, truth, seed=2))


# Observations


def test_chi_square_is_1_for_the_posterior_and_the_truth() -> None:
    x, truth, y, std = posterior()

    assert chi_square(x, y, std).item() == pytest.approx(1, abs=0.02)
    assert chi_square(truth[None], y, 0.5).item() == pytest.approx(1, abs=0.03)
    assert chi_square(y[None] + 0.5, y, 0.5) == 1
    assert chi_square(y[None] + 0.5, y, torch.full_like(y, 0.25)) == 4


def test_log_likelihood_is_that_of_a_normal_distribution() -> None:
    x, y, std = normal(8, 3, 4), normal(3, 4), normal(4).exp()

    expected = Normal(x, std).log_prob(y).sum((1, 2))
    assert torch.allclose(log_likelihood(x, y, std), expected)
    assert torch.allclose(
        log_likelihood(x[:, 0, 0], y[0, 0], 2), Normal(x, 2).log_prob(y)[:, 0, 0]
    )


# What is wrong on purpose is called so


@pytest.mark.parametrize("width, bias", [(0.5, 0.0), (2.0, 0.0), (1.0, 1.0)])
def test_wrong_posteriors_are_called_so(width: float, bias: float) -> None:
    right, truth, _, _ = posterior()
    score = crps(right, truth).mean()

    x, truth, y, std = posterior(width, bias)
    assert crps(x, truth).mean() > 1.05 * score

    ratio, ranks, chi2 = spread_skill(x, truth), shares(x, truth), chi_square(x, y, std)
    ends, middle = (ranks[0] + ranks[-1]) / 2, ranks[4]

    if bias:
        assert ratio < 0.5 and chi2 > 3
        assert ranks[0] > 0.5 and ranks[0] > 5 * ranks[-1]
    elif width < 1:
        assert abs(ratio - width) < 0.02 and chi2 < 0.9
        assert ends > 1.8 * middle and abs(ranks[0] - ranks[-1]) < 0.02
    else:
        assert abs(ratio - width) < 0.05 and chi2 > 1.5
        assert ends < 0.6 * middle


# Spectra


def test_spectral_error_is_that_of_the_power() -> None:
    truth = normal(3, 32, 32)

    assert (spectral_error(truth, truth) == 0).all()
    assert torch.allclose(spectral_error(-0.5 * truth, truth), torch.tensor(0.75).double())
    assert torch.allclose(spectral_error(2 * truth[None], truth), torch.tensor(3.0).double())


def test_spectral_error_names_the_band() -> None:
    i = torch.arange(64).double() * 2 * torch.pi / 64
    truth = normal(64, 64)

    for band, k in enumerate([1, 4, 10, 20]):
        errors = spectral_error(truth + (k * i).cos(), truth)
        assert errors[band] > 0.1 and (errors[:band] < 1e-9).all()
        assert (errors[band + 1 :] < 1e-9).all()
        assert spectral_error(truth.roll(5, -1) + 0 * i, truth).max() < 1e-9


@pytest.mark.parametrize("share, expected", [(1, 0), (0, 1), (math.sqrt(0.5), 1 - math.sqrt(0.5))])
def test_cross_spectral_error_is_what_members_do_not_know(share: float, expected: float) -> None:
    truth = normal(500, 32, 32)
    x = share * truth + math.sqrt(1 - share**2) * normal(4, 500, 32, 32)

    assert torch.allclose(
        cross_spectral_error(x, truth), torch.tensor(expected).double(), atol=0.05
    )
    assert torch.allclose(cross_spectral_error(7 * x, truth), cross_spectral_error(x, truth))


# Flow


def wave(n: int = 32) -> Tensor:
    i, j = torch.meshgrid(*2 * [2 * torch.pi * torch.arange(n).double() / n], indexing="ij")

    return torch.stack([i.sin() * j.cos(), -i.cos() * j.sin()])


def test_energy_and_enstrophy_are_those_of_a_wave() -> None:
    x, slope = wave(), math.sin(2 * math.pi / 32)

    assert energy(x).item() == pytest.approx(0.25)
    assert enstrophy(x).item() == pytest.approx(slope**2 / 2)
    assert energy(torch.stack([x, 3 * x])[:, None]).flatten().tolist() == pytest.approx(
        [0.25, 2.25]
    )
    assert enstrophy(torch.zeros(4, 3, 2, 8, 8)).shape == (4, 3)


def test_divergence_is_relative_to_that_of_the_data() -> None:
    data, noise = wave(), normal(2, 32, 32)

    assert divergence_ratio(noise, noise[None]) == 1
    assert divergence_ratio(3 * noise, noise).item() == pytest.approx(3)
    assert divergence_ratio(noise, data) > 1e6


# Sets


def test_earth_movers_distance_is_that_of_the_best_assignment() -> None:
    x = normal(50, 3, 4)
    shift = normal(3, 4)

    assert earth_movers_distance(x, x[torch.randperm(50)]) == 0
    assert torch.allclose(earth_movers_distance(x, x.flip(0) + shift), shift.norm())

    x, y = normal(2, 50)
    assert torch.allclose(
        earth_movers_distance(x, y), (x.sort().values - y.sort().values).abs().mean()
    )


# Intervals


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = normal(400, 2)
    low, high = bootstrap(values)

    half = 1.96 * values.std(0) / 20
    assert torch.allclose(low, values.mean(0) - half, atol=0.02)
    assert torch.allclose(high, values.mean(0) + half, atol=0.02)

    assert torch.equal(low, bootstrap(values)[0])
    assert not torch.equal(low, bootstrap(values, seed=1)[0])

    narrow = bootstrap(values, level=0.5)
    assert (low < narrow[0]).all() and (narrow[1] < high).all()


def test_interval_is_of_any_statistic_of_trajectories() -> None:
    x, truth = ensemble(4, 50 * 64)
    x, truth = x.unflatten(1, (50, 64)), truth.unflatten(0, (50, 64))
    low, high = bootstrap(torch.arange(50), lambda i: spread_skill(x[:, i], truth[i]), draws=200)

    assert low < spread_skill(x, truth) < high
    assert high - low < 0.2


# What no metric can be computed of


@pytest.mark.parametrize("metric", [crps, spread_skill, lambda x, _: spread(x)])
def test_one_member_has_no_spread(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    message = "x has shape (1, 3), but must have (M, *) with M >= 2 members."

    with pytest.raises(ValueError, match=re.escape(message)):
        metric(torch.zeros(1, 3), torch.zeros(3))


METRICS: list[Callable[[Tensor, Tensor], Tensor]] = [
    crps,
    rmse,
    spread_skill,
    rank_histogram,
    lambda x, y: chi_square(x, y, 1.0),
    lambda x, y: log_likelihood(x, y, 1.0),
    cross_spectral_error,
]


@pytest.mark.parametrize("metric", METRICS)
def test_shapes_that_do_not_match_are_refused(
    metric: Callable[[Tensor, Tensor], Tensor],
) -> None:
    x, truth = torch.zeros(4, 3, 16, 16), torch.zeros(3, 16, 16)
    message = re.escape(
        "x has shape (4, 3, 16, 16), but must have (M, *) where the truth has shape"
    )

    for wrong in truth[:1], truth[0], torch.zeros(4, 3, 16, 16), torch.zeros(()):
        with pytest.raises(ValueError, match=message):
            metric(x, wrong)

    with pytest.raises(ValueError, match="x has shape"):
        metric(torch.zeros(()), torch.zeros(()))


@pytest.mark.parametrize("metric", [*METRICS, spectral_error, earth_movers_distance])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(
    metric: Callable[[Tensor, Tensor], Tensor], value: float
) -> None:
    x, truth = torch.zeros(4, 2, 16, 16), torch.zeros(2, 16, 16)

    if metric is earth_movers_distance:
        truth = torch.zeros_like(x)

    for wrong in x, truth:
        wrong[-1, -1, -1] = value

        with pytest.raises(ValueError, match="Some values are NaN or infinite"):
            metric(x, truth)

        wrong[-1, -1, -1] = 0

    with pytest.raises(ValueError, match=r"There is nothing in a tensor of shape|must have \(M"):
        metric(x[:, :0], truth[:, :0] if metric is earth_movers_distance else truth[:0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: chi_square(x, x[0], 0.0), "std must be positive."),
        (
            lambda x: energy(x[:, :1]),
            "x has shape (4, 1, 8, 8), but velocities have (*, 2, H, W).",
        ),
        (lambda x: divergence_ratio(x, x[0, 0]), "x has shape (8, 8), but velocities have"),
        (
            lambda x: spectral_error(x, x),
            "fields of the same size (H, W), at least 10 points wide.",
        ),
        (lambda x: earth_movers_distance(x, x[1:]), "and y (3, 2, 8, 8), but must have the same"),
        (lambda x: bootstrap(x[:1]), "values has a single row, but an interval needs at least 2."),
    ],
)
def test_other_mistakes_are_refused(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.ones(4, 2, 8, 8))


# Extremes

SCALES = (0.0, 1e-4, 1.0, 6e4)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((dtype, scale) for dtype in (torch.float16, torch.float32) for scale in SCALES),
        (torch.float32, 1e30),
    ],
)
def test_metrics_bear_constant_fields_and_any_scale(dtype: torch.dtype, scale: float) -> None:
    truth = torch.full((2, 16, 16), scale, dtype=dtype)
    x = truth.expand(3, 2, 16, 16)

    assert crps(x, truth).abs().max() == 0
    assert rmse(x, truth) == 0 and spread(x) == 0
    assert chi_square(x, truth, 0.1) == 0
    assert spectral_error(x, truth).max() < 1e-6
    assert cross_spectral_error(x, truth).max() < 1e-6
    assert energy(x).allclose(torch.tensor(scale, dtype=dtype).double().square())
    assert enstrophy(x).max() == 0
    assert rank_histogram(x, truth).sum() == truth.numel()
