r"""Tests for sda_ray.core.system."""

import io
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sda_ray.core.errors import UserError
from sda_ray.core.system import (
    SWITCH,
    cgroup_cpus,
    cgroup_memory,
    deadline,
    margin,
    on_signals,
    try_print,
)

GLIBC = sys.platform.startswith("linux") and bool(os.confstr("CS_GNU_LIBC_VERSION"))

FAULTS = """
import resource, torch
from sda_ray.core.system import release_memory, keep_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

kept = keep_memory()
for _ in range(12):
    torch.ones(2**24)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = resident()
release_memory()
print(int(kept), faults * resource.getpagesize(), held - resident())
"""


def run(keep: str) -> list[int]:
    command = [sys.executable, "-c", FAULTS]
    env = os.environ | {SWITCH: keep}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)

    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="there is no glibc")
def test_memory_that_is_freed_is_kept_and_can_be_given_back() -> None:
    kept, faults, freed = run("1")

    assert kept == 1
    assert faults < 2**20
    assert freed > 2**25


@pytest.mark.skipif(not GLIBC, reason="there is no glibc")
def test_switch_leaves_the_allocator_alone() -> None:
    kept, faults, _ = run("0")

    assert kept == 0
    assert faults > 2**25


def left(hours: float | None, **environ: str) -> float:
    end = deadline(hours, environ)
    assert end is not None

    return end - time.monotonic()


def test_time_has_no_end_unless_somebody_says_so() -> None:
    assert deadline(None, {}) is None
    assert deadline(None, {"SLURM_JOB_END_TIME": ""}) is None


def test_earlier_end_counts() -> None:
    slurm = str(time.time() + 7200)

    assert left(1.0) == pytest.approx(3600, abs=2)
    assert left(1.0, SLURM_JOB_END_TIME=slurm) == pytest.approx(3600, abs=2)
    assert left(9.0, SLURM_JOB_END_TIME=slurm) == pytest.approx(7200 - 90, abs=2)


def test_end_of_a_job_that_has_ended_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    past = str(time.time() - 5)

    assert deadline(None, {"SLURM_JOB_END_TIME": past}) is None
    assert "SLURM_JOB_END_TIME is that of a job that has ended" in caplog.text
    assert left(1.0, SLURM_JOB_END_TIME=past) == pytest.approx(3600, abs=2)


def test_end_of_a_job_that_is_no_time_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert left(1.0, SLURM_JOB_END_TIME="Unknown") == pytest.approx(3600, abs=2)
    assert "SLURM_JOB_END_TIME is 'Unknown', which is not a time" in caplog.text


@pytest.mark.parametrize("hours", [0.0, -1.0, math.nan, math.inf])
def test_hours_that_are_none_are_refused(hours: float) -> None:
    with pytest.raises(UserError, match="--hours is"):
        deadline(hours, {})


def test_margin_is_enough_for_a_checkpoint_and_never_most_of_the_time() -> None:
    assert margin(0.0, 3600) == 30
    assert margin(100.0, 3600) == 200
    assert margin(0.0, 20) == 10
    assert margin(1e9, 3600) == 1800


V1 = {
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
    "cpu/a/cpu.cfs_quota_us": "150000",
    "cpu/a/cpu.cfs_period_us": "100000",
    "cpu/a/b/cpu.cfs_quota_us": "-1",
    "cpu/a/b/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/a/memory.limit_in_bytes": "4096",
    "memory/a/b/memory.limit_in_bytes": "9223372036854771712",
}
V2 = {
    "a/cpu.max": "150000 100000",
    "a/memory.max": "4096",
    "a/b/cpu.max": "max 100000",
    "a/b/memory.max": "8192",
}
V1_CONTAINER = {  # sees its own group as the top, and the path of the host
    "cpu/cpu.cfs_quota_us": "150000",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": "4096",
}


@pytest.mark.parametrize(
    ("group", "files", "cpus", "memory"),
    [
        ("9:name=systemd:/x\n5:memory:/a/b\n3:cpuacct,cpu:/a/b\n0::/\n", V1, 1.5, 4096),
        ("5:memory:/docker/1\n3:cpu:/docker/1\n", V1_CONTAINER, 1.5, 4096),
        ("0::/a/b\n", V2, 1.5, 4096),
        ("0::/c\n", V2, math.inf, math.inf),
        (None, {}, math.inf, math.inf),
    ],
)
def test_least_limit_of_nested_cgroups_counts(
    group: str | None,
    files: dict[str, str],
    cpus: float,
    memory: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sda_ray.core.system.CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr("sda_ray.core.system.CGROUPS", tmp_path)

    if group is not None:
        (tmp_path / "cgroup").write_text(group)

    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"{text}\n")

    assert cgroup_cpus() == cpus
    assert cgroup_memory() == memory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signal_that_comes_to_the_process_and_to_its_group_counts_once(number: int) -> None:
    r"""Twice, a sweep would stop at once, without checkpoints."""

    received: list[int] = []

    with on_signals(received.append):
        signal.raise_signal(number)
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGHUP)
        assert received == [number]

        signal.raise_signal(signal.SIGINT)  # by hand
        signal.raise_signal(signal.SIGINT)
        assert received == [number, signal.SIGINT, signal.SIGINT]

        time.sleep(1.1)
        signal.raise_signal(number)
        assert received[3:] == [number]


def test_signal_in_the_middle_of_a_print_may_print(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            try_print("Stopping")  # as a signal's handler does

            return len(data)

    with io.TextIOWrapper(io.BufferedWriter(Stream())) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("a line", flush=True)
        monkeypatch.undo()
