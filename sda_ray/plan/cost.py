r"""The cost of training a network: operations, memory and files, counted on the meta device.

A training step runs on tensors that have shapes but no content, so nothing is computed and no memory
is taken. Counted are floating point operations and the peak memory.
"""

import io
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from ..nn import VPSDE, MCScoreNet, make_score, network_settings
from ..training import Validation

# Settings that the cost of a step depends on
SHAPE = (*NETWORK, "batch_size", "precision")
SWITCHES = ("dropout", "ema", "grad_clip")  # it only matters whether these are 0

MOST = 24  # shapes whose cost is counted; each of the others costs what the nearest one does
UNIT = 64  # bytes to which torch aligns tensors in files


@dataclass(frozen=True)
class Cost:
    r"""The cost of a shape of network and batch."""

    parameters: int
    flops: float  # of a training step: convolutions and matrix products
    forward: float  # of the forward pass of a single item
    state: int  # bytes of weights, moments and averages
    peak: int  # the most bytes of tensors at a time, in training or validation
    checkpoint: int  # bytes of `checkpoint.pth`
    weights: int  # bytes of `state.pth`


def shape_of(config: Config) -> tuple[Any, ...]:
    r"""Returns the settings that determine the cost of a config: equal shapes cost the same."""

    return (*(config[key] for key in SHAPE), *(bool(config[key]) for key in SWITCHES))


def measure(config: Config, size: int) -> Cost:
    r"""Returns the cost of a checked config, given the grid cells along each axis of the data."""

    with torch.device("meta"):
        score = make_score(**network_settings(config), size=size).eval()
        sde = VPSDE(score.kernel, (2 * config["window"], size, size), config["alpha"])

    score.train()
    step, step_peak = _step(sde, config)
    forward, forward_peak = _forward(sde, Validation.chunk)
    tensors = tensors_of(score, config)
    weights = {key: x for key, x in tensors.items() if key.startswith("score.")}
    state = sum(x.nbytes for x in tensors.values())
    state += sum(x.nbytes for x in score.buffers()) if config["ema"] else 0  # of the average

    return Cost(
        parameters=sum(p.numel() for p in score.parameters()),
        flops=step,
        forward=forward / Validation.chunk,
        state=state,
        peak=state + max(step_peak, forward_peak),
        checkpoint=file_size(tensors),
        weights=file_size({key.removeprefix("score."): x for key, x in weights.items()}),
    )


def tensors_of(score: MCScoreNet, config: Config) -> dict[str, Tensor]:
    r"""Returns the tensors of a checkpoint of :class:`TrainState`, by name, of any content."""

    named = {f"score.{key}": x for key, x in score.state_dict().items()}

    for name, p in score.named_parameters():
        moments = {"step": p.new_empty(()), "exp_avg": p, "exp_avg_sq": p}
        named |= {f"optimizer.{name}.{key}": x for key, x in moments.items()}

    if config["ema"]:
        named |= {f"average.{name}": p for name, p in score.named_parameters()}

    return {**named, "losses": torch.empty(0, device="meta")}


def file_size(tensors: dict[str, Tensor]) -> int:
    r"""Returns the bytes that a file of tensors takes, to a few hundred.

    A small stand-in is written to memory: as many tensors with the same names, each as far from a
    multiple of 64 bytes as the original.
    """

    stand_in, more = {}, 0

    for key, x in tensors.items():
        left = min(x.nbytes, UNIT + x.nbytes % UNIT)
        stand_in[key] = torch.empty(left, dtype=torch.uint8)
        more += x.nbytes - left

    with io.BytesIO() as stream:
        torch.save({"tensors": stand_in, "info": 40 * " ", "sha256": 64 * " "}, stream)

        return len(stream.getbuffer()) + more


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


@contextmanager
def _lowered(precision: str) -> Iterator[None]:
    if precision == "bf16":
        with torch.autocast("cpu", dtype=torch.bfloat16), _Autocast():
            yield
    else:
        yield


def _step(sde: VPSDE, config: Config) -> tuple[int, int]:
    r"""Runs a training step. Returns its FLOPs and peak memory."""

    with FlopCounterMode(display=False) as counter, MemoryMeter() as meter:
        x, t, noise = _inputs(sde, config["batch_size"])

        with _lowered(config["precision"]):
            loss = sde.loss(x, t, noise)

        loss.backward()

    return counter.get_total_flops(), meter.peak


@torch.no_grad()
def _forward(sde: VPSDE, items: int) -> tuple[int, int]:
    r"""Runs a forward pass of the validation. Returns its FLOPs and peak memory."""

    with FlopCounterMode(display=False) as counter, MemoryMeter() as meter:
        sde.errors(*_inputs(sde.eval(), items))

    return counter.get_total_flops(), meter.peak


def _inputs(sde: VPSDE, items: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (items, *sde.shape)

    return (
        torch.empty(shape, device="meta"),
        torch.empty(items, device="meta"),
        torch.empty(shape, device="meta"),
    )


@dataclass(frozen=True)
class Shape:
    r"""A shape of network and batch that a sweep draws."""

    config: Config  # a configuration of the shape
    draws: int  # that have it
    cost: Cost
    assumed: bool = False  # the cost is that of the nearest shape


def distinct_shapes(
    draws: Sequence[Config], info: DataInfo, report: Callable[[str], None]
) -> tuple[list[Shape], list[int]]:
    r"""Returns the distinct shapes of draws, from small to large, and the shape of each draw."""

    most = info.trajectories["train"]
    configs = [c | {"batch_size": min(c["batch_size"], most)} for c in draws]
    keys = [shape_of(config) for config in configs]
    distinct = dict(zip(keys, configs, strict=True))
    rough = {key: count_weights(c) * c["batch_size"] for key, c in distinct.items()}
    ranked = sorted(distinct, key=rough.__getitem__)
    count = Counter(keys)
    report(f"counting the operations of {len(ranked)} network{'s' * (len(ranked) != 1)}")
    chosen = {ranked[i] for i in spread(len(ranked), MOST)}
    costs = {key: measure(distinct[key], info.size) for key in chosen}

    def nearest(key: tuple[object, ...]) -> Cost:
        return costs[min(costs, key=lambda other: abs(math.log(rough[other] / rough[key])))]

    shapes = {
        key: Shape(distinct[key], count[key], costs.get(key) or nearest(key), key not in costs)
        for key in ranked
    }
    final = sorted(shapes, key=lambda key: shapes[key].cost.flops)
    place = {key: i for i, key in enumerate(final)}

    return [shapes[key] for key in final], [place[key] for key in keys]


def spread(count: int, most: int) -> list[int]:
    r"""Returns at most so many of the numbers below a count: the first, the last, and between."""

    return sorted({round((count - 1) * i / (most - 1)) for i in range(most)})
