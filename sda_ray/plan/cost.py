r"""The cost of training a network: operations, memory and files, counted on the meta device.

A training step runs on tensors that have shapes but no content, so nothing is computed and no memory
is taken. Counted are floating point operations and the peak memory.
"""

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..core import NETWORK, Config, count_weights
from ..data import DataInfo
from ..nn import VPSDE, make_score, network_settings
from ..training import Validation

# Settings that the cost of a step depends on
SHAPE = (*NETWORK, "batch_size", "precision")
SWITCHES = ("dropout", "ema", "grad_clip")  # it only matters whether these are 0

MOST = 24  # shapes whose cost is counted; each of the others counts as the nearest one


@dataclass(frozen=True)
class Cost:
    r"""The cost of a shape of network and batch."""

    parameters: int
    flops: float  # of a training step: convolutions and matrix products
    forward: float  # of the forward pass of a single item
    state: int  # bytes of weights, moments and averages, as in `checkpoint.pth`
    peak: int  # the most bytes of tensors at a time, in training or validation
    weights: int  # bytes of the weights alone, as in `state.pth`


def shape_of(config: Config) -> tuple[Any, ...]:
    r"""Returns the settings that determine the cost of a config: equal shapes cost the same."""

    return (*(config[key] for key in SHAPE), *(bool(config[key]) for key in SWITCHES))


def measure(config: Config, size: int) -> Cost:
    r"""Returns the cost of a checked config, given the grid cells along each axis of the data."""

    with torch.device("meta"):
        score = make_score(**network_settings(config), size=size).eval()
        sde = VPSDE(score.kernel, (2 * config["window"], size, size), config["alpha"])

    score.train()

    with FlopCounterMode(display=False) as step, MemoryMeter() as training:
        x, t, noise = _inputs(sde, config["batch_size"])
        lowered = config["precision"] == "bf16"

        with torch.autocast("cpu", torch.bfloat16, enabled=lowered), _Autocast():
            loss = sde.loss(x, t, noise)

        loss.backward()

    with FlopCounterMode(display=False) as forward, MemoryMeter() as validation, torch.no_grad():
        sde.eval().errors(*_inputs(sde, Validation.chunk))

    weights = sum(x.nbytes for x in score.state_dict().values())
    moments = 2 * sum(p.nbytes for p in score.parameters())
    state = weights + moments + weights * bool(config["ema"])

    return Cost(
        parameters=sum(p.numel() for p in score.parameters()),
        flops=step.get_total_flops(),
        forward=forward.get_total_flops() / Validation.chunk,
        state=state,
        peak=state + max(training.peak, validation.peak),
        weights=weights,
    )


def _inputs(sde: VPSDE, items: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (items, *sde.shape)
    x, t, noise = (torch.empty(s, device="meta") for s in (shape, items, shape))

    return x, t, noise


class MemoryMeter(TorchDispatchMode):
    r"""Meters the bytes of the tensors that are made within it and alive: now and at the peak."""

    def __init__(self) -> None:
        super().__init__()

        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})

        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())

        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata

        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _Autocast(TorchFunctionMode):
    r"""Casts on the meta device as autocast does on others, for the operations that we use."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.conv2d, F.linear) and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            args = [x.to(dtype) if isinstance(x, Tensor) else x for x in args]

        return func(*args, **kwargs or {})


@dataclass(frozen=True)
class Shape:
    r"""A shape of network and batch that stands for some of a sweep's draws."""

    config: Config  # a configuration of the shape
    draws: int  # that have it, or one near it
    cost: Cost


def distinct_shapes(
    draws: Sequence[Config], info: DataInfo, report: Callable[[str], None]
) -> tuple[list[Shape], list[int]]:
    r"""Returns at most 24 shapes of draws, from small to large, and the nearest one of each draw."""

    most = info.trajectories["train"]
    configs = [c | {"batch_size": min(c["batch_size"], most)} for c in draws]
    keys = [shape_of(config) for config in configs]
    distinct = dict(zip(keys, configs, strict=True))
    rough = {key: count_weights(c) * c["batch_size"] for key, c in distinct.items()}
    ranked = sorted(distinct, key=rough.__getitem__)
    chosen = [ranked[i] for i in spread(len(ranked), MOST)]
    report(f"counting the operations of {len(chosen)} network{'s' * (len(chosen) != 1)}")
    costs = {key: measure(distinct[key], info.size) for key in chosen}
    chosen.sort(key=lambda key: costs[key].flops)

    def distance(key: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[bool, float]:
        return key != other, abs(math.log(rough[other] / rough[key]))

    nearest = {key: min(chosen, key=functools.partial(distance, key)) for key in ranked}
    count = Counter(nearest[key] for key in keys)
    shapes = [Shape(distinct[key], count[key], costs[key]) for key in chosen]

    return shapes, [chosen.index(nearest[key]) for key in keys]


def spread(count: int, most: int) -> list[int]:
    r"""Returns at most so many of the numbers below a count: the first, the last, and between."""

    return sorted({round((count - 1) * i / (most - 1)) for i in range(most)})
