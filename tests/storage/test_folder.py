r"""Tests for sda_ray.storage.folder: copies whose writers lose answers, or come too late."""

from pathlib import Path

import pytest
from cloud import account, bucket, server, write

from sda_ray.storage.fetching import fetch_sweep
from sda_ray.storage.folder import RUN, Folder, files_of
from sda_ray.storage.store import Bucket, Unreachable

__all__ = ["account", "bucket", "server"]  # fixtures

FIRST = {"metrics.jsonl": "1\n", "checkpoint.pth": "at 1", "run.json": "R1"}
THEN = {"metrics.jsonl": "1\n2\n", "state.pth": "weights", "run.json": "finished"}


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
