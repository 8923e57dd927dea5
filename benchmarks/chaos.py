#!/usr/bin/env python
r"""Is anything lost when the processes of a sweep are killed?

Runs sweeps of small trials on random data, each with SIGKILLs at random moments to its driver, to
a trial's worker, or to Ray's raylet, and gives the same command again until the sweep is done. Then
looks whether all is as if nothing had happened: no run lost, run twice or left open, the same
configurations as in a sweep that nobody disturbed, and each finished run equal bit for bit to one
that is trained alone. Only processes that the sweep itself has started are ever killed.

    python benchmarks/chaos.py [--sweeps 20] [--trials 12] [--parallel 2] [--kills 5] [--seed 0]

The exit code is 0 if nothing was wrong. On two cores a sweep takes one to two minutes.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from processes import Process, family, is_alive, kill
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sda_ray.core.lease import Lease, read_holder
from sda_ray.search.promotion import TrialRecord
from sda_ray.search.study import Study

SCRIPT = """
from sda_ray import CONFIG, Sweep, choice, loguniform, main

CONFIG = CONFIG | {{
    "window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1),
    "batch_size": 8, "epochs": 9,
}}
SPACE = {{
    "learning_rate": loguniform(1e-4, 1e-2),
    "weight_decay": loguniform(1e-5, 1e-1),
    "activation": choice("SiLU", "GELU", "ReLU"),
}}
sweep = Sweep(
    "chaos", CONFIG, SPACE, trials={trials}, sampler="random", min_epochs=1, eta=3, finalists=3
)

if __name__ == "__main__":
    main(sweep)
"""

STARTS = 40  # of one sweep, after which it counts as lost
PATIENCE = 600.0  # seconds of one start, after which it counts as hung
GONE = 60.0  # seconds after which what is left of a sweep's processes counts as left for good


class Sweeping:
    r"""Creates a sweep in a root of its own, to be run as a person would."""

    def __init__(self, root: Path, base: Path, name: str, parallel: int) -> None:
        self.root = root / name
        self.root.mkdir()
        self.base = base
        self.name = name
        self.words = ["sweep", str(base / "chaos.py"), f"--name={name}", f"--parallel={parallel}"]
        self.seen: dict[Process, str] = {}  # what it has ever started
        self.killed: Counter[str] = Counter()
        self.starts, self.hung = 0, False

    @property
    def directory(self) -> Path:
        return self.root / "runs" / "sweeps" / self.name

    @property
    def size(self) -> int:
        journal = self.directory / "study.journal"

        return journal.stat().st_size if journal.exists() else 0

    def command(self, words: list[str]) -> list[str]:
        data = f"--data={self.base / 'data'}"

        return [sys.executable, "-m", "sda_ray", *words, data, "--wandb=disabled"]

    @property
    def env(self) -> dict[str, str]:
        kept = {k: x for k, x in os.environ.items() if not k.startswith(("SDA_RAY_", "RAY_"))}
        home = str(self.base / "home")
        own = {
            "HOME": home,
            "TMPDIR": home,
            "SDA_RAY_ROOT": str(self.root),
            "OMP_NUM_THREADS": "1",
        }

        return {**kept, **own}

    def start(self) -> "subprocess.Popen[bytes]":
        self.starts += 1

        with open(self.root / "output.txt", "ab") as file:
            file.write(f"\n--- start {self.starts}\n".encode())
            return subprocess.Popen(
                self.command(self.words),
                cwd=self.root,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def run(self, kills: list[tuple[str, float, float]]) -> None:
        r"""Runs the sweep to its end, with kills: of what, at which size, after how long."""

        kills = list(kills)

        while self.starts < STARTS:
            driver = self.start()
            code = self.attend(driver, kills)

            if code == 0:
                return

    def attend(self, driver: "subprocess.Popen[bytes]", kills: list[Any]) -> int:
        start = last = time.monotonic()

        while (code := driver.poll()) is None:
            self.seen |= (tree := family(driver.pid))
            now = time.monotonic()

            if now - start > PATIENCE:
                driver.kill()
                self.hung = True

            due = kills and self.size >= kills[0][1] and now - last > kills[0][2]

            if due and self.strike(kills[0][0], driver, tree):
                kills.pop(0)
                last = now

            time.sleep(0.1)

        return code

    def strike(
        self, kind: str, driver: "subprocess.Popen[bytes]", tree: dict[Process, str]
    ) -> bool:
        r"""Kills the driver, the raylet, or a worker that holds a run; tells if there was one."""

        if kind == "driver":
            driver.kill()
            done = True
        elif kind == "raylet":
            done = any(kill(process) for process in tree if tree[process] == "raylet")
        else:
            leases = map(read_holder, (self.root / "runs").glob("*_*/lease.json"))
            holders = {found["pid"] for found in leases if found and found["pid"]}
            done = any(kill(process) for process in tree if process[0] in holders)

        self.killed[kind] += done

        return done

    def left(self) -> list[Process]:
        r"""Waits for the end of all processes of the sweep and returns those that stay."""

        deadline = time.monotonic() + GONE

        while (alive := [p for p in self.seen if is_alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.5)

        return alive

    def records(self) -> list[TrialRecord]:
        lease = Lease(self.directory / "lease.json", f"sweep '{self.name}'")

        try:
            return Study(self.directory / "study.journal", self.name, lease).records()
        finally:
            lease.release()


def check(sweeping: Sweeping, expected: set[str], alone: "Alone") -> dict[str, int]:
    r"""Counts what is wrong with a sweep, and what there is."""

    records = sweeping.records()
    runs = sweeping.root / "runs"
    found = Counter(directory.name.rsplit("_", 1)[1] for directory in runs.glob("*_*"))
    configs = Counter(text(record) for record in records)
    complete = [record for record in records if record.state == "complete"]
    status = [json.loads(file.read_text())["status"] for file in runs.glob("*_*/run.json")]

    return {
        "starts": sweeping.starts,
        "kills": sum(sweeping.killed.values()),
        "complete": len(complete),
        "lost": len(expected - set(configs)) + len(found.keys() - {r.run_id for r in records}),
        "twice": sum(n - 1 for n in [*configs.values(), *found.values()]),
        "hung": int(sweeping.hung),
        "open": sum(r.state == "running" for r in records) + status.count("running"),
        "failed": sum(r.state == "failed" for r in records),
        "strange": len(set(configs) - expected),
        "unequal": sum(not alone.equals(r, sweeping) for r in complete),
        "left": len(sweeping.left()),
    }


def text(record: TrialRecord) -> str:
    return json.dumps(record.config, sort_keys=True)


class Alone:
    r"""Creates trainings of single runs, each in a root of its own, to compare others with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights: dict[str, bytes] = {}

    def equals(self, record: TrialRecord, sweeping: Sweeping) -> bool:
        (directory,) = (sweeping.root / "runs").glob(f"*_{record.run_id}")

        if text(record) not in self.weights:
            root = self.root / f"alone-{len(self.weights)}"
            root.mkdir()
            words = ["train", f"--config={directory}", "--threads=1", f"--runs={root / 'runs'}"]
            command = sweeping.command(words)
            done = subprocess.run(command, cwd=root, env=sweeping.env, capture_output=True)
            assert done.returncode == 0, done.stderr.decode()
            (state,) = (root / "runs").glob("*_*/state.pth")
            self.weights[text(record)] = state.read_bytes()

        return (directory / "state.pth").read_bytes() == self.weights[text(record)]


def make_data(directory: Path) -> None:
    directory.mkdir()
    rng = np.random.default_rng(0)

    for split, count in {"train": 200, "valid": 4, "test": 4}.items():
        with h5py.File(directory / f"{split}.h5", "w") as file:
            x = rng.standard_normal((count, 12, 2, 16, 16), dtype=np.float32)
            file.create_dataset("x", data=x)


def plan(rng: random.Random, count: int, size: int) -> list[tuple[str, float, float]]:
    r"""Draws what is killed, at which size of the journal, and how long after a start or kill."""

    kinds = [rng.choice(["driver", "worker", "raylet"]) for _ in range(count)]
    sizes = sorted(rng.uniform(0, 0.6 * size) for _ in range(count))
    delays = [rng.uniform(0, 3) for _ in range(count)]

    return list(zip(kinds, sizes, delays, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweeps", type=int, default=20, help="default: 20")
    parser.add_argument("--trials", type=int, default=12, help="of each sweep (12)")
    parser.add_argument("--parallel", type=int, default=2, help="trials at a time (2)")
    parser.add_argument("--kills", type=int, default=5, help="of each sweep (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (0)")
    parser.add_argument("--keep", action="store_true", help="leave all files behind")
    args = parser.parse_args()

    root = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: Ray puts sockets there
    console, rng = Console(), random.Random(args.seed)
    console.print(f"files: {root}")
    make_data(root / "data")
    (root / "home").mkdir()
    (root / "chaos.py").write_text(SCRIPT.format(trials=args.trials))

    table = Table(title=f"{args.sweeps} sweeps of {args.trials} trials, {args.kills} kills each")
    bad = 0

    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("undisturbed", total=args.sweeps + 1)
        calm = Sweeping(root, root, "calm", args.parallel)
        calm.run([])
        expected = {text(record) for record in calm.records()}
        alone = Alone(root)
        rows = {"calm": check(calm, expected, alone)}
        progress.advance(task)

        for n in range(1, args.sweeps + 1):
            progress.update(task, description=f"sweep {n}")
            sweeping = Sweeping(root, root, f"chaos-{n}", args.parallel)
            sweeping.run(plan(rng, args.kills, calm.size))
            row = rows[sweeping.name] = check(sweeping, expected, alone)
            console.print(f"{sweeping.name}: {row} {dict(sweeping.killed)}", highlight=False)
            progress.advance(task)

    for column in ("", *rows["calm"]):
        table.add_column(column, justify="right" if column else "left")

    for name, row in rows.items():
        faults = ("lost", "twice", "hung", "open", "failed", "strange", "unequal", "left")
        wrong = row["complete"] < 3 or any(row[key] for key in faults)
        bad += wrong
        table.add_row(name, *map(str, row.values()), style="red" if wrong else None)

    console.print(table)
    console.print(f"{bad} of {len(rows)} sweeps are not as they should be.")

    if not args.keep and not bad:
        shutil.rmtree(root, ignore_errors=True)

    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
