r"""Tests for sda_ray.storage.client: runs that are trained where their files are not, over real Ray."""

import json
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

from sda_ray.core.config import Config, save_config
from sda_ray.core.errors import UserError
from sda_ray.core.files import locked
from sda_ray.data.dataset import fingerprint
from sda_ray.storage.client import KEPT, Private, fetch, find_data, leftovers, local_directory

# One process is the driver, the server's node and the trial's: what is pushed, and what is not
PROGRAM = """
import json, os, sys, time
from pathlib import Path

from sda_ray.cluster.connect import connected

root = Path(sys.argv[1])
runs, request = root / "runs", root / "runs" / "sweeps" / "s" / "stop"
request.parent.mkdir(parents=True)
os.environ["SDA_RAY_LOCAL"] = str(root / "local")
results = {}

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

with connected(cpus=1):
    import ray, torch
    from sda_ray.storage import client
    from sda_ray.storage.client import RemoteRun, shares_files
    from sda_ray.runs.checkpoint import save_checkpoint
    from sda_ray.runs.path import RunPath
    from sda_ray.core.files import append_line, write_atomic
    from sda_ray.storage.server import serve_files

    with serve_files(runs, root / "data", request) as server:
        results["sees"] = shares_files(server), shares_files(server | {"nonce": "another"})
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
        results["told"] = (there / "metrics.jsonl").read_text()
        large = os.urandom(9 * 2**20)
        write_atomic(here / "checkpoint.pth", large)
        until((there / "checkpoint.pth").exists)  # without being asked
        results["large"] = (there / "checkpoint.pth").read_bytes() == large
        write_atomic(here / "checkpoint.pth", b"newer")
        (here / "wandb" / "offline-1" / "run.wandb").open("ab").write(b"def")
        remote.flush()
        results["files"] = sorted(str(x.relative_to(there)) for x in there.rglob("*") if x.is_file())
        results["wandb"] = (there / "wandb" / "offline-1" / "run.wandb").read_text()
        results["newest"] = (there / "checkpoint.pth").read_text()

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
        results["late"], results["state"] = late, (there / "state.pth").exists()

        # The request to stop
        results["request"] = remote.stop_request()
        request.with_name("stop.1").touch()
        until(lambda: remote.stop_request() == "alone")
        request.with_name("stop.1").unlink()

        # A server that is started again; one that is gone comes last
        ray.kill(actor, no_restart=False)
        append_line(here / "metrics.jsonl", {"epoch": 60})
        save_checkpoint(RunPath(here), {"x": torch.zeros(1)}, {"epoch": 1, "step": 0})
        last = (here / "checkpoint.pth").read_bytes()
        remote.push_lines()
        remote.flush()
        results["again"] = (there / "checkpoint.pth").read_bytes() == last
        results["lines"] = (there / "metrics.jsonl").read_text().count("\\n")

        # Another attempt fences this one
        other, here_too, _ = begin("aaaaaaaa", 2)
        results["fetched"] = sorted(x.name for x in here_too.iterdir())
        write_atomic(here / "checkpoint.pth", b"zombie")
        results["fenced"] = raised(remote.flush)
        results["asked_again"] = raised(remote.stop_request)
        results["lost"] = type(remote.close()).__name__
        write_atomic(here_too / "error.txt", b"from the second attempt")
        results["closed"] = other.close(), other.close()
        results["kept"] = (there / "checkpoint.pth").read_bytes() == last
        results["error"] = (there / "error.txt").read_text()
        results["holder"] = json.loads((there / "lease.json").read_text())["pid"]
        results["left"] = list(map(str, (root / "local").glob("*/runs/*")))

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
        results["waits"] = (there / "checkpoint.pth").read_text()
        (here / "checkpoint.pth").rename(here / ".checkpoint.tmp")  # absent for a moment
        write_atomic(here / "error.txt", b"")
        until((there / "error.txt").exists)
        results["absent"] = dict(slow.notes)
        (here / ".checkpoint.tmp").rename(here / "checkpoint.pth")
        slow.flush()
        results["asked"] = (there / "checkpoint.pth").read_text()
        results["notes"] = slow.notes
        slow.close()

        # A damaged checkpoint: the one before is fetched, and stays the one before
        there = runs / "calm-cat-1_aaaaaaaa"
        write_atomic(there / "checkpoint.prev.pth", last)
        write_atomic(there / "checkpoint.pth", last[:-9])
        third, here, there = begin("aaaaaaaa", 3)
        results["damaged"] = sorted(x.name for x in here.iterdir())
        results["aside"] = (there / "checkpoint.damaged.pth").exists()
        third.close()

        # A run whose directory is deleted
        gone, here, there = begin("cccccccc", 1)
        import shutil; shutil.rmtree(there)
        write_atomic(here / "config.json", b"{}")
        results["vanished"] = raised(gone.flush)
        gone.close()

        # A server that is out of reach for long
        cut, here, there = begin("dddddddd", 1, patience=3.0)
        ray.kill(actor)
        write_atomic(here / "config.json", b"{}")
        start = time.monotonic()
        results["cut"] = raised(cut.flush), time.monotonic() - start
        cut.close()
        results["rest"] = list(map(str, (root / "local").glob("*/runs/*")))

    results["probes"] = list(map(str, request.parent.glob(".probe*")))

print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, home: Path) -> dict[str, Any]:
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


def test_node_sees_the_files_if_it_finds_the_very_probe(results: dict[str, Any]) -> None:
    assert results["sees"] == [True, False] and results["probes"] == []


def test_all_that_changes_is_pushed(results: dict[str, Any]) -> None:
    assert results["told"] == '{"epoch": 1}\n'
    assert results["large"] and results["newest"] == "newer" and results["wandb"] == "abcdef"
    assert results["files"] == [
        "checkpoint.prev.pth",
        "checkpoint.pth",
        "config.json",
        "lease.json",
        "lease.lock",
        "metrics.jsonl",
        "wandb/offline-1/run.wandb",
    ]


def test_run_on_the_head_can_be_resumed_at_any_time(results: dict[str, Any]) -> None:
    assert results["late"] == 0 and results["state"]


def test_request_to_stop_arrives(results: dict[str, Any]) -> None:
    assert results["request"] == ""


def test_server_may_be_started_again(results: dict[str, Any]) -> None:
    assert results["again"] and results["lines"] == 60


def test_later_attempt_fences_an_earlier_one(results: dict[str, Any]) -> None:
    for error in (results["fenced"], results["asked_again"]):
        assert error.startswith(
            "Disconnected: the trial was cut off from the head: run aaaaaaaa is at"
        )

    assert results["lost"] == "Disconnected"
    assert results["kept"] and results["error"] == "from the second attempt"
    assert results["closed"] == [None, None] and results["holder"] is None


def test_attempt_fetches_what_resuming_needs_and_leaves_nothing(results: dict[str, Any]) -> None:
    needed = {"config.json", "run.json", "metrics.jsonl", "checkpoint.pth"}
    assert needed <= {*results["fetched"]} and "state.pth" not in results["fetched"]
    assert results["left"] == results["rest"] == []


def test_slow_link_stretches_the_time_between_checkpoints_and_is_said(
    results: dict[str, Any],
) -> None:
    assert results["waits"] == "1"
    assert results["asked"] == "2"
    assert "MB/s: a checkpoint of" in results["notes"]["link"]


def test_absent_checkpoint_does_not_keep_other_files_from_the_head(
    results: dict[str, Any],
) -> None:
    assert "disk" not in results["absent"]


def test_damaged_checkpoint_is_set_aside_in_favour_of_the_one_before(
    results: dict[str, Any],
) -> None:
    assert "checkpoint.prev.pth" in results["damaged"] and results["aside"]


def test_deleted_run_is_reported(results: dict[str, Any]) -> None:
    assert results["vanished"].startswith("LeaseGone: ")


def test_trial_without_the_server_for_long_is_over(results: dict[str, Any]) -> None:
    error, seconds = results["cut"]
    assert (
        error.startswith("Disconnected: the trial was cut off from the head for ") and seconds < 60
    )


TRIAL = """
import json, os, sys
from pathlib import Path

from sda_ray.cluster.connect import connected
from sda_ray.core.config import load_config

root, data = Path(sys.argv[1]), Path(sys.argv[2])
os.environ["SDA_RAY_LOCAL"] = str(root / "local")
runs, request = root / "runs", root / "runs" / "sweeps" / "s" / "stop"
request.parent.mkdir(parents=True)

with connected(cpus=1):
    from sda_ray.cluster.trial import Trial
    from sda_ray.data.dataset import fingerprint
    from sda_ray.storage.server import serve_files

    with serve_files(runs, data, request) as server:
        spec = {
            "runs": str(runs), "data": str(data), "config": load_config(root / "config.json"),
            "run_id": "aaaa0000", "index": 0, "rungs": [1, 2], "cpus": 1,
            "record": {"data": fingerprint(data)}, "wandb": {"mode": "disabled"},
            "request": str(request), "server": server | {"nonce": "another"},
        }
        first = Trial(spec | {"attempt": 1})
        first.train()  # tells where it runs
        event = first.train()["event"]
        (directory,) = runs.glob("*_aaaa0000")
        lines = (directory / "metrics.jsonl").read_text().count("\\n")
        checkpoint = (directory / "checkpoint.pth").exists()
        first.close("paused")
        paused = json.loads((directory / "run.json").read_text())["status"]
        second = Trial(spec | {"attempt": 2})

        while (result := second.train())["event"] == "running":
            pass

    print(json.dumps({
        "first": [event, lines, checkpoint, paused],
        "second": [result["event"], json.loads((directory / "run.json").read_text())["status"]],
        "files": sorted(x.name for x in directory.iterdir() if x.is_file()),
        "left": list(map(str, (root / "local").glob("*/runs/*"))),
    }))
"""


def test_trial_without_the_files_is_resumed_from_the_head(
    tmp_path: Path, data: Path, small: Config, home: Path
) -> None:
    save_config(small, tmp_path / "config.json")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, str(tmp_path), str(data)],
        env=env | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])

    assert results["first"] == ["running", 1, True, "paused"]
    assert results["second"] == ["complete", "finished"]
    assert {"state.pth", "samples.png", "metrics.jsonl"} <= {*results["files"]}
    assert "checkpoint.prev.pth" not in results["files"] and results["left"] == []


HOLD = """
import os, sys
from sda_ray.storage.client import Private
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
