r"""Buckets for tests: one in memory, and an S3 on loopback, moto's server, with its protocol."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from obstore.store import MemoryStore

from sda_ray.storage.store import Bucket

__all__ = ["URL", "account", "bucket", "s3", "server", "write"]

URL = "s3://lab-bucket/kolmogorov/runs"


@pytest.fixture
def bucket() -> Bucket:
    r"""An empty bucket in memory."""

    return Bucket(URL, MemoryStore())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def account(server: str, home: Path) -> dict[str, str]:
    r"""The variables by which AWS's tools find server and keys, and no others of this machine."""

    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(home / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
    }


@pytest.fixture
def s3(account: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    r"""An empty bucket of the server."""

    import boto3

    for name, value in account.items():
        monkeypatch.setenv(name, value)

    client = boto3.client("s3")

    try:
        client.create_bucket(
            Bucket="lab-bucket",
            CreateBucketConfiguration={"LocationConstraint": "eu-central-1"},
        )
    except client.exceptions.BucketAlreadyOwnedByYou:
        for key in (made := Bucket(URL)).list():
            made.delete(key)

    return Bucket(URL)


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)

    for name, text in files.items():
        (directory / name).write_text(text)
