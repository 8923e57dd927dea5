r"""The training loop: one epoch at a time, every step a function of `(seed, epoch, step)`.

Nothing random is remembered between steps. What step :math:`k` of epoch :math:`e` draws (windows,
times, noise, dropout) comes from generators seeded by :math:`(\text{seed}, e, k)`, so that a run may stop
after any step and go on elsewhere as if nothing had happened.
"""

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..core.config import Config, learning_rate
from ..data.dataset import TrajectoryDataset
from ..nn.diffusion import VPSDE
from ..nn.precision import allowing_tf32, lowered
from ..nn.score import MCScoreNet, make_score
from .averaging import average_of, follow
from .compilation import compiled
from .rng import DROPOUT, INIT, NOISE, ORDER, START, rng, seeded
from .validation import DRAWS, Validation

__all__ = ["Diverged", "Metrics", "TrainState", "epochs", "train_epoch", "validate"]

Metrics = dict[str, Any]

EXPLODED = 1e3  # a network that predicts no noise at all has a loss of 1


class Diverged(RuntimeError):
    r"""Signals a loss that is not finite or has exploded: a result, not a failure."""


class TrainState:
    r"""Creates everything that training changes: network, moments of AdamW and position.

    The network drops out during a step alone.

    Arguments:
        config: A checked config.
        size: The side :math:`H = W` of the states.
        device: Where to train.
    """

    score: MCScoreNet

    def __init__(self, config: Config, size: int, device: str | torch.device = "cpu") -> None:
        with seeded(INIT, config["seed"]):
            self.score = make_score(**config, size=size).to(device).eval()

        self.config = config
        self.device = torch.device(device)
        self.shape = 2 * config["window"], size, size
        self.sde = self._sde(self.score)
        self.compiled = compiled(self.sde, config["compile"])  # what a step of training sees
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
        r"""The network that the run is judged by and leaves: the averaged one, if there is one."""

        return self.score if self.average is None else self.average

    @property
    def result_sde(self) -> VPSDE:
        r"""The diffusion over windows with the network that the run is judged by."""

        return self._sde(self.result)

    def _sde(self, score: MCScoreNet) -> VPSDE:
        return VPSDE(score.kernel, self.shape, self.config["alpha"]).to(self.device)

    def begin(self, weights: dict[str, Tensor]) -> None:
        r"""Takes over the weights that another run left."""

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
        r"""Takes over a checkpoint.

        Raises:
            ValueError: If names, shapes or dtypes are not those of this state.
        """

        epoch, step = int(info["epoch"]), int(info["step"])
        here = {**self.tensors(), "losses": torch.zeros(step)}

        if wrong := _differences(here, tensors):
            raise ValueError(wrong)

        for key, x in here.items():
            x.copy_(tensors[key])

        self.epoch, self.step = epoch, step
        self.losses = here["losses"].to(self.device)
        self.saved = self.position

    @torch.no_grad()
    def update(self, n: int) -> None:
        r"""Takes step number n, from 1, of AdamW along the gradients, and clears them.

        The function rather than the class `torch.optim.AdamW`, whose constructor imports
        torch._dynamo: seconds for each process that trains. The bits are the same.
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


def validate(state: TrainState, validation: Validation, rungs: Collection[int] = ()) -> Metrics:
    r"""Returns what :func:`epochs` says of validation, for a state at the end of an epoch."""

    draws = DRAWS if state.epoch in {*rungs, state.config["epochs"]} else 1
    losses: Metrics = {}
    losses["loss_valid"], losses["loss_valid_se"] = validation(state.result_sde, draws)

    if state.average is not None:
        losses["loss_valid_raw"], _ = validation(state.sde, draws)

    return losses


def epochs(
    state: TrainState,
    trainset: TrajectoryDataset,
    validation: Validation,
    after_step: Callable[[TrainState], None] = lambda state: None,
    rungs: Collection[int] = (),
) -> Iterator[Metrics]:
    r"""Trains to the end of the config's epochs and yields the metrics of each.

    A run is judged by its loss at a rung and at the end: there it is the mean of several draws,
    of which the first is that of all other epochs.

    Yields:
        `epoch` (from 1), `loss_train`, `loss_valid`, `loss_valid_se`, `lr` and `seconds`, and
        `loss_valid_raw`, that of the weights themselves, if they are averaged.

    Raises:
        Diverged: If a loss is not finite or has exploded.
    """

    while state.epoch < state.config["epochs"]:
        start = time.monotonic()
        loss_train = train_epoch(state, trainset, after_step)
        losses = {"loss_train": loss_train, **validate(state, validation, rungs)}

        for key, loss in losses.items():
            if key != "loss_valid_se" and not loss < EXPLODED:
                raise Diverged(f"{key} is {loss:.3g} after epoch {state.epoch}")

        yield {
            "epoch": state.epoch,
            **losses,
            "lr": state.lr,
            "seconds": round(time.monotonic() - start, 3),
        }
