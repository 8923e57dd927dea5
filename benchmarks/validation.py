#!/usr/bin/env python
r"""How much does the validation loss depend on what is drawn for it, against plain draws?

A network is validated again and again, with other random numbers each time: as sda_ray does, and
by the plain estimate, a mean over as many items at uniform times. Both cost the same. Printed are
the standard deviations, and whether the means agree, which is what both estimate.

The networks are an untrained one and one that is trained here until its loss is well below 0.1, on
waves of random phase that a small network can learn in a minute. It is kept in the directory.

    python benchmarks/validation.py [--draws 100] [--epochs 20] [--directory DIR]
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import Result
from torch import Tensor

from sda_ray import CONFIG
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.diffusion import VPSDE
from sda_ray.training.loop import TrainState, train_epoch
from sda_ray.training.validation import Validation

SIZE, LENGTH = 16, 12
COUNTS = {"train": 512, "valid": 64}
NETWORK: dict[str, Any] = {
    "window": 3,
    "embedding": 32,
    "hidden_channels": (32, 64),
    "hidden_blocks": (2, 2),
    "learning_rate": 2e-3,
}
GOAL = 5.0
GOOD = 0.1  # the loss of a network that counts as well trained


def make_data(directory: Path) -> None:
    import h5py

    generator = np.random.default_rng(0)
    grid = 2 * np.pi * np.arange(SIZE) / SIZE

    for split, n in COUNTS.items():
        phase = generator.uniform(0, 2 * np.pi, (n, 1, 2, 1, 1))
        time = 0.3 * np.arange(LENGTH).reshape(-1, 1, 1, 1)
        x = np.sin(grid[:, None] + time + phase) + np.cos(2 * grid - time + phase)

        with h5py.File(directory / f"{split}.h5", "w") as f:
            f.create_dataset("x", data=x.astype(np.float32))


def train(directory: Path, epochs: int) -> list[VPSDE]:
    r"""Returns an untrained network and the trained one, as it was before its last epoch and after."""

    file = directory / f"trained-{epochs}.pth"
    config = CONFIG | NETWORK | {"epochs": epochs}
    states = [TrainState(config, size=SIZE) for _ in range(3)]

    if not file.exists():
        trainset = TrajectoryDataset(directory / "train.h5", window=NETWORK["window"])
        weights = []

        for epoch in range(epochs):
            train_epoch(states[2], trainset)

            if epoch >= epochs - 2:
                weights.append({k: x.clone() for k, x in states[2].score.state_dict().items()})

        temporary = file.with_suffix(".tmp")
        torch.save(weights, temporary)
        temporary.replace(file)

    for state, weights in zip(states[1:], torch.load(file, weights_only=True), strict=True):
        state.score.load_state_dict(weights)

    return [state.sde for state in states]


@torch.no_grad()
def plain(sde: VPSDE, validset: TrajectoryDataset, generator: torch.Generator) -> float:
    r"""Returns the mean over a window of each trajectory, at uniform times with fresh noise."""

    starts = torch.randint(validset.starts, (len(validset),), generator=generator)
    x = validset.windows(torch.arange(len(validset)), starts)
    t = torch.rand(len(x), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    parts = zip(x.split(32), t.split(32), noise.split(32), strict=True)

    return float(torch.cat([sde.errors(*part) for part in parts]).double().mean())


def compare(draws: int, epochs: int, directory: Path) -> dict[str, dict[str, Tensor]]:
    r"""Returns the losses of each network over the draws, ours and plain."""

    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)

    if not (directory / "valid.h5").exists():
        make_data(directory)

    validset = TrajectoryDataset(directory / "valid.h5", window=NETWORK["window"])
    generator = torch.Generator().manual_seed(0)
    networks = dict(zip(("untrained", "before", "trained"), train(directory, epochs), strict=True))
    found: dict[str, dict[str, list[float]]] = {
        name: {"ours": [], "plain": []} for name in networks
    }

    for draw in range(draws):
        validation = Validation(validset, draw=draw)

        for name, sde in networks.items():
            found[name]["ours"].append(validation(sde)[0])
            found[name]["plain"].append(plain(sde, validset, generator))

    return {
        name: {kind: torch.tensor(x, dtype=torch.float64) for kind, x in kinds.items()}
        for name, kinds in found.items()
    }


def summary(losses: dict[str, Tensor]) -> dict[str, float]:
    ours, peer = losses["ours"], losses["plain"]
    error = math.sqrt((ours.var() + peer.var()) / len(ours))

    return {
        "loss": float(ours.mean()),
        "ours": float(ours.std()),
        "plain": float(peer.std()),
        "ratio": float(peer.std() / ours.std()),
        "off": float(abs(ours.mean() - peer.mean())) / error if error else 0.0,
    }


def results(quick: bool, directory: Path | None = None) -> Iterator[Result]:
    directory = directory or Path(tempfile.gettempdir()) / "sda-ray-validation"
    losses = compare(30 if quick else 100, 8 if quick else 20, directory)
    changes = {k: losses["trained"][k] - losses["before"][k] for k in ("ours", "plain")}
    rows: dict[str, Any] = {
        "trained": (losses["trained"], GOAL),
        "change in an epoch": (changes, GOAL),
        "untrained": (losses["untrained"], None),
    }

    for name, (values, goal) in rows.items():
        x = summary(values)
        note = f"mean {x['loss']:.4f}; the means are {x['off']:.1f} standard errors apart"

        if name == "trained" and x["loss"] > GOOD:
            goal, note = None, f"{note}; not well trained, its loss is above {GOOD}"

        label = f"validation, {name}"
        yield Result(label, x["ours"], x["plain"], x["ratio"], goal, "standard deviation", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--directory", type=Path, help="where data and network are kept")
    args = parser.parse_args()
    directory = args.directory or Path(tempfile.gettempdir()) / "sda-ray-validation"

    for name, losses in compare(args.draws, args.epochs, directory).items():
        x = summary(losses)
        print(
            f"{name:9} loss {x['loss']:.4f}, standard deviation {x['ours']:.5f}, plain "
            f"{x['plain']:.5f}, ratio {x['ratio']:.1f}; means {x['off']:.1f} errors apart"
        )


if __name__ == "__main__":
    main()
