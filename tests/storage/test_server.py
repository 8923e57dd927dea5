r"""Tests for sda_ray.storage.server: what it takes in is whole, in order, and of the newest attempt only."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sda_ray.core.lease import HEARTBEAT, Lease, LeaseGone, LeaseLost, read_holder
from sda_ray.storage.server import PULSE, FileServer, UnknownAttempt

RUN, NAME = "abcdefgh", "calm-cat-1_abcdefgh"


@pytest.fixture
def server(tmp_path: Path) -> FileServer:
    (tmp_path / "runs" / "sweeps" / "s").mkdir(parents=True)
    runs = tmp_path / "runs"

    return FileServer(
        "server", str(runs), str(tmp_path / "data"), str(runs / "sweeps" / "s" / "stop")
    )


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def begin(server: FileServer, attempt: int = 1) -> Path:
    server.open(RUN, attempt)
    server.settle(RUN, attempt, NAME)

    return server.runs / NAME


def put(server: FileServer, name: str, data: bytes, attempt: int = 1, token: str = "t") -> None:
    server.write(RUN, attempt, name, token, 0, data, sha(data))


def test_new_run_gets_the_name_that_the_trial_tells(server: FileServer) -> None:
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
    server.open(RUN, 2)

    for call in (
        lambda: put(server, "run.json", b"old", 1, "u"),
        lambda: server.append(RUN, 1, "metrics.jsonl", 0, b"old\n", sha(b"")),
        lambda: server.remove(RUN, 1, "checkpoint.prev.pth"),
        lambda: server.read(RUN, 1, "run.json", 0, 1),
        lambda: server.ping(RUN, 1, 0),
        lambda: server.open(RUN, 1),
        lambda: server.close(RUN, 1),
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
    server.open(RUN, 3)
    put(server, "run.json", b"3", 3)


def test_server_is_not_killed_by_who_takes_over_a_run(
    server: FileServer, env: dict[str, str]
) -> None:
    directory = begin(server, 1)
    program = (
        "import sys; from pathlib import Path; from sda_ray.core.lease import Lease;"
        "Lease(Path(sys.argv[1]), 'run', 2, takeover=True)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(directory / "lease.json")], env=env, check=True
    )  # it would have killed this very process
    assert (read_holder(directory / "lease.json") or {})["attempt"] == 2


def test_server_that_was_started_again_goes_on(server: FileServer) -> None:
    directory = begin(server, 3)
    put(server, "config.json", b"{}", 3)
    again = FileServer(server.name, str(server.runs), str(server.data), str(server.request))

    with pytest.raises(UnknownAttempt):
        put(again, "run.json", b"1", 3)

    with pytest.raises(LeaseLost):
        again.open(RUN, 2)

    again.open(RUN, 3)
    put(again, "run.json", b"1", 3)
    assert (directory / "run.json").read_bytes() == b"1"
    other = FileServer("another", str(server.runs), str(server.data), str(server.request))

    with pytest.raises(LeaseLost):
        other.open(RUN, 3)


def test_file_appears_whole_or_not_at_all(server: FileServer) -> None:
    directory = begin(server)
    put(server, "checkpoint.pth", b"old")
    data = os.urandom(1000)
    server.write(RUN, 1, "checkpoint.pth", "a", 0, data[:600], None)
    server.write(RUN, 1, "checkpoint.pth", "a", 0, data[:600], None)  # the answer was lost
    assert (directory / "checkpoint.pth").read_bytes() == b"old"
    server.write(RUN, 1, "checkpoint.pth", "a", 600, data[600:], sha(data))
    server.write(RUN, 1, "checkpoint.pth", "a", 600, data[600:], sha(data))
    assert (directory / "checkpoint.pth").read_bytes() == data
    assert (directory / "checkpoint.prev.pth").read_bytes() == b"old"

    with pytest.raises(ValueError, match="damaged on its way"):
        server.write(RUN, 1, "checkpoint.pth", "b", 0, data[1:], sha(data))

    server.write(RUN, 1, "checkpoint.pth", "c", 0, data[:1], None)  # given up for the next
    server.write(RUN, 1, "checkpoint.pth", "d", 0, b"new", sha(b"new"))
    assert (directory / "checkpoint.pth").read_bytes() == b"new"
    assert (directory / "checkpoint.prev.pth").read_bytes() == data
    assert list(directory.glob(".*.tmp")) == []


def test_growing_file_takes_what_comes_next_once(server: FileServer) -> None:
    file = begin(server) / "metrics.jsonl"
    one, two, three = (b'{"epoch": %d}\n' % i for i in (1, 2, 3))
    server.append(RUN, 1, file.name, 0, one, sha(b""))
    server.append(RUN, 1, file.name, 0, one, sha(b""))  # the answer was lost
    server.append(RUN, 1, file.name, len(one), two, sha(one))

    for offset, before in ((len(one) + 1, one + two), (len(one + two), one + three)):
        with pytest.raises(ValueError, match="other bytes"):
            server.append(RUN, 1, file.name, offset, three, sha(before))

    assert file.read_bytes() == one + two
    server.open(RUN, 2)
    server.append(RUN, 2, file.name, len(one + two), three, sha(one + two))
    assert file.read_bytes() == one + two + three


def test_torn_line_is_cut_off_before_an_attempt_sees_it(server: FileServer) -> None:
    directory = begin(server)
    (directory / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n{"epo')
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


def test_lease_has_a_heartbeat_as_long_as_the_trial_has(server: FileServer) -> None:
    directory = begin(server)
    attempt = server.newest[RUN]
    assert HEARTBEAT < PULSE and attempt.lease.alive()
    attempt.heard -= PULSE + 1
    assert not attempt.lease.alive()
    server.ping(RUN, 1, 0)
    assert attempt.lease.alive()
    server.close(RUN, 1)
    server.close(RUN, 1)
    assert (read_holder(directory / "lease.json") or {})["pid"] is None


def test_wish_to_stop_is_told(server: FileServer) -> None:
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
