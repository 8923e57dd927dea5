#!/usr/bin/env python
r"""Writes `mmps.npz`: moment matching posterior sampling as the package azula computes it.

azula is by the authors of the method. Its denoiser is not linear, nor is its operator, and the
Jacobian of the denoiser is not symmetric, so that every product counts. Its result is the mean of
the posterior, :math:`\hat{x}_y`, after one, two and three conjugate gradients.

Ours is the noise :math:`(x(t) - \mu \hat{x}_y) / \sigma`. Our schedules are azula's:

* `exp`, :math:`\eta^{t^2}`, is `VPSchedule(eta, eta)` at the same time;
* `cos`, :math:`\cos(t \arccos \sqrt{\eta})^2`, is `CosineSchedule(eta, eta)`, which is
  :math:`\cos(s \arccos \eta)`, at the time :math:`s = \arccos \mu(t) / \arccos \eta`.

Both have :math:`\sigma^2 = 1 - \mu^2 + \eta^2`.

    pip install azula==0.11.1 numpy
    python tests/reference/make_mmps.py
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance.mmps import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import CosineSchedule, VPSchedule
from torch import Tensor

ETA = 1e-3
STD = 0.2
TIMES = (0.1, 0.4, 0.7, 0.95)


class Reference(Denoiser):
    def __init__(self, W: Tensor, schedule: Any) -> None:
        super().__init__()

        self.W, self.schedule = W, schedule

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
        mu, sigma = self.schedule(t)
        eps = sigma * x_t + 0.3 * mu**2 * torch.tanh(x_t @ self.W)

        return DiracPosterior(mean=(x_t - sigma * eps) / mu)


def A(x: Tensor) -> Tensor:
    return x[..., ::2] / (1 + x[..., ::2].abs())


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    W, x = (torch.randn(shape, generator=rng).double() for shape in ((8, 8), (3, 8)))
    W, y = W / 8**0.5, torch.rand(4, generator=rng).double() - 0.5
    arrays: Any = {"W": W, "x": x, "y": y, "t": torch.tensor(TIMES, dtype=torch.double)}

    for name, schedule in (("exp", VPSchedule(ETA, ETA)), ("cos", CosineSchedule(ETA, ETA))):
        for iterations in (1, 2, 3):
            denoiser = MMPSDenoiser(
                Reference(W, schedule), y, A, IsotropicCovariance(STD**2), "cg", iterations
            )
            means = []

            for t in TIMES:
                if name == "cos":
                    t = math.acos(math.cos(t * math.acos(math.sqrt(ETA))) ** 2) / math.acos(ETA)

                means.append(denoiser(x, torch.tensor(t, dtype=torch.double)).mean)

            arrays[f"{name}_{iterations}"] = torch.stack(means)

    file = Path(__file__).with_name("mmps.npz")
    np.savez_compressed(file, **{key: x.numpy() for key, x in arrays.items()})


if __name__ == "__main__":
    main()
