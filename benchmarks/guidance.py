#!/usr/bin/env python
r"""How far are guided samples from the posterior, where it is known?

A chain of L normal states, x' = rho x + noise of variance 1 - rho², is seen every few states with
noise. Its score is known, so that what is off is due to the guidance and the steps alone. Printed,
against the Kalman smoother:

* mean: the error of the ensemble mean, in standard deviations of the posterior (RMS over states);
* std: the standard deviation of the ensemble over that of the posterior (RMS over states);
* fit: the mean square of A(x) - y, in variances of y's noise, over that of the posterior.

The last two are 1 for a perfect ensemble. The sampling error of each is about 1/sqrt(members). No
guidance but `mmps` is exact here, even with infinitely many steps, and none is for other data.

    python benchmarks/guidance.py [--length 32] [--every 4] [--std 0.1] [--rho 0.9]
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sda_ray import VPSDE, DPSGaussianScore, GaussianScore, MMPSGaussianScore


class Normal(nn.Module):
    r"""Estimates the noise in normal data of mean 0 exactly."""

    def __init__(self, cov: Tensor) -> None:
        super().__init__()

        self.values, self.vectors = torch.linalg.eigh(cov)
        self.schedule = (VPSDE(nn.Identity(), ()),)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        mu, sigma = self.schedule[0].mu(t), self.schedule[0].sigma(t)
        z = x @ self.vectors / (mu**2 * self.values + sigma**2)

        return sigma * z @ self.vectors.T


def compare(
    length: int, every: int, std: float, rho: float, members: int, steps: int, tau: float
) -> Iterator[tuple[str, int, float, float, float]]:
    r"""Yields the guidance, the corrections, and how far the ensemble is from the posterior."""

    rng = torch.Generator().manual_seed(0)
    i = torch.arange(length, dtype=torch.double)
    prior = rho ** (i - i[:, None]).abs()
    root = torch.linalg.cholesky(prior)
    truth = root @ torch.randn(length, generator=rng, dtype=torch.double)

    def A(x: Tensor) -> Tensor:
        return x[..., ::every]

    y = A(truth) + std * torch.randn(len(A(truth)), generator=rng, dtype=torch.double)
    S = prior[::every, ::every] + std**2 * torch.eye(len(y))
    K = torch.linalg.solve(S, prior[::every]).T
    mean, cov = K @ y, prior - K @ prior[::every]
    var = cov.diagonal()
    fit = ((A(mean) - y).square() + A(var)).mean()
    sde = VPSDE(Normal(prior), (length,))

    scores: dict[str, nn.Module] = {"posterior score": Normal(cov)}
    scores |= {f"gaussian gamma={g:g}": GaussianScore(y, A, std, sde, g) for g in GAMMAS}
    scores |= {f"dps zeta={z:g}": DPSGaussianScore(y, A, sde, z) for z in ZETAS}
    scores |= {f"mmps iterations={n}": MMPSGaussianScore(y, A, std, sde, n) for n in ITERATIONS}

    for name, score in scores.items():
        offset = mean if name == "posterior score" else torch.zeros(length)

        for corrections in (0, 1, 2):
            posterior = VPSDE(score, (length,))
            start = torch.randn(members, length, generator=rng.manual_seed(1)).double()
            *_, x = posterior.reverse(start, None, steps, corrections, tau, rng)
            x = x + offset
            error = ((x.mean(0) - mean) / var.sqrt()).square().mean().sqrt()
            spread = (x.var(0) / var).mean().sqrt()
            ratio = (A(x) - y).square().mean() / fit

            yield name, corrections, error.item(), spread.item(), ratio.item()


GAMMAS = 1e-3, 1e-2, 1e-1, 1.0
ZETAS = 0.1, 1.0
ITERATIONS = 1, 3, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=32, help="states of the chain")
    parser.add_argument(
        "--every", type=int, default=4, help="the gap between states that are seen"
    )
    parser.add_argument("--std", type=float, default=0.1, help="of the observation's noise")
    parser.add_argument("--rho", type=float, default=0.9, help="the correlation of neighbours")
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tau", type=float, default=0.5, help="amplitude of the corrections")
    args = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'guidance':20} corrections   mean    std    fit")

    for name, corrections, *numbers in compare(**vars(args)):
        print(f"{name:20} {corrections:11}", *(f"{x:6.3f}" for x in numbers), flush=True)


if __name__ == "__main__":
    main()
