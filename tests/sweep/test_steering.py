r"""Tests for sda_ray.sweep.steering, and for what befalls trials: real sweeps, steered and tortured."""

import ast
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease, holder
from sda_ray.runs.path import RunPath
from sda_ray.sweep.steering import Absent, ask, live, stop_sweep

PROGRAM = """
import os, sys
from contextlib import ExitStack
from pathlib import Path
from sda_ray.cluster.connect import connect
from sda_ray.core.config import CONFIG
from sda_ray.sweep.requests import attended
from sda_ray.sweep.driver import Driver
from sda_ray.core.lease import Lease
from sda_ray.search.promotion import Rules
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study

root, trials, epochs, slots = Path.cwd(), *map(int, sys.argv[1:])
directory = root / "runs" / "sweeps" / "test"
directory.mkdir(parents=True)
lease = Lease(directory / "lease.json", "sweep 'test'")
study = Study(directory / "study.journal", "test", lease)
config = CONFIG | {
    "window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1),
    "epochs": epochs, "batch_size": 8,
}

def draw(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}

def notify(event, record):
    if event == "memory":  # there is enough now
        os.replace(root / "data" / "enough.h5", root / "data" / "valid.h5")

    if event != "running":
        print((event, record.index, record.attempt, record.error), flush=True)

rules = Rules(trials, epochs)
spec = {
    "runs": str(root / "runs"), "data": str(root / "data"), "config": config, "stall": 2.0,
    "rungs": rules.rungs, "cpus": 1, "wandb": {"mode": "disabled"}, "record": {"sweep": "test"},
    "request": str(directory / "stop"),
}
driver = Driver(
    study, rules, lambda seen, fixed: propose(draw, seen, 0, "random", fixed), spec,
    lambda: slots, notify, directory / "stop", retarget=lambda n: print(("target", n, 0, ""), flush=True),
)

with ExitStack() as stack:
    with attended(driver):
        scratch = stack.enter_context(connect(cpus=2))

    from sda_ray.cluster.executor import execute
    execute(driver, {"cpu": 1, "gpu": 0}, scratch, own=True)

for record in study.records():
    print(("end", record.index, record.last, record.state), flush=True)

lease.release()
"""


class Place:
    r"""Creates a root in which a sweep runs, which is to be watched and disturbed."""

    def __init__(self, root: Path, data: Path, env: dict[str, str]) -> None:
        self.root = root
        self.env = {**env, "HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        self.env["TUNE_RESULT_BUFFER_LENGTH"] = "10"  # somebody's habit, of no effect here
        self.directory = root / "runs" / "sweeps" / "test"
        self.log = root / "log"

        for name in ("home", "tmp"):
            (root / name).mkdir()

        shutil.copytree(data, root / "data")

    def start(self, *words: str) -> None:
        command = [sys.executable, "-c", PROGRAM, *words]

        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.root, env=self.env, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, what: Callable[[], Any], seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds

        while not (found := what()):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

        return found

    def events(self, kind: str = "") -> list[tuple[Any, ...]]:
        lines = [x for x in self.log.read_text().splitlines() if x.startswith("('")]
        events = [ast.literal_eval(line) for line in lines]

        return [event for event in events if kind in ("", event[0])]

    def at_work(self, index: int, attempt: int) -> tuple[RunPath, int]:
        r"""Waits until an attempt at a run has logged epochs; returns the run and the process."""

        def find() -> Any:
            for path in RunPath.all(self.root / "runs"):
                held = holder(path.lease) or {}
                known = held and path.record.exists()
                trial = json.loads(path.record.read_text())["trial"] if known else 0
                logged = path.metrics.exists() and len(path.metrics.read_text().splitlines())

                if (trial, held.get("attempt")) == (index, attempt) and held["pid"] and logged:
                    return path, held["pid"]

        return self.wait(find)

    def end(self) -> dict[int, tuple[int, str]]:
        r"""Waits for the end and returns the last epoch and the state of each run."""

        assert self.process.wait(timeout=180) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()

        return {index: (last, state) for _, index, last, state in self.events("end")}


def make_vast(file: Path) -> None:
    r"""Makes a file of trajectories, of which no machine has the memory to load the windows."""

    with h5py.File(file, "w") as f:
        space = h5py.h5s.create_simple((400_000, 4, 2, 512, 512))
        form = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        form.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        form.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # so that the file is a hole
        h5py.h5d.create(f.id, b"x", h5py.h5t.IEEE_F32LE, space, form)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def place(data: Path, env: dict[str, str]) -> Iterator[Place]:
    root = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))  # short, for Ray's sockets
    place = Place(root, data, env)
    yield place
    place.process.kill()
    place.process.wait()
    shutil.rmtree(root, ignore_errors=True)


def test_live_sweep_is_steered_from_elsewhere(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(kind: str, **content: Any) -> str:
        start = time.monotonic()
        text = ask(place.directory, kind, **content)
        assert time.monotonic() - start < 5
        assert capsys.readouterr().out == f"{text}.\n"

        return text

    place.start("1", "100000", "1")
    driver = place.wait(lambda: live(place.directory))
    assert driver["pid"] == place.process.pid

    # While Ray starts
    assert say("trials", trials=3).endswith("goes on to 3 trials: 3 more")
    assert place.wait(lambda: place.events("target")) == [("target", 3, 0, "")]

    with pytest.raises(UserError) as error:  # a second driver
        Lease(place.directory / "lease.json", "sweep 'test'")

    for word in (driver["host"], str(driver["pid"]), driver["since"]):
        assert word in str(error.value)

    # While trials are at work
    path, pid = place.at_work(1, 1)
    assert "pandas" not in Path(f"/proc/{pid}/maps").read_text()  # as Tune would load it
    assert say("enqueue", items=[{"learning_rate": 0.002}]) == (
        "1 configuration queued, to be tried next"
    )

    with pytest.raises(UserError, match="trials is 0"):
        ask(place.directory, "trials", trials=0)

    assert say("stop", trial=1).startswith("run 1 stops after its step")
    second, _ = place.at_work(2, 1)  # its slot is free
    assert json.loads(second.config.read_text())["learning_rate"] == 0.002
    assert json.loads(path.record.read_text())["status"] == "stopped"
    assert path.checkpoint.exists()

    assert "1 run at work" in say("stop")
    runs = place.end()
    assert runs[1][1] == "stopped" and runs[1][0] > 0
    assert runs[2][1] == "running" and runs[2][0] > 0
    assert json.loads(second.record.read_text())["status"] == "interrupted"

    # While nobody is there
    with pytest.raises(Absent, match="nobody is at sweep 'test' now"):
        ask(place.directory, "trials", trials=9)

    with pytest.raises(UserError, match="there is no sweep"):
        stop_sweep(place.root / "runs", "other")

    assert list((place.directory / "requests").iterdir()) == []


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1"
    if Path("/proc/sys/vm/overcommit_memory").exists()
    else True,
    reason="this kernel promises memory that it has not got",
)
def test_hung_frozen_killed_and_starved_trials_are_adopted_and_complete(place: Place) -> None:
    (place.root / "data" / "valid.h5").rename(place.root / "data" / "enough.h5")
    make_vast(place.root / "data" / "valid.h5")
    place.start("2", "60", "1")

    # Its place on a lock hangs
    path, pid = place.at_work(1, 2)

    with open(path.lease.with_suffix(".lock"), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place.wait(lambda: is_gone(pid))

    stacks = path.directory / "stacks.txt"
    assert "in _lock" in stacks.read_text()

    _, pid = place.at_work(1, 3)
    os.kill(pid, signal.SIGSTOP)
    path, pid = place.at_work(1, 4)
    assert "no sign of life for " in stacks.read_text()
    os.kill(pid, signal.SIGKILL)

    assert place.end() == {1: (60, "complete"), 2: (60, "complete")}
    events = [event for event in place.events() if event[1] == 1]
    assert [event[0] for event in events[:-1]] == [
        *("draw", "memory", "adopt", "lost", "adopt", "lost", "adopt", "lost", "adopt", "complete")
    ]
    memory, hung, frozen, killed = (e[3] for e in events if e[0] in ("memory", "lost"))
    assert "out of memory" in memory and "a peak of" in memory
    assert "its process hung: " in hung and "stacks.txt says where" in hung
    assert "no sign of life" in frozen and "stopped" in frozen
    assert "its worker process has died" in killed
    assert [json.loads(x)["epoch"] for x in path.metrics.read_text().splitlines()] == list(
        range(1, 61)
    )


def test_tune_takes_the_end_of_a_worker_by_the_memory_monitor_for_a_death() -> None:
    import inspect

    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    from sda_ray.cluster.patches import as_death

    parameters = inspect.signature(RayActorManager._actor_task_failed).parameters
    assert list(parameters) == ["self", "tracked_actor_task", "exception"]

    death = as_death(OutOfMemoryError("the node running low on memory"))
    assert isinstance(death, RayActorError) and "running low on memory" in str(death)

    for error in (death, RayTaskError("step", "Traceback", ValueError("x")), ValueError("x")):
        assert as_death(error) is error
