r"""The training loop: one epoch at a time, every step a function of `(seed, epoch, step)`.

No random state is kept between steps. What step :math:`k` of epoch :math:`e` draws (windows, times,
noise, dropout) comes from generators seeded by :math:`(\text{seed}, e, k)`, so that a run may stop
after any step and resume elsewhere to the same bits.
"""

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..core import Config, UserError, check_value
from ..data import TrajectoryDataset
from ..nn import (
    VPSDE,
    MCScoreNet,
    allowing_tf32,
    lowered,
    make_score,
    mismatches,
    network_settings,
)

M = TypeVar("M", bound=nn.Module)
Metrics = dict[str, Any]
# A number, and its standard error
Measure = Callable[[MCScoreNet, str], tuple[float, float]]
Loss = Callable[[VPSDE, int], tuple[float, float]]  # of so many draws

# Streams of random numbers
INIT, ORDER, START, NOISE, VALID, SAMPLES, DROPOUT, DENOISING, ENSEMBLES = range(9)

DRAWS = 4  # independent draws whose mean a run is judged by
EXPLODED = 1e3  # a network that predicts no noise at all has a loss of 1


def rng(stream: int, *key: int, device: str | torch.device = "cpu") -> torch.Generator:
    r"""Returns a generator that is a function of a stream and up to three numbers."""

    entropy = (stream, *key, *(0,) * (3 - len(key)))
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]

    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


@contextmanager
def seeded(stream: int, *key: int, device: str | torch.device = "cpu") -> Iterator[None]:
    r"""Makes what draws from torch's global generators a function of a stream and numbers.

    The generators are as they were before when it is left.
    """

    device = torch.device(device)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(rng(stream, *key).initial_seed())
        yield


class Diverged(RuntimeError):
    r"""Raised if a loss is not finite or has exploded: a result, not a failure."""


class TrainState:
    r"""Creates everything that training changes: network, moments of AdamW and position.

    The states have the side :math:`H = W`, `size`. Dropout is active during a step only.
    """

    score: MCScoreNet

    def __init__(self, config: Config, size: int, device: str | torch.device = "cpu") -> None:
        with seeded(INIT, config["seed"]):
            self.score = make_score(**network_settings(config), size=size).to(device).eval()

        self.config = config
        self.device = torch.device(device)
        self.shape = 2 * config["window"], size, size
        self.sde = self._sde(self.score)
        self.compiled = compiled(self.sde, config["compile"])  # for steps of training
        self.average = average_of(self.score) if config["ema"] else None
        self.lr = config["learning_rate"]
        self.moments = {
            name: {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for name, p in self.score.named_parameters()
        }
        self.epoch = 0
        self.step = 0
        self.losses = torch.zeros(0)  # sum of the item losses of each step of this epoch
        self.saved: tuple[int, int] | None = None  # position of the newest checkpoint

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.step

    @property
    def result(self) -> MCScoreNet:
        r"""The network that the run is judged by and saves: the averaged one, if there is one."""

        return self.score if self.average is None else self.average

    @property
    def result_sde(self) -> VPSDE:
        r"""The diffusion over windows with the network that the run is judged by."""

        return self._sde(self.result)

    def _sde(self, score: MCScoreNet) -> VPSDE:
        return VPSDE(score.kernel, self.shape, self.config["alpha"]).to(self.device)

    def begin(self, weights: dict[str, Tensor]) -> None:
        self.score.load_state_dict(weights)
        self.result.load_state_dict(weights)

    def tensors(self) -> dict[str, Tensor]:
        r"""Returns all tensors by name. They share memory with the state."""

        named = {f"score.{key}": x for key, x in self.score.state_dict().items()}

        for name, moments in self.moments.items():
            named |= {f"optimizer.{name}.{key}": x for key, x in moments.items()}

        if self.average is not None:
            named |= {f"average.{name}": x.detach() for name, x in self.average.named_parameters()}

        return {**named, "losses": self.losses[: self.step]}

    def info(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        r"""Loads a checkpoint.

        Raises:
            ValueError: If names, shapes or dtypes are not those of this state.
        """

        epoch, step = int(info["epoch"]), int(info["step"])
        own = {**self.tensors(), "losses": torch.zeros(step)}

        if wrong := mismatches(tensors, own):
            raise ValueError(wrong[0])

        for key, x in own.items():
            x.copy_(tensors[key])

        self.epoch, self.step = epoch, step
        self.losses = own["losses"].to(self.device)
        self.saved = self.position

    @torch.no_grad()
    def update(self, n: int) -> None:
        r"""Takes step number n, from 1, of AdamW along the gradients, and clears them.

        The constructor of the class `torch.optim.AdamW` would import torch._dynamo, which takes
        seconds. The function has the same bits.
        """

        parameters: list[Tensor] = list(self.score.parameters())
        moments = self.moments.values()
        beta1, beta2 = self.config["betas"]

        if self.config["grad_clip"]:
            torch.nn.utils.clip_grad_norm_(parameters, self.config["grad_clip"])

        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [m["exp_avg"] for m in moments],
            [m["exp_avg_sq"] for m in moments],
            [],
            [m["step"] for m in moments],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.lr,
            weight_decay=self.config["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

        for p in parameters:
            p.grad = None

        if self.average is not None:
            follow(self.average, self.score, self.config["ema"], n)


def train_epoch(
    state: TrainState,
    trainset: TrajectoryDataset,
    after_step: Callable[[TrainState], None] = lambda state: None,
) -> float:
    r"""Trains to the end of the current epoch.

    Each trajectory is seen once, through one window at a random start. `after_step` may save the
    state, or raise to end the training there.

    Returns:
        The mean of the denoising loss over the items of the epoch.
    """

    config, seed, e = state.config, state.config["seed"], state.epoch
    order = torch.randperm(len(trainset), generator=rng(ORDER, seed, e))
    batches = order.split(config["batch_size"])

    if len(state.losses) != len(batches):
        losses = torch.zeros(len(batches), device=state.device)
        losses[: state.step] = state.losses[: state.step]
        state.losses = losses

    state.lr = learning_rate(config, e)

    for k in range(state.step, len(batches)):
        indices = batches[k]
        starts = torch.randint(trainset.starts, indices.shape, generator=rng(START, seed, e, k))
        noise_rng = rng(NOISE, seed, e, k, device=state.device)

        x = trainset.windows(indices, starts).to(state.device, non_blocking=True)
        dropout = seeded(DROPOUT, seed, e, k, device=state.device)
        state.sde.train()

        with allowing_tf32(config["precision"], state.device):
            with dropout, lowered(config["precision"], state.device):
                loss = state.compiled.loss(x, generator=noise_rng)

            state.sde.eval()
            loss.backward()

        state.update(n=e * len(batches) + k + 1)

        state.losses[k] = loss.detach() * len(indices)
        state.step += 1
        after_step(state)

    loss_train = float(state.losses.double().sum()) / len(trainset)
    state.epoch, state.step = e + 1, 0
    state.losses = torch.zeros(0, device=state.device)

    return loss_train


def validate(
    state: TrainState,
    validation: Loss,
    rungs: Collection[int] = (),
    samples: Callable[[TrainState], Metrics] | None = None,
    measures: Mapping[str, Measure] = MappingProxyType({}),
) -> Metrics:
    r"""Returns the validation losses of a state at the end of an epoch, and all else that it is
    judged by, see :func:`epochs`."""

    judged = state.epoch in {*rungs, state.config["epochs"]}
    draws = DRAWS if judged else 1
    losses: Metrics = {}
    losses["loss_valid"], losses["loss_valid_se"] = validation(state.result_sde, draws)

    if state.average is not None:
        losses["loss_valid_raw"], _ = validation(state.sde, draws)

    for name, measure in measures.items() if judged else ():
        losses[name], losses[f"{name}_se"] = measure(state.result, state.config["alpha"])

    return losses | (samples(state) if samples is not None else {})


def epochs(
    state: TrainState,
    trainset: TrajectoryDataset,
    validation: Loss,
    after_step: Callable[[TrainState], None] = lambda state: None,
    rungs: Collection[int] = (),
    samples: Callable[[TrainState], Metrics] | None = None,
    measures: Mapping[str, Measure] = MappingProxyType({}),
) -> Iterator[Metrics]:
    r"""Trains to the end of the config's epochs and yields the metrics of each.

    A run is judged by its loss at a rung and at the end: there it is the mean of several draws,
    the first of which is that of all other epochs.

    Yields:
        `epoch` (from 1), `loss_train`, `loss_valid`, `loss_valid_se`, `lr` and `seconds`;
        `loss_valid_raw`, that of the weights themselves, if they are averaged; and, where the run
        is judged, the `measures`, each with its standard error as `…_se`, and what
        :func:`sda_ray.training.samples.compare_samples` returns.

    Raises:
        Diverged: If a loss is not finite or has exploded, or a measure is not finite.
    """

    while state.epoch < state.config["epochs"]:
        start = time.monotonic()
        loss_train = train_epoch(state, trainset, after_step)
        judged = validate(state, validation, rungs, samples, measures)
        losses = {"loss_train": loss_train, **judged}

        for key in ("loss_train", "loss_valid", "loss_valid_raw", *measures):
            limit = math.inf if key in measures else EXPLODED

            if not (value := losses.get(key, 0.0)) < limit:
                raise Diverged(f"{key} is {value:.3g} after epoch {state.epoch}")

        yield {
            "epoch": state.epoch,
            **losses,
            "lr": state.lr,
            "seconds": round(time.monotonic() - start, 3),
        }


def schedule(name: str, s: float) -> float:
    r"""Returns the factor of the learning rate at a progress :math:`s = e / E` in :math:`[0, 1]`.

    Arguments:
        name: `linear` is :math:`1 - s`, `cosine` :math:`(1 + \cos \pi s) / 2`, `exponential`
            :math:`\exp(-7 s^2)`, `constant` 1 and `wsd` (warm-up, stable, decay)
            :math:`\min(1, 10 (1 - s))`.
        s: The epoch over the number of epochs.
    """

    factors = {
        "linear": 1 - s,
        "cosine": (1 + math.cos(math.pi * s)) / 2,
        "exponential": math.exp(-7 * s**2),
        "constant": 1.0,
        "wsd": 1.0 if s <= 0.9 else min(1.0, 10 * (1 - s)),
    }

    return factors[check_value("scheduler", name)]


def learning_rate(config: Config, epoch: int) -> float:
    r"""Returns the learning rate of an epoch, counted from 0.

    .. math:: \lambda_e = \lambda \, \min(1, (e + 1) / W) \, \mathrm{schedule}(e / E)

    where :math:`W` is `warmup` and :math:`E` is `epochs`.
    """

    rise = min(1.0, (epoch + 1) / config["warmup"]) if config["warmup"] else 1.0

    return config["learning_rate"] * rise * schedule(config["scheduler"], epoch / config["epochs"])


def steady_epochs(config: Config) -> int:
    r"""Returns how many epochs, from the first, are the same in every longer run.

    All are for `constant`, those before the decay for `wsd`, and none for schedules that decay
    over `epochs`.
    """

    if config["scheduler"] == "constant":
        return config["epochs"]
    elif config["scheduler"] == "wsd":
        return min(config["epochs"], 9 * config["epochs"] // 10 + 1)
    else:
        return 0


def average_of(module: M) -> M:
    r"""Returns a copy of a module for its running average: without gradients or dropout."""

    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float, n: int) -> None:
    r"""Moves the average of a module's parameters after a step of its training.

    .. math:: \bar{\phi} \gets \delta \bar{\phi} + (1 - \delta) \phi
        \quad \text{with} \quad \delta = \min(\text{decay}, (1 + n) / (10 + n))

    where :math:`n` is the number of the step, from 1.
    """

    rate = 1 - min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), rate)


def compiled(sde: VPSDE, how: str) -> VPSDE:
    r"""Returns a diffusion with a compiled network, which shares its weights with the given one.

    The maths and the draws of dropout are those of the eager network, but the bits differ. The
    first step of each batch size takes as long as the compilation. `graphs` adds CUDA graphs to
    `on`, and means `on` on a CPU.
    """

    if how == "off":
        return sde

    check_compiler(how, sde.device)

    import torch._dynamo.config as limits
    import torch._inductor.config as settings  # takes seconds

    settings.fallback_random = True
    # torch 2.13 counts the graphs of all networks of a process, and stops to compile after 8
    limits.recompile_limit = limits.accumulated_recompile_limit = 2**20
    graphs = how == "graphs" and sde.device.type == "cuda"

    return VPSDE(_Compiled(sde.eps, graphs), sde.shape, sde.curve, sde.eta)


def check_compiler(how: str, device: torch.device) -> None:
    r"""Checks that there is a C++ compiler, if a network is to be compiled on the CPU."""

    compiler = os.environ.get("CXX", "g++")

    if how != "off" and device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            "compile is on, but there is no C++ compiler here (g++, or what CXX names). Install one, "
            "or set compile=off."
        )


class _Compiled(nn.Module):
    def __init__(self, network: nn.Module, graphs: bool) -> None:
        super().__init__()

        mode = "reduce-overhead" if graphs else None
        self.network = torch.compile(network, mode=mode, dynamic=False)
        self.graphs = graphs

    def forward(self, *args: Any) -> Any:
        if self.graphs:  # the outputs of the previous step may be overwritten
            torch.compiler.cudagraph_mark_step_begin()

        return self.network(*args)
