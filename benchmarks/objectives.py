#!/usr/bin/env python
r"""Does a cheap number say which network assimilates best?

Small networks of several configurations are trained. Each is measured by `loss_valid`,
`denoising` and `skill`, on valid.h5, and evaluated on test.h5. Kendall's tau says how far each
cheap number puts the configurations into the order of the evaluation: 1 is the same, 0 no better
than chance. Its interval is found by bootstrap over configurations.

`loss_valid` is not made for several values of `window` and `alpha`, so its tau is also found among
those that share both. `cost` is CPU time relative to that of the training.

    sda-ray simulate --preset demo --data data
    python benchmarks/objectives.py --data data

What is measured is kept in `benchmarks/results/objectives.json` at once, and runs in `--directory`:
the same command resumes.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata

from sda_ray import CONFIG, TrajectoryDataset
from sda_ray.assimilation import bootstrap
from sda_ray.core import format_value, write_json
from sda_ray.nn import load_network
from sda_ray.runs import EvaluationSettings, RunPath, entries, evaluate_runs, last_metrics, select
from sda_ray.training import Denoising, Ensembles

RESULTS = Path(__file__).parent / "results" / "objectives.json"
OBSERVATIONS = ("assim", "extrapolate", "subsample-4", "circle")
NUMBERS = ("loss_valid", "denoising", "skill")
WINDOWS, ALPHAS = (3, 5), ("cos", "lin")
SHARED = {"window": 3, "alpha": "cos"}  # of half of the configurations
NETWORK = {
    "embedding": 16,
    "hidden_blocks": (1, 1),
    "batch_size": 8,
    "parametrization": "v",
}
FULL = EvaluationSettings(trajectories=2, members=3, steps=32)
BRIEF = EvaluationSettings(trajectories=1, members=2, steps=24)
GOAL_TAU, GOAL_COST = 0.7, 0.05


def configurations(count: int, most: int) -> list[dict[str, Any]]:
    r"""Returns configurations, of which the first are the same whatever their number."""

    rng = np.random.default_rng(0)
    configs = []

    for i in range(count):
        drawn = {
            "learning_rate": float(f"{10 ** rng.uniform(-4, -2.2):.3g}"),
            "epochs": int(rng.choice([e for e in (2, 4, 8, 16, 24) if e <= most])),
            "hidden_channels": ((8, 16), (16, 32), (24, 48))[rng.integers(3)],
            "activation": ("SiLU", "GELU", "ReLU")[rng.integers(3)],
            "window": int(rng.choice(WINDOWS)),
            "alpha": str(rng.choice(ALPHAS)),
        }
        configs.append(NETWORK | drawn | (SHARED if i % 2 == 0 else {}))

    return configs


def measure(config: dict[str, Any], data: Path, directory: Path, quick: bool) -> dict[str, Any]:
    r"""Trains a network, or takes the one that is there, and returns its numbers and their costs."""

    torch.set_num_threads(1)
    words = [f"{key}={format_value(value)}" for key, value in config.items()]
    options = ("--data", str(data), "--runs", str(directory), "--threads=1", "--device=cpu")
    path = _finished(config, directory)
    costs: dict[str, float] = {}

    if path is None:
        env = os.environ | {"WANDB_MODE": "disabled"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [sys.executable, "-m", "sda_ray", "train", *options, *words]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        costs["training"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        path = _finished(config, directory)

    assert path is not None
    line = last_metrics(path.metrics)
    values = {"loss_valid": line["loss_valid"], "sample_std": line.get("sample_std")}
    errors = {"loss_valid": line["loss_valid_se"]}
    validset = TrajectoryDataset(data / "valid.h5", window=1)
    score, _ = load_network(path.directory)
    states = 2 * max(WINDOWS) - 1

    for name, objective in (("denoising", Denoising), ("skill", Ensembles)):
        function = objective(validset, states)
        start = time.process_time()
        values[name], errors[name] = function(score, config["alpha"])
        costs[name] = time.process_time() - start

    start = time.process_time()
    observations = OBSERVATIONS[1:3] if quick else OBSERVATIONS
    settings = BRIEF if quick else FULL
    evaluations, failures = evaluate_runs([path], data, settings, observations)
    costs["evaluation"] = time.process_time() - start

    if failures:
        raise RuntimeError(str(failures))

    rows = [row for found in evaluations[path].results.values() for row in found.values()]
    values["evaluation"] = float(np.mean([row.get("crps", math.inf) for row in rows]))

    return {"run": path.directory.name, "values": values, "errors": errors, "costs": costs}


def _finished(config: dict[str, Any], directory: Path) -> RunPath | None:
    runs = select(entries(directory), status="finished", settings=CONFIG | config)

    return runs[0].path if runs else None


def tau(pairs: Any) -> float:
    r"""Returns Kendall's tau of pairs, those that are equal in one of them counted (tau-b)."""

    value = float(kendalltau(pairs[:, 0], pairs[:, 1]).statistic)

    return 0.0 if math.isnan(value) else value


def table(found: list[dict[str, Any]]) -> str:
    r"""Returns the table of the numbers: tau, interval and cost of each."""

    shared = [x for x in found if all(x["config"][k] == v for k, v in SHARED.items())]
    lines = ["| number | configurations | tau | 95 % interval | cost |", "|---|--:|--:|--:|--:|"]

    for name in NUMBERS:
        costs = [x["costs"][name] / x["costs"]["training"] for x in found if _timed(x, name)]
        cost = f"{np.median(costs):.1%}" if costs else "in the training"

        for kind, group in (("all", found), ("of one window and alpha", shared)):
            values = [[x["values"][key] for x in group] for key in (name, "evaluation")]
            ranks = torch.tensor(np.stack([rankdata(row) for row in values], axis=1))

            if len(ranks) < 2:
                continue

            low, high = bootstrap(ranks, lambda rows: tau(rows.numpy()))
            lines.append(
                f"| `{name}` | {len(ranks)} {kind} | {tau(ranks.numpy()):.2f} | "
                f"{low:.2f} to {high:.2f} | {cost} |"
            )

    return "\n".join(lines)


def _timed(x: dict[str, Any], name: str) -> bool:
    return name in x["costs"] and "training" in x["costs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="as of the preset demo")
    parser.add_argument("--configurations", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="4, tiny: whether it works")
    args = parser.parse_args()
    directory = args.directory or Path(tempfile.gettempdir()) / "sda-ray-objectives"
    directory /= "quick" if args.quick else "full"
    file = directory / RESULTS.name if args.quick else RESULTS
    count, most = (4, 4) if args.quick else (args.configurations, 24)
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    configs = {_key(config): config for config in configurations(count, most)}

    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        missing = {
            pool.submit(measure, config, args.data.absolute(), directory, args.quick): key
            for key, config in configs.items()
            if key not in found
        }

        for future in as_completed(missing):
            key = missing[future]
            found[key] = {"config": configs[key], **future.result()}
            write_json(file, found)
            values = ", ".join(f"{k} {x:.4g}" for k, x in found[key]["values"].items() if x)
            print(f"{found[key]['run']}: {values}", flush=True)

    text = table([found[key] for key in configs])
    print(text)
    file.with_suffix(".md").write_text(f"{text}\n")


def _key(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
