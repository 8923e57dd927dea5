r"""Run directories: their names, and every file in them."""

from __future__ import annotations

import copy
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import find_run, run_directories

# The files of a run in the order in which they are copied: none refers to one after it, so that a
# copy that was cut off can be resumed. `run.json`, which says that a run is finished, comes last.
COPIED = (
    "config.json",
    "metrics.jsonl",
    "error.txt",
    "checkpoint.decay.pth",
    "checkpoint.pth",
    "state.pth",
    "samples.png",
    "wandb",
    "run.json",
)

# The small ones, which are enough to list runs.
RECORDS = ("config.json", "metrics.jsonl", "error.txt", "run.json")

# Those that a run is resumed from.
RESUMED = ("config.json", "run.json", "metrics.jsonl", "checkpoint.pth", "checkpoint.prev.pth")

# Those that mean nothing on another machine.
LOCAL = (
    "lease.json",
    "lease.lock",
    "evaluation.lock",
    "checkpoint.prev.pth",
    "checkpoint.damaged.pth",
)


@dataclass(frozen=True)
class RunPath:
    r"""The directory of a run, `runs/{name}_{id}`, and the files in it."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name.rpartition("_")[0]

    @property
    def id(self) -> str:
        return self.directory.name.rpartition("_")[2]

    config = property(lambda self: self.directory / "config.json")
    state = property(lambda self: self.directory / "state.pth")
    checkpoint = property(lambda self: self.directory / "checkpoint.pth")
    previous = property(lambda self: self.directory / "checkpoint.prev.pth")
    decay = property(lambda self: self.directory / "checkpoint.decay.pth")
    metrics = property(lambda self: self.directory / "metrics.jsonl")
    record = property(lambda self: self.directory / "run.json")
    samples = property(lambda self: self.directory / "samples.png")
    evaluation = property(lambda self: self.directory / "evaluation.json")
    error = property(lambda self: self.directory / "error.txt")
    diff = property(lambda self: self.directory / "diff.patch")
    lease = property(lambda self: self.directory / "lease.json")

    @staticmethod
    def all(runs: Path) -> Iterator[RunPath]:
        r"""Returns the run directories in `runs`, in the order of their names."""

        return map(RunPath, run_directories(runs))

    @classmethod
    def of_id(cls, runs: Path, id: str) -> RunPath | None:
        r"""Returns the run directory of an id, or None if there is none."""

        return next((path for path in cls.all(runs) if path.id == id), None)

    @classmethod
    def find(cls, runs: Path, run: str) -> RunPath:
        r"""Finds a run by its path, name, id or an unambiguous prefix of a name or id.

        Raises:
            UserError: If there is no such run, or more than one.
        """

        if (Path(run) / "config.json").is_file():
            return cls(Path(run).resolve())

        return cls(find_run(runs, run))


def sweep_directory(runs: Path, name: str) -> Path:
    return runs / "sweeps" / name


def sweep_names(runs: Path) -> list[str]:
    r"""Returns the names of the sweeps that have a record."""

    return sorted(file.parent.name for file in runs.glob("sweeps/*/sweep.json"))


def new_id() -> str:
    r"""Returns a random run id: 8 characters of a-z and 0-9."""

    return "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=8))


def new_name(id: str, number: int) -> str:
    r"""Returns the name `{adjective}-{noun}-{number}` that belongs to an id."""

    from coolname import RandomGenerator
    from coolname.data import config

    own: Any = copy.deepcopy(config)  # the generator changes it
    words = RandomGenerator(own, random.Random(id)).generate(2)

    return f"{words[0]}-{words[1]}-{number}"
