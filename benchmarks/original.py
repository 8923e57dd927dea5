#!/usr/bin/env python
r"""What do a training step and a sample cost, against the package `sda`, where it is installed?

That is the package of francois-rozet/sda, used by its public names. Its network and ours have as
many weights; the values differ. As in `step.py`, each measurement is a process on one core.

    python benchmarks/original.py [small mid full]
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from measured import Result, in_turns
from step import SIZES, STEPS

SIZE, BATCH = 64, 32
GOALS: dict[str, dict[str, float | None]] = {
    "step": {"small": 2.0, "mid": 1.6, "full": 2.0},
    "sample": {"small": 2.0, "mid": None, "full": 1.4},
}
SAMPLES, SAMPLING_STEPS = 4, 4


def is_installed() -> bool:
    return bool(importlib.util.find_spec("sda") and importlib.util.find_spec("sda.score"))


def upstream(config: dict[str, Any]) -> tuple[Callable[[torch.Tensor], float], Callable[[], Any]]:
    r"""Returns a training step and the sampling of upstream, as its example of this flow has them."""

    score: Any = importlib.import_module("sda.score")
    channels = 2 * config["window"]
    network = score.ScoreUNet(
        channels=channels,
        context=1,
        embedding=config["embedding"],
        hidden_channels=config["hidden_channels"],
        hidden_blocks=config["hidden_blocks"],
        kernel_size=config["kernel_size"],
        activation=getattr(torch.nn, config["activation"]),
        spatial=2,
        padding_mode="circular",
    )
    y = (torch.arange(SIZE) + 0.5) * (2 * torch.pi / SIZE)
    force = torch.sin(4 * y).expand(1, SIZE, SIZE).clone()
    sde = score.VPSDE(network, shape=(channels, SIZE, SIZE))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config["learning_rate"], weight_decay=config["weight_decay"]
    )

    def step(x: torch.Tensor) -> float:
        loss = sde.loss(x, c=force)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        return float(loss.detach())

    return step, lambda: sde.sample((SAMPLES,), c=force, steps=SAMPLING_STEPS)


def ours(config: dict[str, Any]) -> tuple[Callable[[torch.Tensor], float], Callable[[], Any]]:
    from sda_ray.training.loop import TrainState

    state = TrainState(config, size=SIZE)
    state.lr = config["learning_rate"]
    count = 0

    def step(x: torch.Tensor) -> float:
        nonlocal count
        count += 1
        loss = state.sde.loss(x)
        loss.backward()
        state.update(n=count)

        return float(loss.detach())

    def sample() -> Any:
        with torch.no_grad():
            return state.sde.sample((SAMPLES,), steps=SAMPLING_STEPS)

    return step, sample


def measure(kind: str, what: str, size: str) -> dict[str, float]:
    from sda_ray import CONFIG
    from sda_ray.core.system import keep_memory

    if kind == "ours":  # as a training of ours does
        keep_memory()

    torch.set_num_threads(1)
    config = CONFIG | SIZES[size]
    step, sample = (ours if kind == "ours" else upstream)(config)
    x = torch.randn(BATCH, 2 * config["window"], SIZE, SIZE)
    times = []

    for _ in range(1 + STEPS[size]):
        start = time.process_time()

        if what == "step":
            step(x)
        else:
            sample()

        times.append(time.process_time() - start)

    return {"seconds": median(times[1:])}


def results(quick: bool, sizes: tuple[str, ...] = ()) -> Iterator[Result]:
    for size in sizes or (("small",) if quick else tuple(SIZES)):
        for what, goals in GOALS.items():
            words = [sys.executable, __file__, "--measure"]
            commands = {kind: [*words, kind, what, size] for kind in ("ours", "upstream")}
            found = in_turns(commands, rounds=1 if quick else 3)
            a, b = (found[kind]["seconds"] for kind in ("ours", "upstream"))
            yield Result(f"{what}, {size}, package sda", a, b, b / a, goals[size], "CPU s")


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
        return

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="small, mid, full (default: all)")
    args = parser.parse_args()

    if not is_installed():
        sys.exit("The package sda is not installed. See https://github.com/francois-rozet/sda")

    for x in results(quick=False, sizes=tuple(args.sizes)):
        print(f"{x.name}: ours {x.ours:.3f}, upstream {x.peer:.3f} CPU s, ratio {x.ratio:.2f}")


if __name__ == "__main__":
    main()
