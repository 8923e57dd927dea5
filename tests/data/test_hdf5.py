r"""Tests for the sda_ray.data.hdf5 module."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from sda_ray.core.errors import UserError
from sda_ray.data.hdf5 import open_trajectories

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
        (content(virtual), "in other files, which are not followed"),
        (content(external_storage), "in other files, which are not followed"),
        (content(external_link), "links are not followed"),
        (content(indirect_link), "links are not followed"),
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


def test_whole_file_is_opened(tmp_path: Path) -> None:
    done(np.ones(4, bool))(tmp_path / "x.h5")

    with open_trajectories(tmp_path / "x.h5") as x:
        assert np.array_equal(x, X)


def test_bytes_anywhere_never_give_anything_but_user_errors(tmp_path: Path) -> None:
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
