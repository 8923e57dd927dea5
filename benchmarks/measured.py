r"""What a benchmark has measured, and how processes are measured in turns."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Result", "in_turns", "limit"]


@dataclass(frozen=True)
class Result:
    r"""Creates a line of the table.

    Arguments:
        name: What was measured.
        ours: Our number.
        peer: That of the peer, or what ours may be at most.
        ratio: How many times better ours is than the peer's.
        goal: What the ratio should be at least, or None if it is only shown.
        unit: The unit of both numbers.
        note: Who the peer is, and what else was found.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    goal: float | None
    unit: str
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal


def limit(name: str, ours: float, most: float, unit: str, note: str = "") -> Result:
    r"""Returns the result of what has a limit instead of a peer."""

    ratio = most / ours if ours > 0 else math.inf

    return Result(name, ours, most, ratio, 1.0, unit, f"against its limit. {note}".rstrip())


def in_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict[str, float]]:
    r"""Runs commands in turns, on one core, and returns the medians of what each prints.

    A command prints an object of numbers as JSON in its last line.
    """

    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}

    for _ in range(rounds):
        for name, command in commands.items():
            done = subprocess.run(command, env=env, capture_output=True, text=True)

            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                raise RuntimeError(f"the measurement of '{name}' failed: {' '.join(command)}")

            found[name].append(json.loads(done.stdout.splitlines()[-1]))

    return {name: _medians(values) for name, values in found.items()}


def _medians(values: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(x[key] for x in values) for key in values[0]}
