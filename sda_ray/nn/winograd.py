r"""Convolutions of periodic fields with 3x3 kernels, with a quarter of the multiplications.

A tile of 4x4 outputs sees 6x6 inputs. Both are transformed such that the convolution of a tile
becomes 36 products of one input and one weight each, instead of 144, which are then sums over
channels: matrix products. The transforms cost a pass through memory each, so that this pays where
there are many channels. The maths is exact; the rounding error is that of a sum term by term, 2 to
7 times that of torch's direct sum.

References:
    | Fast Algorithms for Convolutional Neural Networks (Lavin & Gray, 2016)
    | https://arxiv.org/abs/1509.09308
"""

from fractions import Fraction
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["pays", "winograd_conv2d"]

M = 4  # outputs along each side of a tile
R = 3  # taps along each side of the kernel
N = M + R - 1  # inputs along each side of a tile

# Where the polynomials of the transforms are evaluated, beside infinity. Symmetric points, such as
# 0, 1, -1, 2, -2, have one and a half times the rounding error.
POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2))

CHANNELS = 48  # from which on it is faster than the direct sum, and
TILES = 128  # in a batch: the weights are transformed for each
ROOM = 2**22  # numbers in a transformed piece of a batch, which shall fit into the cache


def pays(x: Tensor, weight: Tensor, stride: int) -> bool:
    r"""Tells whether :func:`winograd_conv2d` can be used, and is faster than the direct sum.

    Arguments:
        x: The field, with shape :math:`(B, C, H, W)`.
        weight: The weights, with shape :math:`(C', C, k, k)`.
        stride: The stride.
    """

    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[-1] == R
        and min(weight.shape[:2]) >= CHANNELS
        and stride == 1
        and all(n >= 2 * M and n % M == 0 for n in x.shape[-2:])
        and x.shape[0] * x.shape[2] * x.shape[3] >= TILES * M**2
    )


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Computes a circular convolution.

    Arguments:
        x: The field, with shape :math:`(B, C, H, W)`, where :math:`H` and :math:`W` are multiples
            of 4.
        weight: The weights, with shape :math:`(C', C, 3, 3)`.
        bias: The biases, with shape :math:`(C')`.

    Returns:
        The result, with shape :math:`(B, C', H, W)` and its channels last in memory.
    """

    return _Winograd.apply(x, weight, bias)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)

        back, _, _ = _matrices(x.dtype)
        x, u = x.permute(0, 2, 3, 1), _transformed(weight)
        out = x.new_empty(*x.shape[:3], len(weight))

        for part, y in zip(_pieces(x), _pieces(out, like=x), strict=True):
            v = torch.bmm(_inputs(part), u)
            tiles = _both(back, v).view(M, M, *_tiles(y))
            torch.add(tiles.permute(2, 3, 0, 4, 1, 5), bias, out=_split(y))

        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        # Each product is the adjoint of one in the forward pass.
        x, weight = ctx.saved_tensors
        back, there, inputs = _matrices(x.dtype)
        wants_x, wants_weight, _ = ctx.needs_input_grad
        x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1).contiguous()

        u = _transformed(weight)
        du = torch.zeros_like(u)
        dx = x.new_empty(x.shape if wants_x else (0,))
        parts = _pieces(x), _pieces(grad, like=x), _pieces(dx, like=x) if wants_x else repeat(dx)

        for part, g, d in zip(*parts, strict=False):
            tiles = _split(g).permute(2, 4, 0, 1, 3, 5).contiguous()
            dv = _both(back.T, tiles).view(N * N, -1, g.shape[-1])

            if wants_weight:
                du += torch.bmm(_inputs(part).transpose(1, 2), dv)

            if wants_x:
                products = torch.bmm(dv, u.transpose(1, 2))
                _scatter(_both(inputs.T, products).view(N, N, *_tiles(part)), d)

        dw = _both(there.T, du).view(R, R, *u.shape[1:]).permute(3, 2, 0, 1)

        return (
            dx.permute(0, 3, 1, 2) if wants_x else None,
            dw if wants_weight else None,
            grad.sum((0, 1, 2)),
        )


@cache
@torch.inference_mode(False)  # what is kept shall serve a training as well
def _matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the transforms of products, weights and inputs along one axis of a tile.

    They are those of Toom and Cook: two polynomials are evaluated at the points, multiplied there,
    and interpolated; a convolution of a tile is the transpose of that.
    """

    def powers(count: int) -> list[list[Fraction]]:
        return [[p**j for j in range(count)] for p in POINTS] + [
            [Fraction(j == count - 1) for j in range(count)]
        ]

    def polynomial(roots: list[Fraction]) -> list[Fraction]:
        coefficients = [Fraction(1)]

        for root in roots:
            shifted, scaled = [Fraction(0), *coefficients], [*coefficients, Fraction(0)]
            coefficients = [a - root * b for a, b in zip(shifted, scaled, strict=True)]

        return coefficients

    weights, inputs = powers(R), []

    for i, p in enumerate(POINTS):
        others = [q for q in POINTS if q != p]
        scale = Fraction(1)

        for q in others:
            scale *= p - q

        weights[i] = [x / scale for x in weights[i]]
        inputs.append([*polynomial(others), Fraction(0)])

    inputs.append(polynomial(list(POINTS)))

    def tensor(matrix: list[list[Fraction]]) -> Tensor:
        return torch.tensor([[float(x) for x in row] for row in matrix], dtype=dtype, device="cpu")

    return tensor(powers(M)).T.contiguous(), tensor(weights), tensor(inputs)


def _both(matrix: Tensor, x: Tensor) -> Tensor:
    r"""Transforms tiles along both of their axes, the first of :math:`(m, m, *)`, maybe merged."""

    m = matrix.shape[1]

    return torch.matmul(matrix, (matrix @ x.view(m, -1)).view(len(matrix), m, -1))


def _transformed(weight: Tensor) -> Tensor:
    r"""Returns the transformed weights, with shape :math:`(36, C, C')`."""

    _, there, _ = _matrices(weight.dtype)
    taps = weight.permute(2, 3, 1, 0).contiguous()

    return _both(there, taps).view(N * N, *taps.shape[2:])


def _inputs(x: Tensor) -> Tensor:
    r"""Returns the transformed tiles of a field, with shape :math:`(36, T, C)`."""

    _, _, inputs = _matrices(x.dtype)
    rows = torch.cat((x[:, -1:], x, x[:, :1]), 1)
    padded = torch.cat((rows[:, :, -1:], rows, rows[:, :, :1]), 2)
    tiles = padded.unfold(1, N, M).unfold(2, N, M).permute(4, 5, 0, 1, 2, 3).contiguous()

    return _both(inputs, tiles).view(N * N, -1, x.shape[-1])


def _scatter(tiles: Tensor, out: Tensor) -> None:
    r"""Writes the sum of overlapping tiles, which it changes: the adjoint of cutting them out."""

    for axis in (0, 1):
        parts = tiles.unbind(axis)
        _add_shifted(parts[M], parts[0], 2 + axis, -1)  # what sticks out into the tile before
        _add_shifted(parts[1], parts[-1], 2 + axis, 1)  # and into the next one
        tiles = tiles.narrow(axis, 1, M)

    _split(out).copy_(tiles.permute(2, 3, 0, 4, 1, 5))


def _add_shifted(x: Tensor, y: Tensor, axis: int, shift: int) -> None:
    r"""Adds a tensor that is rolled along an axis by one cell, forwards or backwards."""

    n = x.shape[axis] - 1
    # Where the bulk goes, and the one cell that goes around
    to, back = (1, 0) if shift > 0 else (0, n)
    x.narrow(axis, to, n).add_(y.narrow(axis, 1 - to, n))
    x.narrow(axis, back, 1).add_(y.narrow(axis, n - back, 1))


def _tiles(x: Tensor) -> tuple[int, ...]:
    B, H, W, C = x.shape

    return B, H // M, W // M, C


def _split(x: Tensor) -> Tensor:
    r"""Returns a view of a field, tile by tile, with shape :math:`(B, H/4, 4, W/4, 4, C)`."""

    B, H, W, C = _tiles(x)

    return x.view(B, H, M, W, M, C)


def _pieces(x: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    r"""Returns a batch in pieces, those of another batch if given."""

    like = x if like is None else like
    _, H, W, C = _tiles(like)

    return x.split(max(1, ROOM // (N * N * H * W * C)))
