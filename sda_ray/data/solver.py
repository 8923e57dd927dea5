r"""Finite-volume solver of Kolmogorov flow, the inner loop of :mod:`sda_ray.data.flow`."""

import math

import torch
from torch import Tensor

__all__ = ["Solver"]

VISCOSITY = 1e-3
DRAG = 0.1
FORCING = 4  # wavenumber


def _constants(n: int, dt: float, steps: int) -> tuple[float, float, float, Tensor]:
    r"""Returns the constants of a step, for velocities in cells per step.

    They are the factor of the velocities, and four times the diffusion, the drag and the force of
    a step. The force is a wave of shape :math:`(n)`.
    """

    h, tau = 2 * math.pi / n, dt / steps
    y = (torch.arange(n, dtype=torch.float64) + 0.5) * h
    wave = 4 * (FORCING * y).sin() * tau * tau / h

    return tau / h, 4 * VISCOSITY * tau / h**2, 4 * DRAG * tau, wave.float()


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

    def compute_sums(self) -> None:
        torch.add(self.left, self.right, out=self.sums)

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

        self.scale, self.diffusion, self.drag, wave = _constants(n, dt, steps)

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

        wave = torch.cat([wave[-2:], wave, wave[:2]]).to(device)
        self.force = wave.repeat(batch * row)[2 * row : -2 * row]

        # Fluxes
        self.sums = zeros(2, 2, cells)  # twice the means at the faces along x and along y
        self.scratch = [zeros(2, cells) for _ in range(5)]
        self.fluxes = [zeros(2, cells), zeros(2, cells)]
        self.advections = [self._advection(axis, shift) for axis, shift in enumerate(shifts)]

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

    def _advection(self, axis: int, s: int) -> _Advection:
        return _Advection(
            self.w, self.sums[axis], self.sums[:, axis], self.fluxes[axis], self.scratch, s
        )

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
            advection.compute_sums()

        for advection in self.advections:
            advection.compute_flux(self.diffusion)

        self._apply()
        self._project()

    def _apply(self) -> None:
        # All changes are summed before they meet the velocities: the force alone would be rounded
        # the same way along a row, step after step, and drive a mean flow.
        (x_in, y_in), (x_out, y_out) = self.inflows, self.outflows
        torch.sub(x_in, x_out, out=self.change).add_(y_in).sub_(y_out)
        self.change[0].add_(self.force)
        self.change.sub_(self.cells, alpha=self.drag)
        self.cells.add_(self.change, alpha=0.25)

    def _project(self) -> None:
        for border, opposite in self.walls:
            border.copy_(opposite)

        u, v, u_left, v_left = self.sides
        torch.sub(u, u_left, out=self.projection.divergence).add_(v).sub_(v_left)
        self.projection.solve()
        self.inner.add_(self.projection.pressure)

        for cells, neighbours in self.gradients:
            cells.sub_(neighbours)
