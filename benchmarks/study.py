#!/usr/bin/env python
r"""Does a sweep of thousands of runs stay quick and small?

Drives a study as a sweep does, one trial at a time, with a formula in the place of training: three
keys, nine epochs, pruning by promotion. Prints what the driver needs for a draw with its entry in
the journal, for a report and for a decision, over the last tenth of the runs; how much its memory
has grown; and how long it takes to open the study again and to read all run directories.

    python benchmarks/study.py [--runs 2000] [--sampler tpe] [--directory DIR]
"""

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measured import Result, limit
from rich.console import Console
from rich.progress import track

from sda_ray.core.lease import Lease, this_host
from sda_ray.search.promotion import Rules, TrialRecord, decide, unhide
from sda_ray.search.reconcile import catch_up
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study
from sda_ray.sweep.driver import Driver

EPOCHS = 9
UNITS = {"draw and append": "ms", "growth": "kB a run", "resume": "s"}
LIMITS = {"draw and append": 50.0, "growth": 100.0, "resume": 10.0}


def draw(trial: Any) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True),
        "activation": trial.suggest_categorical("activation", ["SiLU", "GELU", "ReLU"]),
    }


def loss(config: dict[str, Any], epoch: int) -> float:
    x, y = math.log10(config["learning_rate"]) + 3.2, math.log10(config["weight_decay"]) + 2

    return x * x + y * y / 10 + len(set(config["activation"])) / 50 + 1 / epoch


class Times:
    r"""Creates a stopwatch: milliseconds of everything, by name."""

    def __init__(self) -> None:
        self.all: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.all[name].append(1e3 * (time.perf_counter() - start))

    def median(self, name: str) -> float:
        last = self.all[name][-max(1, len(self.all[name]) // 10) :]

        return statistics.median(last)


def resident() -> float:
    r"""Returns the memory of this process in kB."""

    text = Path("/proc/self/status").read_text()

    return float(text.partition("VmRSS:")[2].split()[0])


def write_run(runs: Path, record: TrialRecord, status: str) -> None:
    r"""Writes what reconciling reads of a run."""

    directory = runs / f"run-{record.index}_{record.run_id}"
    directory.mkdir(exist_ok=True)
    lines = [{"epoch": e, "loss_valid": x} for e, x in record.values.items()]
    lease = {"attempt": record.attempt, "pid": None, "since": "", **this_host()}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (directory / "run.json").write_text(json.dumps({"status": status}))
    (directory / "lease.json").write_text(json.dumps(lease))


def drive(directory: Path, count: int, sampler: str, console: Console) -> Times:
    r"""Runs a sweep to its end, but does not close it."""

    times = Times()
    growth: dict[str, float] = {}
    lease = Lease(directory / "lease.json", "the sweep")
    study = Study(directory / "study.journal", "bench", lease)
    rules = Rules(count, EPOCHS, 1, 3)

    def timed(seen: Any, fixed: Any) -> Any:
        with times.of("draw"):
            return propose(draw, seen, 0, sampler, fixed)

    driver = Driver(
        study,
        rules,
        timed,
        {"config": {"epochs": EPOCHS}},
        lambda: 1,
        lambda event, record: None,
        directory / "stop",
    )
    add = study.add

    def append(*args: Any, **more: Any) -> TrialRecord:
        with times.of("append"):
            return add(*args, **more)

    study.add = append  # type: ignore[method-assign]

    for number in track(range(count), "runs", console=console):
        while len(study.records()) <= number or driver.live:
            if number == count // 10:
                growth.setdefault("start", resident())

            name = str(time.monotonic_ns())
            drawn = len(times.all["draw"])

            with times.of("suggest"):
                spec = driver.suggest(name)

            if len(times.all["draw"]) > drawn:
                times.all["draw and append"].append(
                    times.all["draw"][-1] + times.all["append"][-1]
                )
            else:
                times.all["promote"].append(times.all["suggest"].pop())

            if spec is None:
                break

            train(driver, name, spec, rules, times)

    with times.of("records"):
        records = study.records()

    with times.of("decide"):
        decide(unhide(records, rules), (), rules)

    start = growth.get("start", resident())
    times.all["growth"].append((resident() - start) / (count - count // 10))

    for record in track(records, "directories", console=console):
        write_run(directory / "runs", record, "paused" if record.paused else "finished")

    lease.release()

    return times


def train(driver: Driver, name: str, spec: dict[str, Any], rules: Rules, times: Times) -> None:
    r"""Reports the epochs of a trial up to its next rung, until it need not go on."""

    known = driver.study.records()[spec["index"] - 1].values
    epoch, goes_on = max(known, default=0), True

    while goes_on:
        after = rules.after(epoch)
        values = [(e, loss(spec["config"], e)) for e in range(epoch + 1, after + 1)]
        event = "complete" if after == EPOCHS else "running"
        result = {"event": event, "epochs": values, "error": ""}
        epoch = after

        with times.of("report"):
            goes_on = driver.report(name, result, lambda status: lambda: True)


def resume(directory: Path) -> None:
    r"""Opens the study and reads all run directories, and prints the seconds that it took."""

    start = time.perf_counter()
    lease = Lease(directory / "lease.json", "the sweep")
    study = Study(directory / "study.journal", "bench", lease)
    catch_up(study, directory / "runs")
    decide(study.records(), (), Rules(len(study.records()), EPOCHS, 1, 3))
    print(time.perf_counter() - start)
    lease.release()


def measure(runs: int, sampler: str, place: Path | None, console: Console) -> tuple[Times, int]:
    r"""Returns the times of a study of so many runs, and the bytes of its journal."""

    directory = Path(tempfile.mkdtemp(prefix="study-", dir=place))
    (directory / "runs").mkdir()

    try:
        times = drive(directory, runs, sampler, console)
        command = [sys.executable, __file__, f"--resume={directory}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        times.all["resume"].append(float(done.stdout))
        size = (directory / "study.journal").stat().st_size
    finally:
        shutil.rmtree(directory)

    return times, size


def results(quick: bool) -> Iterator[Result]:
    logging.getLogger("sda_ray").setLevel(logging.ERROR)
    runs = 300 if quick else 2000
    times, _ = measure(runs, "tpe", None, Console(quiet=True))

    for name, most in LIMITS.items():
        yield limit(f"study of {runs} runs, {name}", times.median(name), most, UNITS[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2000, help="default: 2000")
    parser.add_argument("--sampler", default="tpe", help="tpe (default) or random")
    parser.add_argument("--directory", type=Path, help="where to write (a temporary directory)")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger("sda_ray").setLevel(logging.ERROR)

    if args.resume:
        return resume(args.resume)

    times, size = measure(args.runs, args.sampler, args.directory, console := Console())
    console.print(f"{args.runs} runs, sampler {args.sampler}, journal {size / 2**20:.1f} MiB")

    for name in (
        *("draw", "append", "draw and append", "promote", "report", "records", "decide"),
        *("growth", "resume"),
    ):
        if name in times.all:
            limit = f"   (at most {LIMITS[name]:g})" if name in LIMITS else ""
            unit = UNITS.get(name, "ms")
            console.print(f"  {name:<16} {times.median(name):8.2f} {unit}{limit}", highlight=False)


if __name__ == "__main__":
    main()
