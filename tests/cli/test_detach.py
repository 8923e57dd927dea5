r"""Tests for `sda-ray sweep --detach` with runs in a bucket: the driver copies."""

import time
from pathlib import Path

import pytest
from cloud import URL, account, s3, server
from conftest import Cli
from recorded_code import SCRIPT

from sda_ray.storage.store import Bucket

__all__ = ["account", "s3", "server"]  # fixtures


@pytest.fixture
def script(tmp_path: Path) -> str:
    text = SCRIPT.replace('"epochs": 27', '"epochs": 1').replace("trials=4", "trials=1")
    (tmp_path / "tiny.py").write_text(text)

    return "tiny.py"


def test_background_driver_keeps_the_copy(
    s3: Bucket, account: dict[str, str], cli: Cli, script: str, tmp_path: Path
) -> None:
    done = cli("sweep", script, f"--runs={URL}", "--detach", timeout=240, **account)
    assert done.returncode == 0 and "in the background" in done.stdout, done.stdout + done.stderr

    (log,) = tmp_path.rglob("detached.log")
    deadline = time.monotonic() + 240

    while f"All of it is in {URL}" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)

    copy = s3.get("sweeps/tiny/study.journal")

    assert copy and copy.data == (log.parent / "study.journal").read_bytes()
