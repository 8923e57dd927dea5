r"""Tests that files written by an earlier version open and resume.

`reference/flat-layout.tar.xz` was written when the package was one folder of modules: a sweep that
was interrupted, a finished one, a training that was interrupted, and a sweep in a bucket, on tiny
data. `expected.json` in it has what that version made of the first three when it resumed them.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cloud import account, server

__all__ = ["account", "server"]  # fixtures

ARCHIVE = Path(__file__).parent / "reference" / "flat-layout.tar.xz"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")

    return tmp_path


def run(root: Path, env: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "sda_ray", *words, f"--root={root}"]
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    return done.stdout


def outcome(root: Path, sweep: str | None) -> dict[int, dict[str, Any]]:
    r"""Returns the runs of a sweep by trial number, as `expected.json` has them.

    The ids of runs that have started since are random, and so are their names.
    """

    runs = {}

    for directory in (root / "runs").glob("*_????????"):
        record = json.loads((directory / "run.json").read_text())

        if record.get("sweep") == sweep:
            config = json.loads((directory / "config.json").read_text())
            lines = (directory / "metrics.jsonl").read_text().splitlines()
            runs[record.get("trial", 0)] = {
                "status": record["status"],
                "config": {key: config[key] for key in ("activation", "learning_rate")},
                "loss_valid": [json.loads(line)["loss_valid"] for line in lines],
            }

    return runs


def check(root: Path, sweep: str | None) -> None:
    r"""Asserts that the runs of a sweep are as expected, up to the rounding of another machine."""

    every = json.loads((root / "expected.json").read_text()).values()
    found, wanted = outcome(root, sweep), [run for run in every if run["sweep"] == sweep]
    assert set(found) == {run["trial"] or 0 for run in wanted}

    for run in wanted:
        trial = found[run["trial"] or 0]
        assert trial["loss_valid"] == pytest.approx(run["loss_valid"], rel=1e-3)
        assert (trial["status"], trial["config"]) == (run["status"], run["config"])


def test_interrupted_sweep_resumes_as_it_would_have(root: Path, env: dict[str, str]) -> None:
    before = {path.name for path in (root / "runs").iterdir()}
    run(root, env, "sweep", "paused", "--code=current", "--parallel=1")

    assert before < {path.name for path in (root / "runs").iterdir()}
    check(root, "paused")


def test_finished_sweep_is_shown_and_extended(root: Path, env: dict[str, str]) -> None:
    assert "fortunate-oxpecker-2" in run(root, env, "sweep", "finished", "--code=current")
    check(root, "finished")

    # With the rungs of its record: defaults have changed since
    words = ("--trials=5", "--code=current", "--parallel=1")
    assert "rungs at epochs 1, 3, 9" in run(root, env, "sweep", "finished.py", *words)
    assert set(outcome(root, "finished")) == {1, 2, 3, 4, 5}


def test_interrupted_training_resumes(root: Path, env: dict[str, str]) -> None:
    run(root, env, "train", "--resume", "3lfdrjga")
    check(root, None)


def test_runs_are_listed(root: Path, env: dict[str, str]) -> None:
    shown = run(root, env, "runs")
    assert all(path.name.rsplit("_")[1] in shown for path in (root / "runs").glob("*_????????"))


def test_sweep_in_a_bucket_is_fetched(
    root: Path, env: dict[str, str], account: dict[str, str]
) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=account["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="eu-central-1",
    )
    client.create_bucket(
        Bucket="earlier-bucket",
        CreateBucketConfiguration={"LocationConstraint": "eu-central-1"},
    )

    for file in (root / "bucket").rglob("*"):
        if file.is_file():
            key = file.relative_to(root / "bucket").as_posix()
            client.put_object(Bucket="earlier-bucket", Key=key, Body=file.read_bytes())

    other = root / "other"
    other.mkdir()
    runs = "--runs=s3://earlier-bucket/kolmogorov/runs"
    shown = run(other, env | account, "sweep", "cloud", "--code=current", runs)

    assert "swinging-zebra-2_6ojputa6" in shown
    assert (next(other.rglob("swinging-zebra-2_6ojputa6")) / "metrics.jsonl").is_file()
