r"""Tests for sda_ray.cluster.slurm: jobs that carry out sweeps."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sda_ray.cluster.join import read_head
from sda_ray.core.lease import read_holder
from sda_ray.runs.path import RunPath
from sda_ray.runs.record import read_record

SWEEP = """
from sda_ray import CONFIG, Sweep, loguniform, main

sweep = Sweep("jobs", CONFIG, {"weight_decay": loguniform(1e-4, 1e-2)}, trials=1, pruner="none")

if __name__ == "__main__":
    main(sweep)
"""

# Says what it was called with, and answers as Slurm does for a job that runs for an hour more
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> "$SAID"
case "$(basename "$0") $*" in
    *%T*) echo "${STATE:-RUNNING}" ;;
    *%L*) echo 1:00:00 ;;
    *hostnames*) echo n1; echo 127.0.0.1 ;;
    srun*) cat > /dev/null; sleep 3; echo "all have left" >> "$SAID" ;;
    sbatch*) echo "Submitted batch job 7" ;;
esac
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    file = tmp_path / "jobs sweep.py"
    file.write_text(SWEEP)

    return file


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    r"""The variables of processes that find a stand-in for Slurm."""

    (tmp_path / "bin").mkdir()

    for name in ("sbatch", "squeue", "scontrol", "srun"):
        file = tmp_path / "bin" / name
        file.write_text(STAND_IN)
        file.chmod(0o755)

    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SAID": str(tmp_path / "said")}


def script_of(root: Path) -> str:
    return (root / "runs/sweeps/jobs/slurm.sh").read_text()


def asked_by(script: str) -> list[str]:
    r"""Returns what a script asks of Slurm."""

    return [x.removeprefix("#SBATCH ") for x in script.splitlines() if x.startswith("#SBATCH")]


def test_script_is_written_and_shown_but_not_submitted(
    cli_here: Any, sweep: Path, settings: list[str], slurm: dict[str, str], tmp_path: Path
) -> None:
    done = cli_here(
        "slurm", sweep.name, *settings, "--trials", "4", "--", "--nodes=2", "-c", "8", **slurm
    )
    assert done.returncode == 0, done.stderr

    script = script_of(tmp_path)
    directory = tmp_path / "runs/sweeps/jobs"
    assert script in done.stdout
    assert f"sbatch {directory / 'slurm.sh'}" in done.stdout
    assert os.access(directory / "slurm.sh", os.X_OK)
    assert not Path(slurm["SAID"]).exists()

    # What the user asks for comes last, and what the sweep needs is there
    assert asked_by(script)[-2:] == ["--nodes=2", "-c 8"]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= set(asked_by(script))

    # Wherever the job starts, it finds everything
    command = script.rstrip().splitlines()[-1]
    assert f"--job=jobs '{sweep}'" in command
    assert f"--root={tmp_path} --runs={tmp_path / 'runs'} --data=" in command
    assert "--trials 4" in command
    assert subprocess.run(["bash", "-n", directory / "slurm.sh"]).returncode == 0


def test_job_is_submitted_on_request(
    cli: Any, sweep: Path, settings: list[str], slurm: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "elsewhere" / "job.sh"
    done = cli(
        "slurm", sweep.name, *settings, "--submit", f"--output={file}", "--", "-c8", **slurm
    )

    assert done.returncode == 0, done.stderr
    assert "Submitted batch job 7" in done.stdout
    assert Path(slurm["SAID"]).read_text() == f"sbatch {file}\n"


def test_wish_of_the_user_takes_the_place_of_ours(
    cli_here: Any, sweep: Path, settings: list[str], tmp_path: Path
) -> None:
    given = ["-J", "mine", "--no-requeue", "--output=a b.log", "--signal=B:USR1@300", "-n4"]
    done = cli_here("slurm", sweep.name, *settings, "--", *given)

    assert done.returncode == 0, done.stderr
    asked = asked_by(script_of(tmp_path))
    assert asked == [
        *["--open-mode=append", "-J mine", "--no-requeue", '"--output=a b.log"'],
        *["--signal=B:USR1@300", "-n4"],
    ]
    assert "--cpus-per-task" in done.stdout  # none are asked for


def test_log_is_in_a_directory_of_any_name(
    cli_here: Any, sweep: Path, settings: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "50%j of it"
    done = cli_here("slurm", sweep.name, *settings, "--root", str(root), "--", r"--comment=a\b")
    assert done.returncode == 0, done.stderr

    asked = asked_by((root / "runs/sweeps/jobs/slurm.sh").read_text())
    (log,) = [x for x in asked if "--output" in x]
    assert log == f'"--output={tmp_path}/50%%j of it/runs/sweeps/jobs/slurm-%j.log"'
    assert asked[-1] == r'"--comment=a\\b"'  # Slurm takes a backslash for a quote


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--root=a\\b"], "has a backslash, which turns off the %j in the names of Slurm's log"),
        (["--time=1:00"], "there is no option --time"),
        (["--time=1:00"], "Options of sbatch come after --, as in: -- --time …"),
        (["-c", "8"], "Options of sbatch come after --, as in: -- -c …"),
        (["--address=auto"], "--address does not go with Slurm"),
        (["--fork"], "--fork needs --name"),
        (["--", "nodes=2"], "'nodes=2' is no option of sbatch"),
        (["--", "--comment=a\nb"], "has a line break"),
        (["--root=a\nb"], "has a line break"),
        (["--runs=a\nb"], "has a line break"),
        (["--output=a\nb"], "has a line break"),
        (["--", "--signal=TERM@60"], "understands --signal=B:USR1@SECONDS"),
        (["--submit"], "there is no sbatch here"),
        (["learning_rates=1"], "Did you mean 'learning_rate'?"),
    ],
)
def test_mistake_is_told_before_a_job_waits_for_days(
    cli_here: Any, sweep: Path, settings: list[str], words: list[str], said: str, tmp_path: Path
) -> None:
    done = cli_here("slurm", sweep.name, *settings, *words)

    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.rglob("slurm.sh")) and not list(tmp_path.glob("a*"))


@pytest.fixture
def short() -> Iterator[Path]:
    r"""A short directory, since Ray puts sockets below it."""

    place = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def carry_out(root: Path, env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    r"""Starts the script of a job as Slurm does."""

    with open(log, "ab") as output:
        return subprocess.Popen(
            [root / "runs/sweeps/jobs/slurm.sh"],
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def test_job_is_requeued_when_its_time_is_up_and_done_when_the_sweep_is(
    cli_here: Any,
    sweep: Path,
    settings: list[str],
    slurm: dict[str, str],
    env: dict[str, str],
    tmp_path: Path,
    short: Path,
) -> None:
    done = cli_here(
        *["slurm", sweep.name, *settings, "epochs=400", "--enqueue=weight_decay=1e-3"],
        *["--", "-c1", "--time=1:00:00"],
    )
    assert done.returncode == 0, done.stderr
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "1"}
    env, log = env | slurm | job | {"TMPDIR": str(short)}, tmp_path / "job.log"
    directory = tmp_path / "runs/sweeps/jobs"
    process = carry_out(tmp_path, env, log)

    try:
        # It runs on Ray of its own, with its share of the machine
        deadline = time.monotonic() + 300

        while not list(tmp_path.glob("runs/*/metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

        assert "1 CPUs here" in log.read_text()

        # The token is nobody else's, and in no command
        token = (directory / "token").read_text().strip()
        files = [directory / "token", *short.glob("sda-ray-*/token")]
        assert len(files) == 2
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
        assert all(stat.S_IMODE(x.stat().st_mode) == 0o700 for x in short.glob("sda-ray-*"))
        assert token not in script_of(tmp_path) + log.read_text()
        said = [
            file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if readable(file)
        ]
        assert not any(token.encode() in words for words in said)
        assert (read_head(directory) or {})["attempt"] == 1

        # Shortly before the end
        process.send_signal(signal.SIGUSR1)
        assert process.wait(300) == 75, log.read_text()
        assert "scontrol requeue 7" in Path(slurm["SAID"]).read_text()
        run = RunPath(next(tmp_path.glob("runs/*/metrics.jsonl")).parent)
        assert run.checkpoint.exists()
        assert read_record(run)["status"] == "interrupted"
        assert read_head(directory) is None and not (directory / "token").exists()
        assert list(short.glob("sda-ray-*")) == []

        # As it was left; what was asked of the first start is not asked again
        process = carry_out(tmp_path, env | {"SLURM_RESTART_COUNT": "1"}, log)
        assert process.wait(1200) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait(60)

    assert Path(slurm["SAID"]).read_text().count("requeue") == 1
    assert len(list(tmp_path.glob("runs/*/state.pth"))) == 1
    assert (read_holder(directory / "lease.json") or {})["attempt"] == 2
    assert "queue/2" not in (directory / "study.journal").read_text()


def test_job_is_requeued_before_its_nodes_are_let_go_of(
    slurm: dict[str, str], env: dict[str, str], tmp_path: Path, short: Path
) -> None:
    r"""To let go of one that is cut off takes longer than what is left."""

    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sda_ray.cluster.slurm", "missing"],
        env=env | slurm | job | {"TMPDIR": str(short), "SDA_RAY_ROOT": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and "job 7" in process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    said = Path(slurm["SAID"]).read_text().splitlines()

    assert process.returncode == 75, out
    assert said[-2:] == ["scontrol requeue 7", "all have left"]


def readable(file: Path) -> bool:
    try:
        return bool(file.read_bytes())
    except OSError:
        return False
