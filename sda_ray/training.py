r"""The training loop: one epoch at a time, every step a function of `(seed, epoch, step)`.

Nothing random is remembered between steps. What step :math:`k` of epoch :math:`e` draws (windows,
times, noise) comes from generators seeded by :math:`(\text{seed}, e, k)`, so that a run may stop
after any step and go on elsewhere as if nothing had happened.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config, schedule
from .data import TrajectoryDataset
from .diffusion import VPSDE
from .score import MCScoreNet, make_score

__all__ = ["SAMPLES", "Diverged", "Metrics", "TrainState", "Validation", "epochs", "rng", "train_epoch"]

Metrics = dict[str, Any]

INIT, ORDER, START, NOISE, VALID, SAMPLES = range(6)  # streams of random numbers

EXPLODED = 1e3  # a network that predicts no noise at all has a loss of 1


class Diverged(RuntimeError):
    r"""Signals a loss that is not finite or has exploded: a result, not a failure."""


def rng(stream: int, *key: int, device: str | torch.device = "cpu") -> torch.Generator:
    r"""Returns a generator that is a function of a stream and up to three numbers."""

    entropy = (stream, *key, *(0,) * (3 - len(key)))
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]

    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


class TrainState:
    r"""Creates everything that training changes: network, optimizer and position.

    Arguments:
        config: A checked config.
        size: The side :math:`H = W` of the states.
        device: Where to train.
    """

    score: MCScoreNet

    def __init__(self, config: Config, size: int, device: str | torch.device = "cpu") -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng(INIT, config["seed"]).initial_seed())
            self.score = make_score(**config, size=size).to(device)

        self.config = config
        self.device = torch.device(device)
        self.sde = VPSDE(self.score.kernel, shape=(2 * config["window"], size, size)).to(device)
        self.optimizer = torch.optim.AdamW(
            self.score.parameters(),
            lr=config["learning_rate"],
            weight_decay=config["weight_decay"],
            fused=True,
        )

        # AdamW makes its state at the first step; a checkpoint needs its names before that.
        for p in self.score.parameters():
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

        self.epoch = 0
        self.step = 0
        self.losses = torch.zeros(0)  # sum of the item losses of each step of this epoch
        self.saved: tuple[int, int] | None = None  # position of the newest checkpoint

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.step

    def tensors(self) -> dict[str, Tensor]:
        r"""Returns all tensors by name. They share memory with the state."""

        named = {f"score.{key}": x for key, x in self.score.state_dict().items()}

        for name, p in self.score.named_parameters():
            for key, x in self.optimizer.state[p].items():
                named[f"optimizer.{name}.{key}"] = x

        return {**named, "losses": self.losses[: self.step]}

    def info(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        r"""Takes over a checkpoint.

        Raises:
            ValueError: If names, shapes or dtypes are not those of this state.
        """

        here = self.tensors()
        losses = tensors["losses"] if "losses" in tensors else self.losses

        if wrong := _differences({**here, "losses": losses}, tensors):
            raise ValueError(f"the checkpoint does not fit the config: {wrong}")

        for key, x in here.items():
            if key != "losses":
                x.copy_(tensors[key])

        self.epoch, self.step = int(info["epoch"]), int(info["step"])
        self.losses = losses.to(self.device)
        self.saved = self.position


def _differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    for key in [*expected, *found]:
        if key not in found:
            return f"'{key}' is missing"
        if key not in expected:
            return f"'{key}' is unknown"
        if (found[key].shape, found[key].dtype) != (expected[key].shape, expected[key].dtype):
            return f"'{key}' is {found[key].dtype} of shape {tuple(found[key].shape)}"

    return ""


def train_epoch(
    state: TrainState,
    trainset: TrajectoryDataset,
    after_step: Callable[[TrainState], None] = lambda state: None,
) -> float:
    r"""Trains for one epoch, or for what is left of it.

    Each trajectory is seen once, through one window at a random start. `after_step` may save the
    state or raise to end the training there.

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

    for group in state.optimizer.param_groups:
        group["lr"] = config["learning_rate"] * schedule(config["scheduler"], e / config["epochs"])

    for k in range(state.step, len(batches)):
        indices = batches[k]
        starts = torch.randint(
            trainset.starts, indices.shape, generator=rng(START, seed, e, k)
        )
        noise_rng = rng(NOISE, seed, e, k, device=state.device)

        x = trainset.windows(indices, starts).to(state.device, non_blocking=True)
        loss = state.sde.loss(x, generator=noise_rng)
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

        state.losses[k] = loss.detach() * len(indices)
        state.step += 1
        after_step(state)

    loss_train = float(state.losses.double().sum()) / len(trainset)
    state.epoch, state.step = e + 1, 0
    state.losses = torch.zeros(0, device=state.device)

    return loss_train


class Validation:
    r"""Creates the validation loss: common random numbers, placed where the variance is.

    All runs on the same data see the same windows, times and noise, whatever their config. Times
    are :math:`t_j = v_j^2` with :math:`v_j` drawn in the :math:`j`-th of :math:`M` equal parts of
    :math:`[0, 1]` and item :math:`j` weighs :math:`2 v_j`, which leaves the expectation over
    uniform times unchanged,

    .. math:: \mathbb{E}_{t \sim U(0, 1)} [f(t)] = \int_0^1 f(v^2) \, 2v \, \mathrm{d}v

    and has a fraction of the variance: nearly all the loss of a good network is at small times.

    Arguments:
        validset: The trajectories, of which each is used equally often.
        device: Where to compute.
        least: The least number of items :math:`M`.
        draw: Which draw of the random numbers.
    """

    chunk = 32  # items at a time: fixed, since a sum's last bits depend on it

    def __init__(
        self,
        validset: TrajectoryDataset,
        device: str | torch.device = "cpu",
        least: int = 32,
        draw: int = 0,
    ) -> None:
        repeats = math.ceil(least / len(validset))
        items = repeats * len(validset)
        generator = rng(VALID, draw)

        indices = torch.arange(len(validset)).repeat(repeats)
        starts = torch.randint(validset.starts, (items,), generator=generator)
        parts = torch.randperm(items, generator=generator)
        v = (parts + torch.rand(items, generator=generator)) / items

        self.device = torch.device(device)
        self.draw = draw
        self.x = validset.windows(indices, starts)
        self.t = v.square()
        self.weights = 2 * v.double()
        self.parts = parts

    @torch.no_grad()
    def __call__(self, sde: VPSDE) -> tuple[float, float]:
        r"""Returns the mean of the denoising loss over the items, and its standard error.

        The standard error comes from the differences of items in neighbouring parts.
        """

        errors = []

        for i, (x, t) in enumerate(
            zip(self.x.split(self.chunk), self.t.split(self.chunk), strict=True)
        ):
            noise = torch.randn(x.shape, generator=rng(VALID, self.draw, 1 + i))
            x, t, noise = x.to(self.device), t.to(self.device), noise.to(self.device)
            errors.append(sde.errors(x, t, noise).double().cpu())

        losses = (self.weights * torch.cat(errors))[self.parts.argsort()]
        pairs = losses[: len(losses) // 2 * 2].view(-1, 2)
        variance = pairs.diff(dim=-1).square().sum() / len(losses) ** 2

        return float(losses.mean()), float(variance.sqrt())


def epochs(
    state: TrainState,
    trainset: TrajectoryDataset,
    validation: Validation,
    after_step: Callable[[TrainState], None] = lambda state: None,
) -> Iterator[Metrics]:
    r"""Trains to the end of the config's epochs and yields the metrics of each.

    Yields:
        `epoch` (from 1), `loss_train`, `loss_valid`, `loss_valid_se`, `lr` and `seconds`.

    Raises:
        Diverged: If a loss is not finite or has exploded.
    """

    while state.epoch < state.config["epochs"]:
        start = time.monotonic()
        loss_train = train_epoch(state, trainset, after_step)
        loss_valid, error = validation(state.sde)

        for key, loss in (("loss_train", loss_train), ("loss_valid", loss_valid)):
            if not loss < EXPLODED:
                raise Diverged(f"{key} is {loss:.3g} after epoch {state.epoch}")

        yield {
            "epoch": state.epoch,
            "loss_train": loss_train,
            "loss_valid": loss_valid,
            "loss_valid_se": error,
            "lr": state.optimizer.param_groups[0]["lr"],
            "seconds": round(time.monotonic() - start, 3),
        }
