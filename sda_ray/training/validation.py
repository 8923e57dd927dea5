r"""What a network is judged by, on `valid.h5`: its loss, its denoising error and its ensembles."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..assimilation import crps, parse
from ..data import TrajectoryDataset
from ..nn import VPSDE, GaussianScore, MCScoreNet
from .loop import DENOISING, ENSEMBLES, VALID, rng

# Noise levels sigma / mu, for data of a size near 1. Below, the noise is less than any observation
# has; above, not even the longest waves of the data can be seen in a window.
LOWEST, HIGHEST = 0.03, 30.0

ITEMS, MEMBERS, STEPS = 3, 2, 16  # of the ensembles
STD = 0.1  # of the noise in their observations, that of `assim` in the panel


# Loss


class Items(NamedTuple):
    r"""The items that the loss is a mean over: windows, times, noise, weights, parts."""

    x: Tensor
    t: Tensor
    noise: Tensor
    weights: Tensor
    parts: Tensor


class Validation:
    r"""Creates the validation loss: common random numbers, placed where the variance is.

    All runs on the same data with the same `valid_seed` see the same windows, times and noise,
    whatever else is in their config. Each of the :math:`M` items has a time drawn uniformly in a
    part of :math:`[0, 1]` of its own, the :math:`j`-th from :math:`(j / M)^2` to
    :math:`((j + 1) / M)^2`, and weighs as much as the part is long. That leaves the expectation over uniform times unchanged,

    .. math:: \mathbb{E}_{t \sim U(0, 1)} [f(t)] = \frac{1}{M} \sum_{j < M}
        \frac{2 j + 1}{M} \, \mathbb{E} [f(t_j)]

    and has a fraction of the variance: nearly all the loss of a good network is at small times.
    The weights do not depend on what is drawn. Else a loss that is the same at all times, as that
    of an untrained network, would have the variance of the weights.

    Each trajectory is used equally often, so that there are at least `least` items, 3 or more. The
    random numbers are those of the first of several draws, `draw`, of a seed.
    """

    chunk = 32  # items at a time: a matter of memory, but a convolution's last bits depend on it

    def __init__(
        self,
        validset: TrajectoryDataset,
        device: str | torch.device = "cpu",
        least: int = 32,
        draw: int = 0,
        seed: int = 0,
    ) -> None:
        self.validset = validset
        self.device = torch.device(device)
        self.repeats = math.ceil(least / len(validset))
        self.draw = draw
        self.seed = seed
        self.first = self.drawn(draw)

    def drawn(self, draw: int) -> Items:
        items = self.repeats * len(self.validset)
        generator = rng(VALID, draw, 0, self.seed)

        indices = torch.arange(len(self.validset)).repeat(self.repeats)
        starts = torch.randint(self.validset.starts, (items,), generator=generator)
        parts = torch.randperm(items, generator=generator)
        widths = 2 * parts + 1
        t = (parts.square() + widths * torch.rand(items, generator=generator)) / items**2
        x = self.validset.windows(indices, starts)
        noise = [
            torch.randn(y.shape, generator=rng(VALID, draw, i + 1, self.seed))
            for i, y in enumerate(x)
        ]

        return Items(x, t, torch.stack(noise), widths.double() / items, parts)

    def __call__(self, sde: VPSDE, draws: int = 1) -> tuple[float, float]:
        r"""Returns the mean of the denoising loss over the items, and its standard error.

        The standard error comes from the second differences of items in neighbouring parts: the
        loss changes steeply from part to part, which is no error.

        The mean is over independent draws. The first of them are always the same, so that a mean
        of several is comparable with one of fewer. All but the very first are drawn anew each
        time, which takes no memory for long.
        """

        found = [self._measure(sde, self.first)]
        found += [self._measure(sde, self.drawn(self.draw + i)) for i in range(1, draws)]
        losses, variances = torch.tensor(found, dtype=torch.float64).unbind(-1)

        return float(losses.mean()), float(variances.mean().div(draws).sqrt())

    @torch.no_grad()
    def _measure(self, sde: VPSDE, items: Items) -> tuple[float, float]:
        r"""Returns the mean of the loss over the items of a draw, and the variance of that."""

        inputs = (items.x, items.t, items.noise)
        chunks = zip(*(x.split(self.chunk) for x in inputs), strict=True)
        errors = [
            sde.errors(*(x.to(self.device, non_blocking=True) for x in chunk)).double().cpu()
            for chunk in chunks
        ]
        losses = (items.weights * torch.cat(errors))[items.parts.argsort()]

        return float(losses.mean()), variance_of_mean(losses)


def variance_of_mean(x: Tensor) -> float:
    r"""Returns the variance of the mean of items in the order of their parts, one in each.

    It comes from second differences: the expectation may change from part to part.
    """

    return float((x[:-2] - 2 * x[1:-1] + x[2:]).square().mean() / 6 / len(x))


# Denoising error


class Denoising:
    r"""Creates the denoising error of a network of trajectories, relative to a simple estimate.

    Segments of one length are denoised as a whole, as when assimilating, at noise levels
    :math:`s = \sigma(t) / \mu(t)`. Of the estimate :math:`\hat{x} = (x(t) - \sigma(t) \,
    \epsilon_\phi) / \mu(t)` it returns the geometric mean over levels of

    .. math:: \frac{\| \hat{x} - x \|^2 / \dim x}{s^2 m / (s^2 + m)}
        \quad \text{with} \quad m = \mathbb{E} \, \| x \|^2 / \dim x

    where the denominator is the error of the best multiple of :math:`x(t)`: 1 is no better than
    that, and smaller is better. A tenth less error counts the same at every level; an arithmetic
    mean would see the levels alone where a network is worst. Networks that denoise
    :math:`x(t) / \mu(t)` in the same way have the same number up to rounding, whatever they see and
    estimate, since all get the same segments, levels and noise: :math:`t` is solved for from each
    level. So runs of another `window`, `alpha`, `parametrization` or `precision` can be compared.

    There are at least `least` items, and each trajectory is used equally often. An item has a
    level of its own, which are equidistant in :math:`\log s`, and a random start. A segment of
    :math:`L` states takes :math:`L - w + 1` evaluations of a network of windows of :math:`w`.

    Arguments:
        validset: The trajectories, of any window.
        states: The length :math:`L` of segments: :math:`2 w - 1`, so that one state at least has
            its full window, or more.
        device: The device of the networks.
        least: The least number of items, 3 or more.
        seed: The seed of starts, levels and noise.

    Raises:
        UserError: If trajectories are shorter.
    """

    def __init__(
        self,
        validset: TrajectoryDataset,
        states: int,
        device: str | torch.device = "cpu",
        least: int = 32,
        seed: int = 0,
    ) -> None:
        segments = TrajectoryDataset(validset.file, window=states)
        repeats = math.ceil(least / len(segments))
        items = repeats * len(segments)
        generator = rng(DENOISING, 0, 0, seed)

        indices = torch.arange(len(segments)).repeat(repeats)
        starts = torch.randint(segments.starts, (items,), generator=generator)
        self.levels = torch.randperm(items, generator=generator)
        self.device = torch.device(device)
        self.x = segments.windows(indices, starts).unflatten(1, (states, -1))
        noise = [
            torch.randn(x.shape, generator=rng(DENOISING, i + 1, 0, seed))
            for i, x in enumerate(self.x)
        ]
        self.noise = torch.stack(noise)

        progress = (self.levels.double() + 0.5) / items
        self.ratios = LOWEST * (HIGHEST / LOWEST) ** progress
        variance, size = self.ratios.square(), self.x.double().square().mean()
        self.scales = variance * size / (variance + size)

    @torch.no_grad()
    def __call__(self, score: MCScoreNet, alpha: str) -> tuple[float, float]:
        r"""Returns the error of a network for an `alpha`, and its standard error.

        The standard error comes from the second differences of neighbouring levels.
        """

        states = self.x.shape[1]
        sde = VPSDE(score, self.x.shape[1:], alpha)
        times = sde.time(self.ratios)
        chunk = max(1, Validation.chunk // (states - 2 * score.order))
        parts = (y.split(chunk) for y in (self.x, self.noise, times))
        errors = []

        for x, noise, t in zip(*parts, strict=True):
            x, noise = x.to(self.device).double(), noise.to(self.device).double()
            t = t.to(self.device)
            noisy = sde.perturb(x, t, noise).float()
            eps = score(noisy, t.float()).double()
            mu, sigma = (y.reshape(-1, 1, 1, 1, 1) for y in (sde.mu(t), sde.sigma(t)))
            error = (noisy.double() - sigma * eps) / mu - x
            errors.append(error.square().flatten(1).mean(1).cpu())

        logs = (torch.cat(errors) / self.scales).log()[self.levels.argsort()]
        mean = float(logs.mean().exp())

        return mean, mean * math.sqrt(variance_of_mean(logs))


# Ensembles


class Ensembles:
    r"""Creates the skill of a network in brief: the fair CRPS of small ensembles.

    Segments of one length are observed as `assim` of the panel does, every 4th state in blocks of
    8 × 8 points, or smaller ones in fields of fewer than 32 × 32. Two members each are drawn from
    the posterior, in few steps without corrections, with a guidance that takes the estimated noise
    for constant. They are too few and too coarse to say how good a network is: that is up to an
    evaluation. But one that is too narrow, too wide or blurred has a worse number.

    All networks get the same segments, observations and noise, and the noise levels of the steps
    are those of the `alpha` `cos`, whatever theirs is. So networks that denoise in the same way
    have the same number up to rounding, and runs of another `window`, `alpha`, `parametrization`
    or `precision` can be compared. A segment of :math:`L` states takes 32 times :math:`L - w + 1`
    evaluations of a network of windows of :math:`w`.

    Arguments:
        validset: The trajectories, of any window. Segments are of as many of them as there are.
        states: The length :math:`L` of segments: :math:`2 w - 1`, so that one state at least has
            its full window, or more.
        device: The device of the networks.
        seed: The seed of segments, observations and noise.

    Raises:
        UserError: If trajectories are shorter.
    """

    def __init__(
        self,
        validset: TrajectoryDataset,
        states: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        segments = TrajectoryDataset(validset.file, window=states)
        generator = rng(ENSEMBLES, 0, 0, seed)
        order = torch.randperm(len(segments), generator=generator)
        indices = order[torch.arange(ITEMS) % len(order)]
        starts = torch.randint(segments.starts, (ITEMS,), generator=generator)

        self.device, self.seed = torch.device(device), seed
        self.x = segments.windows(indices, starts).unflatten(1, (states, -1)).to(self.device)
        self.A = parse(f"every(4) coarsen({math.gcd(8, max(1, self.x.shape[-1] // 4))})")
        clean = self.A(self.x)
        noise = [
            torch.randn(y.shape, generator=rng(ENSEMBLES, 1, i, seed)) for i, y in enumerate(clean)
        ]
        self.y = clean + STD * torch.stack(noise).to(self.device)

    def __call__(self, score: MCScoreNet, alpha: str) -> tuple[float, float]:
        r"""Returns the skill of a network for an `alpha`, and its standard error over segments.

        Both are infinite if a member diverged. The smaller the skill, the better. Since segments
        and noise are the same, two networks differ by less than the errors say.
        """

        numbers = torch.arange(len(self.x) * MEMBERS)
        chunk = max(1, Validation.chunk // (self.x.shape[1] - 2 * score.order))
        sde = VPSDE(_Retimed(VPSDE(score, (), alpha)), self.x.shape[1:])
        x = torch.cat([self._members(sde, part) for part in numbers.split(chunk)])

        if not x.isfinite().all():
            return math.inf, math.inf

        ensembles = x.unflatten(0, (-1, MEMBERS))
        scores = torch.stack([crps(*pair).mean() for pair in zip(ensembles, self.x, strict=True)])

        return float(scores.mean()), float(scores.std() / math.sqrt(len(scores)))

    def _members(self, sde: VPSDE, numbers: Tensor) -> Tensor:
        r"""Returns members by their numbers, of which each segment has the next few."""

        guided = GaussianScore(self.y[numbers // MEMBERS], self.A, STD, sde, detach=True)
        rngs = [rng(ENSEMBLES, 2, int(i), self.seed) for i in numbers]

        return VPSDE(guided, sde.shape).sample(numbers.shape, steps=STEPS, generator=rngs)


class _Retimed(nn.Module):
    r"""Estimates the noise at the times of the `alpha` `cos` by a network for another one."""

    def __init__(self, own: VPSDE) -> None:
        super().__init__()

        self.own = own
        self.cos = VPSDE(nn.Identity(), ())

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        late = t.double()
        ratio = self.cos.sigma(late) / self.cos.mu(late)

        return self.own.eps(x, self.own.time(ratio).to(t.dtype), c)
