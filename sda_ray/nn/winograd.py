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

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

M = 4  # outputs along each side of a tile
R = 3  # taps along each side of the kernel
N = M + R - 1  # inputs along each side of a tile

CHANNELS = 48  # least number of channels for which it is faster than the direct sum
TILES = 128  # least number of tiles in a batch, since the weights are transformed once for it
ROOM = 2**22  # most numbers in a transformed piece of a batch, so that it fits into the cache


def is_traced() -> bool:
    r"""Returns whether the network is compiled or traced, for which all operations are plain."""

    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def pays(x: Tensor, weight: Tensor, stride: int) -> bool:
    r"""Returns whether :func:`winograd_conv2d` is applicable and faster than the direct sum."""

    return (
        x.device.type == "cpu"
        and not is_traced()
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[-1] == R
        and min(weight.shape[:2]) >= CHANNELS
        and stride == 1
        and all(n >= 2 * M and n % M == 0 for n in x.shape[-2:])
        and x.shape[0] * x.shape[2] * x.shape[3] >= TILES * M**2
    )


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Computes a circular convolution, whose result has its channels last in memory.

    Its first derivatives are as fast. All others are those of the direct sum. The field has shape
    :math:`(B, C, H, W)`, where :math:`H` and :math:`W` are multiples of 4, and the weights
    :math:`(C', C, 3, 3)`.
    """

    y: Tensor = _Winograd.apply(_forward, _direct, x, weight, bias)

    return y


def _direct(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def _direct_backward(
    x: Tensor, weight: Tensor, grad: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    _, vjp = _vjp(_direct, x, weight, weight.new_zeros(len(weight)))

    return tuple(d for d, wanted in zip(vjp(grad), wants, strict=False) if wanted)


def _vjp(f: Callable[..., Any], *x: Tensor) -> tuple[Any, Callable[..., Any]]:
    out, vjp, *_ = torch.func.vjp(f, *x)

    return out, vjp


class _Fast(torch.autograd.Function):
    r"""A fast function, with the derivatives and the vectorization of its plain formulation."""

    @staticmethod
    def forward(fast: Callable[..., Any], plain: Callable[..., Any], *tensors: Tensor) -> Any:
        return fast(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.plain, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, vjp = _vjp(ctx.plain, *ctx.saved_tensors)

        return None, None, *vjp(grads if isinstance(out, tuple) else grads[0])

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor) -> Any:
        # The transpose of the transpose: torch.func.jvp cannot be nested in other forward modes.
        out, back = _vjp(ctx.plain, *ctx.saved_tensors)
        _, forth = _vjp(back, out)

        return forth(tangents)[0]

    @staticmethod
    def vmap(info: Any, dims: Any, fast: Any, plain: Any, *tensors: Tensor) -> tuple[Any, Any]:
        out = torch.vmap(plain, dims[2:])(*tensors)

        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0


class _Winograd(_Fast):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        wants = ctx.needs_input_grad[2:4]
        fast, plain = (partial(f, wants=wants) for f in (_backward, _direct_backward))
        found = iter(_Fast.apply(fast, plain, x, weight, *grads) if any(wants) else ())
        dx, dw = (next(found) if wanted else None for wanted in wants)

        return None, None, dx, dw, grads[0].sum((0, 2, 3))


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    back, _, _ = _matrices(x.dtype)
    out = _empty(len(x), len(weight), like=x)
    x, z = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    u = _transformed(weight)

    for part, y in zip(_pieces(x), _pieces(z, like=x), strict=True):
        v = torch.bmm(_inputs(part), u)
        tiles = _both(back, v).view(M, M, *_tiles(y))
        torch.add(tiles.permute(2, 3, 0, 4, 1, 5), bias, out=_split(y))

    return out


def _empty(*sizes: int, like: Tensor) -> Tensor:
    r"""Returns an empty field with its channels last in memory.

    Forward-mode differentiation accepts no view as a result.
    """

    return torch.empty(
        (*sizes, *like.shape[2:]), dtype=like.dtype, memory_format=torch.channels_last
    )


def _backward(
    x: Tensor, weight: Tensor, grad: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    r"""Returns the wanted gradients. Each product is the adjoint of one in the forward pass."""

    back, there, inputs = _matrices(x.dtype)
    wants_x, wants_weight = wants
    dx, dw = _empty(*x.shape[:2], like=x) if wants_x else x, torch.empty_like(weight)
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1).contiguous()

    u = _transformed(weight)
    du = torch.zeros_like(u)
    parts = _pieces(x), _pieces(grad, like=x), _pieces(dx.permute(0, 2, 3, 1), like=x)

    for part, g, d in zip(*parts, strict=True):
        tiles = _split(g).permute(2, 4, 0, 1, 3, 5).contiguous()
        dv = _both(back.T, tiles).view(N * N, -1, g.shape[-1])

        if wants_weight:
            du += torch.bmm(_inputs(part).transpose(1, 2), dv)

        if wants_x:
            products = torch.bmm(dv, u.transpose(1, 2))
            _scatter(_both(inputs.T, products).view(N, N, *_tiles(part)), d)

    dw.copy_(_both(there.T, du).view(R, R, *u.shape[1:]).permute(3, 2, 0, 1))

    return tuple(d for d, wanted in zip((dx, dw), wants, strict=True) if wanted)


@cache
@torch.inference_mode(False)  # a cached inference tensor could not be used in training
def _matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the transforms of products, weights and inputs along one axis of a tile.

    They are those of Toom and Cook: two polynomials are evaluated at 0, 1, -1, 1/2, -2 and
    infinity, multiplied there, and interpolated; a convolution of a tile is the transpose of that.
    Symmetric points, such as 0, 1, -1, 2, -2, have one and a half times the rounding error.
    """

    products = [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 1 / 2, -2, 0],
        [0, 1, 1, 1 / 4, 4, 0],
        [0, 1, -1, 1 / 8, -8, 1],
    ]
    weights = [
        [1, 0, 0],
        [1 / 3, 1 / 3, 1 / 3],
        [-1 / 3, 1 / 3, -1 / 3],
        [-16 / 15, -8 / 15, -4 / 15],
        [1 / 15, -2 / 15, 4 / 15],
        [0, 0, 1],
    ]
    inputs = [
        [1, -3 / 2, -2, 3 / 2, 1, 0],
        [0, -1, 1 / 2, 5 / 2, 1, 0],
        [0, 1, -5 / 2, 1 / 2, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 1 / 2, -1, -1 / 2, 1, 0],
        [0, 1, -3 / 2, -2, 3 / 2, 1],
    ]
    back, there, forth = (
        torch.tensor(x, dtype=dtype, device="cpu") for x in (products, weights, inputs)
    )

    return back, there, forth


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
