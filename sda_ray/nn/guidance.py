r"""Guidance: from the score of a prior to that of a posterior, given an observation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .diffusion import VPSDE

__all__ = ["DPSGaussianScore", "GaussianScore"]


class GaussianScore(nn.Module):
    r"""Creates a score module for Gaussian inverse problems.

    .. math:: p(y | x(t)) = N(y \mid A(\hat{x}), \Sigma + \gamma \, \sigma(t)^2 / \mu(t)^2 \, I)

    where :math:`\hat{x} = (x(t) - \sigma(t) \, \epsilon_\phi(x(t), t)) / \mu(t)`.

    References:
        | Score-based Data Assimilation (Rozet et al., 2023)
        | https://arxiv.org/abs/2306.10574

    Note:
        This module returns :math:`-\sigma(t) s(x(t), t | y)`, which is to the posterior what the
        estimated noise is to the prior.

    Arguments:
        y: The observation.
        A: The observation operator. It must be differentiable.
        std: The standard deviation of the observation's noise.
        sde: The diffusion of the prior.
        gamma: How much the error of :math:`\hat{x}` adds to the variance.
        detach: Whether :math:`\epsilon_\phi` is taken for constant when differentiating. This is
            cheaper and less accurate.
    """

    y: Tensor
    std: Tensor
    gamma: Tensor

    def __init__(
        self,
        y: Tensor,
        A: Callable[[Tensor], Tensor],
        std: float | Tensor,
        sde: VPSDE,
        gamma: float | Tensor = 1e-2,
        detach: bool = False,
    ) -> None:
        super().__init__()

        self.register_buffer("y", y)
        self.register_buffer("std", torch.as_tensor(std, dtype=y.dtype, device=y.device))
        self.register_buffer("gamma", torch.as_tensor(gamma, dtype=y.dtype, device=y.device))

        self.A = A
        self.sde = sde
        self.detach = detach

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        r"""
        Arguments:
            x: The noisy trajectories :math:`x(t)`, with shape :math:`(B, L, C, H, W)`.
            t: The times, with shape :math:`()` or :math:`(B)`.
            c: The optional context.
        """

        mu, sigma = self.sde.mu(t), self.sde.sigma(t)

        with torch.enable_grad():
            x = x.detach().requires_grad_()
            eps, denoised = _denoise(self.sde, x, t, c, self.detach)
            error = self.y - self.A(denoised)
            var = self.std**2 + self.gamma * _fit(sigma / mu, error) ** 2
            log_p = -(error**2 / var).sum() / 2

        (s,) = torch.autograd.grad(log_p, x)

        return eps.detach() - _fit(sigma, x) * s


class DPSGaussianScore(nn.Module):
    r"""Creates a score module for Gaussian inverse problems, as diffusion posterior sampling does.

    .. math:: \nabla_{x(t)} \log p(y | x(t)) \approx
        - \frac{\zeta}{\| y - A(\hat{x}) \|} \nabla_{x(t)} \| y - A(\hat{x}) \|^2

    References:
        | Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023)
        | https://arxiv.org/abs/2209.14687

    Note:
        This module returns :math:`-\sigma(t) s(x(t), t | y)`.

    Arguments:
        y: The observation.
        A: The observation operator. It must be differentiable, and keep the batch dimension.
        sde: The diffusion of the prior.
        zeta: The strength of the guidance.
        joint: Whether the norm is taken over the batch, as SDA does. By default each member has
            its own, so that its guidance does not depend on the other members.
    """

    y: Tensor

    def __init__(
        self,
        y: Tensor,
        A: Callable[[Tensor], Tensor],
        sde: VPSDE,
        zeta: float = 1.0,
        joint: bool = False,
    ) -> None:
        super().__init__()

        self.register_buffer("y", y)

        self.A = A
        self.sde = sde
        self.zeta = zeta
        self.joint = joint

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            eps, denoised = _denoise(self.sde, x, t, c)
            square = (self.y - self.A(denoised)).square()
            square = square.sum() if self.joint else square.reshape(len(square), -1).sum(1)

        (s,) = torch.autograd.grad(square.sum(), x)

        # A perfect fit has gradient zero, and must not become 0 / 0.
        norm = square.detach().sqrt().clamp(min=torch.finfo(square.dtype).tiny)

        return eps.detach() + _fit(self.sde.sigma(t), x) * self.zeta * s / _fit(norm, x)


def _denoise(
    sde: VPSDE, x: Tensor, t: Tensor, c: Tensor | None, detach: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Returns the estimated noise and :math:`\hat{x}`. The weights need no gradients."""

    weights = {name: p.detach() for name, p in sde.eps.named_parameters()}

    with torch.set_grad_enabled(not detach):
        eps: Tensor = functional_call(sde.eps, weights, (x, t, c))

    return eps, (x - _fit(sde.sigma(t), x) * eps) / _fit(sde.mu(t), x)


def _fit(a: Tensor, x: Tensor) -> Tensor:
    r"""Appends dimensions to a tensor of shape :math:`()` or :math:`(B)`, as many as x has more."""

    return a.reshape(a.shape + (1,) * (x.dim() - a.dim())) if a.dim() > 0 else a
