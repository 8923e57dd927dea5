r"""A sweep on disk whose trials were not trained: their losses follow a formula."""

import json
import math
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sda_ray import CONFIG, Sweep, choice, loguniform
from sda_ray.core.lease import Lease
from sda_ray.search.promotion import decide
from sda_ray.search.study import Study, draw_run, replicate_run
from sda_ray.sweep.record import write_sweep

SPACE = {
    "learning_rate": loguniform(1e-4, 1e-2),
    "weight_decay": loguniform(1e-5, 1e-1),
    "activation": choice("SiLU", "GELU", "ReLU"),
}
START = 1_700_000_000
EPOCH = 10.0  # seconds


def loss(config: dict[str, Any], epoch: int) -> float:
    r"""Returns a loss that falls with the epoch, and is least at a learning rate of 1e-3."""

    return 0.1 + (math.log10(config["learning_rate"]) + 3) ** 2 / 10 + 0.5 / epoch


def make_sweep(
    runs: Path,
    name: str,
    count: int,
    space: Any = None,
    epochs: int = 30,
    ends: dict[int, str] | None = None,
    **settings: Any,
) -> Study:
    r"""Makes a finished sweep, one trial at a time, as its rules decide.

    `ends` has the trials, by number, that fail or diverge at the first rung.
    """

    config = CONFIG | {"epochs": epochs}
    settings = {"sampler": "random"} | settings

    return play_sweep(runs, Sweep(name, config, space or SPACE, trials=count, **settings), ends)


def make_sweep_of_seeds(runs: Path, name: str, count: int) -> Study:
    r"""Makes a finished sweep of three seeds, each of which adds 0.01 to the loss."""

    config = CONFIG | {"epochs": 30}
    sweep = Sweep(name, config, SPACE, trials=count, sampler="random", seeds=3)

    return play_sweep(runs, sweep, loss=lambda c, epoch: loss(c, epoch) + 0.01 * c["seed"])


def play_sweep(
    runs: Path,
    sweep: Sweep,
    ends: dict[int, str] | None = None,
    loss: Callable[[dict[str, Any], int], float] = loss,
    **record: Any,
) -> Study:
    r"""Plays a sweep to its end, as its rules decide; `record` adds to its own."""

    sweep, name, ends = sweep.check(), sweep.name, ends or {}
    config, epochs = sweep.config, sweep.config["epochs"]
    directory = runs / "sweeps" / name
    directory.mkdir(parents=True)
    record |= {"name": name, "trials": sweep.trials, "definition": sweep.definition()}
    write_sweep(directory, {"fingerprint": 64 * "f", "options": {}} | record, None)
    lease = Lease(directory / "lease.json", f"sweep '{name}'")
    study = Study(directory / "study.journal", name, lease)
    attempts: dict[str, list[dict[str, Any]]] = {}
    now = float(START)

    while (action := decide(study.records(), (), sweep.rules)).kind != "stop":
        if action.kind == "draw":
            trial = draw_run(study, study.records(), sweep.rules, config, sweep.propose)
        elif action.kind == "replicate":
            assert action.record is not None
            trial = replicate_run(study, action.record, config)
        else:
            assert action.record is not None
            trial = study.start(action.record, action.until, action.shown)

        if trial is None:  # nothing is left to draw
            break

        first = trial.last + 1
        values = {e: loss(config | trial.config, e) for e in range(first, trial.until + 1)}
        trial = study.report(trial, values)
        begin, now = now, now + EPOCH * len(values)
        times = {"started": _text(begin), "ended": _text(now), "host": "a", "device": "cpu"}
        attempts.setdefault(trial.run_id, []).append(times)

        if end := ends.get(trial.index):
            study.tell(trial, end, error=f"it {end} & <ended>")
        elif trial.until == epochs:
            study.tell(trial, "complete")

    study.close()
    lease.release()

    for trial in study.records():
        path = runs / f"crimson-cloud-{trial.index}_{trial.run_id}"
        path.mkdir()
        lines = [
            {"epoch": e, "loss_valid": x, "loss_valid_se": 0.01, "seconds": EPOCH}
            for e, x in trial.values.items()
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (path / "config.json").write_text(json.dumps(config | trial.config))
        state = {"complete": "finished", "pruned": "paused"}.get(trial.state, trial.state)
        own = {"status": state, "attempts": attempts[trial.run_id], "sweep": name}
        (path / "run.json").write_text(json.dumps(own))

    return study


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
