r"""Tests for sda_ray.sweep.driving: workers killed, drivers stopped, runs that fail or vanish."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from scene import GRID, Place, lines, place

from sda_ray.core.lease import holder
from sda_ray.runs.path import RunPath
from sda_ray.sweep.driving import _again

__all__ = ["place"]  # fixtures


def test_killed_worker_and_stopped_driver_cost_no_bit(place: Place) -> None:
    words = ["tiny.py", "--name", "long", "--trials", "1", "epochs=150", "--parallel", "1"]
    driver = place.start("sweep", *words)

    def at_work() -> RunPath | None:
        for path in RunPath.all(place.runs):
            record = json.loads(path.record.read_text()) if path.record.exists() else {}

            if record.get("sweep") == "long" and path.metrics.exists() and len(lines(path)) > 10:
                return path

        return None

    path = place.wait(at_work)
    worker = holder(path.lease)
    assert worker is not None
    os.kill(worker["pid"], signal.SIGKILL)
    place.wait(lambda: (holder(path.lease) or worker)["attempt"] == 2)
    done = len(lines(path))
    place.wait(lambda: len(lines(path)) > done + 5)

    driver.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, out
    assert "Traceback" not in out
    assert "is lost" in out
    assert time.monotonic() - start < 15
    assert json.loads(path.record.read_text())["status"] == "interrupted"
    assert len(lines(path)) < 150

    assert "carry on with `sda-ray sweep long`" in out

    place.run("sweep", "long")
    (record,) = place.records("long")
    assert (record.state, record.attempt) == ("complete", 3)
    assert lines(path) == list(range(1, 151))
    assert place.same_as_alone(record)


def test_bug_in_all_runs_stops_the_sweep_until_it_is_mended(place: Place) -> None:
    shutil.copytree(place.root / "data", place.root / "broken")
    valid = place.root / "broken" / "valid.h5"
    driver = place.start("sweep", "tiny.py", "--name", "broken", "--data", "broken", "epochs=1")
    place.wait(lambda: (place.runs / "sweeps" / "broken" / "study.journal").exists())
    valid.rename(place.root / "kept.h5")  # every check has passed by now
    out, _ = driver.communicate(timeout=120)

    assert driver.returncode == 2, out
    assert "runs failed alike, so the sweep stops: " in out
    assert "valid.h5" in out
    assert "carry on with `sda-ray sweep broken`" in out
    assert "Traceback" not in out

    failed = [r for r in place.records("broken") if r.state == "failed"]
    assert len(failed) >= 3
    assert all("Traceback" in place.path(r).error.read_text() for r in failed)

    (place.root / "kept.h5").rename(valid)
    place.run("sweep", "broken", "--trials", "3")
    records = place.records("broken")
    assert sum(r.state == "complete" for r in records) == 3
    assert sum(r.state == "failed" for r in records) == len(failed)


def test_run_whose_directory_vanishes_fails_and_the_sweep_goes_on(place: Place) -> None:
    script = GRID.replace("choice(100.0, 1e-3)", "choice(2e-3, 1e-3)")
    (place.root / "gone.py").write_text(script.replace('"epochs": 9', '"epochs": 60'))
    words = ("sweep", "gone.py", "--name=gone", "--wandb=disabled", "--parallel=1")
    before = set(RunPath.all(place.runs))
    process = place.start(*words)

    def begun() -> list[RunPath]:
        new = set(RunPath.all(place.runs)) - before
        return [path for path in new if path.metrics.exists()]

    (path,) = place.wait(begun)
    shutil.rmtree(path.directory)
    out, _ = process.communicate(timeout=120)

    assert process.returncode == 0, out
    assert "Traceback" not in out and not path.directory.exists()
    first, *rest = place.records("gone")
    assert first.state == "failed" and "was deleted or unmounted" in first.error
    assert rest and {record.state for record in rest} == {"complete"}


def test_interrupt_while_ray_starts_is_clean(place: Place) -> None:
    driver = place.start("sweep", "tiny.py", "--name", "early")
    assert driver.stdout is not None

    for line in driver.stdout:
        if "rungs at epochs" in line:
            break

    time.sleep(0.3)
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=60)

    assert driver.returncode == 130, out
    assert "Traceback" not in out
    assert "carry on with `sda-ray sweep early`" in out
    assert place.records("early") == []


def test_command_that_carries_on_has_all_that_matters(tmp_path: Path) -> None:
    here = Path.cwd()
    assert _again("x", here, here / "runs", None) == "sda-ray sweep x"
    assert _again("x", here, "s3://bucket/x", "auto") == (
        "sda-ray sweep x --runs s3://bucket/x --address auto"
    )
    assert _again("x", tmp_path, tmp_path / "runs", None) == f"sda-ray sweep x --root {tmp_path}"
