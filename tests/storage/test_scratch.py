r"""Tests for sda_ray.storage.scratch: private places end with their process, data are fetched once."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import pytest

from sda_ray.core.errors import UserError
from sda_ray.core.files import locked
from sda_ray.data.dataset import fingerprint
from sda_ray.storage.scratch import KEPT, Private, fetch, find_data, leftovers, local_directory

HOLD = """
import os, sys
from sda_ray.storage.scratch import Private
place = Private("abcdefgh", 3)
(place.directory / "stacks.txt").write_text("where it hung")
print(place.directory, flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDA_RAY_LOCAL", str(tmp_path / "local"))
    return tmp_path / "local" / f"sda-ray-{os.getuid()}"


class Source:
    r"""Data elsewhere, and what was asked for."""

    def __init__(self, data: Path) -> None:
        self.data, self.asked = data, 0

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def data_sizes(self) -> dict[str, int]:
        return {x: (self.data / x).stat().st_size for x in ("train.h5", "valid.h5")}

    def read_data(self, name: str, offset: int, size: int) -> bytes:
        self.asked += 1

        return (self.data / name).read_bytes()[offset : offset + size]

    def find(self, expected: str | None = None) -> tuple[Path, Any]:
        expected = expected or fingerprint(self.data)
        return find_data(self.data / "not here", expected, self.ask)


def other_data(data: Path, directory: Path, shift: float) -> Source:
    directory.mkdir()

    for name in ("train.h5", "valid.h5"):
        with h5py.File(data / name) as old, h5py.File(directory / name, "w") as new:
            new.create_dataset("x", data=old["x"][:] + shift)

    return Source(directory)


def test_private_directory_is_for_this_user_and_this_attempt(here: Path) -> None:
    one, two = Private("abcdefgh", 1), Private("abcdefgh", 1)
    assert one.directory != two.directory
    assert {x.stat().st_mode & 0o777 for x in (here, one.directory)} == {0o700}
    one.close()
    one.close()
    assert list((here / "runs").iterdir()) == [two.directory]
    two.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_directory_of_another_user_is_refused(here: Path) -> None:
    here.mkdir(parents=True)
    os.chown(here, 65534, 65534)

    with pytest.raises(UserError, match=r"belongs to another user. Set SDA_RAY_LOCAL"):
        local_directory("runs")


def test_leftovers_of_dead_processes_are_listed_and_removed(env: dict[str, str]) -> None:
    mine = Private("zzzzzzzz", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=env | {"SDA_RAY_LOCAL": os.environ["SDA_RAY_LOCAL"]},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    directory = Path(process.stdout.readline().strip())

    with leftovers() as found:
        assert found == []

    process.kill()
    process.communicate()

    with leftovers() as found:
        assert found == [("abcdefgh", 3, directory)]
        assert (directory / "stacks.txt").read_text() == "where it hung"

    assert not directory.exists() and mine.directory.exists()
    mine.close()


def test_data_that_are_here_are_not_fetched(data: Path) -> None:
    source = Source(data)
    expected = fingerprint(data)
    assert find_data(data, expected, source.ask) == (data, None)
    assert source.asked == 0


def test_data_are_fetched_once_by_all_that_want_them(data: Path) -> None:
    source, found = Source(data), []

    def find() -> None:
        found.append(source.find())

    threads = [threading.Thread(target=find, daemon=True) for _ in range(4)]

    for thread in threads:
        thread.start()

    for thread in threads:
        thread.join(timeout=60)

    assert len(found) == len(threads)
    (place,) = {place for place, _ in found}

    for _, held in found:
        held.close()

    assert source.asked == 2 and fingerprint(place) == fingerprint(data)
    assert sorted(x.name for x in place.iterdir()) == ["train.h5", "valid.h5"]


def test_data_that_another_trial_is_fetching_are_waited_for(data: Path, here: Path) -> None:
    r"""The other one keeps the data locked against removal for as long as it trains."""

    source, found = Source(data), []
    expected = fingerprint(data)
    directory = local_directory("data")

    with locked(directory / f"{expected}.lock", shared=True):
        with locked(directory / f"{expected}.fetch"):
            thread = threading.Thread(target=lambda: found.append(source.find()), daemon=True)
            thread.start()
            time.sleep(1.0)
            shutil.copytree(data, directory / "aside")
            (directory / "aside").rename(directory / expected)

        thread.join(timeout=30)

    ((place, held),) = found
    held.close()
    assert place == directory / expected and source.asked == 0


def test_damaged_copy_is_fetched_again(data: Path, tmp_path: Path) -> None:
    source = Source(data)
    place, held = source.find()
    held.close()
    (place / "valid.h5").write_bytes(b"damaged")
    place, held = source.find()
    held.close()
    assert fingerprint(place) == fingerprint(data)


def test_data_that_have_changed_are_refused(data: Path, here: Path) -> None:
    with pytest.raises(UserError, match="have changed since the sweep was started"):
        Source(data).find("0" * 64)

    names = {x.name for x in (here / "data").iterdir()}
    assert names == {"0" * 64 + ".lock", "0" * 64 + ".fetch"}


def test_few_data_sets_are_kept_and_those_in_use_in_any_case(
    data: Path, tmp_path: Path, here: Path
) -> None:
    used, held = other_data(data, tmp_path / "used", 1.0).find()
    places = []

    for i in range(KEPT + 1):
        place, lock = other_data(data, tmp_path / f"{i}", 2.0 + i).find()
        lock.close()
        places.append(place)

    assert used.exists() and places[-1].exists() and not places[0].exists()
    assert sum(x.is_dir() for x in (here / "data").iterdir()) <= KEPT + 1
    held.close()


def test_file_that_becomes_shorter_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="x has changed while it was fetched"):
        fetch(tmp_path / "x", 5, lambda offset, size: b"abc"[offset:])


def test_full_disk_says_where_and_what_to_do(tmp_path: Path) -> None:
    def read(offset: int, size: int) -> bytes:
        return bytes(size)

    (tmp_path / "full").symlink_to("/dev/full")

    with pytest.raises(UserError, match=r"No space left on device. Make room .* SDA_RAY_LOCAL"):
        fetch(tmp_path / "full", 2**20, read)
