r"""Tests for sda_ray.storage.server: what it takes in is whole, in order, and of the newest attempt only."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sda_ray.core.lease import (
    Conflict,
    Lease,
    LeaseGone,
    LeaseLost,
    last_heartbeat,
    read_holder,
)
from sda_ray.storage.client import RemoteLease
from sda_ray.storage.server import FileServer

RUN, NAME = "abcdefgh", "calm-cat-1_abcdefgh"


@pytest.fixture
def server(tmp_path: Path) -> FileServer:
    (tmp_path / "runs" / "sweeps" / "s").mkdir(parents=True)
    runs = tmp_path / "runs"

    return FileServer(str(runs), str(tmp_path / "data"), str(runs / "sweeps" / "s" / "stop"))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Calls:
    r"""A connection to a server in this process."""

    run_id = RUN

    def __init__(self, server: FileServer) -> None:
        self.server = server

    def ask(self, method: str, *args: Any, group: str) -> Any:
        return getattr(self.server, method)(*args)


def take(server: FileServer, attempt: int) -> Lease:
    server.prepare(RUN)

    return Lease(RemoteLease(Calls(server)), "the run", attempt, takeover=True)  # type: ignore[arg-type]


def begin(server: FileServer, attempt: int = 1) -> Path:
    take(server, attempt)
    server.open(RUN, attempt)
    server.settle(RUN, attempt, NAME)

    return server.runs / NAME


def put(server: FileServer, name: str, data: bytes, attempt: int = 1) -> None:
    server.write(RUN, attempt, name, 0, data, sha(data))


def test_new_run_gets_the_name_that_the_trial_chooses(server: FileServer) -> None:
    take(server, 1)
    assert server.open(RUN, 1) == {"name": "", "sizes": {}}
    assert [x.name for x in server.runs.iterdir() if x.name != "sweeps"] == [f".{RUN}"]
    server.settle(RUN, 1, NAME)
    server.settle(RUN, 1, NAME)
    put(server, "config.json", b"{}")
    assert (server.runs / NAME / "config.json").read_bytes() == b"{}"
    assert server.open(RUN, 1) == {"name": NAME, "sizes": {"config.json": 2}}

    for name in ("../x_abcdefgh", f".x_{RUN}", "calm-cat-1_zzzzzzzz", f"a/b_{RUN}"):
        with pytest.raises(ValueError, match="no name"):
            server.settle(RUN, 1, name)


def test_older_attempt_is_refused_by_all_that_writes(server: FileServer) -> None:
    directory = begin(server, 1)
    put(server, "run.json", b"1")
    take(server, 2)

    for call in (
        lambda: put(server, "run.json", b"old", 1),
        lambda: server.append(RUN, 1, "metrics.jsonl", 0, b"old\n"),
        lambda: server.remove(RUN, 1, "checkpoint.prev.pth"),
        lambda: server.read(RUN, 1, "run.json", 0, 1),
        lambda: server.ping(RUN, 1, 0),
        lambda: server.open(RUN, 1),
        lambda: take(server, 1),
    ):
        with pytest.raises(LeaseLost):
            call()

    assert sorted(x.name for x in directory.iterdir()) == ["lease.json", "lease.lock", "run.json"]
    assert (directory / "run.json").read_bytes() == b"1"
    put(server, "run.json", b"2", 2)
    assert (directory / "run.json").read_bytes() == b"2"


def test_attempt_that_sees_the_files_itself_fences_one_through_the_server(
    server: FileServer,
) -> None:
    directory = begin(server, 1)
    lease = Lease(directory / "lease.json", "run", attempt=2, takeover=True)

    with pytest.raises(LeaseLost):
        put(server, "run.json", b"old")

    assert not (directory / "run.json").exists()
    lease.release()
    take(server, 3)
    put(server, "run.json", b"3", 3)


def test_restarted_server_serves_open_attempts(server: FileServer) -> None:
    directory = begin(server, 3)
    put(server, "config.json", b"{}", 3)
    again = FileServer(str(server.runs), str(server.data), str(server.request))

    with pytest.raises(LeaseLost):
        again.open(RUN, 2)

    assert again.ping(RUN, 3, 0) == ""
    put(again, "run.json", b"1", 3)
    assert (directory / "run.json").read_bytes() == b"1"


def test_file_appears_whole_or_not_at_all(server: FileServer) -> None:
    directory = begin(server)
    put(server, "checkpoint.pth", b"old")
    data = os.urandom(1000)
    server.write(RUN, 1, "checkpoint.pth", 0, data[:600], None)
    server.write(RUN, 1, "checkpoint.pth", 0, data[:600], None)  # the answer was lost
    assert (directory / "checkpoint.pth").read_bytes() == b"old"
    server.write(RUN, 1, "checkpoint.pth", 600, data[600:], sha(data))
    server.write(RUN, 1, "checkpoint.pth", 600, data[600:], sha(data))
    assert (directory / "checkpoint.pth").read_bytes() == data
    assert (directory / "checkpoint.prev.pth").read_bytes() == b"old"

    with pytest.raises(ValueError, match="damaged on its way"):
        server.write(RUN, 1, "checkpoint.pth", 0, data, sha(data[1:]))

    server.write(RUN, 1, "checkpoint.pth", 0, data[:10], None)  # given up for the next
    server.write(RUN, 1, "checkpoint.pth", 0, b"new", sha(b"new"))
    assert (directory / "checkpoint.pth").read_bytes() == b"new"
    assert (directory / "checkpoint.prev.pth").read_bytes() == data
    assert list(directory.glob(".*.tmp")) == []


def test_growing_file_takes_what_comes_next_once(server: FileServer) -> None:
    file = begin(server) / "metrics.jsonl"
    one, two, three = (b'{"epoch": %d}\n' % i for i in (1, 2, 3))
    server.append(RUN, 1, file.name, 0, one)
    server.append(RUN, 1, file.name, 0, one)  # the answer was lost
    server.append(RUN, 1, file.name, len(one), two)

    for offset, data in ((len(one) + 1, two), (len(one + two) + 1, three), (len(one), three)):
        with pytest.raises(ValueError, match="other bytes"):
            server.append(RUN, 1, file.name, offset, data)

    assert file.read_bytes() == one + two
    take(server, 2)
    server.append(RUN, 2, file.name, len(one + two), three)
    assert file.read_bytes() == one + two + three


def test_torn_line_is_cut_off_before_an_attempt_sees_it(server: FileServer) -> None:
    directory = begin(server)
    (directory / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n{"epo')
    take(server, 2)
    assert server.open(RUN, 2)["sizes"]["metrics.jsonl"] == 13


def test_nothing_is_written_or_read_outside_of_a_run(server: FileServer, tmp_path: Path) -> None:
    directory = begin(server)
    (directory / "wandb").symlink_to(tmp_path)

    for name in ("../x", "/x", "a/b", "lease.json", ".x", "wandb/../../x", "wandb/x", ""):
        with pytest.raises((ValueError, OSError)):
            put(server, name, b"x")

        with pytest.raises(ValueError):
            server.read(RUN, 1, name, 0, 1)

    with pytest.raises(ValueError):
        server.open("../../..", 1)

    with pytest.raises(ValueError):
        server.read_data("../data/test.h5", 0, 1)


def test_run_that_is_deleted_is_not_made_again(server: FileServer) -> None:
    directory = begin(server)

    for file in directory.iterdir():
        file.unlink()

    directory.rmdir()

    with pytest.raises((LeaseGone, OSError)):
        put(server, "run.json", b"1")

    assert not directory.exists()


def test_lease_on_the_head_has_the_heartbeat_of_the_trial(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sda_ray.core.lease.HEARTBEAT", 0.1)
    lease = take(server, 1)
    server.settle(RUN, 1, NAME)
    file = server.runs / NAME / "lease.json"
    before, deadline = last_heartbeat(file), time.monotonic() + 60

    while last_heartbeat(file) == before:
        assert time.monotonic() < deadline

    assert (read_holder(file) or {})["pid"] == os.getpid()
    lease.release()
    assert (read_holder(file) or {})["pid"] is None

    with pytest.raises(LeaseLost):
        put(server, "run.json", b"late")


def test_lease_on_the_head_is_changed_at_its_version_alone(server: FileServer) -> None:
    server.prepare(RUN)
    version = server.write_lease(RUN, b"one", None)
    assert server.write_lease(RUN, b"one", None) == version  # the answer was lost
    assert server.read_lease(RUN) == (b"one", version)

    for wrong in (None, version - 1):
        with pytest.raises(Conflict):
            server.write_lease(RUN, b"two", wrong)

    assert server.read_lease(RUN) == (b"one", version)


def test_stop_request_arrives(server: FileServer) -> None:
    begin(server)
    assert server.ping(RUN, 1, 7) == ""

    for file, number, wish in ((f"{server.request}.7", 7, "alone"), (server.request, 8, "all")):
        Path(file).touch()
        deadline = time.monotonic() + 60

        while server.ping(RUN, 1, number) != wish:
            assert time.monotonic() < deadline


def test_stacks_of_a_process_that_hung_are_kept_as_noticed(server: FileServer) -> None:
    from sda_ray.training.watchdog import take_stacks

    directory = begin(server)
    server.keep_stacks(RUN, 1, "Thread 0x1:\n  File x\n")
    assert "File x" in (directory / "stacks.txt").read_text()
    assert not take_stacks(directory / "stacks.txt", 2)
