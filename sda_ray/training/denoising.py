r"""The denoising error of trajectories: comparable whatever the window and the noise schedule."""

import math

import torch

from ..data import TrajectoryDataset
from ..nn import VPSDE, MCScoreNet
from .rng import DENOISING, rng
from .validation import Validation, variance_of_mean

__all__ = ["Denoising"]

# Noise levels sigma / mu, for data of a size near 1. Below, the noise is less than any observation
# has; above, not even the longest waves of the data can be seen in a window.
LOWEST, HIGHEST = 0.03, 30.0


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
