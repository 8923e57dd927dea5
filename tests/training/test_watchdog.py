r"""Tests for sda_ray.training.watchdog: what hangs is ended, with its stacks; what is slow is not."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sda_ray.training.watchdog import Watchdog, take_stacks

BEGIN = """
import sys, time
from pathlib import Path
from sda_ray.training.watchdog import Watchdog

def hang():
    time.sleep(30)

watchdog = Watchdog(Path(sys.argv[1]), float(sys.argv[2]))
watchdog.phase()
"""


def run(file: Path, least: float, then: str, env: dict[str, str]) -> int:
    command = [sys.executable, "-c", BEGIN + then, str(file), str(least)]

    return subprocess.run(command, env=env, timeout=25, capture_output=True).returncode


def test_step_that_hangs_ends_the_process_and_leaves_its_stacks(
    tmp_path: Path, env: dict[str, str]
) -> None:
    file = tmp_path / "stacks.txt"
    start = time.monotonic()

    assert run(file, 1.0, "time.sleep(1.1); watchdog.step(); hang()", env) == 1
    assert time.monotonic() - start < 20
    assert "in hang" in file.read_text()

    assert take_stacks(file, 3) and "attempt 3" in file.read_text()
    assert not take_stacks(file, 4)  # nothing new


def test_start_up_that_hangs_ends_the_process_too(tmp_path: Path, env: dict[str, str]) -> None:
    assert run(tmp_path / "stacks.txt", 0.3, "hang()", env) == 1
    assert "in hang" in (tmp_path / "stacks.txt").read_text()


def test_slow_phases_rest_and_usually_slow_steps_do_not_end_the_process(
    tmp_path: Path, env: dict[str, str]
) -> None:
    then = """
time.sleep(1.2)                      # start-up
for _ in range(3):
    watchdog.step(); time.sleep(0.3)
watchdog.phase(); time.sleep(1.2)    # validation
watchdog.step(); time.sleep(1.2)     # at most 20 times what is usual
watchdog.step(); watchdog.rest(); time.sleep(2)
assert watchdog.longest > 1
watchdog.close(); watchdog.close()
"""
    assert run(tmp_path / "stacks.txt", 0.5, then, env) == 0
    assert not (tmp_path / "stacks.txt").exists()


def test_stacks_of_an_attempt_before_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "stacks.txt"
    file.write_text("old stacks\n")
    Watchdog(file).close()

    assert file.read_text() == "old stacks\n"


def test_training_continues_without_a_watchdog_if_stacks_cannot_be_saved(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "missing" / "stacks.txt", 0.01)
    watchdog.phase()
    watchdog.step()
    time.sleep(0.1)
    watchdog.close()

    assert not take_stacks(tmp_path / "missing" / "stacks.txt", 1)


@pytest.mark.parametrize("seconds", [1e-4])
def test_watchdog_costs_little(tmp_path: Path, seconds: float) -> None:
    watchdog = Watchdog(tmp_path / "stacks.txt")
    watchdog.phase()
    start = time.process_time()

    for _ in range(10_000):
        watchdog.step()

    watchdog.close()
    assert (time.process_time() - start) / 10_000 < seconds
