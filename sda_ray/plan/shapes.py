r"""The distinct shapes of networks and batches among the draws of a sweep."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.config import Config, count_weights
from ..data.dataset import DataInfo
from .cost import Cost, measure, shape_of
from .probe import Speed

__all__ = ["Shape", "distinct_shapes", "epoch_seconds"]

PATIENCE = 10.0  # seconds for all shapes; those that are left cost what the one most alike does
FORWARD = 0.3  # of a step's operations on tensors are in the forward pass
SAMPLES = 64, 2  # steps of the sampler and items, at the end of a run


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


def epoch_seconds(config: Config, cost: Cost, speed: Speed, info: DataInfo) -> tuple[float, float]:
    r"""Returns the seconds that an epoch takes, and those after the last one, for the samples."""

    n, valid = info.trajectories["train"], info.trajectories["valid"]
    steps = math.ceil(n / config["batch_size"])
    items = math.ceil(32 / valid) * valid * (2 if config["ema"] else 1)
    calls = math.ceil(items / 32)
    step, item = cost.flops / config["batch_size"], cost.forward
    forward = FORWARD * cost.operations

    return (
        speed.seconds(step * n + item * items, cost.operations * steps + forward * calls),
        speed.seconds(item * math.prod(SAMPLES), forward * SAMPLES[0]),
    )
