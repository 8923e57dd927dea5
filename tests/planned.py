r"""A sweep script to be planned, and its faults."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from sda_ray.plan.plan import Plan, plan_sweep
from sda_ray.sweep.record import Options

__all__ = ["SCRIPT", "faults_of", "plan", "script", "spoil", "write"]

SCRIPT = """
from sda_ray import CONFIG, Sweep, choice, integer, loguniform, uniform

CONFIG = CONFIG | {
    "window": 3,
    "embedding": 8,
    "hidden_channels": (8, 16),
    "hidden_blocks": (1, 1),
    "batch_size": 8,
    "epochs": 9,
}
SPACE = {"learning_rate": loguniform(1e-4, 1e-2)}
MORE = {}
"""

SWEEP = "sweep = Sweep(**{'name': 'test', 'config': CONFIG, 'space': SPACE, 'trials': 4} | MORE)\n"


def write(directory: Path, *parts: str) -> Path:
    script = directory / "script.py"
    script.write_text("\n".join((SCRIPT, *parts, SWEEP)))

    return script


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write(tmp_path)


def plan(script: Path, runs: Path, data: Path, **options: Any) -> Plan:
    return plan_sweep(script, Options(runs.parent, runs, data, **options))


def faults_of(made: Plan) -> str:
    return "\n".join(made.faults)


def spoil(file: Path) -> None:
    with h5py.File(file, "r+") as f:
        f["x"][3, 5] = np.nan
