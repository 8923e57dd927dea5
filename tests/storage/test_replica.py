r"""Tests for sda_ray.storage.replica: copies whose writers die, lose answers, or come too late."""

import contextlib
import json
from pathlib import Path

import pytest
from cloud import account, bucket, server, write

from sda_ray.storage.bucket import fetch_sweep
from sda_ray.storage.replica import RUN, SUMS, Folder, files_of
from sda_ray.storage.store import Bucket, Unreachable

__all__ = ["account", "bucket", "server"]  # fixtures

FIRST = {"config.json": "{}", "metrics.jsonl": "1\n", "checkpoint.pth": "at 1", "run.json": "R1"}
THEN = {
    "metrics.jsonl": "1\n2\n",
    "checkpoint.pth": "at 2",
    "state.pth": "weights",
    "run.json": "finished",
}


def test_copy_is_whole_at_whatever_moment_its_writer_dies(bucket: Bucket, tmp_path: Path) -> None:
    allowed = {"metrics.jsonl": ("1\n", "1\n2\n"), "checkpoint.pth": ("at 1", "at 2")}

    for moment in range(9):
        here, there, left = tmp_path / f"{moment}", tmp_path / f"to-{moment}", [10**6]

        def check(left: list[int] = left) -> None:
            left[0] -= 1

            if left[0] < 0:
                raise KeyboardInterrupt

        folder = Folder(bucket, f"run-{moment}", here, check)
        write(here, **FIRST)
        folder.copy(files_of(here, RUN))
        write(here, **THEN)
        left[0] = moment

        with contextlib.suppress(KeyboardInterrupt):
            folder.copy(files_of(here, RUN))

        Folder(bucket, f"run-{moment}", there).fetch(lambda name: True)
        found = {file.name: file.read_text() for file in there.iterdir()}

        assert set(FIRST) <= set(found)
        assert all(found[name] in texts for name, texts in allowed.items())
        assert len(found["metrics.jsonl"]) >= 2 * int(found["checkpoint.pth"][-1])
        assert found["run.json"] == "R1" or found["state.pth"] == "weights"

        # The next writer brings what is missing
        Folder(bucket, f"run-{moment}", here).copy(files_of(here, RUN))
        Folder(bucket, f"run-{moment}", there / "again").fetch(lambda name: True)
        assert {x.name: x.read_text() for x in (there / "again").iterdir()} == FIRST | THEN

    assert found == FIRST | THEN  # the last moment is after the end


def test_only_what_has_changed_goes_up(bucket: Bucket, tmp_path: Path) -> None:
    write(tmp_path, **FIRST)
    folder = Folder(bucket, "run", tmp_path)
    folder.copy(files_of(tmp_path, RUN))
    written: list[str] = []

    def note(key: str, data: bytes, version: str | None = None) -> str:
        written.append(key)
        return "noted"

    bucket.write = bucket.swap = note  # type: ignore[method-assign,assignment]
    folder.copy(files_of(tmp_path, RUN))
    again = Folder(bucket, "run", tmp_path)
    again.copy(files_of(tmp_path, RUN))

    assert written == []

    write(tmp_path, **{"metrics.jsonl": "1\n2\n"})
    again.copy(files_of(tmp_path, RUN))

    assert written == [f"run/{SUMS}", "run/metrics.jsonl"]


def test_torn_line_stays_behind(bucket: Bucket, tmp_path: Path) -> None:
    write(tmp_path, **{"metrics.jsonl": '{"epoch": 1}\n{"epo'})
    Folder(bucket, "run", tmp_path).copy(files_of(tmp_path, RUN))

    assert bucket.read("run/metrics.jsonl") == b'{"epoch": 1}\n'


def test_deleted_checkpoint_is_deleted(bucket: Bucket, tmp_path: Path) -> None:
    write(tmp_path, **FIRST)
    folder = Folder(bucket, "run", tmp_path)
    folder.copy(files_of(tmp_path, RUN))
    (tmp_path / "checkpoint.pth").unlink()
    folder.copy([*files_of(tmp_path, RUN), "checkpoint.pth"])

    assert "run/checkpoint.pth" not in bucket.sizes()
    assert "checkpoint.pth" not in json.loads(bucket.read(f"run/{SUMS}") or b"")["files"]


@pytest.mark.parametrize("damage", [b"", b"at", b"at 9"])
def test_damaged_object_is_left_out(
    bucket: Bucket, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "here", **FIRST)
    Folder(bucket, "run", tmp_path / "here").copy(files_of(tmp_path / "here", RUN))
    bucket.write("run/checkpoint.pth", damage)
    Folder(bucket, "run", tmp_path / "there").fetch(lambda name: True)

    assert "run/checkpoint.pth is damaged: its checksum is wrong" in caplog.text
    assert files_of(tmp_path / "there", RUN) == ["config.json", "metrics.jsonl", "run.json"]


def test_name_that_leads_out_of_the_directory_is_left_out(bucket: Bucket, tmp_path: Path) -> None:
    sums = {"../out": ["0"], "/tmp/out": ["0"], "a/../../out": ["0"]}
    bucket.write(f"run/{SUMS}", json.dumps({"attempt": 1, "files": sums}).encode())
    Folder(bucket, "run", tmp_path / "there").fetch(lambda name: True)

    assert list(tmp_path.iterdir()) == []


def test_late_write_of_a_former_owner_is_refused(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, texts = "study.journal", {"old": "a\nb\n", "new": "a\nc\n"}
    write(tmp_path / "old", **{name: "a\n"})
    old = Folder(bucket, "x", tmp_path / "old", attempt=1)
    old.copy([name])

    for who, text in texts.items():
        write(tmp_path / who, **{name: text})

    Folder(bucket, "x", tmp_path / "new", attempt=2).copy([name])

    with pytest.raises(Unreachable, match=r"x/sums\.json was written meanwhile"):
        old.copy([name])  # which its check has let pass, a minute ago

    third = Folder(bucket, "x", tmp_path / "third")
    third.fetch(lambda name: True)

    assert (tmp_path / "third" / name).read_text() == texts["new"]
    assert third.by == 2 and caplog.text == ""


def test_write_whose_answer_was_lost_is_made_up_for(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "here", **FIRST)
    folder = Folder(bucket, "run", tmp_path / "here")
    folder.copy(files_of(tmp_path / "here", RUN))
    write(tmp_path / "here", **THEN)
    swap = bucket.swap

    def lose(key: str, data: bytes, version: str | None) -> str:
        swap(key, data, version)
        raise Unreachable("no answer")

    with monkeypatch.context() as patch, pytest.raises(Unreachable, match="no answer"):
        patch.setattr(bucket, "swap", lose)
        folder.copy(files_of(tmp_path / "here", RUN))

    with pytest.raises(Unreachable, match="was written meanwhile"):
        folder.copy(files_of(tmp_path / "here", RUN))

    folder.copy(files_of(tmp_path / "here", RUN))
    Folder(bucket, "run", tmp_path / "there").fetch(lambda name: True)

    assert {x.name: x.read_text() for x in (tmp_path / "there").iterdir()} == FIRST | THEN


def test_copy_whose_first_journal_never_came_is_none(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here" / "sweeps" / "x"
    folder = Folder(bucket, "sweeps/x", here)

    def fail(key: str, data: bytes) -> None:
        raise Unreachable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "write", fail)

        for i in range(10):
            write(here, **{"study.journal": "a\n" * (i + 1)})

            with pytest.raises(Unreachable, match="no answer"):
                folder.copy(["study.journal"])

    fetch_sweep(bucket, tmp_path / "there", "x")

    assert not (tmp_path / "there" / "sweeps" / "x" / "study.journal").exists()
