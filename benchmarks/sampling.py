#!/usr/bin/env python
r"""What does a step of sampling cost, against the plain formulation?

Trajectories are sampled by `VPSDE.sample`, alone and guided by an observation of every fourth
cell. Each measurement is a process of its own, on one core, whose CPU time counts. The processes
of a comparison take turns. The samples are compared, too: both must be the same.

    python benchmarks/sampling.py [small mid full] [--length 16] [--keep both] [--rounds 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from measured import Result
from step import SIZES

STEPS = {"small": 4, "mid": 2, "full": 1}
GOALS = {"small": 2.0, "mid": None, "full": 1.4}
LENGTH = 16  # snapshots of a trajectory


def measure(kind: str, size: str, length: int, guided: bool, kept: bool) -> dict[str, Any]:
    r"""Returns the CPU seconds of a step, and some numbers of the sample."""

    import torch
    from reference import plain_network

    from sda_ray import CONFIG
    from sda_ray.core.system import keep_memory
    from sda_ray.nn.diffusion import VPSDE
    from sda_ray.nn.guidance import GaussianScore
    from sda_ray.training.loop import TrainState

    if kept:
        keep_memory()

    torch.set_num_threads(1)
    state = TrainState(CONFIG | SIZES[size], size=64)

    if kind == "plain":
        plain_network(state)

    sde = VPSDE(state.score, shape=(length, 2, 64, 64)).eval()

    def coarse(x: torch.Tensor) -> torch.Tensor:
        return x[..., ::4, ::4]

    if guided:
        y = torch.zeros(length, 2, 16, 16)
        sde = VPSDE(GaussianScore(y, coarse, std=0.1, sde=sde), sde.shape)

    times: list[float] = []

    for steps in (1, STEPS[size]):
        generator = torch.Generator().manual_seed(0)
        start = time.process_time()
        x = sde.sample((1,), steps=steps, generator=generator)
        times.append((time.process_time() - start) / steps)

    return {"seconds": times[-1], "sample": x.flatten()[:: x.numel() // 64].tolist()}


def compare(size: str, length: int, guided: bool, keep: str, rounds: int) -> dict[str, float]:
    r"""Returns what a step costs, ours and plain, from processes that take turns."""

    found: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}

    for _ in range(rounds):
        for kind, results in found.items():
            words = [kind, size, str(length), str(int(guided)), str(int(keep in ("both", kind)))]
            command = [sys.executable, __file__, "--measure", *words]
            env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))

    plain, ours = (statistics.median(x["seconds"] for x in found[k]) for k in ("plain", "ours"))
    samples = [found[kind][0]["sample"] for kind in ("plain", "ours")]

    return {
        "plain": plain,
        "ours": ours,
        "ratio": plain / ours,
        "difference": max(abs(a - b) for a, b in zip(*samples, strict=True))
        / max(map(abs, samples[0])),
    }


def results(quick: bool) -> Iterator[Result]:
    for size in ("small",) if quick else SIZES:
        for guided in (False, True):
            for keep in ("none", "ours", "both"):
                x = compare(size, LENGTH, guided, keep, rounds=1 if quick else 3)
                yield Result(
                    f"sampling{', guided' * guided}, {size}, freed memory kept by {keep}",
                    x["ours"],
                    x["plain"],
                    x["ratio"],
                    GOALS[size] if keep == "ours" else None,
                    "CPU s a step",
                    f"the samples differ by {x['difference']:.0e}",
                )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        kind, size, *numbers = sys.argv[2:]
        length, guided, kept = map(int, numbers)
        print(json.dumps(measure(kind, size, length, bool(guided), bool(kept))))
        return

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="small, mid, full (default: all)")
    parser.add_argument("--length", type=int, default=LENGTH, help="snapshots of a trajectory")
    parser.add_argument(
        "--keep", default="ours", choices=("none", "ours", "both"), help="who keeps freed memory"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    print("a step of sampling", args.length, "snapshots on one core, in CPU seconds")

    for size in args.sizes or SIZES:
        for guided in (False, True):
            x = compare(size, args.length, guided, args.keep, args.rounds)
            print(
                f"{size:5} {'guided' if guided else 'alone':6}: plain {x['plain']:.3f}, ours "
                f"{x['ours']:.3f}, ratio {x['ratio']:.2f}; relative difference of the samples "
                f"{x['difference']:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
