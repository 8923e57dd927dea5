#!/usr/bin/env python
r"""What does a checkpoint of the full network cost?

Saves the state of CONFIG's network (weights and the moments of AdamW) as a run does, in turn with
a plain `torch.save` of the same tensors and an fsync, and prints the ratio and the share of a
training's time at the default interval.

    python benchmarks/checkpoint.py [--rounds 5] [--directory DIR]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measured import Result, limit

from sda_ray import CONFIG
from sda_ray.runs.checkpoint import save_checkpoint
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import CHECKPOINT_COST, CHECKPOINT_SECONDS
from sda_ray.training.loop import TrainState


def seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()

    return time.perf_counter() - start


def compare(rounds: int, directory: str | None) -> dict[str, float]:
    r"""Returns the bytes of a checkpoint, the median seconds, ours and plain, and their ratio."""

    state = TrainState(CONFIG, size=64)
    tensors, info = state.tensors(), state.info()
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    ours, plain = [], []

    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = RunPath(Path(place) / "speedy-crab-1_abcd1234")
        path.directory.mkdir()

        def save() -> None:
            save_checkpoint(path, tensors, info)

        def save_plainly() -> None:
            with open(path.directory / "plain.pth", "wb") as stream:
                torch.save(tensors, stream)
                stream.flush()
                os.fsync(stream.fileno())

        for _ in range(rounds):
            ours.append(seconds(save))
            plain.append(seconds(save_plainly))

    cost = statistics.median(ours)
    interval = max(CHECKPOINT_SECONDS, cost / CHECKPOINT_COST)

    return {
        "size": size,
        "ours": cost,
        "plain": statistics.median(plain),
        "ratio": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
        "interval": interval,
        "share": cost / (cost + interval),
    }


def results(quick: bool) -> Iterator[Result]:
    x = compare(3 if quick else 5, None)
    note = f"{x['size'] / 1e6:.0f} MB, {x['ratio']:.2f} times as long as a plain torch.save"
    yield limit(
        "checkpoint, full, share of time", 100 * x["share"], 100 * CHECKPOINT_COST, "%", note
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="the disk to measure (default: the temporary one)")
    args = parser.parse_args()

    x = compare(args.rounds, args.directory)

    print(f"state: {x['size'] / 1e6:.0f} MB")
    print(
        f"ours:  {x['ours']:.2f} s (median of {args.rounds}), {x['ratio']:.2f} times a plain "
        "torch.save"
    )
    print(f"share: {100 * x['share']:.1f} % of the time, one each {x['interval']:.0f} s")


if __name__ == "__main__":
    main()
