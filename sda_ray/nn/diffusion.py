r"""Diffusion: how data become noise, and noise becomes data."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Size, Tensor, nn

from ..core import ALPHAS


class VPSDE(nn.Module):
    r"""Creates a noise scheduler for the variance preserving (VP) SDE.

    .. math::
        \mu(t) & = \alpha(t) \\
        \sigma(t)^2 & = 1 - \alpha(t)^2 + \eta^2

    where :math:`\alpha` falls from 1 to :math:`\eta` over :math:`[0, 1]`.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456

    Arguments:
        eps: A noise estimator :math:`\epsilon_\phi(x, t)`, called with :math:`(x, t, c)`.
        shape: The event shape: that of one item.
        alpha: The choice of :math:`\alpha(t)`. `lin` is :math:`1 - (1 - \eta) t`, `cos`
            :math:`\cos(t \arccos \sqrt{\eta})^2` and `exp` :math:`\eta^{t^2}`.
        eta: A numerical stability term.
    """

    def __init__(
        self,
        eps: nn.Module,
        shape: Sequence[int],
        alpha: str = "cos",
        eta: float = 1e-3,
    ) -> None:
        super().__init__()

        if alpha not in ALPHAS:
            raise ValueError(f"alpha is {alpha!r}, but must be one of {', '.join(ALPHAS)}.")

        if not 0 < eta < 1:
            raise ValueError(f"eta is {eta}, but must be between 0 and 1.")

        self.eps = eps
        self.shape = Size(shape)
        self.curve = alpha
        self.eta = eta
        prior = getattr(eps, "sde", None)  # of guidance

        if isinstance(prior, VPSDE) and (prior.curve, prior.eta) != (alpha, eta):
            raise ValueError(
                f"eps guides a prior of alpha={prior.curve!r} and eta={prior.eta}, but alpha is "
                f"{alpha!r} and eta {eta}. Give those of the prior."
            )

    @property
    def device(self) -> torch.device:
        r"""Where the noise estimator is."""

        return self._like().device

    def _like(self) -> Tensor:
        tensors = itertools.chain(self.parameters(), self.buffers())

        return next((x for x in tensors if x.is_floating_point()), torch.empty(()))

    def alpha(self, t: Tensor) -> Tensor:
        if self.curve == "lin":
            return 1 - (1 - self.eta) * t
        elif self.curve == "cos":
            return torch.cos(math.acos(math.sqrt(self.eta)) * t) ** 2
        else:
            return torch.exp(math.log(self.eta) * t**2)

    def mu(self, t: Tensor) -> Tensor:
        return self.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t) ** 2 + self.eta**2).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        r"""Returns the time at which :math:`\sigma(t) / \mu(t)` is a given ratio.

        The ratio must be in the range of the times from 0 to 1, about :math:`[\eta, 1 / \eta]`.
        """

        alpha = ((1 + self.eta**2) / (1 + ratio**2)).sqrt().clamp(self.eta, 1)

        if self.curve == "lin":
            return (1 - alpha) / (1 - self.eta)
        elif self.curve == "cos":
            return torch.acos(alpha.sqrt()) / math.acos(math.sqrt(self.eta))
        else:
            return (torch.log(alpha) / math.log(self.eta)).sqrt()

    def perturb(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        r"""Returns :math:`x(t) = \mu(t) x + \sigma(t) \epsilon`.

        The data and the noise have shape :math:`(*, S)`, where :math:`S` is the event shape, and
        the times :math:`()` or :math:`(*)`.
        """

        t = t.reshape(t.shape + (1,) * len(self.shape))

        return self.mu(t) * x + self.sigma(t) * noise

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Samples from the perturbation kernel :math:`p(x(t) | x)`."""

        return self.perturb(x, t, torch.randn_like(x))

    def errors(self, x: Tensor, t: Tensor, noise: Tensor, c: Tensor | None = None) -> Tensor:
        r"""Returns the mean squared error of the estimated noise of each of :math:`B` items."""

        error = self.eps(self.perturb(x, t, noise), t, c) - noise

        return error.square().flatten(1).mean(1)

    def loss(
        self,
        x: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        c: Tensor | None = None,
        w: Tensor | None = None,
    ) -> Tensor:
        r"""Returns the denoising loss.

        .. math:: \mathbb{E}_{t, \epsilon} \, \| \epsilon_\phi(x(t), t) - \epsilon \|^2 / \dim x

        Arguments:
            x: The data, with shape :math:`(B, S)`.
            t: The times, with shape :math:`(B)`; uniform in :math:`[0, 1)` if None.
            noise: The noise, with shape :math:`(B, S)`; standard normal if None.
            generator: What draws the times, then the noise. Its device must be that of the data.
            c: The optional context.
            w: The optional weights of the squared errors. They are normalized to mean 1.
        """

        if t is None:
            t = torch.rand(x.shape[:1], generator=generator, dtype=x.dtype, device=x.device)

        if noise is None:
            noise = _noise(x, x.shape, generator)

        error = (self.eps(self.perturb(x, t, noise), t, c) - noise).square()

        return error.mean() if w is None else (error * w).mean() / w.mean()

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int] = (),
        c: Tensor | None = None,
        steps: int = 64,
        corrections: int = 0,
        tau: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        r"""Samples from :math:`p(x(0))`.

        Arguments:
            shape: The batch shape :math:`(*)`.
            c: The optional context.
            steps: The number of discrete time steps.
            corrections: The number of Langevin corrections per time step.
            tau: The amplitude of the corrections.
            generator: What draws the noise, on its own device; or one for each sample, which is
                then a function of its generator alone, up to rounding.
            start: The samples :math:`x(1)` to start from, with shape :math:`(*, S)`; standard
                normal if None.

        Returns:
            The samples, with shape :math:`(*, S)`.
        """

        like = self._like()
        count = math.prod(shape)
        x = _noise(like, (count, *self.shape), generator) if start is None else start.to(like)
        x = x.reshape(-1, *self.shape)

        for later in self.reverse(x, c, steps, corrections, tau, generator):
            x = later

        return x.reshape(*shape, *self.shape)

    @torch.no_grad()
    def reverse(
        self,
        x: Tensor,
        c: Tensor | None = None,
        steps: int = 64,
        corrections: int = 0,
        tau: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[Tensor]:
        r"""Yields samples of :math:`p(x(s))` at the end :math:`s` of each step from 1 to 0.

        It starts from samples :math:`x(1)`, with shape :math:`(B, S)`, whose type and device it
        computes with. The other arguments are as in :meth:`sample`.
        """

        if steps < 1:
            raise ValueError(f"steps is {steps}, but must be at least 1.")

        time = torch.linspace(1, 0, steps + 1, dtype=x.dtype).to(x.device)

        for t, s in itertools.pairwise(time):
            # Predictor
            r = self.mu(s) / self.mu(t)
            x = r * x + (self.sigma(s) - r * self.sigma(t)) * self.eps(x, t, c)

            # Corrector
            for _ in range(corrections):
                z = _noise(x, x.shape, generator)
                eps = self.eps(x, s, c)
                delta = tau / eps.square().flatten(1).mean(1)
                delta = delta.reshape(-1, *(1 for _ in self.shape))
                x = x - self.sigma(s) * (delta * eps + torch.sqrt(2 * delta) * z)

            yield x


def _noise(
    like: Tensor,
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"There are {len(generator)} generators for {shape[0]} samples.")

        return torch.stack([_noise(like, shape[1:], g) for g in generator])

    device = like.device if generator is None else generator.device

    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=device).to(
        like.device
    )
