#!/usr/bin/env python
r"""Does one driver keep 64 slots busy, and how little of a core does it need for that?

Starts a Ray with 64 CPUs, whatever the machine has, and runs a sweep of trials that sleep instead
of training: the real driver, study, sampler, pruner, searcher and scheduler, with six reports a
trial. Prints

* how busy the slots were: the seconds that trials spent in their steps, by 64 times the seconds,
  from the moment that all slots are taken to the start of the last trial
* the processor time of the driver's process, by the same seconds

    python benchmarks/scale.py [--trials 320] [--seconds 60] [--slots 64]

It takes some ten minutes and 8 GB of memory. Sleepers need no processor, but their processes do
when they start, some 5 s each: the first ones wait for each other, and then begin at some point of
their first trial, so that trials neither begin nor end all at once.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import Result, limit

REPORTS = 6
BUSY, CORE = 0.95, 0.50  # at least, at most


@dataclass(frozen=True)
class Found:
    r"""Creates what was found.

    Arguments:
        busy: The part of the slots' time that was spent in steps.
        core: The processor time of the driver by wall time.
        wall: The seconds that both are about.
        fill: The seconds that it took to take all slots first.
        trials: The number of trials that came to their end.
        load: The load of the machine at the end, over a minute.
    """

    busy: float
    core: float
    wall: float
    fill: float
    trials: int
    load: float


def draw(trial: Any) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True),
        "activation": trial.suggest_categorical("activation", ["SiLU", "GELU", "ReLU"]),
    }


def sleeper(seconds: float, slots: int, place: Path) -> type:
    r"""Returns a class of trials that sleep. It goes to the workers by value, without torch."""

    class Sleeper:
        def __init__(self, config: dict[str, Any]) -> None:
            self.reset(config)

        def reset(self, config: dict[str, Any]) -> bool:
            self.spec, self.epoch = config, 0
            return True

        def get_auto_filled_metrics(self, **options: Any) -> dict[str, Any]:
            return {}

        def train(self) -> dict[str, Any]:
            import math
            import random
            import time

            import ray

            length = seconds / REPORTS

            if self.epoch == 0 and not (place / "go").exists():
                (place / f"ready.{self.spec['index']}").touch()

                while not (place / "go").exists():
                    time.sleep(0.2)

                length += random.uniform(0, seconds)

            start = time.time()
            time.sleep(length)
            self.epoch += 1
            rate = self.spec["config"]["learning_rate"]
            value = (math.log10(rate) + 3.2) ** 2 + 1 / self.epoch

            return {
                "event": "complete" if self.epoch == REPORTS else "running",
                "epochs": [(self.epoch, value)],
                "error": "",
                "node": ray.get_runtime_context().get_node_id(),
                "span": (start, time.time()),
            }

        def close(self, status: str) -> None:
            pass

        def stop(self) -> None:
            pass

    return Sleeper


def run(trials: int, seconds: float, slots: int, place: Path) -> Found:
    r"""Runs the sweep and returns how busy slots and driver were."""

    from sda_ray.cluster import executor
    from sda_ray.cluster.connect import Slots, connected
    from sda_ray.core.lease import Lease
    from sda_ray.search.promotion import Rules
    from sda_ray.search.sampler import propose
    from sda_ray.search.study import Study
    from sda_ray.sweep.driver import Driver

    lease = Lease(place / "lease.json", "the benchmark")
    study = Study(place / "study.journal", "scale", lease)
    spans: list[tuple[float, float]] = []
    clock: list[tuple[float, float]] = []  # wall and processor time, at each event

    class Watched(Driver):
        def report(self, trial: str, result: dict[str, Any], close: Any) -> bool:
            spans.append(result["span"])
            clock.append((time.time(), time.process_time()))

            return super().report(trial, result, close)

        def tick(self) -> None:
            super().tick()

            if not go and len([*place.glob("ready.*")]) >= min(slots, trials):
                go.append(time.time())
                (place / "go").touch()

    starts: list[float] = []
    go: list[float] = []

    def notify(event: str, record: Any) -> None:
        if event in ("draw", "adopt", "promote"):
            starts.append(time.time())

    with connected(cpus=slots) as scratch:
        driver = Watched(
            study,
            Rules(trials, REPORTS, pruner="none"),
            lambda seen, fixed: propose(draw, seen, 0, "tpe", fixed),
            {"config": {"epochs": REPORTS}, "runs": str(place), "stall": 600.0},
            Slots(1, 0),
            notify,
            place / "stop",
        )
        executor.Trial = sleeper(seconds, slots, place)  # type: ignore[misc, assignment]
        begin = time.time()
        executor.execute(driver, {"cpu": 1, "gpu": 0}, scratch, own=True)

    complete = sum(record.state == "complete" for record in study.records())
    lease.release()

    return _evaluate(spans, clock, slots, go[0], max(starts), go[0] - begin, complete)


def _evaluate(
    spans: list[tuple[float, float]],
    clock: list[tuple[float, float]],
    slots: int,
    first: float,
    last: float,
    fill: float,
    complete: int,
) -> Found:
    busy = sum(max(0.0, min(b, last) - max(a, first)) for a, b in spans)
    inside = [x for x in clock if first <= x[0] <= last]
    core = (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
    wall = last - first

    return Found(busy / slots / wall, core, wall, fill, complete, os.getloadavg()[0])


def measure(trials: int, seconds: float, slots: int) -> Found:
    with tempfile.TemporaryDirectory(prefix="scale-") as place:
        return run(trials, seconds, slots, Path(place))


def results(quick: bool) -> Iterator[Result]:
    found = measure(*((48, 6.0, 8) if quick else (320, 60.0, 64)))
    idle, note = 100 * (1 - found.busy), f"{found.wall:.0f} s, load {found.load:.1f}"

    yield limit("slots idle", idle, 100 * (1 - BUSY), "%", note)
    yield limit("the driver's part of a core", 100 * found.core, 100 * CORE, "%", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=320, help="default: 320")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a trial (default: 60)")
    parser.add_argument("--slots", type=int, default=64, help="default: 64")
    args = parser.parse_args()

    found = measure(args.trials, args.seconds, args.slots)
    print(f"{found.trials} of {args.trials} trials, {args.slots} slots, {args.seconds:g} s each")
    print(f"  all slots taken after {found.fill:8.1f} s")
    print(f"  then, until the last  {found.wall:8.1f} s  (load {found.load:.1f})")
    print(f"  slots busy            {100 * found.busy:8.1f} %  (at least {100 * BUSY:g})")
    print(f"  the driver's process  {100 * found.core:8.1f} %  of a core (at most {100 * CORE:g})")

    if found.busy < BUSY or found.core > CORE or found.trials < args.trials:
        sys.exit(1)


if __name__ == "__main__":
    main()
