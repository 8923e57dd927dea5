r"""Tests for sda_ray.cli.detach with runs in a bucket: who copies is the driver, wherever it is."""

import argparse
import time
from pathlib import Path

import pytest
from cloud import URL, account, s3, server
from conftest import Cli
from recorded_code import SCRIPT

from sda_ray.cli.detach import _words_of_job
from sda_ray.storage.store import Bucket
from sda_ray.sweep.launch import Options

__all__ = ["account", "s3", "server"]  # fixtures


@pytest.fixture
def script(tmp_path: Path) -> str:
    text = SCRIPT.replace('"epochs": 27', '"epochs": 1').replace("trials=4", "trials=1")
    (tmp_path / "tiny.py").write_text(text)

    return "tiny.py"


def test_what_runs_in_the_background_owns_the_copy(
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


@pytest.mark.parametrize("runs", [URL, None])
def test_job_of_a_cluster_is_told_where_the_runs_are(runs: str | None, tmp_path: Path) -> None:
    options = Options(tmp_path, tmp_path / "runs", tmp_path / "data", bucket=runs)
    words = _words_of_job(["sweep", "x", "--address", "10.0.0.1:6379"], options)
    parser = argparse.ArgumentParser()

    for name in ("address", "root", "runs", "data"):
        parser.add_argument(f"--{name}")

    told, rest = parser.parse_known_args(words)

    assert vars(told) == {
        "address": "auto",
        "root": str(tmp_path),
        "runs": runs or str(tmp_path / "runs"),
        "data": str(tmp_path / "data"),
    }
    assert rest == ["sweep", "x"]
