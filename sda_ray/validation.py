r"""The validation loss: one number for a network, with as little noise as can be had."""

import math

import torch

from .data import TrajectoryDataset
from .diffusion import VPSDE
from .streams import VALID, rng

__all__ = ["Validation"]


class Validation:
    r"""Creates the validation loss: common random numbers, placed where the variance is.

    All runs on the same data see the same windows, times and noise, whatever their config. Times
    are :math:`t_j = v_j^2` with :math:`v_j` drawn in the :math:`j`-th of :math:`M` equal parts of
    :math:`[0, 1]` and item :math:`j` weighs :math:`2 v_j`, which leaves the expectation over
    uniform times unchanged,

    .. math:: \mathbb{E}_{t \sim U(0, 1)} [f(t)] = \int_0^1 f(v^2) \, 2v \, \mathrm{d}v

    and has a fraction of the variance: nearly all the loss of a good network is at small times.

    Arguments:
        validset: The trajectories, of which each is used equally often.
        device: Where to compute.
        least: The least number of items :math:`M`, 3 or more.
        draw: Which draw of the random numbers.
    """

    chunk = 32  # items at a time: a matter of memory, but a convolution's last bits depend on it

    def __init__(
        self,
        validset: TrajectoryDataset,
        device: str | torch.device = "cpu",
        least: int = 32,
        draw: int = 0,
    ) -> None:
        repeats = math.ceil(least / len(validset))
        items = repeats * len(validset)
        generator = rng(VALID, draw)

        indices = torch.arange(len(validset)).repeat(repeats)
        starts = torch.randint(validset.starts, (items,), generator=generator)
        parts = torch.randperm(items, generator=generator)
        v = (parts + torch.rand(items, generator=generator)) / items

        self.device = torch.device(device)
        self.x = validset.windows(indices, starts)
        self.noise = torch.stack(
            [torch.randn(x.shape, generator=rng(VALID, draw, i + 1)) for i, x in enumerate(self.x)]
        )
        self.t = v.square()
        self.weights = 2 * v.double()
        self.parts = parts

    @torch.no_grad()
    def __call__(self, sde: VPSDE) -> tuple[float, float]:
        r"""Returns the mean of the denoising loss over the items, and its standard error.

        The standard error comes from the second differences of items in neighbouring parts: the
        loss changes steeply from part to part, which is no error.
        """

        chunks = zip(*(x.split(self.chunk) for x in (self.x, self.t, self.noise)), strict=True)
        errors = [
            sde.errors(*(x.to(self.device, non_blocking=True) for x in chunk)).double().cpu()
            for chunk in chunks
        ]
        losses = (self.weights * torch.cat(errors))[self.parts.argsort()]
        bends = losses[:-2] - 2 * losses[1:-1] + losses[2:]
        variance = bends.square().mean() / 6 / len(losses)

        return float(losses.mean()), float(variance.sqrt())
