r"""The plain formulation of the score network and its training step, which ours is measured against.

It is what one writes first: torch's circular padding, a layer norm of `var_mean`, an upsampling
before its convolution, `torch.optim.AdamW` as it comes. The names of the weights are ours, so that
both networks can have the same ones.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sda_ray.training.loop import TrainState

__all__ = ["plain_network", "plain_step"]


class _LayerNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, unbiased=True, dim=1, keepdim=True)

        return (x - mean) / (var + 1e-5).sqrt()


class _Block(nn.Module):
    def __init__(self, channels: int, features: int, kernel_size: int, activation: Any) -> None:
        super().__init__()

        self.project = nn.Sequential(nn.Linear(features, channels), nn.Unflatten(-1, (-1, 1, 1)))
        self.residue = nn.Sequential(
            _LayerNorm(),
            _conv(channels, channels, kernel_size),
            activation(),
            _conv(channels, channels, kernel_size),
        )

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return x + self.residue(x + self.project(e))


def _conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    padding = kernel_size // 2

    return nn.Conv2d(inputs, outputs, kernel_size, stride, padding, padding_mode="circular")


class _UNet(nn.Module):
    def __init__(self, inputs: int, outputs: int, config: dict[str, Any]) -> None:
        super().__init__()

        channels, kernel = config["hidden_channels"], config["kernel_size"]
        activation = getattr(nn, config["activation"])

        def blocks(width: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(
                _Block(width, config["embedding"], kernel, activation) for _ in range(count)
            )

        heads: list[nn.Module] = [_conv(inputs, channels[0], kernel)]
        tails: list[nn.Module] = [_conv(channels[0], outputs, kernel)]

        for finer, coarser in itertools.pairwise(channels):
            heads.append(nn.Sequential(_conv(finer, coarser, kernel, stride=2)))
            tails.append(
                nn.Sequential(
                    _LayerNorm(), nn.Upsample(scale_factor=2), _conv(coarser, finer, kernel)
                )
            )

        levels = list(zip(channels, config["hidden_blocks"], strict=True))
        self.heads = nn.ModuleList(heads)
        self.tails = nn.ModuleList(reversed(tails))
        self.descent = nn.ModuleList(blocks(*level) for level in levels)
        self.ascent = nn.ModuleList(blocks(*level) for level in reversed(levels))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        skips = []

        for head, level in zip(self.heads, self.descent, strict=True):
            x = head(x)

            for block in level:  # type: ignore[attr-defined]
                x = block(x, e)

            skips.append(x)

        skips.pop()

        for level, tail in zip(self.ascent, self.tails, strict=True):
            for block in level:  # type: ignore[attr-defined]
                x = block(x, e)

            x = tail(x) + skips.pop() if skips else tail(x)

        return x


def plain_network(state: TrainState) -> None:
    r"""Puts the plain formulation of the network into a state, with the weights that it has."""

    kernel: Any = state.score.kernel
    inputs, outputs = kernel.network.heads[0].in_channels, kernel.network.tails[-1].out_channels
    network = _UNet(inputs, outputs, state.config)
    network.load_state_dict(kernel.network.state_dict())
    kernel.network = network


def plain_step(state: TrainState) -> Callable[[Tensor, torch.Generator], float]:
    r"""Returns the plain training step of a state with a plain network.

    The loss is taken to Python after every step, as loops do that show it.
    """

    config = state.config
    optimizer = torch.optim.AdamW(
        state.score.parameters(), lr=config["learning_rate"], weight_decay=config["weight_decay"]
    )

    def step(x: Tensor, generator: torch.Generator) -> float:
        loss = state.sde.loss(x, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        return float(loss.detach())

    return step
