r"""Guidance: from the score of a prior to that of a posterior, given an observation.

Networks in fp16 or bf16 are called as they are. Everything around them is in fp32, because
:math:`\sigma(t)^2 / \mu(t)^2` comes to a million, more than fp16 holds.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .diffusion import VPSDE

LOW = torch.float16, torch.bfloat16


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

        dtype, x, t = x.dtype, _leaf(x), _precise(t)
        mu, sigma = self.sde.mu(t), self.sde.sigma(t)

        with torch.enable_grad():
            eps, denoised = _denoise(self.sde, x, t, c, self.detach)
            error = self.y - self.A(denoised)
            var = _precise(self.std) ** 2 + self.gamma * _fit(sigma / mu, error) ** 2
            log_p = -(error**2 / var).sum() / 2

        (s,) = torch.autograd.grad(log_p, x)

        return (eps.detach() - _fit(sigma, x) * s).to(dtype)


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
        dtype, x, t = x.dtype, _leaf(x), _precise(t)

        with torch.enable_grad():
            eps, denoised = _denoise(self.sde, x, t, c)
            square = (self.y - self.A(denoised)).square()
            square = square.sum() if self.joint else square.reshape(len(square), -1).sum(1)

        (s,) = torch.autograd.grad(square, x, torch.ones_like(square))

        # A perfect fit has gradient zero, and must not become 0 / 0.
        norm = square.detach().sqrt().clamp(min=torch.finfo(square.dtype).tiny)

        eps = eps.detach() + _fit(self.sde.sigma(t), x) * self.zeta * s / _fit(norm, x)

        return eps.to(dtype)


class MMPSGaussianScore(nn.Module):
    r"""Creates a score module for Gaussian inverse problems, by moment matching (MMPS).

    .. math:: p(y | x(t)) = N(y \mid A(\hat{x}), \Sigma + A V A^T) \quad \text{with} \quad
        V = \frac{\sigma(t)^2}{\mu(t)} \frac{\partial \hat{x}}{\partial x(t)}

    where :math:`V` is the covariance of :math:`x` given :math:`x(t)`. For normal data and a linear
    :math:`A`, the score is exact once the conjugate gradients have converged. A nonlinear
    :math:`A` is linearised at :math:`\hat{x}`.

    References:
        | Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024)
        | https://arxiv.org/abs/2405.13712

    Note:
        This module returns :math:`-\sigma(t) s(x(t), t | y)`.

    Arguments:
        y: The observation.
        A: The observation operator. It must be twice differentiable, as most functions of torch
            are, and keep the batch dimension.
        std: The standard deviation of the observation's noise.
        sde: The diffusion of the prior.
        iterations: The most iterations of conjugate gradients, each of which costs a backward
            pass. A member ends them early: at the tolerance, or where :math:`V` is not positive,
            by an error of the network.
        tolerance: The norm of the residual at which they end, relative to that of the start.
    """

    y: Tensor
    std: Tensor

    def __init__(
        self,
        y: Tensor,
        A: Callable[[Tensor], Tensor],
        std: float | Tensor,
        sde: VPSDE,
        iterations: int = 8,
        tolerance: float = 1e-3,
    ) -> None:
        super().__init__()

        self.register_buffer("y", y)
        self.register_buffer("std", torch.as_tensor(std, dtype=y.dtype, device=y.device))

        self.A = A
        self.sde = sde
        self.iterations = iterations
        self.tolerance = tolerance

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        dtype, x, t = x.dtype, _leaf(x), _precise(t)
        mu, sigma = self.sde.mu(t), self.sde.sigma(t)

        with torch.enable_grad():
            eps, denoised = _denoise(self.sde, x, t, c)
            observed = self.A(denoised)

            # The product of A's derivative and a vector, as the transpose of the transpose
            center = denoised.detach().requires_grad_()
            u = torch.zeros_like(observed).requires_grad_()
            (back,) = torch.autograd.grad(self.A(center), center, u, create_graph=True)

        var = _precise(self.std) ** 2
        r = p = (self.y - observed).detach()
        rr = _dot(r, r)
        goal = self.tolerance**2 * rr
        s, active = torch.zeros_like(x), rr > goal

        for _ in range(self.iterations):
            if not active.any():
                break

            (g,) = torch.autograd.grad(observed, x, p, retain_graph=True)
            v = _fit(sigma**2 / mu, g) * g
            q = var * p + torch.autograd.grad(back, u, v, retain_graph=True)[0]
            pq = _dot(p, q)
            active = active & (pq > 0)
            a = torch.where(active, rr / pq, 0)
            s, r = s + _fit(a, g) * g, r - _fit(a, q) * q
            last, rr = rr, _dot(r, r)
            p = r + _fit(torch.where(active, rr / last, 0), p) * p
            active = active & (rr > goal)

        return (eps.detach() - _fit(sigma, x) * s).to(dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(1)


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in LOW else x


def _leaf(x: Tensor) -> Tensor:
    return _precise(x).detach().requires_grad_()


def _denoise(
    sde: VPSDE, x: Tensor, t: Tensor, c: Tensor | None, detach: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Returns the estimated noise and :math:`\hat{x}`. The weights need no gradients."""

    weights = {name: p.detach() for name, p in sde.eps.named_parameters()}
    dtype = next((p.dtype for p in weights.values() if p.dtype in LOW), x.dtype)

    mu = _fit(sde.mu(t), x)

    with torch.set_grad_enabled(not detach):
        z = x if dtype == x.dtype else x.clone()
        eps: Tensor = functional_call(sde.eps, weights, (z.to(dtype), t, c)).to(x.dtype)

    if dtype != x.dtype and eps.requires_grad:
        # Gradients with respect to eps, which grow as 1 / mu, pass the network scaled by mu.
        eps.register_hook(lambda grad: grad * mu)
        z.register_hook(lambda grad: grad / mu)

    if eps.shape != x.shape:
        raise ValueError(
            f"The noise estimate has shape {tuple(eps.shape)}, but must have {tuple(x.shape)}, "
            "that of x."
        )

    return eps, (x - _fit(sde.sigma(t), x) * eps) / mu


def _fit(a: Tensor, x: Tensor) -> Tensor:
    r"""Appends dimensions to a tensor of shape :math:`()` or :math:`(B)`, as many as x has more."""

    return a.reshape(a.shape + (1,) * (x.dim() - a.dim())) if a.dim() > 0 else a
