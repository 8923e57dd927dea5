r"""Convolutions of periodic fields, as few and as small operations as the maths allows.

Feature maps are kept in memory with their channels last, from the first convolution to the last:
the kernels of the convolutions and of the layer norm are fastest there, and any operation that
falls back to the other layout costs a copy before and after.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .precision import full, lower
from .winograd import pays, winograd_conv2d

__all__ = ["CircularConv2d", "circular_pad", "modulated_pad", "silu_pad", "upsampled_conv2d"]


def circular_pad(x: Tensor, padding: int) -> Tensor:
    r"""Pads a periodic field with its own opposite borders.

    The result has its channels last in memory, whatever the layout of the field.

    Arguments:
        x: The field, with shape :math:`(B, C, H, W)`.
        padding: The number :math:`p` of cells to add on each side, at most :math:`\min(H, W)`.

    Returns:
        The padded field, with shape :math:`(B, C, H + 2p, W + 2p)`.
    """

    if torch.compiler.is_compiling():
        _check(x, padding)
        return F.pad(x, (padding,) * 4, mode="circular")

    return _CircularPad.apply(x, padding)


def modulated_pad(x: Tensor, shift: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    r"""Pads a shifted periodic field as :func:`circular_pad`, in one pass through memory.

    Arguments:
        x: The field, with shape :math:`(B, C, H, W)`.
        shift: What is added to it, with shape :math:`(B, C, 1, 1)` or :math:`(1, C, 1, 1)`.
        padding: The number :math:`p` of cells to add on each side.

    Returns:
        The padded field, with shape :math:`(B, C, H + 2p, W + 2p)`, and the field as it was. If
        that is used, rather than `x`, both gradients are summed in one pass.
    """

    if torch.compiler.is_compiling():
        return circular_pad(x + shift, padding), x

    return _ModulatedPad.apply(x, shift, padding)


def silu_pad(x: Tensor, padding: int) -> Tensor:
    r"""Pads the SiLU of a periodic field as :func:`circular_pad`, in one pass through memory."""

    if torch.compiler.is_compiling():
        return circular_pad(F.silu(x), padding)

    return _SiLUPad.apply(x, padding)


class _CircularPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: int) -> Tensor:
        ctx.p = p
        out, inner = _padded(x, p)
        inner.copy_(x.permute(0, 2, 3, 1))
        _wrap(out, p)

        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, inner = _unpadded(grad, ctx.p)
        out.copy_(inner)

        for to, border in _borders(grad, ctx.p):
            out[to] += border

        return out.permute(0, 3, 1, 2), None


class _ModulatedPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, p: int) -> tuple[Tensor, Tensor]:
        ctx.p, ctx.alone = p, len(shift) < len(x)
        out, inner = _padded(x, p)
        torch.add(x.permute(0, 2, 3, 1), shift.permute(0, 2, 3, 1), out=inner)
        _wrap(out, p)

        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, skip: Tensor) -> tuple[Tensor, Tensor | None, None]:
        out, inner = _unpadded(grad, ctx.p)
        torch.add(skip.permute(0, 2, 3, 1), inner, out=out)

        for to, border in _borders(grad, ctx.p):
            out[to] += border

        if not ctx.needs_input_grad[1]:
            return out.permute(0, 3, 1, 2), None, None

        # Each gradient reaches the shift once, those of the border too.
        shift = grad.sum((0, 2, 3) if ctx.alone else (2, 3), keepdim=True)

        return out.permute(0, 3, 1, 2), shift, None


class _SiLUPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: int) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(x)
        out, inner = _padded(x, p)
        torch.ops.aten.silu.out(x.permute(0, 2, 3, 1), out=inner)
        _wrap(out, p)

        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x = x.permute(0, 2, 3, 1)
        out, inner = _unpadded(grad, ctx.p)
        torch.ops.aten.silu_backward.grad_input(inner, x, grad_input=out)

        for to, border in _borders(grad, ctx.p):
            out[to] += torch.ops.aten.silu_backward(border, x[to])

        return out.permute(0, 3, 1, 2), None


def _padded(x: Tensor, p: int) -> tuple[Tensor, Tensor]:
    r"""Returns an empty padded field, and its inner part with the channels as its last axis."""

    _check(x, p)
    B, C, H, W = x.shape
    out = _channels_last(x, (B, C, H + 2 * p, W + 2 * p))

    return out, out.permute(0, 2, 3, 1)[:, p : H + p, p : W + p]


def _check(x: Tensor, p: int) -> None:
    if p > min(x.shape[-2:]):
        raise ValueError(
            f"padding is {p}, but must be at most the size of the field, here "
            f"{tuple(x.shape[-2:])}. Use a smaller kernel or fewer levels."
        )


def _wrap(x: Tensor, p: int) -> None:
    r"""Copies the opposite borders of the inner part of a padded field to its padding."""

    H, W = (n - 2 * p for n in x.shape[2:])
    y = x.permute(0, 2, 3, 1)

    y[:, p : H + p, :p] = y[:, p : H + p, W : W + p]
    y[:, p : H + p, W + p :] = y[:, p : H + p, p : 2 * p]
    y[:, :p] = y[:, H : H + p]
    y[:, H + p :] = y[:, p : 2 * p]


def _unpadded(grad: Tensor, p: int) -> tuple[Tensor, Tensor]:
    r"""Returns an empty field and the inner part of a padded one, channels as last axes."""

    B, C, H, W = grad.shape
    out = grad.new_empty(B, H - 2 * p, W - 2 * p, C)

    return out, grad.permute(0, 2, 3, 1)[:, p : H - p, p : W - p]


def _borders(grad: Tensor, p: int) -> Iterator[tuple[Any, Tensor]]:
    r"""Yields the parts of a padding, and where in the field each was copied from."""

    H, W = (n - 2 * p for n in grad.shape[2:])
    y = grad.permute(0, 2, 3, 1)

    every = slice(None)
    rows = ((slice(0, p), slice(H + p, None)), (slice(H - p, H), slice(0, p)))
    columns = ((slice(0, p), slice(W + p, None)), (slice(W - p, W), slice(0, p)))

    if p == 0:
        return

    for i, k in rows:
        yield (every, i), y[:, k, p : W + p]

    for j, m in columns:
        yield (every, every, j), y[:, p : H + p, m]

    for i, k in rows:
        for j, m in columns:
            yield (every, i, j), y[:, k, m]


def _channels_last(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    r"""Returns an empty tensor that is like another, with its channels last in memory."""

    return torch.empty(
        tuple(shape),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


class _Interleave(torch.autograd.Function):
    # Puts together the four phases that `upsampled_conv2d` computes, and adds the skip.

    @staticmethod
    def forward(ctx: Any, y: Tensor, skip: Tensor) -> Tensor:
        B, C, H, W = skip.shape
        ctx.phases = tuple(_phases(C, H // 2, W // 2, y.shape[-1] - W // 2))
        ctx.shape, ctx.dtype = y.shape, y.dtype

        out = _channels_last(skip, (B, C, H, W), dtype=torch.result_type(y, skip))
        x, y, skip = (z.permute(0, 2, 3, 1) for z in (out, y, skip))

        for fine, coarse in ctx.phases:
            torch.add(y[coarse], skip[fine], out=x[fine])

        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out = _channels_last(grad, ctx.shape, dtype=ctx.dtype)
        x, y = grad.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)

        # Each phase leaves out one row and one column, if its convolution has an even kernel.
        for border in (y[:, 0], y[:, -1], y[:, :, 0], y[:, :, -1]):
            border.zero_()

        for fine, coarse in ctx.phases:
            y[coarse] = x[fine]

        return out, grad


def _phases(C: int, H: int, W: int, shift: int) -> Sequence[tuple[Any, Any]]:
    r"""Returns where the values of each phase belong and where they come from."""

    every = slice(None)

    return [
        (
            (every, slice(a, None, 2), slice(b, None, 2)),
            (
                every,
                slice(a * shift, a * shift + H),
                slice(b * shift, b * shift + W),
                slice((2 * a + b) * C, (2 * a + b + 1) * C),
            ),
        )
        for a in (0, 1)
        for b in (0, 1)
    ]


def upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    r"""Computes a circular convolution of the doubled field, without doubling it.

    In a field whose cells are repeated twice along each axis, several of the :math:`k^2` taps see
    the same value. Their weights are summed first, for each of the four positions of an output
    within a cell of the field, which leaves :math:`(p + 1)^2` taps, where :math:`p = (k - 1) / 2`.

    Arguments:
        x: The field, with shape :math:`(B, C, H, W)`.
        weight: The weights, with shape :math:`(C', C, k, k)`.
        bias: The biases, with shape :math:`(C')`.
        skip: What is added to the result, with shape :math:`(B, C', 2H, 2W)`.

    Returns:
        The sum of the convolution and the skip, with shape :math:`(B, C', 2H, 2W)`.
    """

    p = weight.shape[-1] // 2

    if torch.compiler.is_compiling():  # which is to see the plain formulation
        x = circular_pad(F.interpolate(lower(x), scale_factor=2.0), p)
        return _conv2d(x, weight, bias) + skip

    x = circular_pad(lower(x), (p + 1) // 2)
    y = _conv2d(x, _summed(weight), bias.repeat(4))

    return _Interleave.apply(y, skip)


def _summed(weight: Tensor) -> Tensor:
    r"""Returns the weights of all four phases, with shape :math:`(4C', C, p + 1, p + 1)`."""

    out, n = len(weight), weight.shape[-1] // 2 + 1

    with full(weight):
        w = _pairs(n, weight.dtype).to(weight.device) @ weight.permute(0, 2, 3, 1).flatten(1, 2)

    w = w.view(out, 4, n, n, -1).transpose(0, 1).flatten(0, 1)

    return w.permute(0, 3, 1, 2)


@cache
@torch.inference_mode(False)  # what is kept shall serve a training as well
def _pairs(n: int, dtype: torch.dtype) -> Tensor:
    r"""Returns what sums the taps of a kernel, with shape :math:`(4n^2, (2n - 1)^2)`.

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

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel_size: The size of the kernel. It must be odd.
        stride: The stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        r"""
        Arguments:
            x: The field, with shape :math:`(B, C, H, W)`.
            padded: Whether it is padded already.
        """

        x = lower(x)

        if not padded:
            if pays(x, self.weight, self.stride[0]):
                assert self.bias is not None
                return winograd_conv2d(x, self.weight, self.bias)

            x = circular_pad(x, self.kernel_size[0] // 2)

        return _conv2d(x, self.weight, self.bias, self.stride[0])
