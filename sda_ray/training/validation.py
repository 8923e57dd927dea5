r"""The validation loss: one number for a network, with as little noise as possible."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import TrajectoryDataset
from ..nn import VPSDE
from .rng import VALID, rng

__all__ = ["DRAWS", "Items", "Validation", "variance_of_mean"]

DRAWS = 4  # independent draws whose mean a run is judged by


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
