r"""Padding of periodic fields, alone or with what comes just before it.

The fields are padded by a node of the graph each, which keeps the channels last in memory. As
compositions of slices, autograd would write one full-size gradient for each slice. A compiler, which
sees the whole network, is given the plain formulation.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["channels_last", "circular_pad", "modulated_pad", "silu_pad"]


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
    out = channels_last(x, (B, C, H + 2 * p, W + 2 * p))

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


def channels_last(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    r"""Returns an empty tensor that is like another, with its channels last in memory."""

    return torch.empty(
        tuple(shape),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
