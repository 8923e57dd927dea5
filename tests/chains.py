r"""Linear-Gaussian chains, of which everything is known in closed form."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sda_ray.nn.diffusion import VPSDE

__all__ = ["Chain", "GaussianNoise", "make_chain"]


class GaussianNoise(nn.Module):
    r"""Estimates the noise in normal data exactly.

    .. math:: \epsilon(x, t) = \sigma (\mu^2 C + \sigma^2 I)^{-1} (x - \mu m)

    Arguments:
        mean: The mean :math:`m`, with shape :math:`(N)`, whatever the shape of an item.
        cov: The covariance :math:`C`, with shape :math:`(N, N)`.
        alpha: The noise schedule.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    def __init__(self, mean: Tensor, cov: Tensor, alpha: str = "cos") -> None:
        super().__init__()

        values, vectors = torch.linalg.eigh(cov)

        self.register_buffer("mean", mean)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)
        self.schedule = (VPSDE(nn.Identity(), (), alpha),)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        mu, sigma = (f(t.reshape(-1, 1)) for f in (self.schedule[0].mu, self.schedule[0].sigma))
        z = (x.reshape(-1, len(self.mean)) - mu * self.mean) @ self.vectors
        z = sigma * z / (mu**2 * self.values + sigma**2)

        return (z @ self.vectors.T).reshape(x.shape)


@dataclass
class Chain:
    r"""A chain of L states of d numbers, and what is observed of it.

    .. math::
        x_0 & \sim N(m, P) \\
        x_{i + 1} & \sim N(F x_i + b, Q) \\
        y_j & \sim N(H x_{j k}, \mathrm{std}^2 I)
    """

    L: int
    m: Tensor
    P: Tensor
    F: Tensor
    b: Tensor
    Q: Tensor
    H: Tensor
    every: int
    std: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.L, len(self.m)

    def joint(self) -> tuple[Tensor, Tensor]:
        r"""Returns the mean and the covariance of all states together."""

        L, d = self.shape
        mean, cov = self.m.new_zeros(L, d), self.m.new_zeros(L, d, L, d)
        mean[0], cov[0, :, 0] = self.m, self.P

        for i in range(1, L):
            mean[i] = self.F @ mean[i - 1] + self.b
            cov[i, :, i] = self.F @ cov[i - 1, :, i - 1] @ self.F.T + self.Q

            for j in range(i):
                cov[i, :, j] = self.F @ cov[i - 1, :, j]
                cov[j, :, i] = cov[i, :, j].T

        return mean.flatten(), cov.reshape(L * d, L * d)

    def A(self, x: Tensor) -> Tensor:
        return x[..., :: self.every, :] @ self.H.T

    def matrix(self) -> Tensor:
        r"""Returns A as a matrix from all states to all observations."""

        eye = torch.eye(self.L * len(self.m), dtype=self.m.dtype)

        return self.A(eye.reshape(-1, *self.shape)).flatten(1).T

    def simulate(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        r"""Returns a trajectory and its observation."""

        mean, cov = self.joint()
        z = torch.randn(len(mean), generator=rng, dtype=mean.dtype)
        x = (mean + torch.linalg.cholesky(cov) @ z).reshape(self.shape)
        y = self.A(x)

        return x, y + self.std * torch.randn(y.shape, generator=rng, dtype=y.dtype)

    def posterior(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the mean and the covariance of all states given the observation."""

        mean, cov = self.joint()
        A = self.matrix()
        S = A @ cov @ A.T + self.std**2 * torch.eye(len(A), dtype=A.dtype)
        K = torch.linalg.solve(S, A @ cov).T

        return mean + K @ (y.flatten() - A @ mean), cov - K @ A @ cov

    def smooth(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the mean and the covariance of each state given the observation.

        References:
            | Maximum Likelihood Estimates of Linear Dynamic Systems (Rauch, Tung & Striebel, 1965)
        """

        eye, R = torch.eye(len(self.m)).to(self.m), self.std**2 * torch.eye(len(self.H)).to(self.m)
        filtered, predicted = [], []
        m, P = self.m, self.P

        for i in range(self.L):
            predicted.append((m, P))

            if i % self.every == 0:
                K = torch.linalg.solve(self.H @ P @ self.H.T + R, self.H @ P).T
                m, P = m + K @ (y[i // self.every] - self.H @ m), (eye - K @ self.H) @ P

            filtered.append((m, P))
            m, P = self.F @ m + self.b, self.F @ P @ self.F.T + self.Q

        smoothed = [filtered[-1]]

        for i in reversed(range(self.L - 1)):
            m, P = filtered[i]
            G = torch.linalg.solve(predicted[i + 1][1], self.F @ P).T
            m = m + G @ (smoothed[0][0] - predicted[i + 1][0])
            P = P + G @ (smoothed[0][1] - predicted[i + 1][1]) @ G.T
            smoothed.insert(0, (m, P))

        return cast(tuple[Tensor, Tensor], tuple(map(torch.stack, zip(*smoothed, strict=True))))


def make_chain(
    L: int, d: int = 1, every: int = 1, std: float = 0.3, rho: float = 0.9, seed: int = 0
) -> Chain:
    r"""Returns a stationary chain of variance about 1 that rotates its numbers, seen in part."""

    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.double))[0]
    seen = torch.randn((d + 1) // 2, d, generator=rng, dtype=torch.double)
    m = torch.randn(d, generator=rng, dtype=torch.double) / 2
    eye = torch.eye(d, dtype=torch.double)
    F = rho * (basis if d > 1 else eye)

    return Chain(L, m, eye, F, m - F @ m, (1 - rho**2) * eye, seen, every, std)
