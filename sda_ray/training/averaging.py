r"""Averages of weights: smoother, and mostly better, than the weights themselves."""

import copy
from typing import TypeVar

import torch
from torch import nn

__all__ = ["average_of", "follow"]

Module = TypeVar("Module", bound=nn.Module)


def average_of(module: Module) -> Module:
    r"""Returns a copy of a module that shall follow it: it neither learns nor drops out."""

    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float, n: int) -> None:
    r"""Moves the average of a module's parameters after a step of its training.

    .. math:: \bar{\phi} \gets \delta \bar{\phi} + (1 - \delta) \phi
        \quad \text{with} \quad \delta = \min(\text{decay}, (1 + n) / (10 + n))

    Arguments:
        average: The copy of the module.
        module: The module.
        decay: The decay of the average in the long run.
        n: The number of the step, from 1.
    """

    rate = 1 - min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), rate)
