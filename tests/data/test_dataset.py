r"""Tests for the sda_ray.data.dataset module."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import h5py
import numpy as np
import pytest
import torch

from sda_ray.core.errors import UserError
from sda_ray.data.dataset import (
    TrajectoryDataset,
    check_data,
    check_file,
    fingerprint,
    open_trajectories,
    unusual,
)

X = np.ones((4, 6, 2, 8, 8), dtype=np.float32)


def content(write: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        with h5py.File(file, "w") as f:
            write(f)

    return make


def array(x: object, **storage: object) -> Callable[[Path], None]:
    return content(lambda f: f.create_dataset("x", data=x, **storage))


def done(mask: np.ndarray, **attributes: int) -> Callable[[Path], None]:
    def write(f: h5py.File) -> None:
        f["x"] = X
        f["done"] = mask
        f.attrs.update(attributes)

    return content(write)


def truncated(by: int) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        array(X)(file)
        os.truncate(file, file.stat().st_size - by)

    return make


def damaged(file: Path) -> None:
    array(X)(file)

    with open(file, "r+b") as raw:
        raw.seek(512)
        raw.write(b"\xff" * 512)


def other_file(file: Path) -> Path:
    other = file.with_name("other.h5")
    array(X)(other)

    return other


def virtual(f: h5py.File) -> None:
    layout = h5py.VirtualLayout(X.shape, X.dtype)
    layout[:] = h5py.VirtualSource(other_file(Path(f.filename)), "x", X.shape)
    f.create_virtual_dataset("x", layout)


def external_link(f: h5py.File) -> None:
    f["x"] = h5py.ExternalLink(other_file(Path(f.filename)), "x")


def external_storage(f: h5py.File) -> None:
    secret = Path(f.filename).with_name("secret")
    secret.write_bytes(X.tobytes())
    f.create_dataset("x", X.shape, X.dtype, external=[(str(secret), 0, X.nbytes)])


def indirect_link(f: h5py.File) -> None:
    f["y"] = h5py.ExternalLink(other_file(Path(f.filename)), "/")
    f["x"] = h5py.SoftLink("/y/x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "there is no file"),
        (lambda file: file.mkdir(), "is not an HDF5 file"),
        (lambda file: os.mkfifo(file), "is not an HDF5 file"),
        (lambda file: file.write_bytes(b""), "is not an HDF5 file"),
        (lambda file: file.write_bytes(b"\x93NUMPY" + X.tobytes()), "is not an HDF5 file"),
        (truncated(100), "truncated"),
        (truncated(X.nbytes), "truncated"),
        (damaged, "damaged"),
        (content(lambda f: f.update({"y": X})), r"no dataset `x`, only \['y'\]"),
        (content(lambda f: f.create_group("x")), "a group `x`"),
        (array(X[0]), r"shape \(6, 2, 8, 8\), but it must be \(N, L, 2, H, W\)"),
        (array(X[:, :, :1]), r"shape \(4, 6, 1, 8, 8\)"),
        (array(X[..., :7]), r"shape \(4, 6, 2, 8, 7\)"),
        (array(X[:0]), r"shape \(0, 6, 2, 8, 8\)"),
        (array(h5py.Empty("f4")), "shape None"),
        (array(X.astype(np.int32)), "type int32, but it must be float32"),
        (array(X.astype(np.complex64)), "type complex64"),
        (array(np.full(X.shape, "a", object)), "type object"),
        (content(lambda f: f.create_dataset("x", X.shape, X.dtype)), "holds no data"),
        (content(virtual), "in another file"),
        (content(external_storage), "in another file"),
        (content(external_link), "in another file"),
        (content(indirect_link), "in another file"),
        (done(np.array([1, 0, 0, 1], np.uint8)), "unfinished: 2 of 4 trajectories"),
        (
            done(np.zeros(4, bool), trajectories=9, size=64, seed=3),
            "--trajectories 9 --size 64 --seed 3",
        ),
        (done(np.ones(3, np.uint8)), r"mask `done` of shape \(3,\)"),
        (done(np.ones(4, np.float32)), "mask `done` .* type float32"),
    ],
)
def test_faults_are_named(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    file = tmp_path / "train.h5"
    make(file)

    with pytest.raises(UserError, match=message) as e, open_trajectories(file):
        pass

    assert str(file) in str(e.value)


HOLD = """
import sys, h5py
with h5py.File(sys.argv[1], "a", libver=sys.argv[2]):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_file_that_another_process_has_open_is_read_or_not_called_damaged(
    tmp_path: Path, version: str
) -> None:
    file = tmp_path / "train.h5"

    with h5py.File(file, "w", libver=version) as f:
        f["x"] = X

    command = [sys.executable, "-c", HOLD, str(file), version]

    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"

        if version == "earliest":
            with open_trajectories(file) as x:
                assert np.array_equal(x, X)
        else:  # which marks the file
            with pytest.raises(UserError, match="a process has it open for writing"):  # noqa: SIM117
                with open_trajectories(file):
                    pass

        process.communicate()


def test_whole_file_is_opened(tmp_path: Path) -> None:
    done(np.ones(4, bool))(tmp_path / "x.h5")

    with open_trajectories(tmp_path / "x.h5") as x:
        assert np.array_equal(x, X)


def test_damaged_bytes_give_user_errors_only(tmp_path: Path) -> None:
    file = tmp_path / "x.h5"
    array(X)(file)
    whole = bytearray(file.read_bytes())
    generator = np.random.default_rng(0)

    for _ in range(200):
        data = whole.copy()

        for i in generator.integers(0, 2048, size=4):
            data[i] = generator.integers(256)

        file.write_bytes(data)

        try:
            with open_trajectories(file) as x:
                assert x.shape[2] == 2
        except UserError as e:
            assert str(file) in str(e)


SHAPE = (4, 6, 2, 8, 8)


def numbers(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *SHAPE[1:]), dtype=np.float32)


def write(file: Path, x: np.ndarray, **storage: object) -> Path:
    with h5py.File(file, "w") as f:
        f.create_dataset("x", data=x, **storage)

    return file


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path / "train.h5", numbers(4))
    write(tmp_path / "valid.h5", numbers(2, seed=1))

    return tmp_path


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2"])
@pytest.mark.parametrize("storage", [{}, {"chunks": True}, {"compression": "gzip"}])
def test_windows_are_those_of_the_file(tmp_path: Path, dtype: str, storage: dict) -> None:
    x = numbers(4).astype(dtype)
    dataset = TrajectoryDataset(write(tmp_path / "x.h5", x, **storage), window=3)
    windows = dataset.windows([3, 0, 0], torch.tensor([0, 3, 1]))

    expected = np.stack([x[3, 0:3], x[0, 3:6], x[0, 1:4]]).reshape(3, 6, 8, 8)

    assert len(dataset) == 4
    assert dataset.starts == 4
    assert dataset.shape == (6, 8, 8)
    assert windows.dtype == torch.float32
    assert windows.is_contiguous()
    assert np.array_equal(windows.numpy(), expected.astype(np.float32))


def test_contiguous_file_is_mapped_and_not_read(directory: Path) -> None:
    dataset = TrajectoryDataset(directory / "train.h5", window=2)

    assert isinstance(dataset.x, np.memmap)
    assert not dataset.x.flags.writeable


# Processes that read all windows, and one that only starts a training
SHARED = """
import json, sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.training.validation import Validation

torch.set_num_threads(1)
file, count = Path(sys.argv[1]), 8

def taken(pid, key):
    mine, total = False, 0

    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            mine = line.endswith(file.name)
        elif mine and line.startswith(f"{key}:"):
            total += 1024 * int(line.split()[1])

    return total

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])

def read(pipe):
    before = anonymous()
    dataset = TrajectoryDataset(file, 3)
    Validation(TrajectoryDataset(file.with_name("valid.h5"), 3))
    began = taken("self", "Rss")

    for i in range(len(dataset)):
        for start in (*range(0, dataset.starts, 3), dataset.starts - 1):
            dataset.windows([i], [start])

    pipe.send((began, anonymous() - before))
    pipe.recv()

context = get_context("fork")
pipes, processes = [], []

for _ in range(count):
    here, there = context.Pipe()
    processes.append(context.Process(target=read, args=(there,)))
    pipes.append(here)
    processes[-1].start()

told = [pipe.recv() for pipe in pipes]
shared = [taken(process.pid, "Pss") for process in processes]

for pipe, process in zip(pipes, processes):
    pipe.send(None)
    process.join()

print(json.dumps({"began": [x for x, _ in told], "own": [x for _, x in told], "shared": shared}))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_processes_of_a_machine_share_one_copy(tmp_path: Path) -> None:
    shape = (256, 16, 2, 32, 32)
    size = 4 * math.prod(shape)  # 32 MiB
    write(tmp_path / "train.h5", np.random.default_rng(0).random(shape, dtype=np.float32))
    write(tmp_path / "valid.h5", np.ones((4, *shape[1:]), dtype=np.float32))
    done = subprocess.run(
        [sys.executable, "-c", SHARED, str(tmp_path / "train.h5")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert 0.95 * size < sum(found["shared"]) < 1.05 * size
    assert max(found["own"]) < size / 2  # no copy of its own
    assert max(found["began"]) == 0  # a start reads nothing of the training data


def test_chunked_file_is_read_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "x.h5", numbers(4), chunks=True)
    TrajectoryDataset(file, window=2)

    assert f"{file} is chunked or compressed" in caplog.text


def test_user_block_is_skipped(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512) as f:
        f["x"] = numbers(4)

    assert np.array_equal(TrajectoryDataset(tmp_path / "x.h5", window=2).x, numbers(4))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_data_on_a_device_give_the_same_windows(tmp_path: Path, dtype: str) -> None:
    file = write(tmp_path / "train.h5", numbers(4).astype(dtype))
    mapped, moved = TrajectoryDataset(file, window=2), TrajectoryDataset(file, window=2)
    indices = torch.randint(len(mapped), (16,))
    starts = torch.randint(mapped.starts, (16,))
    size = 4 * mapped.x.size

    assert not moved.move("cpu", limit=size - 1)
    assert moved.windows(indices, starts).equal(mapped.windows(indices, starts))
    assert moved.move("cpu", limit=size)
    assert moved.windows(indices, starts).equal(mapped.windows(indices, starts))
    assert moved.windows([1], [0]).dtype == torch.float32

    with pytest.raises(IndexError, match="trajectory 0, start -1"):
        moved.windows([0], [-1])

    far = TrajectoryDataset(file, window=2)
    assert far.move("meta", limit=size)
    assert far.windows(indices, starts).is_meta  # cut out on the device itself


def test_windows_outside_are_refused(directory: Path) -> None:
    dataset = TrajectoryDataset(directory / "train.h5", window=3)

    for i, j in ((4, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(IndexError, match=f"trajectory {i}, start {j}"):
            dataset.windows([i], [j])


def test_pickled_dataset_does_not_carry_the_numbers(directory: Path) -> None:
    dataset = TrajectoryDataset(directory / "train.h5", window=3)
    data = pickle.dumps(dataset)

    assert len(data) < 1000
    assert torch.equal(pickle.loads(data).windows([1], [2]), dataset.windows([1], [2]))


@pytest.mark.parametrize("window", [0, 7])
def test_window_longer_than_the_trajectories_is_refused(directory: Path, window: int) -> None:
    with pytest.raises(UserError, match=f"trajectories of 6 snapshots, but window is {window}"):
        TrajectoryDataset(directory / "train.h5", window=window)


def test_check_describes_the_data(directory: Path) -> None:
    info = check_data(directory)

    assert (info.size, info.length) == (8, 6)
    assert info.trajectories == {"train": 4, "valid": 2}
    assert info.fingerprint == fingerprint(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x, ""),
        (lambda x: 0.3 * x, ""),
        (lambda x: x + np.array([[[30]], [[0]]], np.float32), "are 30 ± 1 and .*Scale them"),
        (lambda x: 10 * x, "a standard deviation near 1"),
        (lambda x: 0.1 * x, "a standard deviation near 1"),
        (lambda x: x[..., :9, :9], "not periodic along axis -2.*, and by"),
    ],
)
def test_states_that_are_not_what_networks_take_them_for_are_told(
    tmp_path: Path, data: Path, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    for split in ("train", "valid"):
        with h5py.File(data / f"{split}.h5") as f, h5py.File(tmp_path / f"{split}.h5", "w") as g:
            g["x"] = change(f["x"][...])

    text = " ".join(unusual(tmp_path / "train.h5"))
    assert re.search(message, text) if message else not text
    assert check_data(tmp_path).warnings == tuple(unusual(tmp_path / "train.h5"))


def test_check_does_not_open_the_test_file(directory: Path) -> None:
    before = check_data(directory)
    (directory / "test.h5").write_bytes(b"not HDF5")

    assert check_data(directory) == before


def test_missing_data_say_how_to_make_some(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(UserError, match=r"no directory .*absent.*sda-ray simulate --preset demo"):
        check_data(tmp_path / "absent")

    (directory / "valid.h5").unlink()

    with pytest.raises(UserError, match=r"no file .*valid\.h5"):
        check_data(directory)


def test_splits_of_different_shapes_are_refused(directory: Path) -> None:
    write(directory / "valid.h5", numbers(2)[:, :5])

    with pytest.raises(UserError, match=r"valid\.h5 .*\(5, 2, 8, 8\), but .*\(6, 2, 8, 8\)"):
        check_data(directory)


def test_splits_of_different_simulations_are_refused(directory: Path) -> None:
    for seed, split in enumerate(("train", "valid")):
        with h5py.File(directory / f"{split}.h5", "r+") as f:
            f.attrs.update({"trajectories": 10, "size": 64, "seed": seed})

    with pytest.raises(
        UserError, match=r"valid\.h5 was simulated with .*--seed 1, but .*--seed 0"
    ):
        check_data(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_numbers_that_are_not_finite_are_found(directory: Path, split: str, value: float) -> None:
    x = numbers(3)
    x[1, 4, 0, 7, 3] = value
    write(directory / f"{split}.h5", x)

    with pytest.raises(UserError, match=rf"{split}\.h5 .*trajectory 1, snapshot 4"):
        check_data(directory)


def test_doubles_beyond_single_precision_are_found(directory: Path) -> None:
    x = numbers(3).astype(np.float64)
    x[2, 0, 1, 0, 0] = 1e300
    write(directory / "train.h5", x)

    with pytest.raises(UserError, match=r"train\.h5 .*trajectory 2, snapshot 0"):
        check_data(directory)


def test_large_finite_numbers_are_accepted(directory: Path) -> None:
    check_file(write(directory / "large.h5", np.full(SHAPE, 3e38, dtype=np.float32)))


def test_lost_trajectory_is_found(directory: Path) -> None:
    x = numbers(3)
    x[1] = 0
    write(directory / "train.h5", x)

    with pytest.raises(UserError, match="only zeros in trajectory 1"):
        check_data(directory)


def test_fingerprint_depends_on_the_numbers_alone(directory: Path) -> None:
    before = fingerprint(directory)
    write(directory / "train.h5", numbers(4), compression="gzip")

    assert fingerprint(directory) == before

    write(directory / "train.h5", numbers(4).astype(">f4"))

    assert fingerprint(directory) == before


def test_fingerprint_changes_with_each_trajectory_shape_and_type(directory: Path) -> None:
    prints = {fingerprint(directory)}

    for i in range(4):
        x = numbers(4)
        x[i] += 1
        write(directory / "train.h5", x)
        prints.add(fingerprint(directory))

    for x in (numbers(3), numbers(4).astype(np.float64)):
        write(directory / "train.h5", x)
        prints.add(fingerprint(directory))

    assert len(prints) == 7
