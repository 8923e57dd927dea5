r"""Tests for sda_ray.cluster.join: machines that come to a sweep, and go again."""

import json
import re
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sda_ray.cluster import join
from sda_ray.cluster.join import (
    _await_head,
    announced,
    find_token,
    is_requeued,
    join_sweep,
    read_head,
    stay,
)
from sda_ray.cluster.ray_node import RayNode
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease, this_process
from sda_ray.runs.path import sweep_directory
from sda_ray.sweep.record import write_sweep

SWEEP = """
from sda_ray import CONFIG, Sweep, loguniform, main

space = {"weight_decay": loguniform(1e-4, 1e-2)}
sweep = Sweep("shared", CONFIG, space, trials=2, pruner="none")

if __name__ == "__main__":
    main(sweep)
"""

# The command line, on a machine that has a single CPU
ONE = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from sda_ray.cli.main import main
main()
"""


def take(directory: Path, **options: Any) -> Lease:
    return Lease(directory / "lease.json", "the sweep", **options)


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_sweep_is_found_for_as_long_as_it_runs(tmp_path: Path) -> None:
    lease = take(tmp_path)
    assert read_head(tmp_path) is None

    with announced(tmp_path, lease, "10.0.0.1:1234", "secret"):
        head = read_head(tmp_path)
        assert head is not None
        assert (head["host"], head["address"]) == (socket.gethostname(), "10.0.0.1:1234")
        assert head["attempt"] == 1
        assert find_token(tmp_path) == "secret"
        assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600

    assert read_head(tmp_path) is None
    assert find_token(tmp_path) is None
    lease.release()


def test_driver_that_has_ended_is_not_announced(tmp_path: Path) -> None:
    lease = take(tmp_path)

    with announced(tmp_path, lease, "10.0.0.1:1234", None):
        lease.release()
        assert read_head(tmp_path) is None


def test_token_of_a_ray_that_is_not_the_sweeps_is_not_told(tmp_path: Path) -> None:
    lease = take(tmp_path)

    with announced(tmp_path, lease, "10.0.0.1:1234", "secret"):
        pass

    with announced(tmp_path, lease, "10.0.0.1:1234", None):
        assert find_token(tmp_path) is None

    lease.release()


def test_driver_that_was_taken_over_changes_nothing_when_it_comes_back(tmp_path: Path) -> None:
    old = take(tmp_path)

    with announced(tmp_path, old, "10.0.0.1:1", "old"):
        new = take(tmp_path, takeover=True)
        assert old.is_lost() and not new.is_lost()

        with announced(tmp_path, new, "10.0.0.2:2", "new"):
            before = content(tmp_path)
            old.release()
            assert content(tmp_path) == before
            block = announced(tmp_path, old, "10.0.0.1:1", "old")

            with pytest.raises(RuntimeError, match="was released"), block:
                pass

            assert content(tmp_path) == before

    old.release()
    new.release()


def test_token_that_others_could_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o640)

    with pytest.raises(UserError, match="can be read by others"):
        find_token(tmp_path)

    (tmp_path / "token").rename(tmp_path / "other")
    (tmp_path / "token").symlink_to(tmp_path / "other")

    with pytest.raises(UserError, match="cannot be read"):
        find_token(tmp_path)


def test_job_knows_its_own_sweep_again_and_no_other(tmp_path: Path) -> None:
    assert not is_requeued(tmp_path, "7")

    lease = take(tmp_path)
    lease.note(job="7")
    lease.release()

    assert is_requeued(tmp_path, "7")
    assert not is_requeued(tmp_path, "8")
    assert not is_requeued(tmp_path, None)

    take(tmp_path).release()  # somebody else has driven it since

    assert not is_requeued(tmp_path, "7")


def test_machine_is_told_when_there_is_nothing_to_join(cli_here: Any, tmp_path: Path) -> None:
    done = cli_here("join", "shared")
    assert done.returncode == 2 and "there is no sweep 'shared'" in done.stderr

    keys = ("name", "trials", "definition", "fingerprint", "options")
    directory = sweep_directory(tmp_path, "shared")
    directory.mkdir(parents=True)
    write_sweep(directory, {key: {} for key in keys}, None)

    with pytest.raises(UserError, match="sweep 'shared' is not running"):
        join_sweep(directory)

    with pytest.raises(UserError, match="--cpus is 0, but must be at least 1"):
        join_sweep(directory, cpus=0)

    with pytest.raises(UserError, match="--gpus is -1, but must be at least 0"):
        join_sweep(directory, gpus=-1)


def test_who_waits_passes_over_an_address_where_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sda_ray.cluster.join.POLL", 0.1)
    directory = sweep_directory(tmp_path, "shared")
    directory.mkdir(parents=True)
    gone, here = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    stale, living = (f"127.0.0.1:{x.getsockname()[1]}" for x in (gone, here))
    gone.close()
    old = take(directory)

    # The lease of a driver whose machine was lost still has its address
    with ThreadPoolExecutor() as pool, here, announced(directory, old, stale, None):
        waiting = pool.submit(_await_head, directory, 0, 60.0, lambda: "")
        time.sleep(1)
        assert not waiting.done()

        new = take(directory, takeover=True)

        with announced(directory, new, living, None):
            head = waiting.result(timeout=30)

    assert head is not None and (head["address"], head["attempt"]) == (living, 2)
    said = f"No answer from {stale}, where sweep 'shared' ran last: waiting.\n"
    assert capsys.readouterr().out == said
    old.release()
    new.release()


def test_ray_that_only_its_own_host_reaches_is_not_waited_for(tmp_path: Path) -> None:
    directory = sweep_directory(tmp_path, "shared")
    directory.mkdir(parents=True)
    elsewhere = this_process(1) | {"host": "elsewhere", "notes": {"address": "127.0.0.1:1"}}
    (directory / "lease.json").write_text(json.dumps(elsewhere))

    with pytest.raises(UserError, match=r"runs on elsewhere, whose Ray listens on 127\.0\.0\.1"):
        join_sweep(directory, wait=0.05)


def test_node_leaves_a_head_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r"""Without its power, the head's machine does not close its connections either."""

    monkeypatch.setattr(join, "PROBE", 0.1)
    monkeypatch.setattr(join, "SILENT", 1.0)
    head = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{head.getsockname()[1]}"

    with ThreadPoolExecutor(1) as pool, subprocess.Popen(["sleep", "60"]) as process:
        why = pool.submit(stay, RayNode(process, tmp_path, address, 1, 0), lambda: "")
        time.sleep(2.0)
        assert not why.done()

        head.close()
        assert why.result(10) == f"the sweep's head at {address} does not answer"
        assert process.poll() is None  # so Ray has not noticed
        process.kill()


def test_node_whose_directory_was_cleaned_leaves_all_the_same(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        RayNode(process, tmp_path / "gone", "127.0.0.1:1", 1, 0).leave()
        assert process.poll() == -signal.SIGTERM


def wait(condition: Callable[[], Any], *processes: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300

    while not condition():
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.2)


def test_machine_that_joins_takes_trials_and_leaves_without_loss(
    start: Any, settings: list[str], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "shared.py").write_text(SWEEP)
    with tempfile.TemporaryDirectory(prefix="sda-", dir="/tmp") as short:
        words = ["sweep", f"--data={data}", "shared.py", *settings, "epochs=100000"]
        sweep = start(*words, program=ONE, TMPDIR=short)
        running = lambda: len(list(tmp_path.glob("runs/*/metrics.jsonl")))  # noqa: E731
        wait(lambda: running() == 1, sweep)

        # The machine of the driver has room for one
        other = start("join", "shared", "--cpus=1", TMPDIR=short)
        wait(lambda: running() == 2, sweep, other)

        other.send_signal(signal.SIGTERM)
        said, trouble = other.communicate(timeout=150)
        assert other.returncode == 0, trouble
        assert "joined sweep 'shared'" in said
        assert "trials here save a checkpoint first" in said

        sweep.send_signal(signal.SIGTERM)
        said, trouble = sweep.communicate(timeout=150)
        assert sweep.returncode == 143, trouble

    assert "leaves the cluster: its trials resume elsewhere" in " ".join((said + trouble).split())
    assert not re.search(r"run \d+ \w+ is lost", said)
    assert len(list(tmp_path.glob("runs/*/checkpoint.pth"))) == 2
    assert " interrupted: epoch" in said
    assert read_head(tmp_path / "runs/sweeps/shared") is None
