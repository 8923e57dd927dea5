r"""Tests for sda_ray.runs.fragments: what W&B has left on the disk is found, and read."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from offline import NAME, STEPS, attempted, run

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.runs.fragments import await_end, read_fragments
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train

__all__ = ["attempted", "run"]  # fixtures


def test_reader_takes_whole_records_only(run: RunPath) -> None:
    first, second = read_fragments(run)

    assert [step for fragment in (first, second) for step, _ in fragment.rows] == STEPS
    assert (first.ended, second.ended) == (False, True)
    assert first.run["name"] == NAME

    data = second.file.read_bytes()
    second.file.write_bytes(data[:-40])
    torn = read_fragments(run)[1]

    assert not torn.ended
    assert torn.size <= len(data) - 40


def test_attempts_of_the_same_second_are_told_apart(run: RunPath) -> None:
    first, second = (f.file.parent for f in read_fragments(run))
    kept = [first, *(first.with_name(f"{first.name}-{n}") for n in (2, 10))]  # as wandb names them
    shutil.copytree(first, kept[1])
    second.rename(kept[2])
    assert [f.file.parent for f in read_fragments(run)] == kept


def test_end_that_is_still_being_written_is_waited_for(run: RunPath) -> None:
    file = read_fragments(run)[-1].file
    data = file.read_bytes()
    file.write_bytes(data[:-400])
    await_end(file, patience=0.05)
    assert not read_fragments(run)[-1].ended

    writer = threading.Timer(0.2, file.write_bytes, (data,))
    writer.start()
    await_end(file)
    assert read_fragments(run)[-1].ended and file.read_bytes() == data
    writer.join()


def test_end_of_the_own_fragment_is_waited_for_and_no_other(
    tmp_path: Path, data: Path, small: Config
) -> None:
    r"""A stranger's directory, or a clock that was wrong, may have left what seems to be newer."""

    run = Run(tmp_path / "runs", small, wandb=Wandb("offline"))
    newer = run.path.directory / "wandb" / f"offline-run-99991231_235959-{run.id}"
    newer.mkdir()
    os.mkfifo(newer / f"run-{run.id}.wandb")
    list(train(run, data))
    run.close("finished")

    shutil.rmtree(newer)
    assert [fragment.ended for fragment in read_fragments(run.path)] == [True]


def test_reader_refuses_damage(run: RunPath) -> None:
    file = read_fragments(run)[0].file
    data = file.read_bytes()
    file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])

    with pytest.raises(UserError, match=r"run-abcd1234\.wandb is damaged at byte \d+"):
        read_fragments(run)


def test_reader_follows_no_links(run: RunPath, tmp_path: Path) -> None:
    (run.directory / "wandb").rename(tmp_path / "elsewhere")
    (run.directory / "wandb").symlink_to(tmp_path / "elsewhere")

    assert read_fragments(run) == []
