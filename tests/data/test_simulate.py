r"""Tests for the sda_ray.data.simulate module."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from sda_ray.core.errors import UserError
from sda_ray.data.dataset import Origin, check_data, check_file
from sda_ray.data.flow import KolmogorovFlow, coarsen
from sda_ray.data.simulate import (
    PRESETS,
    SHAPE,
    create_files,
    find_missing,
    lock_directory,
    simulate_dataset,
    split_indices,
    write_trajectory,
)

ORIGIN = Origin(trajectories=12, size=64, seed=3)


def numbers(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal(SHAPE, dtype=np.float32)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create_files(tmp_path, ORIGIN)

    return tmp_path


@pytest.mark.parametrize("n", [10, 11, 12, 19, 64, 1024])
def test_splits_are_those_of_upstream_and_not_empty(n: int) -> None:
    train, valid, test = split_indices(n).values()

    assert (train.stop, valid.stop) == (int(0.8 * n), int(0.9 * n))
    assert [*train, *valid, *test] == list(range(n))
    assert train and valid and test


def test_written_trajectories_are_read_back(directory: Path) -> None:
    for i in range(12):
        assert find_missing(directory, ORIGIN) == list(range(i, 12))
        write_trajectory(directory, ORIGIN, i, numbers(i))

    for split, indices in split_indices(12).items():
        check_file(directory / f"{split}.h5")

        with h5py.File(directory / f"{split}.h5", "r") as f:
            assert np.array_equal(f["x"], np.stack([numbers(i) for i in indices]))
            assert f["x"].chunks is None
            assert f["x"].dtype == "<f4"

    assert check_data(directory).trajectories == {"train": 9, "valid": 1}


def test_trajectories_may_come_in_any_order(directory: Path) -> None:
    for i in (11, 3, 9):
        write_trajectory(directory, ORIGIN, i, numbers(i))

    assert find_missing(directory, ORIGIN) == [0, 1, 2, 4, 5, 6, 7, 8, 10]


def test_unfinished_data_are_refused_with_the_command_that_continues(directory: Path) -> None:
    write_trajectory(directory, ORIGIN, 5, numbers(5))

    with pytest.raises(UserError, match=r"train\.h5 is unfinished: 1 of 9 ") as e:
        check_data(directory)

    options = f"--trajectories 12 --size 64 --seed 3 --data {directory}"
    assert f"`sda-ray simulate {options}`" in str(e.value)


def test_metadata_do_not_change_when_a_trajectory_is_written(directory: Path) -> None:
    file = directory / "train.h5"

    with h5py.File(file, "r") as f:
        offsets = [(f[name].id.get_offset(), f[name].nbytes) for name in ("x", "done")]

    def metadata() -> bytes:
        data = np.fromfile(file, dtype=np.uint8)

        for offset, size in offsets:
            data[offset : offset + size] = 0

        return data.tobytes()

    before = metadata()
    write_trajectory(directory, ORIGIN, 0, numbers(0))

    assert metadata() == before


def test_space_is_taken_at_once(directory: Path) -> None:
    # A full disk cannot interrupt the simulation later.
    for file in directory.glob("*.h5"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size


def test_creating_again_changes_nothing(directory: Path) -> None:
    write_trajectory(directory, ORIGIN, 0, numbers(0))
    before = (directory / "train.h5").read_bytes()
    (directory / "valid.h5").unlink()
    create_files(directory, ORIGIN)

    assert (directory / "train.h5").read_bytes() == before
    assert find_missing(directory, ORIGIN) == list(range(1, 12))


def test_half_created_file_is_made_anew(directory: Path) -> None:
    (directory / "valid.h5").rename(directory / ".valid.h5.tmp")
    os.truncate(directory / ".valid.h5.tmp", 100)

    assert 9 in find_missing(directory, ORIGIN)

    create_files(directory, ORIGIN)

    assert sorted(os.listdir(directory)) == ["test.h5", "train.h5", "valid.h5"]


@pytest.mark.parametrize("origin", [Origin(13, 64, 3), Origin(12, 128, 3), Origin(12, 64, 4)])
def test_other_settings_are_refused(directory: Path, origin: Origin) -> None:
    with pytest.raises(UserError, match=r"simulate. with .*, but with .*--seed 3.*another --data"):
        find_missing(directory, origin)


def test_foreign_and_damaged_files_are_refused(directory: Path) -> None:
    os.truncate(directory / "train.h5", 10_000)

    with pytest.raises(UserError, match=r"train\.h5 is damaged"):
        find_missing(directory, ORIGIN)

    with h5py.File(directory / "train.h5", "w") as f:
        f["x"] = np.zeros((9, *SHAPE), np.float32)

    with pytest.raises(UserError, match=r"train\.h5 was not written by"):
        find_missing(directory, ORIGIN)


@pytest.mark.parametrize("seed", ["abc", float("nan"), float("inf"), [3, 4]])
def test_strange_attributes_are_refused(directory: Path, seed: Any) -> None:
    with h5py.File(directory / "train.h5", "a") as f:
        f.attrs["seed"] = seed

    with pytest.raises(UserError, match=r"train\.h5 (is damaged|was not)"):
        find_missing(directory, ORIGIN)


def test_mask_of_another_shape_is_refused(directory: Path) -> None:
    with h5py.File(directory / "train.h5", "a") as f:
        del f["done"]
        f["done"] = True

    with pytest.raises(UserError, match=r"train\.h5 was not written by"):
        find_missing(directory, ORIGIN)


def test_full_disk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    n = shutil.disk_usage(tmp_path).free // 2**20

    with pytest.raises(UserError, match=r"needs .* GiB .* but its disk has .* GiB left"):
        create_files(tmp_path, Origin(n, 64, 0))

    assert os.listdir(tmp_path) == []


def test_directory_is_held_by_one_and_released(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            lock_directory(tmp_path),
            pytest.raises(UserError, match="another process simulates in it"),
            lock_directory(tmp_path),
        ):
            pass


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with (
        pytest.raises(UserError, match="cannot be written"),
        lock_directory(tmp_path / "file" / "data"),
    ):
        pass


SCRIPT = """
import sys
from pathlib import Path
from sda_ray.data.simulate import simulate_dataset
simulate_dataset(Path(sys.argv[1]), 11, 64, 7)
"""

DEMO = Origin(trajectories=11, size=64, seed=7)


def start(directory: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def missing(directory: Path) -> int:
    return len(find_missing(directory, DEMO))


def trajectory(seed: int, i: int) -> np.ndarray:
    torch.set_num_threads(1)
    flow = KolmogorovFlow(64)
    state = np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)
    x = flow.prior([int(state[0])])

    return coarsen(flow.trajectory(x, length=128, last=64), 1)[0].numpy()


def test_killed_simulation_continues_to_the_same_bits(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    directory = tmp_path / "data"

    # Killed in mid-run, while a second one is refused
    with start(directory) as process:
        while missing(directory) == 11 and process.poll() is None:
            time.sleep(0.01)

        with pytest.raises(UserError, match="another process simulates in it"):
            simulate_dataset(directory, 11, 64, 7)

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
    assert "trajectory 11/11" in output
    assert check_data(directory).trajectories == {"train": 8, "valid": 1}

    with h5py.File(directory / "train.h5", "r") as f:
        assert np.array_equal(f["x"][done], before[done])
        assert np.array_equal(f["x"][0], trajectory(7, 0))
        assert np.array_equal(f["x"][7], trajectory(7, 7))

    with h5py.File(directory / "test.h5", "r") as f:
        assert np.array_equal(f["x"][1], trajectory(7, 10))

    # Once more: nothing is done
    times = {file: file.stat().st_mtime_ns for file in directory.glob("*.h5")}

    assert simulate_dataset(directory, 11, 64, 7) == 0
    assert "There is nothing to do" in capfd.readouterr().out
    assert times == {file: file.stat().st_mtime_ns for file in directory.glob("*.h5")}

    with pytest.raises(UserError, match="another --data"):
        simulate_dataset(directory, 12, 64, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 64, 0), "trajectories is 9, but must be at least 10"),
        ((10, 0, 0), "size is 0, but must be a multiple of 64"),
        ((10, 96, 0), "size is 96, but must be a multiple of 64"),
        ((10, 64, -1), "seed is -1"),
    ],
)
def test_invalid_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        simulate_dataset(tmp_path / "data", *arguments)

    assert os.listdir(tmp_path) == []


def test_presets_are_upstream_and_a_small_one() -> None:
    assert PRESETS["full"] == {"trajectories": 1024, "size": 256}
    assert PRESETS["demo"] == {"trajectories": 64, "size": 64}
