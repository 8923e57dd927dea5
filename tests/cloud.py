r"""An S3 on loopback, moto's server: what it does with conditions and parts is S3's."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from sda_ray.storage.store import Bucket

pytest.importorskip("moto.server")

__all__ = ["URL", "account", "bucket", "server", "write"]

URL = "s3://lab-bucket/kolmogorov/runs"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def account(server: str, home: Path) -> dict[str, str]:
    r"""The variables by which AWS' tools find server and keys, and no others of this machine."""

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
def bucket(account: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    r"""An empty bucket."""

    for name, value in account.items():
        monkeypatch.setenv(name, value)

    made = Bucket(URL)

    try:
        made._client.create_bucket(
            Bucket=made.name,
            CreateBucketConfiguration={"LocationConstraint": "eu-central-1"},
        )
    except made._client.exceptions.BucketAlreadyOwnedByYou:
        for key in made.sizes():
            made.delete(key)

    return made


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)

    for name, text in files.items():
        (directory / name).write_text(text)
