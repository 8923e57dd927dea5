r"""Tests for sda_ray.storage.client: runs that are trained where their files are not, over real Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One process is the driver, the server's node and the trial's: what is handed over, and what is not
PROGRAM = """
import json, os, sys, time
from pathlib import Path

from sda_ray.cluster.connect import connect

root = Path(sys.argv[1])
runs, request = root / "runs", root / "runs" / "sweeps" / "s" / "stop"
request.parent.mkdir(parents=True)
os.environ["SDA_RAY_LOCAL"] = str(root / "local")
said = {}

def until(done):
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)

def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def begin(run_id, attempt, **more):
    remote = RemoteRun(server, run_id, attempt, 1, **more)
    remote.open()
    directory = remote.runs / f"calm-cat-1_{run_id}"
    directory.mkdir(exist_ok=True)
    remote.watch(RunPath(directory))
    return remote, directory, runs / directory.name

with connect(cpus=1):
    import ray, torch
    from sda_ray.storage import client
    from sda_ray.storage.client import RemoteRun, shares_files
    from sda_ray.runs.checkpoint import save_checkpoint
    from sda_ray.runs.path import RunPath
    from sda_ray.core.files import append_line, write_atomic
    from sda_ray.storage.server import serve_files

    with serve_files(runs, root / "data", request) as server:
        said["sees"] = shares_files(server), shares_files(server | {"nonce": "another"})
        actor = ray.get_actor(server["actor"], server["namespace"])

        # All that changes arrives, and nothing that is aside
        remote, here, there = begin("aaaaaaaa", 1)
        write_atomic(here / "config.json", b"{}")
        (here / ".config.json.0123.tmp").write_bytes(b"half")
        (here / "wandb" / "offline-1").mkdir(parents=True)
        (here / "wandb" / "offline-1" / "run.wandb").write_bytes(b"abc")
        (here / "wandb" / "latest").symlink_to("offline-1")
        append_line(here / "metrics.jsonl", {"epoch": 1})
        remote.push_lines()
        said["told"] = (there / "metrics.jsonl").read_text()
        large = os.urandom(9 * 2**20)
        write_atomic(here / "checkpoint.pth", large)
        until((there / "checkpoint.pth").exists)  # without being asked
        said["large"] = (there / "checkpoint.pth").read_bytes() == large
        write_atomic(here / "checkpoint.pth", b"newer")
        (here / "wandb" / "offline-1" / "run.wandb").open("ab").write(b"def")
        remote.flush()
        said["files"] = sorted(str(x.relative_to(there)) for x in there.rglob("*") if x.is_file())
        said["wandb"] = (there / "wandb" / "offline-1" / "run.wandb").read_text()
        said["newest"] = (there / "checkpoint.pth").read_text()

        # The order: a reader finds the lines of each checkpoint, and the weights of `finished`
        late = 0
        for i in range(2, 60):
            append_line(here / "metrics.jsonl", {"epoch": i})
            write_atomic(here / "checkpoint.pth", str(i).encode())
            seen = (there / "checkpoint.pth").read_text()
            lines = (there / "metrics.jsonl").read_text().count("\\n")
            late += seen != "newer" and lines < int(seen)
            time.sleep(0.05)
        write_atomic(here / "state.pth", b"weights")
        write_atomic(here / "run.json", b"finished")
        until((there / "run.json").exists)
        said["late"], said["state"] = late, (there / "state.pth").exists()

        # The wish to stop
        said["wish"] = remote.stop_request()
        request.with_name("stop.1").touch()
        until(lambda: remote.stop_request() == "alone")
        request.with_name("stop.1").unlink()

        # A server that is started again; one that is gone for good comes last
        ray.kill(actor, no_restart=False)
        append_line(here / "metrics.jsonl", {"epoch": 60})
        save_checkpoint(RunPath(here), {"x": torch.zeros(1)}, {"epoch": 1, "step": 0})
        last = (here / "checkpoint.pth").read_bytes()
        remote.push_lines()
        remote.flush()
        said["again"] = (there / "checkpoint.pth").read_bytes() == last
        said["lines"] = (there / "metrics.jsonl").read_text().count("\\n")

        # Another attempt fences this one
        other, here_too, _ = begin("aaaaaaaa", 2)
        said["fetched"] = sorted(x.name for x in here_too.iterdir())
        write_atomic(here / "checkpoint.pth", b"zombie")
        said["fenced"] = raised(remote.flush)
        said["wished"] = raised(remote.stop_request)
        said["lost"] = type(remote.close()).__name__
        write_atomic(here_too / "error.txt", b"from the second attempt")
        said["closed"] = other.close(), other.close()
        said["kept"] = (there / "checkpoint.pth").read_bytes() == last
        said["error"] = (there / "error.txt").read_text()
        said["holder"] = json.loads((there / "lease.json").read_text())["pid"]
        said["left"] = list(map(str, (root / "local").glob("*/runs/*")))

        # A slow link: checkpoints come less often, unless they are asked for
        client.CHECKPOINT_SECONDS = 1.0
        slow, here, there = begin("bbbbbbbb", 1)
        class Slow:
            def __init__(self, link): self.link = link
            def __call__(self, *args, **more):
                time.sleep(2.0 if args[:2] == ("write", "checkpoint.pth") else 0)
                return self.link(*args, **more)
        slow.head.connection = Slow(slow.connection)
        write_atomic(here / "checkpoint.pth", b"1")
        until((there / "checkpoint.pth").exists)
        write_atomic(here / "checkpoint.pth", b"2")
        write_atomic(here / "config.json", b"{}")
        until((there / "config.json").exists)
        said["waits"] = (there / "checkpoint.pth").read_text()
        (here / "checkpoint.pth").rename(here / ".checkpoint.tmp")  # absent for a moment
        write_atomic(here / "error.txt", b"")
        until((there / "error.txt").exists)
        said["absent"] = dict(slow.notes)
        (here / ".checkpoint.tmp").rename(here / "checkpoint.pth")
        slow.flush()
        said["asked"] = (there / "checkpoint.pth").read_text()
        said["notes"] = slow.notes
        slow.close()

        # A damaged checkpoint: the one before is fetched, and stays the one before
        there = runs / "calm-cat-1_aaaaaaaa"
        write_atomic(there / "checkpoint.prev.pth", last)
        write_atomic(there / "checkpoint.pth", last[:-9])
        third, here, there = begin("aaaaaaaa", 3)
        said["damaged"] = sorted(x.name for x in here.iterdir())
        said["aside"] = (there / "checkpoint.damaged.pth").exists()
        third.close()

        # A run whose directory is deleted
        gone, here, there = begin("cccccccc", 1)
        import shutil; shutil.rmtree(there)
        write_atomic(here / "config.json", b"{}")
        said["vanished"] = raised(gone.flush)
        gone.close()

        # A server that is out of reach for long
        cut, here, there = begin("dddddddd", 1, patience=3.0)
        ray.kill(actor)
        write_atomic(here / "config.json", b"{}")
        start = time.monotonic()
        said["cut"] = raised(cut.flush), time.monotonic() - start
        cut.close()
        said["rest"] = list(map(str, (root / "local").glob("*/runs/*")))

    said["probes"] = list(map(str, request.parent.glob(".probe*")))

print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, home: Path) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("remote")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)],
        env=env | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr

    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_node_sees_the_files_if_it_finds_the_very_probe(said: dict[str, Any]) -> None:
    assert said["sees"] == [True, False] and said["probes"] == []


def test_all_that_changes_is_handed_over(said: dict[str, Any]) -> None:
    assert said["told"] == '{"epoch": 1}\n'
    assert said["large"] and said["newest"] == "newer" and said["wandb"] == "abcdef"
    assert said["files"] == [
        "checkpoint.prev.pth",
        "checkpoint.pth",
        "config.json",
        "lease.json",
        "lease.lock",
        "metrics.jsonl",
        "wandb/offline-1/run.wandb",
    ]


def test_what_the_server_has_can_be_gone_on_with_at_any_time(said: dict[str, Any]) -> None:
    assert said["late"] == 0 and said["state"]


def test_wish_to_stop_arrives(said: dict[str, Any]) -> None:
    assert said["wish"] == ""


def test_server_may_be_started_again(said: dict[str, Any]) -> None:
    assert said["again"] and said["lines"] == 60


def test_later_attempt_fences_an_earlier_one(said: dict[str, Any]) -> None:
    for error in (said["fenced"], said["wished"]):
        assert error.startswith(
            "Disconnected: the trial was cut off from the head: run aaaaaaaa is at"
        )

    assert said["lost"] == "Disconnected"
    assert said["kept"] and said["error"] == "from the second attempt"
    assert said["closed"] == [None, None] and said["holder"] is None


def test_attempt_has_what_going_on_needs_and_leaves_nothing(said: dict[str, Any]) -> None:
    needed = {"config.json", "run.json", "metrics.jsonl", "checkpoint.pth"}
    assert needed <= {*said["fetched"]} and "state.pth" not in said["fetched"]
    assert said["left"] == said["rest"] == []


def test_slow_link_stretches_the_time_between_checkpoints_and_is_said(
    said: dict[str, Any],
) -> None:
    assert said["waits"] == "1"
    assert said["asked"] == "2"
    assert "MB/s: a checkpoint of" in said["notes"]["link"]


def test_absent_checkpoint_does_not_keep_other_files_from_the_head(said: dict[str, Any]) -> None:
    assert "disk" not in said["absent"]


def test_damaged_checkpoint_is_set_aside_in_favour_of_the_one_before(said: dict[str, Any]) -> None:
    assert "checkpoint.prev.pth" in said["damaged"] and said["aside"]


def test_run_that_is_deleted_is_told_so(said: dict[str, Any]) -> None:
    assert said["vanished"].startswith("LeaseGone: ")


def test_trial_without_the_server_for_long_is_over(said: dict[str, Any]) -> None:
    error, seconds = said["cut"]
    assert (
        error.startswith("Disconnected: the trial was cut off from the head for ") and seconds < 60
    )
