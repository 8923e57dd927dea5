r"""Tests for `sda-ray attach` and `--detach`, and for studies that are only read."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Start
from recorded_code import SCRIPT

from sda_ray.core.lease import Lease, LeaseLost, read_holder
from sda_ray.search.study import Study

LONG = SCRIPT.replace('"epochs": 27', '"epochs": 100000').replace("trials=4", "trials=2")


def wait(what: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds

    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)

    return found


def test_study_is_read_without_touching_it(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    lease = Lease(tmp_path / "lease.json", "a test")
    study = Study(file, "x", lease)

    with open(file, "ab") as f:
        f.write(b'{"torn')

    (tmp_path / "study.journal.lock").touch()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    reader = Study(file, "x", None)

    assert reader.records() == []

    with pytest.raises(LeaseLost, match="was opened for reading only"):
        reader.enqueue({"seed": 1})

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    os.truncate(file, file.stat().st_size - len(b'{"torn'))
    study.enqueue({"seed": 2})
    lease.release()

    assert list(reader.queue().values()) == [{"seed": 2}]  # what is written later is seen


def test_unknown_sweep_is_not_attached(cli_here: Cli, tmp_path: Path) -> None:
    done = cli_here("attach", "tiny")

    assert done.returncode == 2 and "there is no sweep 'tiny'" in done.stderr


def test_mistakes_are_reported_before_anything_is_detached(cli_here: Cli, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(SCRIPT.replace('"window": 3', '"window": 4'))
    done = cli_here("sweep", "tiny.py", "--detach")

    assert done.returncode == 2 and "window" in done.stderr
    assert not (tmp_path / "runs" / "sweeps" / "tiny" / "detached.log").exists()


def test_detached_sweep_outlives_its_starter_and_viewers(
    cli: Cli, cli_here: Cli, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "tiny.py").write_text(LONG)
    directory = tmp_path / "runs" / "sweeps" / "tiny"
    done = cli("sweep", "tiny.py", "--detach", timeout=240)

    assert done.returncode == 0, done.stderr
    assert "in the background" in done.stdout and "sda-ray attach tiny" in done.stdout

    found = read_holder(directory / "lease.json")
    assert found is not None

    try:
        assert os.getsid(found["pid"]) == found["pid"] != os.getsid(0)
        wait(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")))

        watcher = start("attach", "tiny")
        assert watcher.stdout is not None
        lines = [watcher.stdout.readline() for _ in range(3)]
        assert f"driven by process {found['pid']}" in "".join(lines), lines
        watcher.send_signal(signal.SIGINT)
        out, error = watcher.communicate(timeout=60)

        assert watcher.returncode == 0 and "Sweep 'tiny' keeps running" in out, (out, error)
        assert read_holder(directory / "lease.json") == found

        # Two at a time: one sees how it ends
        watcher = start("attach", "tiny")
        assert watcher.stdout is not None
        assert "root" in watcher.stdout.readline() and "driven" in watcher.stdout.readline()
        done = cli_here("stop", "tiny")

        assert done.returncode == 0, done.stderr

        out, error = watcher.communicate(timeout=120)

        assert watcher.returncode == 0, error
        assert "Leaderboard of tiny" in out and "`sda-ray sweep tiny` carries them on" in out
    finally:
        wait(lambda: (read_holder(directory / "lease.json") or {}).get("pid") is None)

    assert "Nothing is lost" in (directory / "detached.log").read_text()

    done = cli_here("attach", "tiny")

    assert done.returncode == 0 and "sweep 'tiny' does not run" in done.stdout
    assert "carries them on" in done.stdout


def test_detached_sweep_that_ends_at_once_shows_its_output(
    cli: Cli, env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tiny.py").write_text(SCRIPT)
    directory = tmp_path / "runs" / "sweeps" / "tiny"
    directory.mkdir(parents=True)
    lease = Lease(directory / "lease.json", "sweep 'tiny'")

    try:
        done = cli("sweep", "tiny.py", "--detach")
    finally:
        lease.release()

    assert done.returncode == 2 and "is in use by process" in done.stdout
    assert "runs in the background" not in done.stdout
