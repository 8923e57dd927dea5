r"""Tests for sda_ray.storage.replica: replicas whose writers die, lose answers, or come too late."""

import contextlib
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from cloud import bucket, write

from sda_ray.runs.path import COPIED
from sda_ray.storage.bucket import fetch_records
from sda_ray.storage.replica import Replica, files_of, run_files
from sda_ray.storage.store import Bucket, Folder, Unreachable

__all__ = ["bucket"]  # fixture

FIRST = {"config.json": "{}", "metrics.jsonl": "1\n", "checkpoint.pth": "at 1", "run.json": "R1"}
THEN = {
    "metrics.jsonl": "1\n2\n",
    "checkpoint.pth": "at 2",
    "state.pth": "weights",
    "run.json": "finished",
}


class Log:
    r"""A target that notes what it is given."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.order: list[str] = []

    def put(self, name: str, file: BinaryIO, size: int) -> None:
        self.files[name] = file.read(size)
        self.order.append(name)

    def remove(self, name: str) -> None:
        del self.files[name]


def texts(bucket: Bucket, folder: str) -> dict[str, str]:
    r"""Returns the texts of the files in a folder."""

    names = {key: key.removeprefix(f"{folder}/") for key in bucket.list() if folder in key}

    return {name: bucket.get(key).data.decode() for key, name in names.items()}  # type: ignore[union-attr]


def test_replica_is_whole_whenever_its_writer_dies(bucket: Bucket, tmp_path: Path) -> None:
    allowed = {"metrics.jsonl": ("1\n", "1\n2\n"), "checkpoint.pth": ("at 1", "at 2")}

    for moment in range(6):
        here, left = tmp_path / f"{moment}", [10**6]

        def check(left: list[int] = left) -> None:
            left[0] -= 1

            if left[0] < 0:
                raise KeyboardInterrupt

        replica = Replica(here, Folder(bucket, f"run-{moment}", check))
        write(here, **FIRST)
        replica.push(files_of(here, COPIED))
        write(here, **THEN)
        left[0] = moment

        with contextlib.suppress(KeyboardInterrupt):
            replica.push(files_of(here, COPIED))

        copy = texts(bucket, f"run-{moment}")

        assert set(FIRST) <= set(copy)
        assert all(copy[name] in texts for name, texts in allowed.items())
        assert len(copy["metrics.jsonl"]) >= 2 * int(copy["checkpoint.pth"][-1])
        assert copy["run.json"] == "R1" or copy["state.pth"] == "weights"

        # The next writer adds what is missing
        Replica(here, Folder(bucket, f"run-{moment}")).push(files_of(here, COPIED))
        assert texts(bucket, f"run-{moment}") == FIRST | THEN

    assert copy == FIRST | THEN  # the last moment is after the end


def test_only_what_has_changed_is_pushed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, **FIRST)
    replica = Replica(tmp_path, Folder(bucket, "run"))
    replica.push(files_of(tmp_path, COPIED))
    written: list[str] = []
    put = bucket.put

    def note(key: str, *args: Any) -> Any:
        written.append(key)
        return put(key, *args)

    monkeypatch.setattr(bucket, "put", note)
    replica.push(files_of(tmp_path, COPIED))
    again = Replica(tmp_path, Folder(bucket, "run"))  # of another process
    again.push(files_of(tmp_path, COPIED))

    assert written == []

    write(tmp_path, **{"metrics.jsonl": "1\n2\n"})
    again.push(files_of(tmp_path, COPIED))

    assert written == ["run/metrics.jsonl"]


def test_torn_line_is_not_pushed(tmp_path: Path) -> None:
    log = Log()
    write(tmp_path, **{"metrics.jsonl": '{"epoch": 1}\n{"epo'})
    Replica(tmp_path, log).push(["metrics.jsonl"])

    assert log.files == {"metrics.jsonl": b'{"epoch": 1}\n'}


def test_file_that_grows_is_pushed_up_to_the_size_that_was_asked_for(tmp_path: Path) -> None:
    log = Log()
    replica = Replica(tmp_path, log)
    write(tmp_path, **{"study.journal": "a\nb\nc\n"})
    replica.push(["study.journal"], {"study.journal": 5})

    assert log.files == {"study.journal": b"a\nb\n"}

    replica.push(["study.journal"])

    assert log.files == {"study.journal": b"a\nb\nc\n"}


def test_deleted_file_is_removed(tmp_path: Path) -> None:
    log = Log()
    replica = Replica(tmp_path, log)
    write(tmp_path, **FIRST)
    replica.push(files_of(tmp_path, COPIED))
    (tmp_path / "checkpoint.pth").unlink()
    replica.push([*files_of(tmp_path, COPIED), "checkpoint.pth"])

    assert set(log.files) == set(FIRST) - {"checkpoint.pth"}


def test_file_that_is_replaced_during_a_push_is_pushed_as_it_was(tmp_path: Path) -> None:
    r"""What is pushed last never refers to what was not there when the push started."""

    class Slow(Log):
        def put(self, name: str, file: BinaryIO, size: int) -> None:
            super().put(name, file, size)

            if name == "metrics.jsonl":
                (tmp_path / "new").write_text("at 2")
                (tmp_path / "new").rename(tmp_path / "checkpoint.pth")

    slow = Slow()
    write(tmp_path, **FIRST)
    replica = Replica(tmp_path, slow)
    replica.push(files_of(tmp_path, COPIED))

    assert slow.files["checkpoint.pth"] == b"at 1" and replica.changed("checkpoint.pth")


def test_files_of_a_run_are_in_order_and_none_is_private(tmp_path: Path) -> None:
    others = {"lease.json": "", "checkpoint.prev.pth": "", ".x.tmp": "", "diff.patch": ""}
    write(tmp_path, **FIRST, **others, **{"stacks.txt": "", "state.pth": ""})
    write(tmp_path / "wandb" / "offline-1", **{"run.wandb": "", ".hidden": ""})
    (tmp_path / "wandb" / "latest").symlink_to("offline-1")

    assert run_files(tmp_path) == [
        *("config.json", "metrics.jsonl", "diff.patch", "wandb/offline-1/run.wandb"),
        *("checkpoint.pth", "state.pth", "run.json"),
    ]


@pytest.mark.parametrize("damage", [b"", b"at", b"at 9"])
def test_damaged_object_is_left_out(
    bucket: Bucket, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "here", **FIRST)
    run, here = "calm-cat-1_aaaaaaaa", tmp_path / "here"
    Replica(here, Folder(bucket, run)).push(files_of(here, COPIED))
    found = bucket.get(f"{run}/metrics.jsonl")
    assert found is not None
    bucket.put(f"{run}/metrics.jsonl", damage, found.version, {**found.attributes})
    fetch_records(bucket, tmp_path / "there")

    assert f"{run}/metrics.jsonl is damaged: its checksum is wrong" in caplog.text
    assert files_of(tmp_path / "there" / run, COPIED) == ["config.json", "run.json"]


def test_late_write_of_a_former_owner_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    name, journals = "study.journal", {"old": "a\nb\n", "new": "a\nc\n"}
    write(tmp_path / "old", **{name: "a\n"})
    old = Replica(tmp_path / "old", Folder(bucket, "x", attributes={"attempt": "1"}))
    old.push([name])

    for who, text in journals.items():
        write(tmp_path / who, **{name: text})

    new = Replica(tmp_path / "new", Folder(bucket, "x", attributes={"attempt": "2"}))
    new.push([name])

    with pytest.raises(Unreachable, match=rf"x/{name} was written meanwhile"):
        old.push([name])  # its check has let it pass a minute ago

    found = bucket.get(f"x/{name}")

    assert found and found.data.decode() == journals["new"]
    assert found.attributes["attempt"] == "2" and not found.damaged


def test_write_whose_answer_was_lost_is_repeated(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, **FIRST)
    replica = Replica(tmp_path, Folder(bucket, "run"))
    replica.push(files_of(tmp_path, COPIED))
    write(tmp_path, **THEN)
    put = bucket.put

    def lose(*args: Any) -> Any:
        put(*args)
        raise Unreachable("no answer")

    for _ in range(len(THEN)):
        with monkeypatch.context() as patch, pytest.raises(Unreachable, match="no answer"):
            patch.setattr(bucket, "put", lose)
            replica.push(files_of(tmp_path, COPIED))

    replica.push(files_of(tmp_path, COPIED))

    assert texts(bucket, "run") == FIRST | THEN
