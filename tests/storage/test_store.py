r"""Tests for sda_ray.storage.store, and how directories go there and back: `folder`, `fetching`."""

import contextlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cloud import account, bucket, server, write

from sda_ray.core.errors import UserError
from sda_ray.storage.bucket import SWEEP
from sda_ray.storage.fetching import compare_journals, fetch_sweep
from sda_ray.storage.folder import RUN, SUMS, Folder, files_of
from sda_ray.storage.store import PIECE, Bucket, Damaged, Refused, Unreachable, parse_url

__all__ = ["account", "bucket", "server"]  # fixtures

# Objects


@pytest.mark.parametrize("url", ["s3://", "s3://B/x", "s3://lab/../x", "s3://lab/a b", "s3://l"])
def test_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"s3://BUCKET/PREFIX"):
        parse_url(url)


def test_objects_come_back(bucket: Bucket) -> None:
    bucket.write("a/b.txt", b"1")
    bucket.write("a/c/d.txt", b"22")

    assert bucket.read("a/b.txt") == b"1"
    assert bucket.read("a/none.txt") is None
    assert bucket.sizes() == {"a/b.txt": 1, "a/c/d.txt": 2}
    assert bucket.sizes("a/c") == {"a/c/d.txt": 2}
    assert bucket.sizes("none") == {}
    assert bucket.has("a/c/d.txt") and not bucket.has("a/c") and not bucket.has("none")


def test_bucket_that_is_not_there_is_said(bucket: Bucket) -> None:
    with pytest.raises(UserError, match=r"s3://other-bucket/x cannot be used.*Create the bucket"):
        Bucket("s3://other-bucket/x").check()


def test_write_on_condition_is_refused_where_it_does_not_hold(bucket: Bucket) -> None:
    version = bucket.swap("o", b"1", None)

    for wrong in (None, '"0"'):
        with pytest.raises(Refused):
            bucket.swap("o", b"2", wrong)

    newer = bucket.swap("o", b"2", version)

    assert bucket.peek("o") == (b"2", newer)
    assert bucket.peek("none") is None


def test_pyarrow_knows_no_condition(bucket: Bucket) -> None:
    r"""The day that it does, boto3 is not needed any more."""

    bucket.write("o", b"1")
    condition = {"If-None-Match": "*", "IfNoneMatch": "*"}

    with bucket._fs.open_output_stream(bucket._path("o"), metadata=condition) as stream:
        stream.write(b"2")

    assert bucket.read("o") == b"2"


def test_large_file_that_is_given_up_leaves_the_object(bucket: Bucket, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2 * PIECE + 1))
    bucket.write("large", b"before")
    parts = []

    def going() -> None:
        parts.append(1)

        if len(parts) == 2:
            raise UserError("taken over")

    with open(file, "rb") as stream, pytest.raises(UserError, match=r"taken over"):
        bucket.upload("large", stream, going)

    assert bucket.read("large") == b"before"
    assert bucket.sizes() == {"large": 6}

    with open(file, "rb") as stream:
        bucket.upload("large", stream, lambda: None)

    assert bucket.read("large") == file.read_bytes()
    assert bucket.sizes() == {"large": 2 * PIECE + 1}


def test_read_is_tried_again_but_no_write(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Its writer may not be the owner any more by the next time."""

    tried = []

    class Away(BaseHTTPRequestHandler):
        def handle(self) -> None:
            tried.append(1)

    with ThreadingHTTPServer(("127.0.0.1", 0), Away) as away:
        threading.Thread(target=away.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{away.server_port}")

        far = Bucket(bucket.url)

        with pytest.raises(Unreachable):
            far.write("o", b"1")

        assert len(tried) == 1

        with pytest.raises(Unreachable):
            far.read("o")

        away.shutdown()

    assert len(tried) > 2


def test_wrong_checksum_leaves_the_file(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("o", b"damaged")
    (tmp_path / "file").write_bytes(b"before")

    with pytest.raises(Damaged, match=r"s3://.*/o is damaged"):
        bucket.download("o", tmp_path / "file", ["0" * 64])

    assert (tmp_path / "file").read_bytes() == b"before"


# Directories


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
        (b"a\nb\n", b"a\nc\nd\n", "parted"),
    ],
)
def test_newer_journal_goes_on_where_the_other_ends(here: bytes, copy: bytes, newer: str) -> None:
    assert compare_journals(here, copy) == newer


def parted(bucket: Bucket, tmp_path: Path, by: int, last: int) -> Path:
    r"""Makes a journal and a copy that have parted, written by drivers of these numbers."""

    there = tmp_path / "there" / "sweeps" / "x"
    write(there, **{"study.journal": "a\nc\nd\n", "sweep.json": "{}"})
    Folder(bucket, "sweeps/x", there, attempt=by).copy(["sweep.json", "study.journal"])
    here = tmp_path / "here" / "sweeps" / "x"
    write(here, **{"study.journal": "a\nb\n", "copy.json": json.dumps({"attempt": last})})

    return tmp_path / "here"


def test_copy_of_a_later_driver_wins_over_what_it_did_not_know(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = parted(bucket, tmp_path, by=3, last=2)
    fetch_sweep(bucket, runs, "x")
    directory = runs / "sweeps" / "x"

    assert (directory / "study.journal").read_text() == "a\nc\nd\n"
    assert (directory / "study.journal.parted-3").read_text() == "a\nb\n"
    assert "has 4 bytes that another driver did not know of" in caplog.text


def test_journals_that_parted_without_a_reason_are_refused(bucket: Bucket, tmp_path: Path) -> None:
    runs = parted(bucket, tmp_path, by=2, last=2)

    with pytest.raises(UserError, match=r"\(4 bytes\) and its copy .* \(6 bytes\) have parted"):
        fetch_sweep(bucket, runs, "x")

    assert (runs / "sweeps" / "x" / "study.journal").read_text() == "a\nb\n"


def test_code_of_a_sweep_comes_along_before_there_is_a_journal(
    bucket: Bucket, tmp_path: Path
) -> None:
    here = tmp_path / "here" / "sweeps" / "x"
    write(here, **{"sweep.json": "{}"})
    write(here / "code" / "0123" / "sda_ray", **{"nn.py": "1", ".hidden": ""})
    write(here / "code" / "0123" / "sda_ray" / "__pycache__", **{"nn.pyc": ""})
    Folder(bucket, "sweeps/x", here).copy(files_of(here, SWEEP))
    fetch_sweep(bucket, tmp_path / "there", "x")
    there = tmp_path / "there" / "sweeps" / "x"
    found = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}

    assert found == {"sweep.json", "code/0123/sda_ray/nn/unet.py"}


def test_damaged_copy_of_a_journal_is_said(bucket: Bucket, tmp_path: Path) -> None:
    runs = parted(bucket, tmp_path, by=2, last=2)
    bucket.write("sweeps/x/study.journal", b"a\nc\n")

    with pytest.raises(UserError, match=r"study\.journal is damaged: its checksum is wrong"):
        fetch_sweep(bucket, runs, "x")
