r"""Tests for the sda_ray.data.simulate module."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sda_ray.core.errors import UserError
from sda_ray.data.dataset import check_data
from sda_ray.data.flow import KolmogorovFlow, coarsen
from sda_ray.data.generation import find_missing
from sda_ray.data.hdf5 import Origin
from sda_ray.data.simulate import PRESETS, simulate

SCRIPT = """
import sys
from pathlib import Path
from sda_ray.data.simulate import simulate
simulate(Path(sys.argv[1]), 11, 64, 7, workers=1)
"""

ORIGIN = Origin(trajectories=11, size=64, seed=7)


def start(directory: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def missing(directory: Path) -> int:
    return len(find_missing(directory, ORIGIN))


def trajectory(seed: int, i: int) -> np.ndarray:
    torch.set_num_threads(1)
    flow = KolmogorovFlow(64)
    state = np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)
    x = flow.prior([int(state[0])])

    return coarsen(flow.trajectory(x, length=128, last=64), 1)[0].numpy()


def test_killed_simulation_goes_on_to_the_same_bits(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    directory = tmp_path / "data"

    # Killed in mid-run, while a second one is refused
    with start(directory) as process:
        while missing(directory) == 11 and process.poll() is None:
            time.sleep(0.01)

        with pytest.raises(UserError, match=f"in use: .* process {process.pid} is simulating"):
            simulate(directory, 11, 64, 7)

        process.send_signal(signal.SIGKILL)

    left = missing(directory)
    assert 0 < left < 11

    with pytest.raises(UserError, match="is unfinished"):
        check_data(directory)

    with h5py.File(directory / "train.h5", "r") as f:
        done, before = f["done"][...].astype(bool), f["x"][...]

    # Again, to the end
    with start(directory) as process:
        assert process.stdout is not None
        output = process.stdout.read()

    assert process.returncode == 0, output
    assert f"Simulating {left} of 11 trajectories" in output
    assert "11/11 trajectories" in output
    assert check_data(directory).trajectories == {"train": 8, "valid": 1}

    with h5py.File(directory / "train.h5", "r") as f:
        assert np.array_equal(f["x"][done], before[done])
        assert np.array_equal(f["x"][0], trajectory(7, 0))
        assert np.array_equal(f["x"][7], trajectory(7, 7))

    with h5py.File(directory / "test.h5", "r") as f:
        assert np.array_equal(f["x"][1], trajectory(7, 10))

    # Once more: nothing is done
    times = {file: file.stat().st_mtime_ns for file in directory.glob("*.h5")}

    assert simulate(directory, 11, 64, 7) == 0
    assert "There is nothing to do" in capfd.readouterr().out
    assert times == {file: file.stat().st_mtime_ns for file in directory.glob("*.h5")}

    with pytest.raises(UserError, match="another --data"):
        simulate(directory, 12, 64, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 64, 0), "trajectories is 9, but must be at least 10"),
        ((10, 0, 0), "size is 0, but must be a multiple of 64"),
        ((10, 96, 0), "size is 96, but must be a multiple of 64"),
        ((10, 64, -1), "seed is -1"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        simulate(tmp_path / "data", *arguments)

    with pytest.raises(UserError, match="workers is 0"):
        simulate(tmp_path / "data", 10, 64, 0, workers=0)

    assert os.listdir(tmp_path) == []


def test_presets_are_upstream_and_a_small_one() -> None:
    assert PRESETS["full"] == {"trajectories": 1024, "size": 256}
    assert PRESETS["demo"] == {"trajectories": 64, "size": 64}
