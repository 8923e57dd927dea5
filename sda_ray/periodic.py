r"""Convolutions of periodic fields, as few and as small operations as the maths allows.

Feature maps are kept in memory with their channels last, from the first convolution to the last:
the kernels of the convolutions and of the layer norm are fastest there, and any operation that
falls back to the other layout costs a copy before and after.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .padding import channels_last, circular_pad
from .precision import lower
from .winograd import pays, winograd_conv2d

__all__ = ["CircularConv2d", "upsampled_conv2d"]


class _Interleave(torch.autograd.Function):
    # Puts together the four phases that `upsampled_conv2d` computes, and adds the skip.

    @staticmethod
    def forward(ctx: Any, y: Tensor, skip: Tensor) -> Tensor:
        B, C, H, W = skip.shape
        ctx.phases = tuple(_phases(C, H // 2, W // 2, y.shape[-1] - W // 2))
        ctx.shape, ctx.dtype = y.shape, y.dtype

        out = channels_last(skip, (B, C, H, W), dtype=torch.result_type(y, skip))
        x, y, skip = (z.permute(0, 2, 3, 1) for z in (out, y, skip))

        for fine, coarse in ctx.phases:
            torch.add(y[coarse], skip[fine], out=x[fine])

        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out = channels_last(grad, ctx.shape, dtype=ctx.dtype)
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

    phases = []

    for a in (0, 1):
        for b in (0, 1):
            # The row in phase a sees pairs of taps. The first pair, or the last, has one tap.
            i, j = (p + a) % 2, (p + b) % 2
            w = F.pad(weight, (j, 1 - j, i, 1 - i))
            w = w.unflatten(-2, (p + 1, 2)).unflatten(-1, (p + 1, 2)).sum((-3, -1))
            phases.append(w)

    x = circular_pad(lower(x), (p + 1) // 2)
    y = _conv2d(x, torch.cat(phases), bias.repeat(4))

    return _Interleave.apply(y, skip)


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
