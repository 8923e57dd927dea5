r"""Neural networks on periodic fields."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import CircularConv2d, upsampled_conv2d
from .precision import full


class LayerNorm(nn.Module):
    r"""Creates a layer that standardizes over channels, without parameters.

    .. math:: y = \frac{x - \mathbb{E}[x]}{\sqrt{\mathbb{V}[x] + \epsilon}}

    The variance is the unbiased one. Features of less than single precision are standardized in
    single precision.
    """

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        # Torch's layer norm has the biased variance: r times the unbiased one.
        C = x.shape[1]
        r = (C - 1) / C
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = y.new_full((C,), math.sqrt(r))
        y = F.layer_norm(y.permute(0, 2, 3, 1), (C,), weight, eps=r * self.eps)

        return y.permute(0, 3, 1, 2).to(x.dtype)


class ModResidualBlock(nn.Module):
    r"""Creates a residual block with modulation.

    .. math:: y = x + f(x + g(e))

    Arguments:
        project: The projection :math:`g` of the modulation vector :math:`e`.
        residue: The function :math:`f`.
    """

    def __init__(self, project: nn.Module, residue: nn.Module) -> None:
        super().__init__()

        self.project = project
        self.residue = residue

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return x + self.residue(x + self.project(e))


class Residue(nn.Sequential):
    r"""Creates the residue of a block: two convolutions of normalized features.

    While it trains, random features between the convolutions are zero, with the probability
    `dropout`. They are drawn from torch's global generator.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        activation: Callable[[], nn.Module],
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            LayerNorm(),
            CircularConv2d(channels, channels, kernel_size),
            activation(),
            CircularConv2d(channels, channels, kernel_size),
        )

        self.dropout = dropout  # no module, so that the names of the weights stay

    def forward(self, x: Tensor) -> Tensor:
        norm, first, activation, second = self
        x = activation(first(norm(x)))

        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)

        return second(x)


class UpTail(nn.ModuleList):
    r"""Creates the step of an U-Net from one level to the next finer one.

    .. math:: y = s + \mathrm{Conv}(\mathrm{Upsample}(\mathrm{LN}(x)))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            [
                LayerNorm(),
                nn.Upsample(scale_factor=2, mode="nearest"),
                CircularConv2d(in_channels, out_channels, kernel_size),
            ]
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # The upsampling has its place in the names of the weights, and is done by the convolution.
        norm, _, conv = self
        assert isinstance(conv, CircularConv2d) and conv.bias is not None

        return upsampled_conv2d(norm(x), conv.weight, conv.bias, skip)


class UNet(nn.Module):
    r"""Creates a U-Net with modulation, for two-dimensional periodic fields.

    References:
        | U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger et al., 2015)
        | https://arxiv.org/abs/1505.04597

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        mod_features: The number of modulation features.
        hidden_channels: The number of channels of each level, from fine to coarse.
        hidden_blocks: The number of residual blocks of each level, in the descent and in the
            ascent.
        kernel_size: The size of the convolution kernels. It must be odd.
        activation: The constructor of the activation function.
        dropout: The probability that a feature within a block is zero in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mod_features: int,
        hidden_channels: Sequence[int] = (32, 64, 128),
        hidden_blocks: Sequence[int] = (2, 3, 5),
        kernel_size: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()

        def block(channels: int) -> nn.Module:
            return ModResidualBlock(
                project=nn.Sequential(
                    nn.Linear(mod_features, channels),
                    nn.Unflatten(-1, (-1, 1, 1)),
                ),
                residue=Residue(channels, kernel_size, activation, dropout),
            )

        heads: list[nn.Module] = []
        tails: list[nn.Module] = []
        descent, ascent = [], []

        for i, (channels, blocks) in enumerate(zip(hidden_channels, hidden_blocks, strict=True)):
            if i == 0:
                heads.append(CircularConv2d(in_channels, channels, kernel_size))
                tails.append(CircularConv2d(channels, out_channels, kernel_size))
            else:
                finer = hidden_channels[i - 1]
                heads.append(nn.Sequential(CircularConv2d(finer, channels, kernel_size, stride=2)))
                tails.append(UpTail(channels, finer, kernel_size))

            descent.append(nn.ModuleList(block(channels) for _ in range(blocks)))
            ascent.append(nn.ModuleList(block(channels) for _ in range(blocks)))

        self.heads = nn.ModuleList(heads)
        self.tails = nn.ModuleList(reversed(tails))
        self.descent = nn.ModuleList(descent)
        self.ascent = nn.ModuleList(reversed(ascent))

        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        r"""
        Arguments:
            x: The input fields, with shape :math:`(B, C, H, W)`.
            e: The modulation vectors, with shape :math:`(B, D)` or :math:`(1, D)`.

        Returns:
            The output fields, with shape :math:`(B, C', H, W)`.
        """

        skips: list[Tensor] = []

        for head, level in zip(self.heads, self.descent, strict=True):
            if skips:
                x = head(x).to(x.dtype)
            else:
                with full(x):
                    x = head(x)

            for block in level:  # type: ignore[attr-defined]
                x = block(x, e)

            skips.append(x)

        skips.pop()

        for tail, level in zip(self.tails, self.ascent, strict=True):
            for block in level:  # type: ignore[attr-defined]
                x = block(x, e)

            if skips:
                x = tail(x, skips.pop())

        with full(x):
            return tail(x)
