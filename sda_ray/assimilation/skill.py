r"""Skill of posterior samples, given the truth or what was observed of it.

An ensemble `x` has shape :math:`(M, *)`, a member a row, and the truth :math:`(*)`. What members
show of themselves, :math:`A(x)`, has shape :math:`(M, *)`, and the observation `y` :math:`(*)`; the
standard deviation `std` of its noise broadcasts with it. Velocities have shape
:math:`(*, 2, H, W)`, and fields :math:`(*, H, W)`. All is computed in double precision. An ensemble
is calibrated if the truth is like one more member: a draw of the same distribution.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data import divergence, isotropic_spectrum, vorticity

BANDS = 4


def crps(x: Tensor, truth: Tensor) -> Tensor:
    r"""Computes the fair continuous ranked probability score of each value.

    .. math:: \frac{1}{M} \sum_i |x_i - y| - \frac{1}{2 M (M - 1)} \sum_{i, j} |x_i - x_j|

    It is small if the members are close to the truth :math:`y` and no closer to each other, and
    in the units of the truth. The sum over pairs is computed from the probability-weighted moments
    of the sorted members, in :math:`O(M \log M)`. It is unbiased, and so may be negative.

    References:
        | Fair scores for ensemble forecasts (Ferro, 2014)
        | https://doi.org/10.1002/qj.2270

        | Estimation of the Continuous Ranked Probability Score with Limited Information and
          Applications to Ensemble Weather Forecasts (Zamo and Naveau, 2018)
        | https://doi.org/10.1007/s11004-017-9709-7

    Returns:
        The scores, with shape :math:`(*)`. Their mean is the score of the ensemble, which needs
        two members at least.
    """

    x, truth = _ensemble(x, truth, members=2)
    error = x - truth
    M = len(error)
    weights = torch.arange(1 - M, M, 2).to(error) / (M * (M - 1))

    return error.abs().mean(0) - torch.tensordot(weights, error.sort(0).values, 1)


def rmse(x: Tensor, truth: Tensor) -> Tensor:
    r"""Computes the root of the mean squared error of the ensemble mean.

    .. math:: \sqrt{\langle (\bar{x} - y)^2 \rangle}

    That of a calibrated ensemble is :math:`\sqrt{1 + 1 / M}` times its spread.

    References:
        | Why Should Ensemble Spread Match the RMSE of the Ensemble Mean? (Fortin et al., 2014)
        | https://doi.org/10.1175/JHM-D-14-0008.1
    """

    x, truth = _ensemble(x, truth)

    return (x.mean(0) - truth).square().mean().sqrt()


def spread(x: Tensor) -> Tensor:
    r"""Computes the root of the mean variance of an ensemble.

    .. math:: \sqrt{\langle \hat{\sigma}^2 \rangle}, \quad
        \hat{\sigma}^2 = \frac{1}{M - 1} \sum_i (x_i - \bar{x})^2
    """

    return _ensemble(x, members=2)[0].var(0).mean().sqrt()


def spread_skill(x: Tensor, truth: Tensor) -> Tensor:
    r"""Computes how much wider an ensemble is than its errors are.

    .. math:: \sqrt{\frac{\langle \hat{\sigma}^2 \rangle}
        {\langle (\bar{x} - y)^2 - \hat{\sigma}^2 / M \rangle}}

    where :math:`\hat{\sigma}^2` is the variance of the members. It is 1 if the ensemble is as wide
    as it should be, less if it is too narrow or biased. The mean of :math:`M` members errs by more
    than a perfect mean: :math:`\hat{\sigma}^2 / M` corrects for that, see :func:`rmse`. If the mean
    is closer to the truth than this, the ratio is infinite.
    """

    x, truth = _ensemble(x, truth, members=2)
    variance = x.var(0)
    skill = (x.mean(0) - truth).square() - variance / len(x)

    return (variance.mean() / skill.mean().clamp(min=0)).sqrt()


def rank_histogram(x: Tensor, truth: Tensor, seed: int = 0) -> Tensor:
    r"""Counts how many members are below the truth.

    The histogram is flat if the ensemble is calibrated, U-shaped if it is too narrow, dome-shaped
    if it is too wide, and sloped if it is biased. Among members that equal it, the truth takes a
    place at random, which `seed` decides.

    References:
        | Interpretation of Rank Histograms for Verifying Ensemble Forecasts (Hamill, 2001)
        | https://doi.org/10.1175/1520-0493(2001)129%3C0550:IORHFV%3E2.0.CO;2

    Returns:
        The number of values of each rank, with shape :math:`(M + 1)`.
    """

    x, truth = _ensemble(x, truth)
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(truth.shape, generator=generator, dtype=truth.dtype).to(truth.device)
    ranks = (x < truth).sum(0) + (places * ((x == truth).sum(0) + 1)).long()

    return torch.bincount(ranks.flatten(), minlength=len(x) + 1)


def chi_square(x: Tensor, y: Tensor, std: float | Tensor) -> Tensor:
    r"""Computes the mean squared misfit of what was observed, in units of its variance.

    .. math:: \left\langle \frac{(A(x) - y)^2}{\sigma^2} \right\rangle

    A draw of the posterior is to :math:`y` what the truth is, so that the expectation is 1. It is
    more if the members do not follow the observation, less if they follow its noise.
    """

    x, y = _ensemble(x, y)

    return ((x - y) / _positive(std, y)).square().mean()


def log_likelihood(x: Tensor, y: Tensor, std: float | Tensor) -> Tensor:
    r"""Computes the log-likelihood of each member, given an observation.

    .. math:: \log p(y | x) = \sum \log N(y \mid A(x), \sigma^2)
    """

    x, y = _ensemble(x, y)
    std = _positive(std, y)
    log_p = -((x - y) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2

    return log_p.flatten(1).sum(1) if log_p.dim() > 1 else log_p


def spectral_error(x: Tensor, truth: Tensor) -> Tensor:
    r"""Computes by how much the power of fields is off, in four bands of wavenumbers.

    .. math:: \sqrt{\left\langle (1 - S^x_k / S^y_k)^2 \right\rangle_{k \in \mathrm{band}}}

    where :math:`S^x` and :math:`S^y` are the isotropic power spectra, each averaged over all its
    fields. It is 0 if the power is right. Smooth samples have errors of up to 1 in the upper bands,
    noisy ones have more.

    The bands, from the longest waves to the shortest that the grid resolves in all directions, are
    equally wide on a logarithmic scale.

    References:
        | Lost in Latent Space: An Empirical Study of Latent Diffusion Models for Physics Emulation
          (Rozet et al., 2025)
        | https://arxiv.org/abs/2507.02608

    Returns:
        The errors of the bands, with shape :math:`(4)`.
    """

    x, truth = _fields(x, truth)
    power, target = _mean_spectrum(x), _mean_spectrum(truth)
    floor = _floor(target)

    return _over_bands(((power + floor) / (target + floor) - 1).square(), x)


def cross_spectral_error(x: Tensor, truth: Tensor) -> Tensor:
    r"""Computes how little members have to do with the truth, in four bands of wavenumbers.

    .. math:: \sqrt{\left\langle \left(1 - S^{xy}_k / \sqrt{S^x_k S^y_k} \right)^2
        \right\rangle_{k \in \mathrm{band}}}

    where the spectra, of which :math:`S^{xy}` is the cross-spectrum, are averaged over all members
    and fields. It is 0 if each member is the truth, or a multiple of it, and 1 if members and truth
    are independent. The bands are those of :func:`spectral_error`.

    Returns:
        The errors of the bands, with shape :math:`(4)`.
    """

    x, truth = _fields(*_ensemble(x, truth))
    power, target = _mean_spectrum(x), _mean_spectrum(truth)
    a, b = _floor(power), _floor(target)
    cross = _mean_spectrum(x.mean(0), truth) + a.sqrt() * b.sqrt()
    coherence = cross / (power + a).sqrt() / (target + b).sqrt()

    return _over_bands((1 - coherence).square(), x)


def divergence_ratio(x: Tensor, data: Tensor) -> Tensor:
    r"""Computes the divergence of velocities relative to that of data.

    .. math:: \sqrt{\frac{\langle (\nabla \cdot x)^2 \rangle}
        {\langle (\nabla \cdot x_{data})^2 \rangle}}

    It is 1 if velocities are as incompressible as those of the data, whose divergence, computed by
    differences on a coarse grid, is not zero.
    """

    x, data = _velocities(x), _velocities(data)

    return (divergence(x).square().mean() / divergence(data).square().mean()).sqrt()


def energy(x: Tensor) -> Tensor:
    r"""Computes the kinetic energy :math:`\langle u^2 + v^2 \rangle / 2` of each state, per mass."""

    return _velocities(x).square().sum(-3).mean((-1, -2)) / 2


def enstrophy(x: Tensor) -> Tensor:
    r"""Computes the enstrophy :math:`\langle \omega^2 \rangle / 2` of each state.

    The vorticity :math:`\omega` is in units of the grid spacing.
    """

    return vorticity(_velocities(x)).square().mean((-1, -2)) / 2


def earth_movers_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Computes the earth mover's distance of two sets of the same size, of shape :math:`(N, *)`.

    .. math:: \min_\pi \frac{1}{N} \sum_i \| x_i - y_{\pi(i)} \|_2

    over the permutations :math:`\pi`: the 1-Wasserstein distance of the empirical distributions. Of
    finite sets of one distribution it is not zero, and the less so the more dimensions there are:
    compare it with that of two sets of the truth.

    References:
        | Computational Optimal Transport (Peyré and Cuturi, 2019)
        | https://arxiv.org/abs/1803.00567
    """

    from scipy.optimize import linear_sum_assignment

    x, y = _finite(x), _finite(y)

    if x.shape != y.shape or x.dim() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}, but must have the same, (N, *)."
        )

    # By differences, since products would cancel where sets are close
    mode = "donot_use_mm_for_euclid_dist"
    costs = torch.cdist(x.reshape(len(x), -1), y.reshape(len(y), -1), compute_mode=mode)
    rows, columns = linear_sum_assignment(costs.detach().cpu().numpy())

    return costs[rows, columns].mean()


def bootstrap(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor | float] = lambda values: values.mean(0),
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Computes the percentile interval of a statistic of independent values, by bootstrap.

    What belongs to one trajectory is not independent, and makes one row. Rows may be indices.

    References:
        | An Introduction to the Bootstrap (Efron and Tibshirani, 1993)
        | https://doi.org/10.1201/9780429246593

    Example:
        >>> x, truth = torch.randn(16, 8, 32), torch.randn(8, 32)
        >>> low, high = bootstrap(crps(x, truth).mean(1))
        >>> low, high = bootstrap(torch.arange(8), lambda i: spread_skill(x[:, i], truth[i]))

    Arguments:
        values: The values, with shape :math:`(N, *)`, of which rows are drawn with replacement.
        statistic: A function of values of that shape, by default their mean over the rows.
        level: The probability of the interval.
        draws: How many times the rows are drawn.
        seed: Of the draws.

    Returns:
        The ends of the interval.
    """

    _finite(values)

    if len(values) < 2:
        raise ValueError("values has a single row, but an interval needs at least 2.")

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)
    drawn = (statistic(values[i.to(values.device)]) for i in rows)
    statistics = torch.stack([torch.as_tensor(value).double() for value in drawn])
    low, high = statistics.quantile(statistics.new_tensor([1 - level, 1 + level]) / 2, dim=0)

    return low, high


def _finite(x: Tensor) -> Tensor:
    if x.numel() == 0:
        raise ValueError(f"There is nothing in a tensor of shape {tuple(x.shape)}.")

    if not x.isfinite().all():
        raise ValueError("Some values are NaN or infinite, so that no metric is defined.")

    return x.double()


def _ensemble(x: Tensor, truth: Tensor | None = None, members: int = 1) -> tuple[Tensor, Tensor]:
    r"""Returns an ensemble and the truth in double precision, checked against each other."""

    if x.dim() == 0 or len(x) < members:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but must have (M, *) with M >= {members} members."
        )

    truth = x[0] if truth is None else truth

    if x.shape[1:] != truth.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but must have (M, *) where the truth has shape "
            f"(*) = {tuple(truth.shape)}."
        )

    return _finite(x), _finite(truth)


def _positive(std: float | Tensor, y: Tensor) -> Tensor:
    std = torch.as_tensor(std).to(y)

    if not (std > 0).all():
        raise ValueError("std must be positive.")

    return std


def _velocities(x: Tensor) -> Tensor:
    if x.dim() < 3 or x.shape[-3] != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but velocities have (*, 2, H, W).")

    return _finite(x)


def _fields(x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 2 or x.shape[-2:] != truth.shape[-2:] or min(x.shape[-2:]) < 10:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and the truth {tuple(truth.shape)}, but must have "
            "fields of the same size (H, W), at least 10 points wide."
        )

    return _finite(x), _finite(truth)


def _mean_spectrum(x: Tensor, y: Tensor | None = None) -> Tensor:
    spectrum = isotropic_spectrum(x, y)

    return spectrum.flatten(0, -2).mean(0) if spectrum.dim() > 1 else spectrum


def _floor(spectrum: Tensor) -> Tensor:
    r"""Returns the power that is rounding error in fields of single precision."""

    return (1e-12 * spectrum.sum()).clamp(min=torch.finfo(spectrum.dtype).tiny)


def _over_bands(squares: Tensor, x: Tensor) -> Tensor:
    r"""Returns the root of the mean in each band, of squares with shape :math:`(K)`."""

    highest = min(x.shape[-2:]) // 2
    k = torch.arange(1, highest + 1, device=x.device)
    band = (BANDS * k.double().log2() / math.log2(highest)).long().clamp(max=BANDS - 1)

    return torch.stack([squares[k[band == i]].mean().sqrt() for i in range(BANDS)])
