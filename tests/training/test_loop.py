r"""Tests for sda_ray.training.loop: the same bits, whatever comes between."""

import copy
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sda_ray.core.config import CONFIG, SCHEDULERS, Config
from sda_ray.core.errors import UserError
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.score import load_score
from sda_ray.runs.checkpoint import load_checkpoint
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run
from sda_ray.training.loop import (
    DRAWS,
    Diverged,
    TrainState,
    average_of,
    check_compiler,
    compiled,
    epochs,
    follow,
    learning_rate,
    rng,
    schedule,
    steady_epochs,
    train_epoch,
)
from sda_ray.training.validation import Validation

SIZE = 16
DISABLED = Wandb("disabled")


@pytest.fixture
def trainset(data: Path) -> TrajectoryDataset:
    return TrajectoryDataset(data / "train.h5", window=3)


@pytest.fixture
def validation(data: Path) -> Validation:
    return Validation(TrajectoryDataset(data / "valid.h5", window=3))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


class Halt(Exception):
    pass


def halt_after(steps: int) -> Callable[[TrainState], None]:
    def after_step(state: TrainState) -> None:
        nonlocal steps
        steps -= 1

        if steps == 0:
            raise Halt

    return after_step


def seen(
    state: TrainState, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor]]:
    r"""Trains for an epoch and returns the (indices, starts) of its windows."""

    drawn = []
    windows = trainset.windows

    def record(indices: Tensor, starts: Tensor) -> Tensor:
        drawn.append((indices, starts))
        return windows(indices, starts)

    with monkeypatch.context() as context:
        context.setattr(trainset, "windows", record)
        train_epoch(state, trainset)

    return drawn


# Random numbers


def test_step_draws_the_same_numbers_whatever_came_before(
    small: Config, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = TrainState(small, SIZE)
    train_epoch(late, trainset)
    drawn = seen(late, trainset, monkeypatch)

    torch.manual_seed(1)
    torch.rand(100)
    fresh = TrainState(small, SIZE)
    fresh.epoch, fresh.step = 1, 1
    fresh.losses = torch.zeros(1)
    again = seen(fresh, trainset, monkeypatch)

    assert len(drawn) == 3 and len(again) == 2

    for a, b in zip(drawn[1:], again, strict=True):
        assert a[0].equal(b[0]) and a[1].equal(b[1])


def test_training_leaves_the_global_generator_alone(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    before = torch.get_rng_state()
    list(epochs(TrainState(small, SIZE), trainset, validation))
    assert torch.get_rng_state().equal(before)


def test_seed_decides_the_weights(small: Config) -> None:
    states = [TrainState(small | {"seed": seed}, SIZE).tensors() for seed in (0, 0, 1)]
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


# Epochs


def test_every_trajectory_once_per_epoch_with_the_last_partial_batch(
    small: Config, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(small | {"batch_size": 7}, SIZE)
    orders = []

    for _ in range(2):
        drawn = seen(state, trainset, monkeypatch)
        assert [len(indices) for indices, _ in drawn] == [7, 7, 6]
        orders.append(torch.cat([indices for indices, _ in drawn]))
        assert orders[-1].sort().values.tolist() == list(range(20))

    assert not orders[0].equal(orders[1])


def test_starts_are_uniform_over_all_windows(
    small: Config, trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainState, "update", lambda self, n: None)
    state = TrainState(small | {"batch_size": 20}, SIZE)
    starts = torch.cat([s for _ in range(50) for _, s in seen(state, trainset, monkeypatch)])
    counts = torch.bincount(starts, minlength=trainset.starts)
    assert len(counts) == 12 - 3 + 1
    chi2 = ((counts - 100.0) ** 2 / 100).sum()
    assert chi2 < 27.9  # 99.9 % of 9 degrees of freedom


@pytest.mark.parametrize("batch_size", [7, 20])
def test_loss_train_is_a_mean_over_items(
    small: Config,
    trainset: TrajectoryDataset,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    state = TrainState(small | {"batch_size": batch_size}, SIZE)
    items: list[float] = []

    def loss(x: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.rand(len(x), generator=generator)
        errors = state.sde.errors(x, t, torch.randn(x.shape, generator=generator))
        items.extend(errors.tolist())

        return errors.mean()

    monkeypatch.setattr(state.sde, "loss", loss)
    loss_train = train_epoch(state, trainset)
    assert len(items) == 20
    assert math.isclose(loss_train, sum(items) / 20, rel_tol=1e-6)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "exponential"])
def test_lr_follows_the_schedule(
    small: Config, trainset: TrajectoryDataset, validation: Validation, scheduler: str
) -> None:
    config = small | {"scheduler": scheduler, "epochs": 4}
    lrs = [m["lr"] for m in epochs(TrainState(config, SIZE), trainset, validation)]
    assert lrs == [1e-3 * schedule(scheduler, e / 4) for e in range(4)]


def test_update_is_that_of_adamw(small: Config, trainset: TrajectoryDataset) -> None:
    state = TrainState(small, SIZE)
    score = copy.deepcopy(state.score)
    optimizer = torch.optim.AdamW(score.parameters(), lr=1e-3, weight_decay=1e-3, fused=True)

    for k in range(3):
        for p, q in zip(state.score.parameters(), score.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.manual_seed(k))
            q.grad = p.grad.clone()

        state.update(k + 1)
        optimizer.step()

    assert equal(dict(state.score.state_dict()), dict(score.state_dict()))
    assert all(p.grad is None for p in state.score.parameters())


def test_metrics_of_an_epoch(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    found = list(epochs(TrainState(small, SIZE), trainset, validation))
    keys = {"epoch", "loss_train", "loss_valid", "loss_valid_se", "lr", "seconds"}
    assert [m["epoch"] for m in found] == [1, 2, 3]
    assert all(m.keys() == keys for m in found)
    assert found[-1]["loss_valid"] < found[0]["loss_valid"]


# Interruption


def train_to_the_end(
    state: TrainState, trainset: TrajectoryDataset, validation: Validation
) -> list[dict[str, object]]:
    metrics = list(epochs(state, trainset, validation))
    return [{k: x for k, x in m.items() if k != "seconds"} for m in metrics]


def test_loss_that_a_run_is_judged_by_is_the_mean_of_several_draws(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    state, found = TrainState(small | {"epochs": 3}, SIZE), []

    for metrics in epochs(state, trainset, validation, rungs=[2]):
        expected = [validation(state.sde), validation(state.sde, DRAWS)]
        found.append((metrics["loss_valid"], metrics["loss_valid_se"]))
        assert found[-1] == expected[metrics["epoch"] in (2, 3)]  # the last is a rung, too

    errors = [error for _, error in found]
    assert max(errors[1:]) < 0.75 * errors[0]  # a half of it, but for chance


def test_same_seed_trains_the_same_bits(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    a, b = TrainState(small, SIZE), TrainState(small, SIZE)
    assert train_to_the_end(a, trainset, validation) == train_to_the_end(b, trainset, validation)
    assert equal(a.tensors(), b.tensors())


@pytest.fixture(scope="module")
def whole(small: Config, data: Path) -> tuple[TrainState, list[dict[str, object]]]:
    r"""An uninterrupted training, and its metrics."""

    state = TrainState(small, SIZE)
    splits = [TrajectoryDataset(data / f"{split}.h5", window=3) for split in ("train", "valid")]

    return state, train_to_the_end(state, splits[0], Validation(splits[1]))


@pytest.mark.parametrize("steps", range(1, 10))
def test_interrupted_at_any_step_and_resumed_equals_uninterrupted(
    small: Config,
    trainset: TrajectoryDataset,
    validation: Validation,
    whole: tuple[TrainState, list[dict[str, object]]],
    steps: int,
) -> None:
    first = TrainState(small, SIZE)

    with pytest.raises(Halt):
        list(epochs(first, trainset, validation, halt_after(steps)))

    saved, info = copy.deepcopy(first.tensors()), first.info()
    assert info == {"epoch": (steps - 1) // 3, "step": (steps - 1) % 3 + 1}

    second = TrainState(small | {"seed": 0}, SIZE)
    second.load(saved, info)
    assert train_to_the_end(second, trainset, validation) == whole[1][info["epoch"] :]
    assert equal(second.tensors(), whole[0].tensors())


def test_checkpoint_of_another_network_is_refused_untouched(small: Config) -> None:
    state = TrainState(small, SIZE)
    before = copy.deepcopy(state.tensors())

    for other, reason in (
        ({"embedding": 16}, "'score.kernel.embedding.2.weight' is float32 of shape"),
        ({"hidden_blocks": (1, 2)}, "'score.kernel.network.*' is unknown"),
    ):
        with pytest.raises(ValueError, match=reason):
            state.load(TrainState(small | other, SIZE).tensors(), {"epoch": 0, "step": 0})

    tensors = state.tensors()
    tensors.pop("losses")

    with pytest.raises(ValueError, match="'losses' is missing"):
        state.load(tensors, {"epoch": 0, "step": 0})

    assert equal(state.tensors(), before)


# Divergence


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
def test_loss_that_is_not_finite_or_explodes_ends_the_training(
    small: Config, trainset: TrajectoryDataset, validation: Validation, value: float
) -> None:
    state = TrainState(small, SIZE)

    with torch.no_grad():
        for p in state.score.parameters():
            p.fill_(value)

    with pytest.raises(Diverged, match=r"loss_train is \S+ after epoch 1"):
        list(epochs(state, trainset, validation))


def test_learning_rate_that_is_far_too_high_ends_the_training(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    config = small | {"learning_rate": 100.0, "epochs": 50}

    with pytest.raises(Diverged, match=r"loss_\w+ is \S+ after epoch \d+"):
        list(epochs(TrainState(config, SIZE), trainset, validation))


def test_training_is_that_of_the_plain_formulation(
    trainset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    r"""The losses of 50 steps of the small network, in single precision."""

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    reference = importlib.import_module("reference")
    config = CONFIG | {"hidden_channels": (16, 32, 64), "hidden_blocks": (1, 1, 1), "window": 3}
    ours, theirs = TrainState(config, SIZE), TrainState(config, SIZE)
    reference.plain_network(theirs)
    plain_step = reference.plain_step(theirs)
    losses, expected = [], []

    for k in range(50):
        x = trainset.windows(torch.arange(4), torch.full((4,), k % trainset.starts))
        loss = ours.sde.loss(x, generator=rng(0, 0, k))
        loss.backward()
        ours.update(n=k + 1)
        losses.append(float(loss.detach()))
        expected.append(plain_step(x, rng(0, 0, k)))

    assert expected[-1] < expected[0]
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


# Learning rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_decays_from_one_towards_zero(name: str) -> None:
    factors = [schedule(name, i / 64) for i in range(65)]

    assert factors[0] == 1
    assert math.isclose(factors[-1], 1 if name == "constant" else 0, abs_tol=1e-3)
    assert factors == sorted(factors, reverse=True)


def test_schedule_is_as_defined() -> None:
    assert schedule("linear", 0.25) == 0.75
    assert math.isclose(schedule("cosine", 1 / 3), 0.75)
    assert math.isclose(schedule("exponential", 0.5), math.exp(-7 / 4))

    assert schedule("constant", 0.99) == schedule("wsd", 0.9) == 1
    assert math.isclose(schedule("wsd", 0.95), 0.5)

    with pytest.raises(UserError, match="scheduler is 'lineal'"):
        schedule("lineal", 0.5)


def test_learning_rate_rises_over_the_warmup_then_follows_the_schedule() -> None:
    config = CONFIG | {"epochs": 8, "learning_rate": 1.0}
    cold = [learning_rate(config, e) for e in range(8)]
    warm = [learning_rate(config | {"warmup": 4}, e) for e in range(8)]

    assert cold == [schedule("linear", e / 8) for e in range(8)]
    assert warm == [0.25 * cold[0], 0.5 * cold[1], 0.75 * cold[2], *cold[3:]]


@pytest.mark.parametrize("epochs", [1, 7, 10, 11, 20, 256, 999, 4096])
def test_steady_epochs_are_those_whose_rates_depend_on_no_later_one(epochs: int) -> None:
    config = CONFIG | {"epochs": epochs, "scheduler": "wsd"}
    steady = [learning_rate(config, e) == config["learning_rate"] for e in range(epochs)]

    assert steady_epochs(config) == sum(steady) == epochs - steady[::-1].index(True)
    assert steady_epochs(config | {"scheduler": "constant"}) == epochs
    assert steady_epochs(config | {"scheduler": "cosine"}) == 0


# Averages


@pytest.mark.parametrize(("n", "decay"), [(1, 2 / 11), (5, 0.4), (80, 0.9), (10**6, 0.9)])
def test_average_follows_faster_at_first(n: int, decay: float) -> None:
    module = nn.Linear(3, 2).double()
    average = average_of(module)
    before = average.weight.clone()
    nn.init.normal_(module.weight)
    follow(average, module, 0.9, n)

    assert torch.allclose(average.weight, decay * before + (1 - decay) * module.weight)


def test_average_is_of_the_parameters_only_and_does_not_learn() -> None:
    module = nn.BatchNorm1d(3)
    average = average_of(module)
    module.running_mean = torch.ones(3)
    follow(average, module, 0.9, 1)

    assert average.running_mean is not None and average.running_mean.equal(torch.zeros(3))
    assert not average.training and not any(p.requires_grad for p in average.parameters())


def test_every_step_is_averaged_and_learning_is_left_alone(
    small: Config, trainset: TrajectoryDataset
) -> None:
    plain, state = TrainState(small, 16), TrainState(small | {"ema": 0.3}, 16)
    average = copy.deepcopy(state.score)
    steps = 0

    def check(state: TrainState) -> None:
        nonlocal steps
        steps += 1
        follow(average, state.score, 0.3, steps)

    for _ in range(2):
        assert train_epoch(plain, trainset) == train_epoch(state, trainset, check)

    assert steps == 6 and state.average is not None

    for p, q, r, s in zip(
        plain.score.parameters(),
        state.score.parameters(),
        state.average.parameters(),
        average.parameters(),
        strict=True,
    ):
        assert p.equal(q) and r.equal(s) and not q.equal(r)


def test_loss_valid_is_that_of_the_average_and_the_raw_one_is_logged(
    small: Config, trainset: TrajectoryDataset, validation: Validation
) -> None:
    plain = list(epochs(TrainState(small, 16), trainset, validation))
    state = TrainState(small | {"ema": 0.999}, 16)
    found = list(epochs(state, trainset, validation))

    assert [m["loss_valid_raw"] for m in found] == [m["loss_valid"] for m in plain]
    assert all(m["loss_valid"] != m["loss_valid_raw"] for m in found)
    assert validation(state.result_sde, DRAWS) == (
        found[-1]["loss_valid"],
        found[-1]["loss_valid_se"],
    )
    assert all("loss_valid_raw" not in m for m in plain)


def test_state_holds_the_average_and_the_checkpoint_both(
    small: Config, data: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, small | {"epochs": 1, "ema": 0.999}, wandb=DISABLED)
    list(train_run(run, data))
    run.close("finished")

    checkpoint = load_checkpoint(run.path)
    assert checkpoint is not None
    tensors, state = checkpoint[0], torch.load(run.path.state, weights_only=True)

    for name, p in load_score(run.path.directory).named_parameters():
        assert p.equal(state[name]) and p.equal(tensors[f"average.{name}"])

    assert not state["kernel.network.heads.0.weight"].equal(
        tensors["score.kernel.network.heads.0.weight"]
    )


def test_average_begins_with_the_weights_of_another_run(small: Config) -> None:
    weights = TrainState(small | {"seed": 1}, 16).score.state_dict()
    state = TrainState(small | {"ema": 0.9}, 16)
    state.begin(weights)

    for score in (state.score, state.result):
        assert all(x.equal(weights[key]) for key, x in score.state_dict().items())


# Compilation


CELLS = 8
TINY: Config = CONFIG | {
    "window": 3,
    "embedding": 4,
    "hidden_channels": (4, 8),
    "hidden_blocks": (1, 1),
    "batch_size": 4,
    "dropout": 0.2,
    "parametrization": "v",
    "compile": "on",
}


def step(state: TrainState, n: int) -> tuple[float, list[torch.Tensor]]:
    r"""Returns the loss of a step, and the gradients."""

    generator = torch.Generator().manual_seed(n)
    x = torch.randn(4, 6, CELLS, CELLS, generator=generator)
    torch.manual_seed(n)  # what dropout draws from
    state.sde.train()
    loss = state.compiled.loss(x, generator=generator)
    state.sde.eval()
    loss.backward()

    return float(loss.detach()), [
        p.grad.clone() for p in state.score.parameters() if p.grad is not None
    ]


@pytest.mark.filterwarnings("default")  # of torch's own compiler
@pytest.mark.parametrize(
    ("backend", "channels"),
    [("inductor", (4,)), ("aot_eager", (4, 8))],  # the former takes a minute for one level
)
def test_compiled_step_has_the_maths_of_the_eager_one(
    backend: str, channels: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(network: Any, **options: Any) -> Any:
        return torch_compile(network, **options | {"mode": None, "backend": backend})

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    config = TINY | {"hidden_channels": channels, "hidden_blocks": (1,) * len(channels)}
    eager, ours = TrainState(config | {"compile": "off"}, CELLS), TrainState(config, CELLS)

    for n in range(1, 4):
        (expected, grads), (loss, found) = step(eager, n), step(ours, n)
        assert loss == pytest.approx(expected, rel=1e-6)

        for a, b in zip(grads, found, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm() + 1e-7  # single numbers may cancel out

        for state in (eager, ours):
            state.lr = 1e-3
            state.update(n)

    assert list(ours.tensors()) == list(eager.tensors())  # a checkpoint looks the same
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]


def test_network_is_compiled_however_many_were_before(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""A process of a sweep has many of them, and their bits must not depend on how many."""

    graphs: list[Any] = []
    compile = torch.compile

    def backend(graph: Any, _: Any) -> Any:  # a compiler that takes no time
        graphs.append(graph)
        return graph.forward

    def count(network: Any, **options: Any) -> Any:
        return compile(network, **options | {"mode": None, "backend": backend})

    monkeypatch.setattr(torch, "compile", count)
    torch.compiler.reset()

    for width in range(10):
        config = TINY | {"hidden_channels": (4 + width,), "hidden_blocks": (1,)}
        state = TrainState(config, CELLS)
        state.compiled.loss(torch.randn(2, 6, CELLS, CELLS))
        assert len(graphs) == width + 1


def test_without_a_compiler_the_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sde = TrainState(TINY | {"compile": "off"}, CELLS).sde
    assert compiled(sde, "off") is sde
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(UserError, match="no C\\+\\+ compiler here"):
        compiled(sde, "graphs")

    monkeypatch.delenv("CXX")
    check_compiler("on", sde.device)


def test_streams_and_keys_draw_different_numbers() -> None:
    keys = [(0,), (1,), (0, 1), (1, 1), (0, 0, 1), (0, 2**63 - 1)]
    drawn = [torch.rand(4, generator=rng(s, *key)) for s in range(3) for key in keys]
    assert len({tuple(x.tolist()) for x in drawn}) == 3 * len(keys)
