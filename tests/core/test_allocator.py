r"""Tests of the memory that a process keeps."""

import os
import subprocess
import sys

import pytest

from sda_ray.core.allocator import SWITCH, give_memory_back, keep_memory

GLIBC = sys.platform.startswith("linux") and bool(os.confstr("CS_GNU_LIBC_VERSION"))

FAULTS = """
import resource, torch
from sda_ray.core.allocator import give_memory_back, keep_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

kept = keep_memory()
for _ in range(12):
    torch.ones(2**24)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = resident()
give_memory_back()
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


def test_systems_without_glibc_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    assert not keep_memory()
    give_memory_back()
