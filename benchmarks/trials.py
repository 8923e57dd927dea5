#!/usr/bin/env python
r"""What does a trial cost beside its training?

Runs a sweep of tiny trials, all of them to the end, and prints

* what one more trial costs: the wall time from the start of the first trial to the end of the
  last, times the slots, less the seconds that were spent training and validating, for each trial
* the time from the command to the first training step

    python benchmarks/trials.py [--trials 50] [--slots 2] [--wandb offline]

With `--versus-tune`, it is a sweep with pruning instead, 8 trials of 8 epochs of a small network,
beside Ray Tune alone with OptunaSearch, ASHA and the plain loop: `plain_tune.py`.

Times depend on the machine and on what else it does; the processor time is printed beside them.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos import make_data
from measured import Result, limit

SWEEP = """
from sda_ray import CONFIG, Sweep, loguniform, main

CONFIG = CONFIG | {{
    "window": 3, "epochs": {epochs}, {network}
}}
SPACE = {{"learning_rate": loguniform(1e-4, 1e-2)}}
sweep = Sweep("trials", CONFIG, SPACE, trials={trials}, {rules})

if __name__ == "__main__":
    main(sweep)
"""

TINY = '"embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1), "batch_size": 8'
SMALL = '"hidden_channels": (16, 32, 64), "hidden_blocks": (1, 1, 1), "batch_size": 32'
COST, START, WHOLE = 1.0, 12.0, 15.0  # seconds, at most


def environment(root: Path) -> dict[str, str]:
    kept = {k: x for k, x in os.environ.items() if not k.startswith(("SDA_RAY_", "RAY_", "WANDB"))}
    home = str(root / "home")

    return {**kept, "HOME": home, "TMPDIR": home, "SDA_RAY_ROOT": str(root)}


def sweep(root: Path, slots: int, wandb: str) -> tuple[float, float]:
    r"""Runs the sweep. Returns when the command was given, and when the first epoch had ended."""

    words = [sys.executable, "-m", "sda_ray", "sweep", str(root / "sweep.py")]
    words += [f"--parallel={slots}", f"--data={root / 'data'}", f"--wandb={wandb}"]
    given, first = time.time(), 0.0

    with open(root / "output.txt", "wb") as file:
        process = subprocess.Popen(
            words, cwd=root, env=environment(root), stdout=file, stderr=subprocess.STDOUT
        )

        while process.poll() is None:
            if not first and any(x.stat().st_size for x in root.glob("runs/*_*/metrics.jsonl")):
                first = time.time()

            time.sleep(0.02 if not first else 0.2)

    if process.returncode:
        sys.exit((root / "output.txt").read_text())

    return given, first


def versus_tune(root: Path, slots: int, wandb: str) -> Iterator[Result]:
    r"""Yields what 8 trials of 8 epochs, with pruning, take in a sweep and by Ray Tune alone."""

    rules = 'sampler="tpe", min_epochs=1, eta=2'
    (root / "sweep.py").write_text(SWEEP.format(trials=8, epochs=8, network=SMALL, rules=rules))
    start = time.monotonic()
    sweep(root, slots, wandb)
    ours = time.monotonic() - start
    files = list(root.glob("runs/*_*/metrics.jsonl"))
    epochs = sum(len(file.read_text().splitlines()) for file in files)
    config = next(root.glob("runs/*_*/config.json"))

    words = [Path(__file__).with_name("plain_tune.py"), root / "data", config, 8, slots]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment(root), capture_output=True, text=True
    )
    theirs = time.monotonic() - start

    if done.returncode:
        sys.exit(done.stderr)

    count = int(done.stdout.split()[-1])
    yield limit(f"sweep of 8 trials, {epochs} epochs", ours, WHOLE, "s", f"{len(files)} runs.")
    yield Result(
        "time of an epoch in a sweep of 8 trials",
        ours / epochs,
        theirs / count,
        theirs / count * epochs / ours,
        None,
        "s",
        f"Ray Tune alone took {theirs:.1f} s for {count} epochs",
    )


def trained(root: Path) -> list[float]:
    r"""Returns the seconds that each run has trained, the first epoch's first."""

    found = []

    for file in sorted(root.glob("runs/*_*/metrics.jsonl"), key=lambda x: x.stat().st_ctime):
        found.append(sum(json.loads(line)["seconds"] for line in file.read_text().splitlines()))

    return found


def marginal(root: Path, trials: int, slots: int, epochs: int, wandb: str) -> Iterator[Result]:
    r"""Yields what trials cost in a sweep of tiny ones, beside their training."""

    rules = 'sampler="random", pruner="none"'
    (root / "sweep.py").write_text(
        SWEEP.format(trials=trials, epochs=epochs, network=TINY, rules=rules)
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    given, first = sweep(root, slots, wandb)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    training = trained(root)
    runs = list(root.glob("runs/*_*"))
    start = min((run / "config.json").stat().st_mtime for run in runs)
    end = max((run / "run.json").stat().st_mtime for run in runs)
    wall, total = end - start, sum(training)
    cost = (wall * slots - total) / len(runs)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    yield limit(
        "one more trial",
        cost,
        COST,
        "s",
        f"{len(runs)} trials, {slots} at a time: {wall:.1f} s, of which {total:.1f} s training; "
        f"{cpu:.0f} CPU s.",
    )
    yield limit("command to first step", first - given, START, "s", "The first epoch included.")


def results(quick: bool) -> Iterator[Result]:
    with place() as root:
        yield from marginal(root, 10 if quick else 50, 2, 9, "offline")

    with place() as root:
        yield from versus_tune(root, 2, "offline")


@contextmanager
def place(keep: bool = False) -> Iterator[Path]:
    r"""Makes a directory with data, and removes it with the block, unless it is to be kept."""

    root = Path(tempfile.mkdtemp(prefix="trials-", dir="/tmp"))  # short: Ray puts sockets there
    make_data(root / "data")
    (root / "home").mkdir()

    try:
        yield root
    finally:
        if keep:
            print(root)
        else:
            shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=50, help="default: 50")
    parser.add_argument("--slots", type=int, default=2, help="trials at a time (2)")
    parser.add_argument("--epochs", type=int, default=9, help="of each trial (9)")
    parser.add_argument("--wandb", default="offline", help="disabled or offline (default)")
    parser.add_argument("--keep", action="store_true", help="leave all files behind")
    parser.add_argument("--versus-tune", action="store_true", help="beside Ray Tune alone")
    args = parser.parse_args()

    with place(args.keep) as root:
        if args.versus_tune:
            found = versus_tune(root, args.slots, args.wandb)
        else:
            found = marginal(root, args.trials, args.slots, args.epochs, args.wandb)

        for x in found:
            print(f"{x.name}: {x.ours:.2f} {x.unit} (at most {x.peer:.3g}). {x.note}", flush=True)

    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
