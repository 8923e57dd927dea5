r"""Tests for sda_ray.storage.bucket: a sweep at work in a bucket, and who may write there."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from cloud import URL, account, bucket, s3, server, write
from conftest import Cli, Start
from optuna.trial import TrialState

from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease, LeaseLost, this_process
from sda_ray.runs.path import COPIED
from sda_ray.search.study import Study
from sda_ray.storage.bucket import SWEEP, SweepReplica, compare_journals, fetch_sweep
from sda_ray.storage.replica import Replica, files_of
from sda_ray.storage.store import Bucket, Folder, LeaseObject, Unreachable

__all__ = ["account", "bucket", "s3", "server"]  # fixtures

# Ownership


def take(bucket: Bucket, patience: float = 60.0) -> Lease:
    return Lease(LeaseObject(bucket, "sweeps/x/owner.json"), "sweep 'x'", patience=patience)


def elsewhere(lease: Lease) -> None:
    r"""Lets a lease look as if its holder were on another machine."""

    with lease.hold():
        lease._write(lease._mine | {"host": "elsewhere", "boot": "another"}, lease._version)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Leases without heartbeats."""

    monkeypatch.setattr("sda_ray.core.lease.HEARTBEAT", 3600.0)


def test_second_driver_is_refused_while_the_first_lives(bucket: Bucket) -> None:
    lease = take(bucket)

    with pytest.raises(UserError, match=r"sweep 'x' is in use by process \d+ on .* since"):
        take(bucket)

    lease.release()
    second = take(bucket)

    assert second.attempt == lease.attempt + 1
    second.release()


def test_driver_elsewhere_is_refused_by_its_heartbeat(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sda_ray.core.lease.HEARTBEAT", 0.2)
    lease = take(bucket)
    elsewhere(lease)

    with pytest.raises(UserError, match=r"in use by process \d+ on elsewhere"):
        take(bucket, patience=30.0)

    lease.release()


def test_silent_driver_is_taken_over_and_writes_no_more(
    bucket: Bucket, tmp_path: Path, silent: None
) -> None:
    lease = take(bucket)
    elsewhere(lease)
    write(tmp_path / "run", **{"metrics.jsonl": "1\n"})
    sweep = SweepReplica(bucket, tmp_path, "x", lease)
    replica = Replica(tmp_path / "run", Folder(bucket, "run", sweep._confirm))

    second = take(bucket, patience=0.5)
    lease.confirmed -= 3600  # an hour later it comes back

    with pytest.raises(LeaseLost, match=r"sweep 'x' was taken over from attempt 1 by process"):
        replica.push(COPIED)

    assert set(bucket.list()) == {"sweeps/x/owner.json"}
    lease.release()
    second.renew()
    second.release()


def test_lease_whose_answer_was_lost_stays_held(bucket: Bucket) -> None:
    lease = take(bucket)
    lease._version = {"e_tag": '"another"'}  # as if the last answer had not come back
    lease.renew()
    lease.renew()
    lease.release()


def test_lease_of_the_version_before_is_respected(bucket: Bucket) -> None:
    r"""Its record has a token, which no later version reads."""

    holder = this_process(3) | {"token": "0123", "beat": "4567"}
    bucket.put("sweeps/x/owner.json", json.dumps(holder).encode())

    with pytest.raises(UserError, match=r"sweep 'x' is in use by process"):
        take(bucket)


# Which journal


@pytest.mark.parametrize(
    "here, copy, newer",
    [
        (b"", b"", "here"),
        (b"a\n", b"", "here"),
        (b"", b"a\n", "copy"),
        (b"a\nb\n", b"a\n", "here"),
        (b"a\nb\n", b"a\nb\n", "here"),
        (b"a\n", b"a\nb\n", "copy"),
        (b"a\nto", b"a\nb\n", "copy"),  # torn
        (b"a\nb\n", b"a\nc\nd\n", "diverged"),
    ],
)
def test_newer_journal_continues_the_other(here: bytes, copy: bytes, newer: str) -> None:
    assert compare_journals(here, copy) == newer


def push(
    bucket: Bucket, key: str, directory: Path, names: Sequence[str], attempt: int = 1
) -> None:
    folder = Folder(bucket, key, attributes={"attempt": str(attempt)})
    Replica(directory, folder).push(files_of(directory, names))


def diverged(bucket: Bucket, tmp_path: Path, by: int, last: int) -> Path:
    r"""Makes a journal and a copy that have diverged, written by drivers of these numbers."""

    there = tmp_path / "there" / "sweeps" / "x"
    write(there, **{"study.journal": "a\nc\nd\n", "sweep.json": "{}"})
    push(bucket, "sweeps/x", there, ["sweep.json", "study.journal"], by)
    here = tmp_path / "here" / "sweeps" / "x"
    write(here, **{"study.journal": "a\nb\n", "copy.json": json.dumps({"attempt": last})})

    return tmp_path / "here"


def test_copy_of_a_later_driver_wins_over_what_it_did_not_know(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = diverged(bucket, tmp_path, by=3, last=2)
    fetch_sweep(bucket, runs, "x")
    directory = runs / "sweeps" / "x"

    assert (directory / "study.journal").read_text() == "a\nc\nd\n"
    assert (directory / "study.journal.parted-3").read_text() == "a\nb\n"
    assert "has 4 bytes that another driver did not know when" in caplog.text


def test_journals_that_diverged_for_no_reason_are_refused(bucket: Bucket, tmp_path: Path) -> None:
    runs = diverged(bucket, tmp_path, by=2, last=2)

    with pytest.raises(UserError, match=r"\(4 bytes\) and its copy .* \(6 bytes\) have diverged"):
        fetch_sweep(bucket, runs, "x")

    assert (runs / "sweeps" / "x" / "study.journal").read_text() == "a\nb\n"


def test_code_of_a_sweep_comes_along_before_there_is_a_journal(
    bucket: Bucket, tmp_path: Path
) -> None:
    here = tmp_path / "here" / "sweeps" / "x"
    write(here, **{"sweep.json": "{}"})
    write(here / "code" / "0123" / "sda_ray", **{"nn.py": "1", ".hidden": ""})
    write(here / "code" / "0123" / "sda_ray" / "__pycache__", **{"nn.pyc": ""})
    push(bucket, "sweeps/x", here, SWEEP)
    fetch_sweep(bucket, tmp_path / "there", "x")
    there = tmp_path / "there" / "sweeps" / "x"
    found = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}

    assert found == {"sweep.json", "code/0123/sda_ray/nn.py"}


def test_damaged_copy_of_a_journal_is_reported(bucket: Bucket, tmp_path: Path) -> None:
    runs = diverged(bucket, tmp_path, by=2, last=2)
    found = bucket.get("sweeps/x/study.journal", head=True)
    assert found is not None
    bucket.put("sweeps/x/study.journal", b"a\nc\n", found.version, found.attributes)

    with pytest.raises(UserError, match=r"study\.journal is damaged: its checksum is wrong"):
        fetch_sweep(bucket, runs, "x")


def test_copy_whose_first_journal_never_came_has_none(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here" / "sweeps" / "x"
    replica = Replica(here, Folder(bucket, "sweeps/x"))

    def fail(*args: Any) -> Any:
        raise Unreachable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "put", fail)

        for i in range(10):
            write(here, **{"study.journal": "a\n" * (i + 1)})

            with pytest.raises(Unreachable, match="no answer"):
                replica.push(["study.journal"])

    fetch_sweep(bucket, tmp_path / "there", "x")

    assert not (tmp_path / "there" / "sweeps" / "x" / "study.journal").exists()


def test_sweep_is_fetched_with_one_listing(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = diverged(bucket, tmp_path, by=3, last=2)
    listings: list[dict[str, int]] = []
    list_all = bucket.list

    def note() -> dict[str, int]:
        listings.append(list_all())
        return listings[-1]

    monkeypatch.setattr(bucket, "list", note)
    fetch_sweep(bucket, runs, "x")

    assert len(listings) == 1


def test_name_that_leads_out_of_the_directory_is_left_out(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("sweeps/x/code/../../../../out", "../run_aaaaaaaa/run.json", "sweeps/../sweep.json")
    monkeypatch.setattr(bucket, "list", lambda: dict.fromkeys(names, 1))
    fetch_sweep(bucket, tmp_path / "runs", "x")

    assert list(tmp_path.rglob("*")) == []


def test_copy_of_the_version_before_is_restored(bucket: Bucket, tmp_path: Path) -> None:
    r"""It has checksums in `sums.json`, and no attributes."""

    journal = b'{"run_id": "aaaaaaaa"}\n{"run_id": "bbbbbbbb"}\n'
    sums = json.dumps({"attempt": 3, "files": {"study.journal": ["0"]}}).encode()
    objects = {"sweeps/x/study.journal": journal, "sweeps/x/sums.json": sums}
    objects |= {"sweeps/x/sweep.json": b"{}", "sweeps/x/study.journal.0123.tmp": b"half"}

    for name, status in (("calm-cat-1_aaaaaaaa", "paused"), ("calm-cat-2_bbbbbbbb", "finished")):
        objects |= {f"{name}/config.json": b"{}", f"{name}/checkpoint.pth": b"at 1"}
        objects |= {f"{name}/run.json": json.dumps({"status": status}).encode()}
        objects |= {f"{name}/sums.json": sums}

    for key, data in objects.items():
        bucket.put(key, data)

    runs = tmp_path / "runs"
    fetch_sweep(bucket, runs, "x")
    files = {str(p.relative_to(runs)) for p in runs.rglob("*") if p.is_file()}

    assert (runs / "sweeps" / "x" / "study.journal").read_bytes() == journal
    assert files == {
        *("sweeps/x/study.journal", "sweeps/x/sweep.json", "calm-cat-1_aaaaaaaa/config.json"),
        *("calm-cat-1_aaaaaaaa/run.json", "calm-cat-1_aaaaaaaa/checkpoint.pth"),
        *("calm-cat-2_bbbbbbbb/config.json", "calm-cat-2_bbbbbbbb/run.json"),
    }


def test_closed_run_that_is_in_the_bucket_is_not_pushed_again(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path / "calm-cat-1_aaaaaaaa", **{"run.json": '{"status": "paused"}', "state.pth": ""}
    )
    lease = take(bucket)
    SweepReplica(bucket, tmp_path, "x", lease)._push_run("aaaaaaaa", closed=True)
    written: list[str] = []
    monkeypatch.setattr(bucket, "put", lambda key, *args: written.append(key))
    again = SweepReplica(bucket, tmp_path, "x", lease)
    again._push_run("aaaaaaaa", closed=True)

    assert written == [] and again.settled == {"aaaaaaaa"}

    (tmp_path / "calm-cat-1_aaaaaaaa" / "run.json").write_text('{"status": "finished"}')
    SweepReplica(bucket, tmp_path, "x", lease)._push_run("aaaaaaaa", closed=True)

    assert written == ["calm-cat-1_aaaaaaaa/run.json"]
    monkeypatch.undo()
    lease.release()


# Copies of a study at work


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    directory = tmp_path / "sweeps" / "x"
    directory.mkdir(parents=True)
    lease = Lease(directory / "lease.json", "sweep 'x'")
    yield Study(directory / "study.journal", "x", lease)
    lease.release()


def content(bucket: Bucket, key: str) -> bytes:
    found = bucket.get(key)

    return found.data if found else b""


def copied_to(bucket: Bucket, study: Study) -> bool:
    r"""Tells whether the copy of a journal is as the journal is."""

    return content(bucket, "sweeps/x/study.journal") == study.journal.file.read_bytes()


def until(what: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds

    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_journal_follows_changes_at_once_and_reports_later(
    bucket: Bucket, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sda_ray.storage.bucket.LAG", 3600.0)

    # The lease of the sweep is ours: `replicated` would find it at work
    replica = SweepReplica(bucket, tmp_path, "x", take(bucket))
    replica.follow(study)
    until(lambda: copied_to(bucket, study))
    study.enqueue({"learning_rate": 1e-3})
    until(lambda: copied_to(bucket, study))
    study.study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))
    until(lambda: copied_to(bucket, study))
    study.storage.set_trial_intermediate_value(0, 1, 0.5)

    assert not copied_to(bucket, study)  # an hour later

    replica.finish(60.0)

    assert copied_to(bucket, study)


def test_unreachable_bucket_delays_nothing(
    s3: Bucket,
    server: str,
    study: Study,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moto.server import ThreadedMotoServer

    monkey = pytest.MonkeyPatch()
    other = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    other.start()
    host, port = other.get_host_and_port()
    monkey.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkey.setattr("sda_ray.storage.bucket.PAUSE", 0.2)
    far = Bucket(URL)  # the same objects, by a way that can be cut
    monkey.undo()
    replica = SweepReplica(far, tmp_path, "x", take(far))
    replica.follow(study)
    until(lambda: copied_to(s3, study))

    other.stop()
    start = time.monotonic()
    study.enqueue({"learning_rate": 1e-3})

    assert time.monotonic() - start < 15
    until(lambda: "nothing is copied to" in caplog.text)
    assert not copied_to(s3, study)

    again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    again.start()
    until(lambda: copied_to(s3, study))
    until(lambda: "is copied to again, after" in caplog.text)
    replica.finish(60.0)
    again.stop()

    assert caplog.text.count("nothing is copied to") == 1
    assert f"All of it is in {URL}" in capsys.readouterr().out


def test_driver_that_was_taken_over_notices_and_copies_no_more(
    bucket: Bucket, study: Study, tmp_path: Path, silent: None
) -> None:
    lease = take(bucket)
    replica = SweepReplica(bucket, tmp_path, "x", lease)
    replica.follow(study)
    until(lambda: copied_to(bucket, study))
    replica.check()
    elsewhere(lease)
    second = take(bucket, patience=0.5)
    lease.confirmed -= 3600
    before = content(bucket, "sweeps/x/study.journal")
    study.enqueue({"learning_rate": 1e-3})
    until(lambda: replica.lost is not None)

    with pytest.raises(UserError, match=r"was taken over .* by process .*: this driver stops"):
        replica.check()

    replica.finish(60.0)

    assert content(bucket, "sweeps/x/study.journal") == before
    second.renew()
    second.release()


# Sweeps

SCRIPT = """
from sda_ray import CONFIG, Sweep, loguniform, main

CONFIG = CONFIG | {settings} | {{"epochs": 9}}
SPACE = {{"learning_rate": loguniform(1e-4, 1e-2)}}
sweep = Sweep("cloud", CONFIG, SPACE, trials=6, min_epochs=3, eta=3)

if __name__ == "__main__":
    main(sweep)
"""


def wait_for(what: Any, process: Any, seconds: float = 400.0) -> bool:
    r"""Waits for something; not if Ray does not start within 30 s, as on a busy machine."""

    deadline = time.monotonic() + seconds

    while not what():
        if process.poll() is not None:
            said = process.communicate()
            assert "Ray could not be started" in said[1], said
            return False

        assert time.monotonic() < deadline
        time.sleep(0.1)

    return True


def records(journal: bytes) -> list[dict[str, Any]]:
    r"""Returns the runs that a journal creates."""

    lines = [json.loads(line) for line in journal.splitlines()]

    return [line["user_attrs"] for line in lines if line.get("op_code") == 4]


def test_sweep_outlives_its_machine(
    s3: Bucket,
    account: dict[str, str],
    cli: Cli,
    start: Start,
    small: dict[str, Any],
    tmp_path: Path,
) -> None:
    from conftest import SMALL

    (tmp_path / "cloud.py").write_text(SCRIPT.format(settings=SMALL))
    command = ("sweep", "cloud.py", f"--runs={URL}", "--parallel=2")

    def under_way() -> bool:
        data = content(s3, "sweeps/cloud/study.journal")
        return len(records(data)) >= 3 and data.count(b'"op_code":7') >= 3

    for _ in range(4):
        first = start(*command, **account)

        if wait_for(under_way, first):
            break

    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = records(content(s3, "sweeps/cloud/study.journal"))
    new = {"SDA_RAY_ROOT": str(tmp_path / "new")}  # a machine with an empty disk

    for _ in range(4):
        done = cli(*command, timeout=600, **account, **new)

        if "Ray could not be started" not in done.stderr:  # within 30 s, on a busy machine
            break

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"All of it is in {URL}" in done.stdout
    keys, journal = s3.list(), content(s3, "sweeps/cloud/study.journal")
    made = {record["run"]: record["run_id"] for record in records(journal)}
    assert made | {r["run"]: r["run_id"] for r in before} == made  # none lost
    assert sorted(made) == [1, 2, 3, 4, 5, 6]  # and none twice
    directories = {key.partition("/")[0] for key in keys if key.endswith("/run.json")}
    assert {name.rpartition("_")[2] for name in directories} == set(made.values())
    statuses = []

    for name in directories:
        record = json.loads(content(s3, f"{name}/run.json"))
        lines = content(s3, f"{name}/metrics.jsonl").splitlines()
        epochs = [json.loads(line)["epoch"] for line in lines]
        statuses.append(record["status"])
        assert epochs == [*range(1, len(epochs) + 1)]
        assert (f"{name}/state.pth" in keys) == (record["status"] == "finished")

    assert {"finished", "paused"} == {*statuses}

    recorded = json.loads(content(s3, "sweeps/cloud/sweep.json"))["code"][:16]
    assert f"sweeps/cloud/code/{recorded}/sda_ray/nn/unet.py" in keys

    third = {"SDA_RAY_ROOT": str(tmp_path / "third")}
    listed = cli("runs", f"--runs={URL}", "--json", **account, **third)
    assert {run["id"] for run in json.loads(listed.stdout)} == set(made.values())


def test_command_that_cannot_do_with_a_bucket_says_so(
    s3: Bucket, account: dict[str, str], cli: Cli
) -> None:
    done = cli("train", f"--runs={URL}", **account)

    assert done.returncode == 2
    assert "`sda-ray train` works on a directory, not on s3://" in done.stderr
