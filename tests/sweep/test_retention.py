r"""Tests for sda_ray.sweep.retention: which checkpoints are deleted, and in which order."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kept import MADE, Keeping, identity, keeping, made, path_of, runs, snapshot

from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.runs.checkpoint import prune_run, resumable
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import TrialRecord
from sda_ray.sweep.retention import AGAIN, Retention, parse_size

__all__ = ["keeping", "made", "runs"]  # fixtures

# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50GB", 50 * 10**9),
        ("1.5 TB", 15 * 10**11),
        (" .5gb ", 5 * 10**8),
        ("800MiB", 800 * 2**20),
        ("50G", 50 * 10**9),
        ("3kB", 3000),
    ],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("50", r"--disk is '50', but must be a number and a unit .*Did you mean 50GB\?"),
        ("-1GB", "must be a number and a unit"),
        ("fifty GB", "must be a number and a unit"),
        ("50GBit", "must be a number and a unit"),
        ("nanGB", "must be a number and a unit"),
        ("", "must be a number and a unit"),
        ("0GB", "--disk is '0GB', but must be above 0"),
    ],
)
def test_invalid_sizes_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_size(text)


# Deleted and kept checkpoints


def test_all_checkpoints_stay_by_default_and_their_size_is_known(
    runs: Path, keeping: Callable[..., Keeping]
) -> None:
    before = snapshot(runs)
    kept = keeping()

    assert snapshot(runs) == before
    assert kept.said == []
    assert kept.retention.size == sum(
        len(content) for file, content in before.items() if file.name.startswith("checkpoint")
    )


def test_worst_paused_runs_lose_their_checkpoint_first(keeping: Callable[..., Keeping]) -> None:
    r"""Before them go those that no run resumes from, after them the worst of complete runs."""

    gone: list[int] = []
    left, size = set(MADE), keeping().retention.size

    while True:
        kept = keeping(limit=size - 1)

        if kept.left == left:
            break

        assert kept.retention.size < size
        gone += sorted(left - kept.left)
        left, size = kept.left, kept.retention.size

    assert gone == [6, 8, 2, 1, 3, 5, 4]
    assert left == {7}
    assert any("the remaining ones are in use" in text for text in kept.said)


def test_no_more_is_deleted_than_the_limit_requires(keeping: Callable[..., Keeping]) -> None:
    size = keeping().retention.size
    one = size // len(MADE)
    kept = keeping(limit=size - one - one // 2)

    assert kept.left == set(MADE) - {6, 8}
    assert kept.retention.size <= size - one - one // 2
    assert len(kept.said) == 1
    assert "run 6 (00000006), run 8 (00000008)" in kept.said[0]
    assert "starts again at epoch 0, to the same bits" in kept.said[0]


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, {1, 2, 3, 7}), (1, {1, 2, 3, 7, 4}), (2, {1, 2, 3, 7, 4, 5}), (9, set(MADE) - {6, 8})],
)
def test_running_paused_and_the_best_runs_keep_theirs(
    keeping: Callable[..., Keeping], keep: int, left: set[int]
) -> None:
    assert keeping(keep=keep).left == left


def test_best_runs_are_those_of_the_best_means_over_seeds(keeping: Callable[..., Keeping]) -> None:
    kept = keeping()
    lucky = kept.records[3]
    kept.records += [
        replace(lucky, index=9, run_id="9" * 8, values={3: 9.0}, replica_of=lucky.index)
    ]
    kept.retention.keep = 1
    kept.retention.finish()

    assert kept.left == {1, 2, 3, 7, 5}


def test_finally_pruned_runs_do_not_count_as_paused(runs: Path) -> None:
    kept = Keeping(runs)
    kept.records = [
        TrialRecord(r.index, r.run_id, "pruned" if r.paused else r.state, r.until, 3, r.values)
        for r in kept.records
    ]

    for final, left in ((False, {1, 2, 3, 4, 7}), (True, {4, 7})):
        Retention(runs, "width", lambda: kept.records, 1, notify=print, final=final).finish()
        assert kept.left == left


def test_only_checkpoints_are_deleted(runs: Path, keeping: Callable[..., Keeping]) -> None:
    before = snapshot(runs)
    assert keeping(limit=1).left == {7}
    after = snapshot(runs)

    assert {file.name for file in before.keys() - after.keys()} <= {
        "checkpoint.pth",
        "checkpoint.prev.pth",
        "checkpoint.decay.pth",
    }

    assert all(after[file] == before[file] for file in after)


def test_run_of_another_sweep_keeps_its_checkpoint(
    runs: Path, keeping: Callable[..., Keeping]
) -> None:
    r"""Even if the study names its id: `run.json` decides."""

    for index, sweep in ((1, "depth"), (2, None), (5, "depth")):
        path = path_of(runs, index)
        path.record.write_text(json.dumps(json.loads(path.record.read_text()) | {"sweep": sweep}))

    assert keeping(limit=1).left == {1, 2, 5, 7}


def test_run_in_use_keeps_its_checkpoint(runs: Path, keeping: Callable[..., Keeping]) -> None:
    lease = Lease(path_of(runs, 1).lease, "run")
    elsewhere = path_of(runs, 2).lease
    content = json.loads(elsewhere.read_text())
    elsewhere.write_text(
        json.dumps(content | {"host": "another", "boot": "x", "pid": 1, "started": "1"})
    )
    path_of(runs, 3).lease.write_text("garbage")
    assert keeping(limit=1).left == {1, 2, 3, 7}

    with lease.hold(), pytest.raises(UserError, match="cannot be locked"):
        prune_run(path_of(runs, 1), "width")

    lease.release()
    assert 1 not in keeping(limit=1).left


def test_run_that_cannot_restart_keeps_its_checkpoint(
    runs: Path, keeping: Callable[..., Keeping]
) -> None:
    path_of(runs, 1).config.write_text("garbage")
    path = path_of(runs, 2)
    path.record.write_text(json.dumps(json.loads(path.record.read_text()) | {"parent": "x"}))
    path_of(runs, 4).state.unlink()

    assert keeping(limit=1).left == {1, 2, 4, 7}


def test_links_are_not_followed(
    runs: Path, tmp_path: Path, keeping: Callable[..., Keeping]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    path = path_of(runs, 1)
    shutil.move(path.directory, elsewhere)
    path.directory.symlink_to(elsewhere)

    foreign = tmp_path / "foreign.pth"
    path = path_of(runs, 2)
    path.checkpoint.rename(foreign)
    path.checkpoint.symlink_to(foreign)
    content = foreign.read_bytes()
    kept = keeping(limit=1)

    assert (elsewhere / "checkpoint.pth").exists()
    assert foreign.read_bytes() == content and path.checkpoint.is_symlink()
    assert 1 in kept.left


def test_adopted_run_and_run_without_a_directory_are_skipped(runs: Path) -> None:
    kept = Keeping(runs)
    kept.records = [TrialRecord(5, identity(5), "complete", 3, 3, {3: 1.0}, source="a/b")]
    kept.records += [TrialRecord(99, identity(99), "running", 1, 3, {1: 1.0})]
    before = snapshot(runs)
    Retention(runs, "width", lambda: kept.records, 0, 1, print).finish()

    assert snapshot(runs) == before


def test_hard_linked_file_counts_once(runs: Path) -> None:
    path = path_of(runs, 4)
    size = sum(resumable(path).values())
    os.link(path.checkpoint, path.decay)

    assert sum(resumable(path).values()) == size
    assert prune_run(path, "width") == size
    assert not path.decay.exists()


# The disk


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    r"""A small disk."""

    directory = tmp_path / "disk"
    directory.mkdir()

    if os.geteuid() or os.system(f"mount -t tmpfs -o size=4m none {directory} 2> /dev/null"):
        pytest.skip("only root can mount a small disk")

    yield directory
    os.system(f"umount -l {directory}")


def test_warning_of_a_full_disk_names_the_command_and_is_not_repeated(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    retention = Retention(disk, "width", list, notify=said.append)
    retention.finish()
    assert said == []

    (disk / "filler").write_bytes(b"x" * 3_900_000)

    for _ in range(2):
        retention.finish()

    (text,) = said
    assert "% of it" in text and "trials train on with the checkpoints they have" in text
    assert "`sda-ray sweep width --keep-checkpoints 3`" in text
    assert "`sda-ray sweep width --disk 50GB`" in text and "`sda-ray runs prune`" in text

    retention._warned["disk"] -= AGAIN
    retention.finish()
    assert len(said) == 2


def test_checkpoint_is_deleted_on_a_full_disk(disk: Path, runs: Path) -> None:
    path = path_of(runs, 1)
    shutil.copytree(path.directory, disk / path.directory.name)
    filler = disk / "filler"

    with open(filler, "wb", buffering=0) as f, pytest.raises(OSError, match="No space left"):
        while True:
            f.write(b"x" * 4096)

    there = RunPath(disk / path.directory.name)
    assert prune_run(there, "width") > 0
    assert not resumable(there)
    assert json.loads(there.record.read_text())["status"] == "paused"


def test_run_whose_directory_was_deleted_is_skipped(runs: Path) -> None:
    kept = Keeping(runs, keep=2)
    shutil.rmtree(path_of(runs, 4).directory)
    kept.retention.keep = 0
    kept.retention.finish()

    assert not resumable(path_of(runs, 5))


def test_examination_takes_little_time_of_the_driver(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    examined = 0

    for n in range(500):
        (runs / f"run-{n}_{n:08}").mkdir(parents=True)
        (runs / f"run-{n}_{n:08}" / "checkpoint.pth").write_bytes(b"x")

    def records() -> list[TrialRecord]:
        nonlocal examined
        examined += 1

        return [TrialRecord(n, f"{n:08}", "complete", 3, 3, {3: 1.0}) for n in range(500)]

    retention = Retention(runs, "width", records, notify=print)

    for _ in range(1000):
        retention()

    assert retention.size == 500
    assert examined <= 4


def test_checkpoints_are_deleted_without_torch(runs: Path) -> None:
    r"""Torch and a network would cost the driver hundreds of megabytes."""

    code = f"""
import sys
from pathlib import Path
from sda_ray.search.promotion import TrialRecord
from sda_ray.sweep.retention import Retention
records = [TrialRecord(4, "00000004", "complete", 3, 3, {{3: 1.0}}, attempt=1)]
Retention(Path({str(runs)!r}), "width", lambda: records, keep=0, notify=print).finish()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "deleted" in done.stdout
    assert not resumable(path_of(runs, 4))


def test_checkpoint_of_a_run_with_damaged_weights_stays(runs: Path) -> None:
    state = path_of(runs, 4).state
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 255
    state.write_bytes(content)

    with pytest.raises(UserError, match=r"state.pth is damaged"):
        prune_run(path_of(runs, 4), "width")

    assert resumable(path_of(runs, 4))
