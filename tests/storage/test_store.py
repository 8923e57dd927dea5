r"""Tests for sda_ray.storage.store: objects in a bucket, in memory and over S3's protocol."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cloud import URL, account, bucket, s3, server

from sda_ray.core.errors import UserError
from sda_ray.core.lease import Conflict
from sda_ray.storage.replica import CHUNK, digest
from sda_ray.storage.store import Bucket, Damaged, Folder, Unreachable, check_url

__all__ = ["account", "bucket", "s3", "server"]  # fixtures


@pytest.fixture(params=["bucket", "s3"])
def both(request: pytest.FixtureRequest) -> Bucket:
    r"""A bucket in memory, then one over HTTP."""

    made: Bucket = request.getfixturevalue(request.param)

    return made


@pytest.mark.parametrize("url", ["s3://", "s3://B/x", "s3://lab/../x", "s3://lab/a b", "s3://l"])
def test_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"s3://BUCKET/PREFIX"):
        check_url(url)


def test_object_is_read_as_it_was_written(both: Bucket) -> None:
    version = both.put("a/b.txt", b"1", attributes={"sha256": "x"})
    both.put("a/c/d.txt", b"22")
    found = both.get("a/b.txt")

    assert found and (found.data, found.version) == (b"1", version)
    assert found.attributes["sha256"] == "x" and found.damaged
    assert both.get("a/b.txt", head=True).version == version  # type: ignore[union-attr]
    assert both.get("a/none.txt") is None and both.get("a", head=True) is None
    assert both.list() == {"a/b.txt": 1, "a/c/d.txt": 2}

    for _ in range(2):
        both.delete("a/b.txt")

    assert both.list() == {"a/c/d.txt": 2}


def test_missing_bucket_is_reported(s3: Bucket) -> None:
    s3.check()

    with pytest.raises(UserError, match=r"s3://other-bucket/x cannot be used.*Create the bucket"):
        Bucket("s3://other-bucket/x").check()


def test_conditional_write_is_refused_at_another_version(both: Bucket) -> None:
    version = both.put("o", b"1")

    for wrong in (None, {"e_tag": '"7"'}):
        with pytest.raises(Conflict):
            both.put("o", b"2", wrong)

    newer = both.put("o", b"2", version)
    found = both.get("o")

    assert found and (found.data, found.version) == (b"2", newer)


def test_aborted_upload_of_a_large_file_leaves_the_object(both: Bucket, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2 * CHUNK + 1))
    both.put("large", b"before")
    parts = []

    def check() -> None:
        parts.append(1)

        if len(parts) == 2:
            raise UserError("taken over")

    with open(file, "rb") as stream:
        with pytest.raises(UserError, match=r"taken over"):
            both.upload("large", stream, 2 * CHUNK + 1, check)

        assert both.get("large").data == b"before"  # type: ignore[union-attr]
        assert both.list() == {"large": 6}
        both.upload("large", stream, 2 * CHUNK, lambda: None)

    assert both.get("large").data == file.read_bytes()[:-1]  # type: ignore[union-attr]


def test_read_is_retried_but_no_write(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""By the time of a retry, the writer may not be the owner any more."""

    tried = []

    class Silent(BaseHTTPRequestHandler):
        def handle(self) -> None:
            tried.append(1)

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as silent:
        threading.Thread(target=silent.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.server_port}")
        far = Bucket(URL)

        with pytest.raises(Unreachable):
            far.put("o", b"1")

        assert len(tried) == 1

        with pytest.raises(Unreachable):
            far.get("o")

        silent.shutdown()

    assert len(tried) > 2


def test_wrong_checksum_leaves_the_file(both: Bucket, tmp_path: Path) -> None:
    both.put("o", b"damaged", attributes={"sha256": "0" * 64})
    (tmp_path / "file").write_bytes(b"before")

    with pytest.raises(Damaged, match=r"s3://.*/o is damaged"):
        both.download("o", tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == b"before"


@pytest.mark.parametrize("size", [0, 7, CHUNK, CHUNK + 1])
def test_folder_keeps_the_checksum_of_each_object(both: Bucket, tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size) + b"not pushed")
    folder = Folder(both, "run", attributes={"attempt": "3"})

    with open(file, "rb") as stream:
        folder.put("x", stream, size)
        sha = digest(stream, size)

    found = both.get("run/x")

    assert found and found.data == file.read_bytes()[:size] and not found.damaged
    assert found.attributes["sha256"] == sha and found.attributes["attempt"] == "3"
    both.download("run/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == found.data
    folder.remove("x")
    assert both.list() == {}
