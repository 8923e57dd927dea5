r"""The solver of :mod:`sda_ray.data.solver` on a CPU that a C compiler is there for.

What the eager solver does in some forty passes over its arrays is done here in two, row by row in
the cache. The C code has no dependency but a compiler, takes it a fraction of a second, and is
compiled anew by each process that simulates, for the very CPU that it runs on.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .solver import Projection, constants

__all__ = ["StencilSolver", "kernels"]

# Without contraction to fused multiply-adds, all compilers and CPUs compute the same bits.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("cc", "gcc", "clang")

SOURCE = r"""
#include <stddef.h>

/* Four times the flux of c through the face between c1 and c2, see _Advection in solver.py */
static inline float flux(float c0, float c1, float c2, float c3, float V, float kappa) {
    float d = c2 - c1, left = c1 - c0, right = c3 - c2;
    float s = V > 0 ? left : right;
    float product = s * d;
    float g = (product > 0 ? product : 0) / (s + d + 1e-30f);
    float size = V > 0 ? V : -V;

    return V * (c1 + c2) - size * (d + (size - 2) * g) - kappa * d;
}

/* One component c of one state, without the pressure. The arrays c and U, the component along
   each axis, have two periodic cells on each side; `across` is the neighbour along the axis of c.
   The buffer holds the fluxes of three rows. */
static void advect(const float *c, const float *U[2], ptrdiff_t across, float *restrict out,
                   const float *restrict force, float *restrict buffer, ptrdiff_t n,
                   float kappa, float drag) {
    const ptrdiff_t row = n + 4;
    float *restrict above = buffer, *restrict below = buffer + n, *restrict side = buffer + 2 * n;

    for (ptrdiff_t i = -1; i < n; i++) {
        const float *p = c + (i + 2) * row + 2;
        const float *x = U[0] + (i + 2) * row + 2, *y = U[1] + (i + 2) * row + 2;

        for (ptrdiff_t j = 0; j < n; j++)
            below[j] = flux(p[j - row], p[j], p[j + row], p[j + 2 * row], x[j] + x[j + across],
                            kappa);

        if (i >= 0) {
            for (ptrdiff_t j = -1; j < n; j++)
                side[j + 1] = flux(p[j - 1], p[j], p[j + 1], p[j + 2], y[j] + y[j + across],
                                   kappa);

            for (ptrdiff_t j = 0; j < n; j++) {
                float change = above[j] - below[j] + side[j] - side[j + 1];
                out[i * n + j] = p[j] + 0.25f * (change + force[j] - drag * p[j]);
            }
        }

        float *swap = above;
        above = below;
        below = swap;
    }
}

void advance(const float *w, float *out, float *divergence, const float *force, float *buffer,
             ptrdiff_t batch, ptrdiff_t n, float kappa, float drag) {
    const ptrdiff_t row = n + 4;

    for (ptrdiff_t b = 0; b < batch; b++) {
        const float *U[2] = {w + b * row * row, w + (batch + b) * row * row};
        float *u = out + b * n * n, *v = out + (batch + b) * n * n;

        advect(U[0], U, row, u, force, buffer, n, kappa, drag);
        advect(U[1], U, 1, v, force + n, buffer, n, kappa, drag);

        for (ptrdiff_t i = 0; i < n; i++) {
            const float *x = u + i * n, *x0 = u + (i ? i - 1 : n - 1) * n, *y = v + i * n;
            float *restrict d = divergence + (b * n + i) * n;

            d[0] = x[0] - x0[0] + y[0] - y[n - 1];

            for (ptrdiff_t j = 1; j < n; j++)
                d[j] = x[j] - x0[j] + y[j] - y[j - 1];
        }
    }
}

/* Subtracts the gradient of q, and fills the periodic cells. */
void correct(float *w, const float *out, const float *q, ptrdiff_t batch, ptrdiff_t n) {
    const ptrdiff_t row = n + 4;

    for (ptrdiff_t k = 0; k < 2 * batch; k++) {
        float *grid = w + k * row * row;

        for (ptrdiff_t i = 0; i < n; i++) {
            const float *c = out + (k * n + i) * n, *q0 = q + (k % batch * n + i) * n;
            const float *q1 = k < batch ? q + (k % batch * n + (i + 1) % n) * n : q0 + 1;
            float *restrict to = grid + (i + 2) * row + 2;

            for (ptrdiff_t j = 0; j < n - 1; j++)
                to[j] = c[j] + q0[j] - q1[j];

            to[n - 1] = c[n - 1] + q0[n - 1] - (k < batch ? q1[n - 1] : q0[0]);
            to[-2] = to[n - 2];
            to[-1] = to[n - 1];
            to[n] = to[0];
            to[n + 1] = to[1];
        }

        for (ptrdiff_t j = 0; j < 2 * row; j++) {
            grid[j] = grid[n * row + j];
            grid[(n + 2) * row + j] = grid[2 * row + j];
        }
    }
}
"""


@functools.cache
def kernels() -> ctypes.CDLL | None:
    r"""Returns the compiled functions, or None if this machine cannot make them."""

    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)

    if compiler is None:
        return None

    with tempfile.TemporaryDirectory(prefix="sda-ray-") as directory:
        source, library = Path(directory) / "stencil.c", Path(directory) / "stencil.so"
        source.write_text(SOURCE)
        command = [compiler, *FLAGS, "-shared", "-fPIC", str(source), "-o", str(library)]

        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            found = ctypes.CDLL(str(library))  # stays loaded when the file is gone
        except (OSError, subprocess.SubprocessError):
            return None

    pointer, size, number = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float
    found.advance.argtypes = [*[pointer] * 5, size, size, number, number]
    found.correct.argtypes = [*[pointer] * 3, size, size]
    found.advance.restype = found.correct.restype = None

    return found


class StencilSolver:
    r"""Creates the arrays in which a batch of states is advanced by compiled code.

    The arguments and what it computes are those of :class:`sda_ray.data.solver.Solver`, on a CPU.
    """

    def __init__(self, batch: int, n: int, dt: float, steps: int, library: ctypes.CDLL) -> None:
        self.scale, kappa, drag, wave = constants(n, dt, steps)

        self.w = torch.zeros(2, batch, n + 4, n + 4)
        self.inner = self.w[..., 2:-2, 2:-2]
        self.out = torch.zeros(2, batch, n, n)
        self.force = torch.stack([wave, torch.zeros_like(wave)])
        self.buffer = torch.zeros(3 * n + 1)
        self.projection = Projection(batch, n, torch.device("cpu"))

        q = self.projection
        arrays = self.w, self.out, q.divergence, self.force, self.buffer
        sizes = batch, n
        self.compiled = library
        self.advance = (*(x.data_ptr() for x in arrays), *sizes, kappa, drag)
        self.correct = (*(x.data_ptr() for x in (self.w, self.out, q.pressure)), *sizes)

    def load(self, x: Tensor) -> None:
        r"""Sets the states to :math:`x`, of shape :math:`(B, 2, n, n)`."""

        torch.mul(x.transpose(0, 1), self.scale, out=self.out)
        self.projection.pressure.zero_()
        self.compiled.correct(*self.correct)

    def store(self, x: Tensor) -> None:
        r"""Writes the states to :math:`x`, of shape :math:`(B, 2, n, n)`."""

        torch.div(self.inner.transpose(0, 1), self.scale, out=x)

    def step(self) -> None:
        r"""Advances the states by :math:`dt / steps`."""

        self.compiled.advance(*self.advance)
        self.projection.solve()
        self.compiled.correct(*self.correct)
