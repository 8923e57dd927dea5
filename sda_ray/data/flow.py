r"""Kolmogorov flow: a two-dimensional fluid in a periodic box, stirred by a sine.

References:
    | Machine learning-accelerated computational fluid dynamics (Kochkov et al., 2021)
    | https://www.pnas.org/doi/10.1073/pnas.2101784118
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .solver import Solver

__all__ = ["KolmogorovFlow", "coarsen", "divergence", "isotropic_spectrum", "vorticity"]

SPEED = 3.0  # of the initial field, at most
SPEED_LIMIT = 5.0  # that the time step allows
PEAK = 4  # wavenumber of the initial field

# Cells that are advanced together: few enough for a CPU's cache, many enough to keep it busy.
CELLS = {"cpu": 2**15, "cuda": 2**24}


class KolmogorovFlow:
    r"""Creates a solver of the incompressible Navier-Stokes equations with Kolmogorov forcing.

    .. math:: \dot{u} = - u \cdot \nabla u - \nabla p + 10^{-3} \nabla^2 u - \frac{u}{10}
        + \sin(4 y) \, e_x, \quad \nabla \cdot u = 0

    on :math:`[0, 2\pi)^2`, periodic. The velocities live on a staggered grid of finite volumes:
    in the cell :math:`(i, j)` of side :math:`h`, :math:`u` at :math:`(i + 1, j + \frac{1}{2}) h`
    and :math:`v` at :math:`(i + \frac{1}{2}, j + 1) h`. A step of forward Euler with van Leer
    limited Lax-Wendroff fluxes is followed by a projection onto fields without divergence.

    On a CPU, the bits of a trajectory depend neither on the trajectories that are computed together
    with it, nor on the number of threads.

    An instance keeps its arrays, and must not be used by two threads at once.

    Arguments:
        size: The number of cells along each side.
        dt: The time between two states.
        device: The device to compute on.
    """

    def __init__(
        self, size: int = 256, dt: float = 0.2, device: torch.device | str = "cpu"
    ) -> None:
        h = 2 * math.pi / size
        self.size = size
        self.dt = dt
        self.device = torch.device(device)
        self.steps = math.ceil(dt / (0.5 * h / SPEED_LIMIT))
        self._solvers: dict[int, Solver] = {}

    def prior(self, seeds: Sequence[int]) -> Tensor:
        r"""Draws initial fields :math:`(N, 2, H, W)`, filtered noise without divergence."""

        fields = [_initial_field(self.size, seed) for seed in seeds]

        return torch.from_numpy(np.stack(fields)).to(self.device)

    def transition(self, x: Tensor) -> Tensor:
        r"""Advances states of shape :math:`(*, 2, H, W)` by the time :math:`dt`."""

        at_once = max(1, CELLS.get(self.device.type, CELLS["cuda"]) // self.size**2)
        batch = x.detach().to(self.device, torch.float32).reshape(-1, 2, self.size, self.size)
        out = torch.empty_like(batch)

        with torch.inference_mode():
            for part, result in zip(batch.split(at_once), out.split(at_once), strict=True):
                solver = self._solver(len(part))
                solver.load(part)

                for _ in range(self.steps):
                    solver.step()

                solver.store(result)

        return out.reshape(x.shape)

    def trajectory(self, x: Tensor, length: int, last: int | None = None) -> Tensor:
        r"""Computes the states that follow initial ones of shape :math:`(N, 2, H, W)`.

        Returns:
            The last of them, by default all, with shape :math:`(N, L, 2, H, W)`.
        """

        states: deque[Tensor] = deque(maxlen=last)

        for _ in range(length):
            x = self.transition(x)
            states.append(x)

        return torch.stack(tuple(states), dim=1)

    def _solver(self, batch: int) -> Solver:
        if batch not in self._solvers:
            self._solvers[batch] = Solver(batch, self.size, self.dt, self.steps, self.device)

        return self._solvers[batch]


def _initial_field(n: int, seed: int) -> np.ndarray:
    r"""Draws a field of shape :math:`(2, n, n)` in float64, independent of threads and devices."""

    k = np.fft.fftfreq(n, 1 / n)
    kx, ky = k[:, None], k[None, : n // 2 + 1]
    norm = np.hypot(kx, ky)
    norm[0, 0] = 1

    # Log-normal in the wavenumber, spread over the circle of that radius
    amplitude = np.exp(-((math.log(PEAK) + 0.25 - np.log(norm)) ** 2) / 0.5) / norm**2
    amplitude[0, 0] = 0

    noise = np.random.default_rng(seed).standard_normal((2, n, n))
    u, v = amplitude * np.fft.rfft2(noise)

    # Backward differences make the divergence, forward ones the gradient.
    dx, dy = (1 - np.exp(-2j * math.pi / n * k) for k in (kx, ky))
    laplacian = abs(dx) ** 2 + abs(dy) ** 2
    laplacian[0, 0] = 1
    q = (dx * u + dy * v) / laplacian
    field = np.fft.irfft2(np.stack([u - dx.conj() * q, v - dy.conj() * q]), s=(n, n))

    field *= SPEED / np.hypot(*field).max()

    return field.astype(np.float32)


def coarsen(x: Tensor, r: int) -> Tensor:
    r"""Averages a field of shape :math:`(*, H, W)` over blocks of :math:`r \times r` cells."""

    y = F.avg_pool2d(x.reshape(-1, 1, *x.shape[-2:]), r)

    return y.reshape(*x.shape[:-2], *y.shape[-2:])


def vorticity(x: Tensor) -> Tensor:
    r"""Computes the vorticity :math:`\partial_y u - \partial_x v` in units of the grid spacing.

    The velocities have shape :math:`(*, 2, H, W)`. The differences are central.
    """

    u, v = x.unbind(dim=-3)
    du = u.roll(-1, dims=-1) - u.roll(1, dims=-1)
    dv = v.roll(-1, dims=-2) - v.roll(1, dims=-2)

    return (du - dv) / 2


def divergence(x: Tensor) -> Tensor:
    r"""Computes the divergence :math:`\partial_x u + \partial_y v` in units of the grid spacing.

    The velocities have shape :math:`(*, 2, H, W)`. The differences are central, since velocities
    that were averaged over blocks of cells live close to the centers of the blocks. So the
    divergence of data is small, but not zero: compare it with that.
    """

    u, v = x.unbind(dim=-3)
    du = u.roll(-1, dims=-2) - u.roll(1, dims=-2)
    dv = v.roll(-1, dims=-1) - v.roll(1, dims=-1)

    return (du + dv) / 2


def isotropic_spectrum(x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""Computes the isotropic power spectrum of periodic fields, or their cross-spectrum.

    .. math:: S_k = \sum_{k - 1/2 \le |q| < k + 1/2} \mathrm{Re}(\hat{x}_q \hat{y}_q^*)

    where :math:`q` counts the waves along the shorter side, and :math:`\hat{x}` is scaled such that
    :math:`\sum_k S_k` is the mean of :math:`x y` over the field.

    Arguments:
        x: The fields, with shape :math:`(*, H, W)`.
        y: The other fields, by default the same.

    Returns:
        The spectrum of the wavenumbers :math:`0, 1, \dots` up to the corners of the Fourier plane,
        with shape :math:`(*, K)`, in single precision at least.
    """

    def transform(x: Tensor) -> Tensor:
        return torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)), norm="forward")

    side = min(x.shape[-2:])
    rows, columns = (torch.fft.fftfreq(n, 1 / side, device=x.device) for n in x.shape[-2:])
    shells = torch.hypot(rows[:, None], columns).round().long().flatten()

    a = transform(x)
    power = (a * (a if y is None else transform(y)).conj()).real.flatten(-2)

    return power.new_zeros(*power.shape[:-1], int(shells.max()) + 1).index_add(-1, shells, power)
