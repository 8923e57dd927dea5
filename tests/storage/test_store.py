r"""Tests for sda_ray.storage.store: objects in a bucket."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cloud import account, bucket, server

from sda_ray.core.errors import UserError
from sda_ray.storage.store import PIECE, Bucket, Damaged, Refused, Unreachable, parse_url

__all__ = ["account", "bucket", "server"]  # fixtures


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
