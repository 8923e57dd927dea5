r"""What a network costs, found on the meta device: nothing is computed and no memory is taken.

A training step is gone through on tensors that have shapes but no content. Everything is counted
on the way: floating point operations, what the forward pass keeps for the backward pass, and the
most memory that is in use at a time.
"""

import io
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..core.config import Config, count_weights
from ..core.keys import NETWORK
from ..data.dataset import DataInfo
from ..nn.diffusion import VPSDE
from ..nn.score import MCScoreNet, make_score
from ..training.validation import Validation

__all__ = [
    "Cost",
    "Meter",
    "Shape",
    "distinct_shapes",
    "file_size",
    "measure",
    "shape_of",
    "tensors_of",
]

# The settings that a step's cost depends on
SHAPE = (*NETWORK, "batch_size", "precision")
SWITCHES = ("dropout", "ema", "grad_clip")  # of which it only matters whether they are 0

PATIENCE = 10.0  # seconds for all shapes; those that are left cost what the one most alike does
UNIT = 64  # bytes, at multiples of which torch's files align the content of tensors


@dataclass(frozen=True)
class Cost:
    r"""Creates the cost of a shape of network and batch.

    Arguments:
        parameters: The number of parameters.
        flops: The floating point operations of a training step: convolutions and matrix products.
        forward: Those of the forward pass of a single item.
        operations: The number of operations on tensors in a step: each takes its time, however
            small the tensors.
        activations: The bytes that the forward pass keeps for the backward pass.
        state: The bytes of weights, moments and averages.
        peak: The most bytes of tensors in use at a time, in training or validation.
        checkpoint: The bytes of `checkpoint.pth`.
        weights: The bytes of `state.pth`.
    """

    parameters: int
    flops: float
    forward: float
    operations: int
    activations: int
    state: int
    peak: int
    checkpoint: int
    weights: int


def shape_of(config: Config) -> tuple[Any, ...]:
    r"""Returns what the cost of a config depends on. Equal shapes cost the same."""

    return (*(config[key] for key in SHAPE), *(bool(config[key]) for key in SWITCHES))


def measure(config: Config, size: int) -> Cost:
    r"""Returns the cost of a config.

    Arguments:
        config: A checked config.
        size: The number of grid cells along each axis of the data.
    """

    with torch.device("meta"):
        score = make_score(**config, size=size).eval()
        sde = VPSDE(score.kernel, (2 * config["window"], size, size), config["alpha"])

    score.train()
    step, activations = _step(sde, score, config)
    check = _forward(sde, Validation.chunk)
    tensors = tensors_of(score, config)
    weights = {key: x for key, x in tensors.items() if key.startswith("score.")}
    state = sum(x.nbytes for x in tensors.values())
    state += state_of_average(score) if config["ema"] else 0

    return Cost(
        parameters=sum(p.numel() for p in score.parameters()),
        flops=step.flops,
        forward=check.flops / Validation.chunk,
        operations=step.operations,
        activations=activations,
        state=state,
        peak=state + max(step.peak, check.peak),
        checkpoint=file_size(tensors),
        weights=file_size({key.removeprefix("score."): x for key, x in weights.items()}),
    )


def tensors_of(score: MCScoreNet, config: Config) -> dict[str, Tensor]:
    r"""Returns the tensors of a checkpoint, by name, as of :class:`TrainState`, of any content."""

    named = {f"score.{key}": x for key, x in score.state_dict().items()}

    for name, p in score.named_parameters():
        moments = {"step": p.new_empty(()), "exp_avg": p, "exp_avg_sq": p}
        named |= {f"optimizer.{name}.{key}": x for key, x in moments.items()}

    if config["ema"]:
        named |= {f"average.{name}": p for name, p in score.named_parameters()}

    return {**named, "losses": torch.empty(0, device="meta")}


def state_of_average(score: MCScoreNet) -> int:
    r"""Returns the bytes of the averaged network that are in no checkpoint: its buffers."""

    return sum(x.nbytes for x in score.buffers())


def file_size(tensors: dict[str, Tensor]) -> int:
    r"""Returns the bytes that a file of tensors takes, to a few hundred.

    A small stand-in is written in memory: as many tensors of the same names, whose content ends
    as far from a multiple of 64 bytes as theirs.
    """

    stand_in, more = {}, 0

    for key, x in tensors.items():
        left = min(x.nbytes, UNIT + x.nbytes % UNIT)
        stand_in[key] = torch.empty(left, dtype=torch.uint8)
        more += x.nbytes - left

    with io.BytesIO() as stream:
        torch.save({"tensors": stand_in, "info": 40 * " ", "sha256": 64 * " "}, stream)

        return len(stream.getbuffer()) + more


class Meter(TorchDispatchMode):
    r"""Creates a meter of the operations on tensors for as long as it is entered.

    It counts operations, those of floating point numbers, and the bytes of all tensors made within
    that are alive: now and at the most.
    """

    def __init__(self) -> None:
        super().__init__()

        self.flops = 0.0
        self.operations = 0
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations += 1

        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)

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
    r"""Does on the meta device what autocast does on others, for the operations that we use."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.conv2d, F.linear) and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            args = [x.to(dtype) if isinstance(x, Tensor) else x for x in args]

        return func(*args, **kwargs or {})


@contextmanager
def _lowered(precision: str) -> Iterator[None]:
    with ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            stack.enter_context(_Autocast())

        yield


def _step(sde: VPSDE, score: MCScoreNet, config: Config) -> tuple[Meter, int]:
    r"""Goes through a training step. Returns the meter and the bytes of saved activations."""

    own = {x.untyped_storage()._cdata for x in (*score.parameters(), *score.buffers())}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()

        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()

        return x

    with Meter() as meter:
        x, t, noise = _inputs(sde, config["batch_size"])

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)

        with _lowered(config["precision"]), hooks:
            loss = sde.loss(x, t, noise)

        loss.backward()

    return meter, sum(saved.values())


@torch.no_grad()
def _forward(sde: VPSDE, items: int) -> Meter:
    with Meter() as meter:
        sde.errors(*_inputs(sde.eval(), items))

    return meter


def _inputs(sde: VPSDE, items: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (items, *sde.shape)

    return (
        torch.empty(shape, device="meta"),
        torch.empty(items, device="meta"),
        torch.empty(shape, device="meta"),
    )


@dataclass(frozen=True)
class Shape:
    r"""Creates a shape of network and batch that a sweep draws.

    Arguments:
        config: A configuration of the shape.
        draws: The number of draws that have it.
        cost: What it costs.
        assumed: Whether that is the cost of another shape, much like this one.
    """

    config: Config
    draws: int
    cost: Cost
    assumed: bool = False


def distinct_shapes(
    draws: Sequence[Config], info: DataInfo, say: Callable[[str], None]
) -> tuple[list[Shape], list[int]]:
    r"""Returns the distinct shapes of draws, from small to large, and the shape of each draw."""

    most = info.trajectories["train"]
    configs = [c | {"batch_size": min(c["batch_size"], most)} for c in draws]
    keys = [shape_of(config) for config in configs]
    distinct = dict(zip(keys, configs, strict=True))
    rough = {key: count_weights(c) * c["batch_size"] for key, c in distinct.items()}
    ranked = sorted(distinct, key=rough.__getitem__)
    count = Counter(keys)
    costs: dict[tuple[object, ...], Cost] = {}
    start = time.monotonic()
    say(f"going through {len(ranked)} shape{'s' * (len(ranked) != 1)} of networks")

    for i in _spread(len(ranked)):
        if len(costs) >= 3 and time.monotonic() - start > PATIENCE:
            break

        costs[ranked[i]] = measure(distinct[ranked[i]], info.size)

    def nearest(key: tuple[object, ...]) -> Cost:
        alike = min(costs, key=lambda other: abs(math.log(rough[other] / rough[key])))
        return costs[alike]

    shapes = {
        key: Shape(distinct[key], count[key], nearest(key), key not in costs) for key in ranked
    }
    final = sorted(shapes, key=lambda key: shapes[key].cost.flops)
    place = {key: i for i, key in enumerate(final)}

    return [shapes[key] for key in final], [place[key] for key in keys]


def _spread(count: int) -> list[int]:
    r"""Returns the numbers below a count: the last, the first, and then what is between."""

    order = [count - 1, 0]
    step = count

    while step > 1:
        step = -(-step // 2)
        order += range(0, count, step)

    return list(dict.fromkeys(order))
