r"""Skill in brief: how good a network's ensembles are, from few members in few steps."""

import math

import torch
from torch import Tensor, nn

from ..assimilation import crps, parse
from ..data import TrajectoryDataset
from ..nn import VPSDE, GaussianScore, MCScoreNet
from .rng import ENSEMBLES, rng
from .validation import Validation

__all__ = ["Ensembles"]

ITEMS, MEMBERS, STEPS = 3, 2, 16
STD = 0.1  # of the noise in observations, that of `assim` in the panel


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
