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

VISCOSITY = 1e-3
DRAG = 0.1
FORCING = 4  # wavenumber
SPEED = 3.0  # of the initial field, at most
SPEED_LIMIT = 5.0  # that the time step allows
PEAK = 4  # wavenumber of the initial field

# Cells that are advanced together: few enough for a CPU's cache, many enough to keep it busy.
CELLS = {"cpu": 2**15, "cuda": 2**24}


# Solver


class _Projection:
    r"""Creates the pressure whose gradient carries the divergence of a batch of states."""

    def __init__(self, batch: int, n: int, device: torch.device) -> None:
        k = 2 * math.pi / n * torch.arange(n, device=device, dtype=torch.float64)
        eigenvalues = 2 * k.cos()[:, None] + 2 * k[: n // 2 + 1].cos() - 4
        eigenvalues[0, 0] = torch.inf
        self.inverse = eigenvalues.reciprocal().float()[..., None].repeat(1, 1, 2)
        self.divergence = torch.zeros(batch, n, n, device=device)
        self.pressure = torch.zeros(batch, n, n, device=device)

        # MKL's transforms of small fields change in the last bit with the batch and the threads,
        # those of one axis even alone.
        spectrum = torch.zeros(batch, n, n // 2 + 1, dtype=torch.complex64, device=device)
        fields = (self.divergence, spectrum, self.pressure)
        self.transforms = [fields] if device.type != "cpu" else list(zip(*fields, strict=True))
        self.parts = torch.view_as_real(spectrum)

    def solve(self) -> None:
        for divergence, spectrum, _ in self.transforms:
            torch.fft.rfft2(divergence, out=spectrum)

        self.parts.mul_(self.inverse)

        for _, spectrum, pressure in self.transforms:
            torch.fft.irfft2(spectrum, s=pressure.shape[-2:], out=pressure)


class _Advection:
    r"""Creates the advection and diffusion of both components along one axis.

    Through a face between the cells L and R of a component :math:`c`, with a velocity :math:`U` in
    cells per step, flows

    .. math:: U c_{up} + |U| (1 - |U|) g - \kappa d, \quad g = \frac{s d}{s + d} [s d > 0]

    where :math:`d = c_R - c_L` and :math:`s` is the same difference one face upwind. The harmonic
    mean :math:`g` is made once per cell from its two faces, and the upwind one of the two cells is
    taken. Four times the flux, in terms of the sums :math:`V = 2 U` and :math:`m = c_L + c_R`, is

    .. math:: V m - |V| (d + (|V| - 2) g) - 4 \kappa d.
    """

    def __init__(
        self, w: Tensor, sums: Tensor, speed: Tensor, flux: Tensor, scratch: list[Tensor], s: int
    ) -> None:
        a, b, c, d, e = scratch
        n = w.shape[-1]
        faces = slice(s, n - 2 * s)

        self.left, self.right, self.sums = w[:, :-s], w[:, s:], sums[:, :-s]
        self.m, self.speed, self.flux = sums[:, faces], speed[:, faces], flux[:, : n - 3 * s]
        self.difference, self.d = a[:, :-s], a[:, faces]
        self.d_left, self.d_right = a[:, : -2 * s], a[:, s:-s]
        self.product, self.total = b[:, : n - 2 * s], c[:, : n - 2 * s]
        self.g_left, self.g_right = b[:, : n - 3 * s], b[:, s : n - 2 * s]
        self.g, self.magnitude, self.t = (x[:, : n - 3 * s] for x in (c, d, e))

    def compute_flux(self, diffusion: float) -> None:
        torch.sub(self.right, self.left, out=self.difference)

        # Where both differences vanish, so does the mean: 0 / 1e-30.
        torch.mul(self.d_left, self.d_right, out=self.product).clamp_min_(0)
        torch.add(self.d_left, self.d_right, out=self.total).add_(1e-30)
        self.product.div_(self.total)

        # With weights 0 and 1, lerp is a faster where.
        torch.gt(self.speed, 0, out=self.g)
        torch.lerp(self.g_right, self.g_left, self.g, out=self.g)

        torch.abs(self.speed, out=self.magnitude)
        torch.sub(self.magnitude, 2, out=self.t)
        torch.addcmul(self.d, self.t, self.g, out=self.t)
        torch.mul(self.speed, self.m, out=self.flux)
        self.flux.addcmul_(self.magnitude, self.t, value=-1).sub_(self.d, alpha=diffusion)


class Solver:
    r"""Creates the arrays in which a batch of states is advanced, in place, step by step.

    Velocities are stored in cells per step, with two periodic cells on each side, and flattened
    to :math:`(2, B (n + 4)^2)`. A neighbour is then an offset, the row length along x and 1 along
    y, and every operation runs over long contiguous memory; the results in and across the borders
    are never used. The views into the arrays are made once: with small arrays, making them would
    take as long as the arithmetic.

    Arguments:
        batch: The number :math:`B` of states.
        n: The number of cells along each side.
        dt: The time between two states, of `steps` steps.
    """

    def __init__(self, batch: int, n: int, dt: float, steps: int, device: torch.device) -> None:
        row = n + 4
        cells = batch * row**2
        shifts = (row, 1)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        # The factor of the velocities; four times the diffusion, the drag and the force of a step
        h, tau = 2 * math.pi / n, dt / steps
        self.scale, self.diffusion, self.drag = tau / h, 4 * VISCOSITY * tau / h**2, 4 * DRAG * tau
        y = (torch.arange(n, dtype=torch.float64) + 0.5) * h
        wave = (4 * (FORCING * y).sin() * tau * tau / h).float()
        wave = torch.cat([wave[-2:], wave, wave[:2]]).to(device)
        self.force = wave.repeat(batch * row)[2 * row : -2 * row]

        # State
        self.w = zeros(2, cells)
        self.grid = self.w.view(2, batch, row, row)
        self.inner = self.grid[:, :, 2:-2, 2:-2]
        self.borders = [
            (self.grid[:, :, :2], self.grid[:, :, -4:-2]),
            (self.grid[:, :, -2:], self.grid[:, :, 2:4]),
            (self.grid[..., :2], self.grid[..., -4:-2]),
            (self.grid[..., -2:], self.grid[..., 2:4]),
        ]

        # Fluxes
        self.sums = zeros(2, 2, cells)  # twice the means at the faces along x and along y
        self.scratch = [zeros(2, cells) for _ in range(5)]
        self.fluxes = [zeros(2, cells), zeros(2, cells)]
        self.advections = [
            _Advection(self.w, self.sums[i], self.sums[:, i], self.fluxes[i], self.scratch, s)
            for i, s in enumerate(shifts)
        ]

        # Changes of the cells between the outermost rows; a flux is stored at its face less s.
        a, b = 2 * row, cells - 2 * row
        self.cells = self.w[:, a:b]
        self.change = self.scratch[0][:, a:b]
        self.inflows = [
            x[:, a - 2 * s : b - 2 * s] for x, s in zip(self.fluxes, shifts, strict=True)
        ]
        self.outflows = [x[:, a - s : b - s] for x, s in zip(self.fluxes, shifts, strict=True)]

        # Projection
        self.projection = _Projection(batch, n, device)
        (u, v), (u0, v0), q = self.grid, self.inner, self.projection.pressure
        self.walls = [(u[:, 1], u[:, -3]), (v[..., 1], v[..., -3])]
        self.sides = (u0, v0, u[:, 1:-3, 2:-2], v[:, 2:-2, 1:-3])
        self.gradients = [
            (u0[:, :-1], q[:, 1:]),
            (u0[:, -1], q[:, 0]),
            (v0[..., :-1], q[..., 1:]),
            (v0[..., -1], q[..., 0]),
        ]

    def load(self, x: Tensor) -> None:
        r"""Sets the states to :math:`x`, of shape :math:`(B, 2, n, n)`."""

        torch.mul(x.transpose(0, 1), self.scale, out=self.inner)

    def store(self, x: Tensor) -> None:
        r"""Writes the states to :math:`x`, of shape :math:`(B, 2, n, n)`."""

        torch.div(self.inner.transpose(0, 1), self.scale, out=x)

    def step(self) -> None:
        r"""Advances the states by :math:`dt / steps`."""

        for border, opposite in self.borders:
            border.copy_(opposite)

        for advection in self.advections:
            torch.add(advection.left, advection.right, out=advection.sums)

        for advection in self.advections:
            advection.compute_flux(self.diffusion)

        # All changes are summed before they meet the velocities: the force alone would be rounded
        # the same way along a row, step after step, and drive a mean flow.
        (x_in, y_in), (x_out, y_out) = self.inflows, self.outflows
        torch.sub(x_in, x_out, out=self.change).add_(y_in).sub_(y_out)
        self.change[0].add_(self.force)
        self.change.sub_(self.cells, alpha=self.drag)
        self.cells.add_(self.change, alpha=0.25)

        # The projection
        for border, opposite in self.walls:
            border.copy_(opposite)

        u, v, u_left, v_left = self.sides
        torch.sub(u, u_left, out=self.projection.divergence).add_(v).sub_(v_left)
        self.projection.solve()
        self.inner.add_(self.projection.pressure)

        for cells, neighbours in self.gradients:
            cells.sub_(neighbours)


# Flow


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
                if (n := len(part)) not in self._solvers:
                    self._solvers[n] = Solver(n, self.size, self.dt, self.steps, self.device)

                solver = self._solvers[n]
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


# Fields


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
