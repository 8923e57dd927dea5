r"""Tests for sda_ray.cluster.ray_node: what a node of ours leaves to others, and takes from them."""

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sda_ray.cluster.ray_node import cpus_left, note_cpus, private_directory, started
from sda_ray.core.errors import UserError
from sda_ray.core.files import locked

DELETIONS = ("os.remove", "os.rmdir")
left = 0  # deletions until this process is asked to end; 0 for never


def end_at_deletion(event: str, arguments: tuple[object, ...]) -> None:
    global left

    if left and event in DELETIONS:
        left -= 1

        if not left:
            raise SystemExit(143)


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    r"""A directory for temporary files with a path that is short enough."""

    place = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def fill(directory: Path) -> None:
    (directory / "r" / "session").mkdir(parents=True)

    for name in ("r/session/log", "ray.log", "token"):
        (directory / name).touch()


def test_removal_that_is_cut_short_is_completed_at_the_next_start(parent: Path) -> None:
    global left

    sys.addaudithook(end_at_deletion)
    cut = 0

    for number in range(1, 9):
        with suppress(SystemExit), private_directory() as directory:
            fill(directory)
            left = number

        cut += not left
        left = 0

        with private_directory() as other:
            assert [x for x in parent.iterdir() if any(x.iterdir())] == [other], number

    assert cut == 7  # 4 files, 3 directories


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_directories_of_others_are_left_alone(parent: Path) -> None:
    for name in ("lock", "pipe"):
        (parent / f"sda-ray-{name}").mkdir()

    (parent / "sda-ray-lock" / "lock").touch()
    os.mkfifo(parent / "sda-ray-pipe" / "lock")  # would wait for a writer, if opened to be read

    for place in parent.iterdir():
        os.chown(place, 65534, 65534)

    with private_directory() as directory:
        assert {x.name for x in parent.iterdir()} == {
            "sda-ray-lock",
            "sda-ray-pipe",
            directory.name,
        }


def test_link_out_of_the_temporary_directory_is_not_followed(parent: Path) -> None:
    (target := parent / "target").mkdir()
    (parent / "sda-ray-link").symlink_to(target)
    (target / "lock").touch()

    with private_directory(), locked(target / "lock", wait=False):
        assert (parent / "sda-ray-link").exists()


def test_directory_in_use_is_left_alone(parent: Path) -> None:
    with private_directory() as first, private_directory():
        assert first.exists()

        with pytest.raises(BlockingIOError), locked(first / "lock", wait=False):
            pytest.fail("it was not locked")


def test_cpus_that_are_taken_twice_are_told(
    parent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with private_directory(1), private_directory(), private_directory(0):
        assert not caplog.records

        with private_directory(10_000):
            assert "hold 1 CPUs of this machine, and this one takes 10000" in caplog.text


def test_cpus_are_shared_with_other_commands_while_they_use_them(parent: Path) -> None:
    with private_directory(99) as mine:
        every = cpus_left(mine)
        assert 1 <= every <= (os.cpu_count() or 1)

        with private_directory(99) as other, private_directory():
            assert cpus_left(mine) == cpus_left(other) == every // 2
            note_cpus(mine, 0.5)
            assert cpus_left(other) == max(every // 2, every - 1)
            note_cpus(mine, 0)
            assert (cpus_left(other), cpus_left(mine)) == (every, every // 2)

        assert cpus_left(mine) == every


def test_node_whose_raylet_is_killed_while_it_starts_is_started_again(parent: Path) -> None:
    r"""Ray itself waits for the dead one, for minutes."""

    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.name() == "raylet":
                        process.kill()
                        killed.append(process.pid)

            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()
    start = time.monotonic()

    with started("0" * 64, cpus=1, gpus=0, alone=True) as node:
        assert killed and node.is_running()

    assert time.monotonic() - start < 100


@pytest.mark.parametrize("name", ["it's", '"x"', "a b", "x" * 30, "none"])
def test_path_that_ray_cannot_use_is_passed_over(
    name: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "none":
        (parent / name).mkdir()

    monkeypatch.setattr(tempfile, "tempdir", str(parent / name))

    with private_directory() as directory:
        assert directory.parent in map(Path, ("/tmp", "/var/tmp", "/dev/shm"))


def test_lack_of_a_path_that_ray_can_use_is_told(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(parent / "none"))
    monkeypatch.setattr("sda_ray.cluster.ray_node.PLACES", ("/none",))

    with pytest.raises(UserError, match="Set TMPDIR to"), private_directory():
        pytest.fail("there was a place")
