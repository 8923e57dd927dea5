r"""Tests for sda_ray.cluster.executor: a process without a sign of life is found, and nothing else is."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from byhand import ManualDriver
from conftest import Cli, Start
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from sda_ray.cluster.executor import (
    BEATS,
    Attempt,
    Executor,
    NotStarted,
    _error_of,
    cause_of,
)
from sda_ray.cluster.ray_node import local_cpus
from sda_ray.core.lease import HEARTBEAT
from sda_ray.runs.path import RunPath
from sda_ray.storage.client import Disconnected

HOLD = """
import sys, time
from pathlib import Path
from sda_ray.core.lease import Lease
lease = Lease(Path(sys.argv[1]), "a run")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> RunPath:
    path = RunPath(tmp_path / "calm-cat-1_abcdefgh")
    path.directory.mkdir()

    return path


@pytest.fixture
def process(path: RunPath, env: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(path.lease)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt({"runs": str(tmp_path), "run_id": "abcdefgh", "attempt": 1, "stall": 30.0})


def test_process_that_is_silent_for_long_is_found(
    attempt: Attempt, process: "subprocess.Popen[str]"
) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert attempt.silence() == 0
    attempt.since -= 29.0
    assert attempt.silence() == 0
    attempt.since -= 2.0
    assert attempt.silence() > 30


def test_heartbeat_is_a_sign_of_life(
    attempt: Attempt, path: RunPath, process: "subprocess.Popen[str]"
) -> None:
    attempt.silence()
    attempt.since -= 31.0
    os.utime(path.lease)
    assert attempt.silence() == 0
    attempt.since -= 31.0
    assert attempt.silence() > 30


def test_start_may_take_longer(attempt: Attempt, path: RunPath) -> None:
    attempt.silence()
    attempt.since -= 31.0
    assert attempt.silence() == 0
    attempt.since -= 60.0
    assert attempt.silence() > 90


def test_silence_while_the_driver_was_frozen_itself_does_not_count(
    attempt: Attempt, process: "subprocess.Popen[str]"
) -> None:
    attempt.silence()
    attempt.since -= 100.0
    assert attempt.silence(fresh=True) == 0


def test_missed_heartbeat_is_no_silence_however_short_the_limit(
    attempt: Attempt, process: "subprocess.Popen[str]"
) -> None:
    attempt.spec["stall"] = 0.1
    attempt.silence()
    attempt.since -= BEATS * HEARTBEAT - 1.0
    assert attempt.silence() == 0


def test_run_without_a_directory_is_watched(tmp_path: Path) -> None:
    attempt = Attempt({"runs": str(tmp_path), "run_id": "zzzzzzzz", "attempt": 1})

    assert attempt.path is None and attempt.holder == {} and attempt.silence() == 0


# What Ray says if a node has lost its network, before it takes the node for dead
CUT = ActorUnavailableError("The actor is temporarily unavailable: RpcError.", b"a" * 16)


def test_death_of_an_actor_is_that_of_its_node_if_that_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"NodeID": name, "Alive": True} for name in ("first", "second")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    manual = ManualDriver(tmp_path / "sweep")
    executor = Executor(manual.driver, {"CPU": 1})
    executor._look_at_nodes()

    for name, node in {"a": "first", "b": "second", "c": ""}.items():  # c has not reported yet
        spec = executor.suggest(name)
        assert spec is not None
        executor.attempts[spec["index"]].node = node

    nodes[0]["Alive"] = False

    for name in "abc":
        executor.lose(name, ActorDiedError())

    assert [record.worker_deaths for record in manual.study.records()] == [0, 1, 0]


MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node was 3GB"
)


@pytest.mark.parametrize(
    ("error", "cause", "words"),
    [
        (ActorDiedError(), "worker", "died unexpectedly"),
        (RayActorError(error_msg="x", preempted=True), "node", "x"),
        (CUT, "node", "is unavailable: "),
        (OutOfMemoryError(f"{MEMORY}\nRefer to the documentation."), "memory", "was 3GB"),
        (NodeDiedError("The node died."), "node", "The node died."),
        (
            RayTaskError("train", "Traceback\nDisconnected: cut off", Disconnected("cut off")),
            "node",
            "cut off",
        ),
        (
            RayTaskError("train", "Traceback\nValueError: a bug", ValueError("a bug")),
            "worker",
            "a bug",
        ),
        (NotStarted(f"{MEMORY}\nRefer to the documentation."), "start", "was 3GB"),
        (None, "worker", "unknown"),
    ],
)
def test_cause_is_found(error: BaseException | None, cause: str, words: str) -> None:
    result, line = cause_of(error)

    assert result == cause
    assert words in line and "\n" not in line and len(line) <= 300


def test_error_of_an_unknown_class_is_no_lack_of_memory(tmp_path: Path) -> None:
    pickled, file = tmp_path / "error.pkl", tmp_path / "error.txt"
    pickled.write_bytes(b"cnowhere\nUnknown\n.")
    file.write_text("Failure # 1\nTraceback\nImportError: cannot allocate memory in TLS block\n")
    trial = SimpleNamespace(pickled_error_file=str(pickled), error_file=str(file))
    line = "ImportError: cannot allocate memory in TLS block"
    assert cause_of(_error_of(trial)) == ("worker", line)

    trial.pickled_error_file = None
    assert cause_of(_error_of(trial))[0] == "start"


SWEEP = """from sda_ray import CONFIG, Sweep, loguniform, main

SMALL = {"window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1)}
CONFIG = CONFIG | SMALL | {"batch_size": 8, "epochs": 4000}
sweep = Sweep(
    "small", CONFIG, {"learning_rate": loguniform(1e-4, 1e-2)}, trials=2, pruner="none"
)

if __name__ == "__main__":
    main(sweep)
"""


@pytest.fixture
def terminal(env: dict[str, str], data: Path, tmp_path: Path) -> Iterator[tuple[int, int]]:
    r"""A sweep that trains in a terminal of its own: its process, and the terminal."""

    (tmp_path / "small.py").write_text(SWEEP)
    command = [sys.executable, "-m", "sda_ray", "sweep", "small.py", f"--data={data}"]
    pid, fd = pty.fork()

    if not pid:
        os.chdir(tmp_path)
        os.execve(command[0], command, env | {"SDA_RAY_ROOT": str(tmp_path)})

    deadline = time.monotonic() + 240

    while not training(tmp_path):
        assert time.monotonic() < deadline
        read(fd)

    yield pid, fd

    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def training(root: Path) -> bool:
    files = [*(root / "runs").glob("*_*/metrics.jsonl")]

    return len(files) == min(2, local_cpus()) and all(
        len(file.read_text().splitlines()) > 5 for file in files
    )


def read(fd: int, seconds: float = 0.2) -> str:
    if not select.select([fd], [], [], seconds)[0]:
        return ""

    try:
        return os.read(fd, 2**16).decode(errors="replace")
    except OSError:  # the other side has ended
        time.sleep(seconds)
        return ""


@pytest.mark.parametrize("way", ["Ctrl-C", "closed", "timeout"])
def test_every_trial_saves_a_checkpoint_when_its_terminal_says_so(
    terminal: tuple[int, int], tmp_path: Path, way: str
) -> None:
    r"""All its processes get the signal; a closed one cannot be printed to; `timeout` sends two."""

    pid, fd = terminal
    now = time.time()

    if way == "Ctrl-C":
        os.write(fd, b"\x03")
    elif way == "timeout":
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        os.killpg(pid, signal.SIGTERM)
    else:
        os.close(fd)

    text, deadline = "", time.monotonic() + 120

    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.monotonic() < deadline, text
        text += read(fd) if way != "closed" else ""
        time.sleep(0.05)

    runs = [*(tmp_path / "runs").glob("*_*")]
    code = {"Ctrl-C": 130, "closed": 129, "timeout": 143}[way]
    assert os.waitstatus_to_exitcode(ended[1]) == code
    assert all((run / "checkpoint.pth").stat().st_mtime > now for run in runs)
    statuses = [json.loads((run / "run.json").read_text())["status"] for run in runs]
    assert statuses == len(runs) * ["interrupted"]

    if way != "closed":
        text += read(fd) + read(fd)
        assert "Nothing is lost" in " ".join(text.split())
        assert "dead" not in text


def below(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from below(int(child))


def program(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].rpartition("/")[2]

    return ""


def test_sweep_whose_ray_dies_ends_soon_and_can_be_resumed(start: Start, tmp_path: Path) -> None:
    r"""Ray's own functions would wait for a minute, then end the process without a word."""

    (tmp_path / "small.py").write_text(SWEEP)
    sweep = start("sweep", "small.py", "--parallel=1")

    def lines() -> int:
        return sum(
            len(x.read_text().splitlines()) for x in tmp_path.glob("runs/*_*/metrics.jsonl")
        )

    for name in ("gcs_server", "raylet"):
        before = lines()
        wait_for(lambda before=before: lines() > before, sweep)  # type: ignore[misc]
        processes = [*below(sweep.pid)]
        (server,) = [pid for pid in processes if program(pid) == name]
        os.kill(server, signal.SIGKILL)
        since = time.monotonic()
        _, errors = sweep.communicate(timeout=120)

        assert sweep.returncode == 2, errors
        assert time.monotonic() - since < 30
        assert errors.rstrip().splitlines()[-1].startswith("sda-ray: Ray is gone: ")
        assert errors.rstrip().endswith("from their last checkpoint with `sda-ray sweep small`.")
        assert "Traceback" not in errors and errors.count("Ray is gone") == 1

        sweep = start("sweep", "small", "--parallel=1")
        stdout = sweep.stdout
        assert stdout is not None
        wait_for(lambda stdout=stdout: "is resumed" in stdout.readline(), sweep)  # type: ignore[misc]

    sweep.send_signal(signal.SIGTERM)
    out, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 143, out + errors
    assert "Nothing is lost" in out


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240

    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_run_whose_workers_are_killed_by_the_memory_monitor_fails_for_that(
    cli: Cli, tmp_path: Path
) -> None:
    r"""Tune ends with that error of Ray, which it does not expect: the sweep does not."""

    (tmp_path / "small.py").write_text(SWEEP)
    done = cli(
        "sweep",
        "small.py",
        "--parallel=1",
        timeout=400,
        RAY_memory_usage_threshold="0.001",
        RAY_memory_monitor_refresh_ms="250",
    )

    assert done.returncode == 2, done.stdout + done.stderr
    assert " 2 times, last of: " in done.stderr + done.stdout
    assert "running low on memory" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
