r"""Tests for sda_ray.plan.cost, and for what is made of it: times, memory and forecasts."""

import itertools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sda_ray.core.config import CONFIG, Config
from sda_ray.nn.precision import lowered
from sda_ray.plan.cost import MemoryMeter, measure, shape_of
from sda_ray.plan.plan import expect, forecast
from sda_ray.plan.probe import Sample, Speed, speed_of, take_steps
from sda_ray.runs.checkpoint import save_checkpoint, save_state
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import Rules
from sda_ray.training.loop import TrainState
from sda_ray.training.validation import Validation

CHANGES: dict[str, dict[str, Any]] = {
    "small": {},
    "averaged": {"ema": 0.9},
    "odd": {"hidden_channels": (7, 9), "hidden_blocks": (2, 1), "kernel_size": 5},
    "pointwise": {"kernel_size": 1, "activation": "ReLU"},
    "dropping out": {"dropout": 0.1, "alpha": "lin"},
    "low": {"precision": "bf16"},
    "v": {"parametrization": "v"},
}

cases = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)


def by_hand(config: Config, size: int) -> tuple[float, float]:
    r"""Returns the FLOPs of an item, forward, and of a step: twice the multiplications."""

    window, features = 2 * config["window"], config["embedding"]
    taps, levels = config["kernel_size"] ** 2, config["hidden_channels"]
    cells = [(size // 2**i) ** 2 for i in range(len(levels))]
    first = 2 * taps * (window + 1) * levels[0] * cells[0]
    tail = 2 * taps * levels[0] * window * cells[0]
    time = 2 * 32 * 256
    rest = tail + 2 * 256 * features
    sums = 0  # of the taps of upsampled kernels, once for all items

    for i, (c, n) in enumerate(zip(levels, config["hidden_blocks"], strict=True)):
        rest += 2 * n * (2 * features * c + 2 * (2 * taps * c * c * cells[i]))

        if i > 0:
            p = config["kernel_size"] // 2
            down = 2 * taps * levels[i - 1] * c * cells[i]
            side = math.isqrt(cells[i]) + (2 * ((p + 1) // 2) - p)  # a border more, if p is odd
            up = 2 * (p + 1) ** 2 * c * 4 * levels[i - 1] * side**2
            rest += down + up
            sums += 2 * 4 * (p + 1) ** 2 * taps * c * levels[i - 1]

    # The gradient of weights and of inputs, but that of the data
    forward = first + time + rest
    step = 3 * rest + 2 * (first + time)

    return forward + sums / Validation.chunk, step * config["batch_size"] + 2 * sums


@cases
def test_flops_are_those_counted_by_hand(changes: Config, small: Config) -> None:
    config = small | changes
    cost = measure(config, 16)

    assert (cost.forward, cost.flops) == by_hand(config, 16)


def test_flops_of_sda_are_those_counted_by_hand() -> None:
    cost = measure(CONFIG, 64)

    assert cost.parameters == 22_874_922
    assert (cost.forward, cost.flops) == by_hand(CONFIG, 64)


@cases
def test_memory_is_that_of_a_real_step(changes: Config, small: Config) -> None:
    config = small | changes
    state = TrainState(config, 16)
    state.sde.train()

    with MemoryMeter() as meter:
        x, noise = (torch.zeros(config["batch_size"], *state.shape) for _ in range(2))
        t = torch.zeros(config["batch_size"])

        with lowered(config["precision"], state.device):
            loss = state.sde.loss(x, t, noise)

        loss.backward()

    cost = measure(config | {"batch_size": 64}, 16)
    here = measure(config, 16)
    tensors = {x.untyped_storage()._cdata: x.nbytes for x in state.tensors().values()}

    assert here.parameters == sum(p.numel() for p in state.score.parameters())
    assert here.state == pytest.approx(sum(tensors.values()), rel=0.01, abs=2048)
    assert cost.peak > here.peak >= here.state + meter.peak * (1 - 0.01)


@cases
def test_files_are_as_large_as_foreseen(changes: Config, small: Config, tmp_path: Path) -> None:
    config = small | changes
    state, path = TrainState(config, 16), RunPath(tmp_path)
    save_checkpoint(path, state.tensors(), state.info())
    save_state(path, state.result.state_dict())
    cost = measure(config, 16)

    each = 512 * len(state.tensors())  # a tensor's place in the file
    assert cost.state <= os.path.getsize(path.checkpoint) <= cost.state + each
    assert cost.weights <= os.path.getsize(path.state) <= cost.weights + each


def test_cost_depends_on_the_shape_alone(small: Config) -> None:
    other = small | {"learning_rate": 1.0, "weight_decay": 0.5, "seed": 3, "epochs": 1}

    assert shape_of(other) == shape_of(small) != shape_of(small | {"ema": 0.9})
    assert measure(other, 16) == measure(small, 16)


def test_times_are_interpolated_between_networks_that_were_measured() -> None:
    speed = Speed(((1e6, 0.01), (1e8, 0.1), (1e10, 10.0)), base=0, factor=1.0)

    assert [speed.seconds(f) for f, _ in speed.points] == pytest.approx([0.01, 0.1, 10.0])
    assert speed.seconds(1e7) == pytest.approx(10**-1.5)
    assert speed.seconds(1e11) == pytest.approx(100.0)  # in proportion
    assert speed.seconds(1e3) == pytest.approx(0.01)  # operations on tensors take their time
    assert Speed(((1e6, 0.01),), 0, 1.0).seconds(1e7) == pytest.approx(0.1)


def test_time_of_a_network_is_the_median_of_its_samples(small: Config) -> None:
    cost = measure(small, 16)
    samples = [Sample(0, 8, seconds, 10**8) for seconds in (0.2, 0.1, 9.0)]
    speed = speed_of(samples, [cost] * 3, 10**8)

    assert speed.seconds(cost.flops) == pytest.approx(0.2)


def test_steps_are_measured_up_to_the_batch_and_leave_nothing(
    small: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wide = small | {"hidden_channels": (16, 16), "batch_size": 64}
    found = list(take_steps([small, wide], data, cpus=1, gpu=False, seconds=20))
    samples = [sample for _, sample, _ in found]

    assert [(x.which, x.batch) for x in samples] == [
        *((0, n) for n in (1, 4, 8)),
        *((1, n) for n in (1, 4, 16, 20)),  # there are no more trajectories
    ]
    assert all(x.seconds > 0 and x.memory > 0 for x in samples)
    assert list(tmp_path.iterdir()) == []


def test_slow_steps_are_few(small: Config, data: Path) -> None:
    found = list(take_steps([small], data, cpus=1, gpu=False, seconds=0))

    assert [sample.batch for _, sample, _ in found] == [1]


def test_steps_are_taken_without_a_compiler(
    small: Config, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = list(take_steps([small | {"compile": "on"}], data, cpus=1, gpu=False, seconds=0))

    assert len(found) == 1


def test_memory_beyond_that_of_tensors_grows_for_large_networks_only(small: Config) -> None:
    base, more = 5 * 10**8, 10**9
    cost, large = (measure(small | {"batch_size": n}, 16) for n in (8, 4096))
    speed = speed_of([Sample(0, 8, 0.1, base + more)], [cost], base, gpu=True)
    assert speed.memory(cost) == pytest.approx(base + more)
    assert speed.memory(large) < base + more + 1.2 * large.peak

    speed = speed_of([Sample(0, 8, 0.1, base + 2 * large.peak)], [large], base, gpu=True)
    assert speed.memory(large) == pytest.approx(base + 2 * large.peak)
    assert speed.factor == pytest.approx(2, rel=0.01)


def test_forecast_without_pruning_is_exact() -> None:
    found = forecast(Rules(12, 10, pruner="none"), 4, [2.0])

    assert found.epochs == 120
    assert found.busy == 12 * 20
    assert found.finish == 3 * 20


def test_further_seeds_of_what_reaches_the_end_are_foreseen() -> None:
    every = Rules(12, 10, pruner="none", seeds=3)
    once, thrice = Rules(64, 64, 4), Rules(64, 64, 4, seeds=3)

    assert forecast(every, 4, [1.0]).epochs == 3 * 12 * 10
    assert expect(every, ()).most == 3 * 12 * 10

    more = forecast(thrice, 4, [1.0]).epochs - forecast(once, 4, [1.0]).epochs
    assert 2 * 64 < more < 2 * 64 * 16  # some go to the end, not many


@pytest.mark.parametrize("slots", [1, 8])
def test_forecast_of_promotion_is_near_the_formula(slots: int) -> None:
    rules = Rules(81, 81, min_epochs=3, eta=3)
    rungs = rules.rungs
    steps = itertools.pairwise(rungs)
    formula = rungs[0] + sum((b - a) / 3 ** (k + 1) for k, (a, b) in enumerate(steps))
    found = forecast(rules, slots, [1.0])

    assert 0.9 * formula < found.epochs / rules.target < 1.5 * formula
    assert found.busy == found.epochs
    assert found.busy / slots <= found.finish < 2 * found.busy / slots + rules.epochs


def test_forecast_of_a_long_sweep_is_quick_and_in_proportion() -> None:
    short, long = (forecast(Rules(n, 256, 9), 16, [1.0]) for n in (200, 2000))

    assert long.epochs / short.epochs == pytest.approx(10, rel=0.2)
    assert long.finish / short.finish == pytest.approx(10, rel=0.5)
