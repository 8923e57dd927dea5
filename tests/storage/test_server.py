r"""Tests for sda_ray.storage.server: what it takes in is whole, in order, and of the newest attempt only."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sda_ray.core.holder import holder
from sda_ray.core.lease import HEARTBEAT, Lease, LeaseLost
from sda_ray.core.presence import Vanished
from sda_ray.storage.attempts import PULSE, Unknown
from sda_ray.storage.server import Depot

RUN, NAME = "abcdefgh", "calm-cat-1_abcdefgh"


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    (tmp_path / "runs" / "sweeps" / "s").mkdir(parents=True)
    runs = tmp_path / "runs"

    return Depot("depot", str(runs), str(tmp_path / "data"), str(runs / "sweeps" / "s" / "stop"))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def begin(depot: Depot, attempt: int = 1) -> Path:
    depot.open(RUN, attempt)
    depot.settle(RUN, attempt, NAME)

    return depot.runs / NAME


def put(depot: Depot, name: str, data: bytes, attempt: int = 1, token: str = "t") -> None:
    depot.write(RUN, attempt, name, token, 0, data, sha(data))


def test_new_run_gets_the_name_that_the_trial_tells(depot: Depot) -> None:
    assert depot.open(RUN, 1) == {"named": "", "sizes": {}}
    assert [x.name for x in depot.runs.iterdir() if x.name != "sweeps"] == [f".{RUN}"]
    depot.settle(RUN, 1, NAME)
    depot.settle(RUN, 1, NAME)
    put(depot, "config.json", b"{}")
    assert (depot.runs / NAME / "config.json").read_bytes() == b"{}"
    assert depot.open(RUN, 1) == {"named": NAME, "sizes": {"config.json": 2}}

    for name in ("../x_abcdefgh", f".x_{RUN}", "calm-cat-1_zzzzzzzz", f"a/b_{RUN}"):
        with pytest.raises(ValueError, match="no name"):
            depot.settle(RUN, 1, name)


def test_older_attempt_is_refused_by_all_that_writes(depot: Depot) -> None:
    directory = begin(depot, 1)
    put(depot, "run.json", b"1")
    depot.open(RUN, 2)

    for call in (
        lambda: put(depot, "run.json", b"old", 1, "u"),
        lambda: depot.append(RUN, 1, "metrics.jsonl", 0, b"old\n", sha(b"")),
        lambda: depot.remove(RUN, 1, "checkpoint.prev.pth"),
        lambda: depot.read(RUN, 1, "run.json", 0, 1),
        lambda: depot.ping(RUN, 1, 0),
        lambda: depot.open(RUN, 1),
        lambda: depot.close(RUN, 1),
    ):
        with pytest.raises(LeaseLost):
            call()

    assert sorted(x.name for x in directory.iterdir()) == ["lease.json", "lease.lock", "run.json"]
    assert (directory / "run.json").read_bytes() == b"1"
    put(depot, "run.json", b"2", 2)
    assert (directory / "run.json").read_bytes() == b"2"


def test_attempt_that_sees_the_files_itself_fences_one_through_the_depot(depot: Depot) -> None:
    directory = begin(depot, 1)
    lease = Lease(directory / "lease.json", "run", attempt=2, takeover=True)

    with pytest.raises(LeaseLost):
        put(depot, "run.json", b"old")

    assert not (directory / "run.json").exists()
    lease.release()
    depot.open(RUN, 3)
    put(depot, "run.json", b"3", 3)


def test_depot_is_not_killed_by_who_takes_over_a_run(depot: Depot, env: dict[str, str]) -> None:
    directory = begin(depot, 1)
    program = (
        "import sys; from pathlib import Path; from sda_ray.core.lease import Lease;"
        "Lease(Path(sys.argv[1]), 'run', 2, takeover=True)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(directory / "lease.json")], env=env, check=True
    )  # it would have killed this very process
    assert (holder(directory / "lease.json") or {})["attempt"] == 2


def test_depot_that_was_started_again_goes_on(depot: Depot) -> None:
    directory = begin(depot, 3)
    put(depot, "config.json", b"{}", 3)
    again = Depot(depot.name, str(depot.runs), str(depot.data), str(depot.request))

    with pytest.raises(Unknown):
        put(again, "run.json", b"1", 3)

    with pytest.raises(LeaseLost):
        again.open(RUN, 2)

    again.open(RUN, 3)
    put(again, "run.json", b"1", 3)
    assert (directory / "run.json").read_bytes() == b"1"
    other = Depot("another", str(depot.runs), str(depot.data), str(depot.request))

    with pytest.raises(LeaseLost):
        other.open(RUN, 3)


def test_file_appears_whole_or_not_at_all(depot: Depot) -> None:
    directory = begin(depot)
    put(depot, "checkpoint.pth", b"old")
    data = os.urandom(1000)
    depot.write(RUN, 1, "checkpoint.pth", "a", 0, data[:600], None)
    depot.write(RUN, 1, "checkpoint.pth", "a", 0, data[:600], None)  # the answer was lost
    assert (directory / "checkpoint.pth").read_bytes() == b"old"
    depot.write(RUN, 1, "checkpoint.pth", "a", 600, data[600:], sha(data))
    depot.write(RUN, 1, "checkpoint.pth", "a", 600, data[600:], sha(data))
    assert (directory / "checkpoint.pth").read_bytes() == data
    assert (directory / "checkpoint.prev.pth").read_bytes() == b"old"

    with pytest.raises(ValueError, match="damaged on its way"):
        depot.write(RUN, 1, "checkpoint.pth", "b", 0, data[1:], sha(data))

    depot.write(RUN, 1, "checkpoint.pth", "c", 0, data[:1], None)  # given up for the next
    depot.write(RUN, 1, "checkpoint.pth", "d", 0, b"new", sha(b"new"))
    assert (directory / "checkpoint.pth").read_bytes() == b"new"
    assert (directory / "checkpoint.prev.pth").read_bytes() == data
    assert list(directory.glob(".*.tmp")) == []


def test_growing_file_takes_what_comes_next_once(depot: Depot) -> None:
    file = begin(depot) / "metrics.jsonl"
    one, two, three = (b'{"epoch": %d}\n' % i for i in (1, 2, 3))
    depot.append(RUN, 1, file.name, 0, one, sha(b""))
    depot.append(RUN, 1, file.name, 0, one, sha(b""))  # the answer was lost
    depot.append(RUN, 1, file.name, len(one), two, sha(one))

    for offset, before in ((len(one) + 1, one + two), (len(one + two), one + three)):
        with pytest.raises(ValueError, match="other bytes"):
            depot.append(RUN, 1, file.name, offset, three, sha(before))

    assert file.read_bytes() == one + two
    depot.open(RUN, 2)
    depot.append(RUN, 2, file.name, len(one + two), three, sha(one + two))
    assert file.read_bytes() == one + two + three


def test_torn_line_is_cut_off_before_an_attempt_sees_it(depot: Depot) -> None:
    directory = begin(depot)
    (directory / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n{"epo')
    assert depot.open(RUN, 2)["sizes"]["metrics.jsonl"] == 13


def test_nothing_is_written_or_read_outside_of_a_run(depot: Depot, tmp_path: Path) -> None:
    directory = begin(depot)
    (directory / "wandb").symlink_to(tmp_path)

    for name in ("../x", "/x", "a/b", "lease.json", ".x", "wandb/../../x", "wandb/x", ""):
        with pytest.raises((ValueError, OSError)):
            put(depot, name, b"x")

        with pytest.raises(ValueError):
            depot.read(RUN, 1, name, 0, 1)

    with pytest.raises(ValueError):
        depot.open("../../..", 1)

    with pytest.raises(ValueError):
        depot.data_piece("../data/test.h5", 0, 1)


def test_run_that_is_deleted_is_not_made_again(depot: Depot) -> None:
    directory = begin(depot)

    for file in directory.iterdir():
        file.unlink()

    directory.rmdir()

    with pytest.raises((Vanished, OSError)):
        put(depot, "run.json", b"1")

    assert not directory.exists()


def test_lease_has_a_heartbeat_as_long_as_the_trial_has(depot: Depot) -> None:
    directory = begin(depot)
    attempt = depot.attempts.newest[RUN]
    assert HEARTBEAT < PULSE and attempt.lease.alive()
    attempt.heard -= PULSE + 1
    assert not attempt.lease.alive()
    depot.ping(RUN, 1, 0)
    assert attempt.lease.alive()
    depot.close(RUN, 1)
    depot.close(RUN, 1)
    assert (holder(directory / "lease.json") or {})["pid"] is None


def test_wish_to_stop_is_told(depot: Depot) -> None:
    begin(depot)
    assert depot.ping(RUN, 1, 7) == ""

    for file, number, wish in ((f"{depot.request}.7", 7, "alone"), (depot.request, 8, "all")):
        Path(file).touch()
        deadline = time.monotonic() + 60

        while depot.ping(RUN, 1, number) != wish:
            assert time.monotonic() < deadline


def test_stacks_of_a_process_that_hung_are_kept_as_noticed(depot: Depot) -> None:
    from sda_ray.training.watchdog import take_stacks

    directory = begin(depot)
    depot.leave(RUN, 1, "Thread 0x1:\n  File x\n")
    assert "File x" in (directory / "stacks.txt").read_text()
    assert not take_stacks(directory / "stacks.txt", 2)
