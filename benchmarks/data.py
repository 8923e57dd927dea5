#!/usr/bin/env python
r"""What do the data cost on a node with several trials?

Eight processes open one data set as trials do and read every window of it. Their proportional
memory of the file (Pss, of `/proc/PID/smaps`) is summed up. Then data sets of two sizes are
opened, for the time that this takes.

    python benchmarks/data.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from measured import Result, limit

PROCESSES = 8
SHAPE = (32, 2, 64, 64)  # of a trajectory
OPENINGS = 20


def write(file: Path, trajectories: int) -> int:
    r"""Writes random trajectories and returns their bytes."""

    rng = np.random.default_rng(0)

    with h5py.File(file, "w") as f:
        x = f.create_dataset("x", (trajectories, *SHAPE), dtype="float32")

        for i in range(trajectories):
            x[i] = rng.random(SHAPE, dtype=np.float32)

        return int(x.nbytes)


def read(file: Path) -> None:
    r"""Reads all windows, prints a line and waits for one; then prints the memory of the file."""

    from sda_ray.data.dataset import TrajectoryDataset

    dataset = TrajectoryDataset(file, 5)

    for i in range(len(dataset)):
        for start in (*range(0, dataset.starts, 5), dataset.starts - 1):
            dataset.windows([i], [start])

    print("read", flush=True)
    sys.stdin.readline()
    mine, total = False, 0

    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            mine = line.endswith(file.name)
        elif mine and line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])

    print(total, flush=True)
    sys.stdin.readline()


def shared(file: Path) -> int:
    r"""Returns the proportional memory of a file over several processes that have read it all."""

    words = [sys.executable, __file__, "--read", str(file)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) for _ in range(PROCESSES)
    ]
    found = []

    for said in (str, int):  # all have read, then all have looked
        for process in processes:
            assert process.stdout is not None
            found.append(said(process.stdout.readline()))

        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    for process in processes:
        process.communicate()

    return sum(x for x in found if isinstance(x, int))


def opening(file: Path) -> float:
    r"""Returns the CPU seconds of opening a data set, the least of several times."""

    from sda_ray.data.dataset import TrajectoryDataset

    def once() -> float:
        start = time.process_time()
        TrajectoryDataset(file, 5)

        return time.process_time() - start

    return min(once() for _ in range(OPENINGS))


def results(quick: bool) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as directory:
        small, large = Path(directory) / "small.h5", Path(directory) / "large.h5"
        write(small, 16)
        size = write(large, 64 if quick else 256)
        yield limit(
            f"memory of the data, {PROCESSES} trials",
            shared(large) / 2**20,
            1.05 * size / 2**20,
            "MiB",
            f"The data have {size / 2**20:.0f} MiB.",
        )
        few, many = opening(small), opening(large)
        yield Result(
            f"opening {large.stat().st_size // small.stat().st_size} times as many data",
            1e3 * many,
            1e3 * few,
            few / many,
            None,
            "CPU ms",
            "against the fewer",
        )


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
        return

    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()

    for x in results(quick=False):
        print(f"{x.name}: {x.ours:.3g} {x.unit} against {x.peer:.3g}. {x.note}", flush=True)

    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
