r"""Convolutions of periodic fields, with as few and as small operations as the maths allows.

Feature maps are kept in memory with their channels last, from the first convolution to the last:
the kernels of the convolutions and of the layer norm are fastest there, and any operation that
falls back to the other layout costs a copy before and after.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import full, lower
from .winograd import is_traced, pays, winograd_conv2d

Map = Callable[[Tensor], Tensor]


class LinearMap(torch.autograd.Function):
    r"""A linear map of one tensor, given as a fast function and that of its transpose.

    As compositions of slices, autograd would write one full-size gradient for each slice. The
    derivatives of any order and in any mode are the map or its transpose again, so that it works
    under every transform of :mod:`torch.func`.
    """

    @staticmethod
    def forward(x: Tensor, forth: Map, back: Map) -> Tensor:
        return forth(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Map, Map], output: Tensor) -> None:
        _, ctx.forth, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return LinearMap.apply(grad, ctx.back, ctx.forth), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return LinearMap.apply(tangent, ctx.forth, ctx.back)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, forth: Map, back: Map) -> tuple[Tensor, int]:
        x = x.movedim(dims[0], 0)
        y = LinearMap.apply(x.flatten(0, 1), forth, back)

        return y.unflatten(0, x.shape[:2]), 0


def circular_pad(x: Tensor, padding: int) -> Tensor:
    r"""Pads a periodic field :math:`(B, C, H, W)` with its own opposite borders.

    The result has its channels last in memory, whatever the layout of the field. The padding is at
    most :math:`\min(H, W)` cells on each side.
    """

    if padding > min(x.shape[-2:]):
        raise ValueError(
            f"padding is {padding}, but must be at most the size of the field, here "
            f"{tuple(x.shape[-2:])}. Use a smaller kernel or fewer levels."
        )

    if is_traced():
        return F.pad(x, (padding,) * 4, mode="circular")

    return LinearMap.apply(x, partial(_pad, p=padding), partial(_pad_transposed, p=padding))


def _pad(x: Tensor, p: int) -> Tensor:
    B, C, H, W = x.shape
    out = x.new_empty(B, H + 2 * p, W + 2 * p, C)
    out[:, p : H + p, p : W + p] = x.permute(0, 2, 3, 1)

    out[:, p : H + p, :p] = out[:, p : H + p, W : W + p]
    out[:, p : H + p, W + p :] = out[:, p : H + p, p : 2 * p]
    out[:, :p] = out[:, H : H + p]
    out[:, H + p :] = out[:, p : 2 * p]

    return out.permute(0, 3, 1, 2)


def _pad_transposed(y: Tensor, p: int) -> Tensor:
    r"""Returns the sum of all cells of a padded field that are the same cell of the field."""

    H, W = (n - 2 * p for n in y.shape[2:])
    y = y.permute(0, 2, 3, 1)
    out = y[:, p : H + p, p : W + p].contiguous()
    inner, first, last = slice(p, -p or None), slice(p), slice(-p or None, None)

    if p > 0:
        rows = ((slice(H - p, H), first), (slice(p), last))
        columns = ((slice(W - p, W), first), (slice(p), last))

        for i, k in rows:
            out[:, i] += y[:, k, inner]

        for j, m in columns:
            out[:, :, j] += y[:, inner, m]

        for i, k in rows:
            for j, m in columns:
                out[:, i, j] += y[:, k, m]

    return out.permute(0, 3, 1, 2)


def upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    r"""Computes a circular convolution of the doubled field, without doubling it.

    In a field whose cells are repeated twice along each axis, several of the :math:`k^2` taps see
    the same value. Their weights are summed first, for each of the four positions of an output
    within a cell of the field, which leaves :math:`(p + 1)^2` taps, where :math:`p = (k - 1) / 2`.
    To the result, a field `skip` of its shape :math:`(B, C', 2H, 2W)` is added.
    """

    p = weight.shape[-1] // 2

    if is_traced():
        x = circular_pad(F.interpolate(lower(x), scale_factor=2.0), p)
        return _conv2d(x, weight, bias) + skip

    H, W = x.shape[-2:]
    x = circular_pad(lower(x), (p + 1) // 2)
    y = _conv2d(x, _phase_weights(weight), bias.repeat(4))
    size = y.shape[-2] - H, y.shape[-1] - W  # by how much it is larger: 0 or 1

    return skip + LinearMap.apply(
        y, partial(_interleave, excess=size), partial(_interleave_transposed, excess=size)
    )


def _interleave(y: Tensor, excess: tuple[int, int]) -> Tensor:
    r"""Puts the four phases of a field together."""

    B, C, H, W = y.shape
    H, W, C = H - excess[0], W - excess[1], C // 4
    out = y.new_empty(B, 2 * H, 2 * W, C)
    y = y.permute(0, 2, 3, 1)

    for fine, coarse in _phases(C, H, W, *excess):
        out[fine] = y[coarse]

    return out.permute(0, 3, 1, 2)


def _interleave_transposed(x: Tensor, excess: tuple[int, int]) -> Tensor:
    B, C, H, W = x.shape
    H, W = H // 2, W // 2
    out = x.new_empty(B, H + excess[0], W + excess[1], 4 * C)
    x = x.permute(0, 2, 3, 1)

    # Each phase leaves out one row and one column, if its convolution has an even kernel.
    for border in (out[:, 0], out[:, -1], out[:, :, 0], out[:, :, -1]):
        border.zero_()

    for fine, coarse in _phases(C, H, W, *excess):
        out[coarse] = x[fine]

    return out.permute(0, 3, 1, 2)


def _phases(C: int, H: int, W: int, i: int, j: int) -> Iterator[tuple[Any, Any]]:
    r"""Yields the indices of each phase in the fine field and in the coarse one."""

    every = slice(None)

    for a in (0, 1):
        for b in (0, 1):
            rows, columns = slice(a * i, a * i + H), slice(b * j, b * j + W)
            channels = slice((2 * a + b) * C, (2 * a + b + 1) * C)

            yield (
                (every, slice(a, None, 2), slice(b, None, 2)),
                (every, rows, columns, channels),
            )


def _phase_weights(weight: Tensor) -> Tensor:
    r"""Returns the weights of all four phases, with shape :math:`(4C', C, p + 1, p + 1)`."""

    out, n = len(weight), weight.shape[-1] // 2 + 1

    with full(weight):
        w = _tap_sums(n, weight.dtype).to(weight.device) @ weight.permute(0, 2, 3, 1).flatten(1, 2)

    w = w.view(out, 4, n, n, -1).transpose(0, 1).flatten(0, 1)

    return w.permute(0, 3, 1, 2)


@cache
@torch.inference_mode(False)  # a cached inference tensor could not be used in training
def _tap_sums(n: int, dtype: torch.dtype) -> Tensor:
    r"""Returns the matrix that sums the taps of a kernel, with shape :math:`(4n^2, (2n - 1)^2)`.

    The row of a kernel in phase 0 or 1 sees pairs of taps. The first pair, or the last, has one.
    """

    taps, rows = (torch.arange(count, device="cpu") for count in (2 * n - 1, n))
    sums = [(taps + (n + 1 + a) % 2) // 2 == rows[:, None] for a in (0, 1)]

    return torch.cat([torch.kron(a.to(dtype), b.to(dtype)) for a in sums for b in sums])


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    if weight.shape[-1] > 1:
        return F.conv2d(x, weight, bias, stride)

    # The backward pass of oneDNN's 1x1 convolution writes out of bounds (torch 2.13 with AVX2).
    x = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)

    return F.linear(x, weight.flatten(1), bias).permute(0, 3, 1, 2)


class CircularConv2d(nn.Conv2d):
    r"""Creates a convolution of periodic fields that keeps their size, or divides it.

    The size of the kernel must be odd.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = lower(x)

        if pays(x, self.weight, self.stride[0]):
            assert self.bias is not None
            return winograd_conv2d(x, self.weight, self.bias)

        x = circular_pad(x, self.kernel_size[0] // 2)

        return _conv2d(x, self.weight, self.bias, self.stride[0])
