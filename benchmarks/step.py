#!/usr/bin/env python
r"""What does a training step cost, against the plain formulation?

Each measurement is a process of its own, on one core, whose CPU time counts. The processes of a
comparison take turns. Losses after the same steps are compared, too: both must train alike.

    python benchmarks/step.py [small mid full] [--precision fp32 bf16] [--keep both] [--rounds 3]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measured import Result

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_channels": (16, 32, 64), "hidden_blocks": (1, 1, 1)},
    "mid": {"hidden_channels": (32, 64, 128), "hidden_blocks": (3, 3, 3)},
    "full": {},
}
STEPS = {"small": 8, "mid": 4, "full": 2}
GOALS = {
    "fp32": {"small": 2.0, "mid": 1.6, "full": 2.0},
    "bf16": {"small": 3.0, "mid": 2.5, "full": 3.5},
}


def measure(
    kind: str, size: str, precision: str, batch: int, tuned: bool, cores: int = 0
) -> dict[str, Any]:
    r"""Returns the seconds of the median step, the last loss, and the memory at its peak.

    They are seconds of the CPU, with one thread; or of the wall on so many cores, with a thread
    on each.
    """

    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    if tuned:
        from sda_ray.core.system import keep_memory

        keep_memory()

    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from reference import plain_network, plain_step

    from sda_ray import CONFIG
    from sda_ray.nn.precision import lowered
    from sda_ray.training.loop import TrainState

    torch.set_num_threads(max(1, cores))
    clock = time.perf_counter if cores else time.process_time
    config = CONFIG | SIZES[size] | {"precision": precision}
    state = TrainState(config, size=64)
    x = torch.randn(
        batch, 2 * config["window"], 64, 64, generator=torch.Generator().manual_seed(0)
    )
    state.lr = config["learning_rate"]

    if kind == "plain":
        plain_network(state)
        step = plain_step(state)
    else:

        def step(x: torch.Tensor, generator: torch.Generator) -> float:
            with lowered(precision, state.device):
                loss = state.sde.loss(x, generator=generator)

            loss.backward()
            state.update(n=1 + len(times))

            return float(loss.detach())

    times: list[float] = []

    for i in range(1 + STEPS[size]):
        start = clock()
        loss = step(x, torch.Generator().manual_seed(i))
        times.append(clock() - start)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    return {"seconds": statistics.median(times[1:]), "loss": loss, "peak": peak}


def compare(size: str, precision: str, batch: int, keep: str, rounds: int) -> dict[str, float]:
    r"""Returns what a step costs, ours and plain, from processes that take turns."""

    found: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}

    for _ in range(rounds):
        for kind, results in found.items():
            kept = keep in ("both", kind)
            results.append(
                _measured(kind, size, precision if kind == "ours" else "fp32", batch, kept)
            )

    plain, ours = (statistics.median(x["seconds"] for x in found[k]) for k in ("plain", "ours"))

    return {
        "plain": plain,
        "ours": ours,
        "ratio": plain / ours,
        "loss": abs(found["ours"][0]["loss"] / found["plain"][0]["loss"] - 1),
        "memory": found["plain"][0]["peak"] / found["ours"][0]["peak"],
    }


def _measured(*args: Any) -> dict[str, Any]:
    r"""Returns what :func:`measure` does, from a process of its own."""

    words = [sys.executable, __file__, "--measure", json.dumps(args)]
    env = {k: x for k, x in os.environ.items() if k != "OMP_NUM_THREADS"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])

    return found


def scaling(size: str, rounds: int) -> Result:
    r"""Returns how much faster a step of ours is on two cores than on one, by the wall."""

    times: dict[int, list[float]] = {1: [], 2: []}

    for _ in range(rounds):
        for cores, found in times.items():
            found.append(_measured("ours", size, "fp32", 32, True, cores)["seconds"])

    one, two = (statistics.median(found) for found in times.values())

    return Result(f"step, {size}, two cores", two, one, one / two, 1.7, "s", "against one core")


def has_bf16() -> bool:
    r"""Whether the CPU has instructions for bf16. Without, it is emulated, and five times slower."""

    info = Path("/proc/cpuinfo")

    return info.exists() and "bf16" in info.read_text()


def results(quick: bool) -> Iterator[Result]:
    for precision in ("fp32", *["bf16"] * has_bf16()):
        for size in ("small", "mid") if quick else SIZES:
            for keep in ("none", "ours", "both"):
                x = compare(size, precision, 32, keep, _rounds(size, quick))
                yield Result(
                    f"step, {size}, {precision}, freed memory kept by {keep}",
                    x["ours"],
                    x["plain"],
                    x["ratio"],
                    GOALS[precision][size] if keep == "ours" else None,
                    "CPU s",
                    f"memory {x['memory']:.2f} times less; loss differs by {x['loss']:.0e}",
                )

    if len(os.sched_getaffinity(0)) > 1:
        for size in ("small", "mid") if quick else SIZES:
            yield scaling(size, _rounds(size, quick))


def _rounds(size: str, quick: bool) -> int:
    return 1 if quick or size == "full" else 3


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        return

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="small, mid, full (default: all)")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument(
        "--keep",
        default="ours",
        choices=("none", "ours", "both"),
        help="who keeps freed memory; a training of ours does",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    print("a step of batch", args.batch, "on one core, in CPU seconds; plain is always fp32")

    for size in args.sizes or SIZES:
        for precision in args.precision:
            x = compare(size, precision, args.batch, args.keep, args.rounds)
            print(
                f"{size:5} {precision}: plain {x['plain']:.3f}, ours {x['ours']:.3f}, ratio "
                f"{x['ratio']:.2f}; memory {x['memory']:.2f} times less; relative difference of "
                f"the loss after {1 + STEPS[size]} steps {x['loss']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
