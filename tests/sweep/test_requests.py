r"""Tests for sda_ray.sweep.requests: a request is served once or not at all, and answered."""

import ast
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from byhand import ManualDriver as Sweep

from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease, is_alive, read_holder
from sda_ray.runs.path import RunPath
from sda_ray.sweep.requests import (
    PATIENCE,
    REQUESTS,
    Mailbox,
    NotRunning,
    RequestServer,
    ask,
    stop_sweep,
    wait_for_driver,
)


def test_pending_requests_are_in_the_order_of_posting(tmp_path: Path) -> None:
    box = Mailbox(tmp_path / "requests")
    assert box.pending() == {}  # no request yet

    ids = [box.post("trials", trials=n) for n in range(5)]

    assert [(id, json.loads(data)) for id, data in box.pending().items()] == [
        (id, {"kind": "trials", "content": {"trials": n}}) for n, id in enumerate(ids)
    ]


def test_request_is_taken_once(tmp_path: Path) -> None:
    id = Mailbox(tmp_path).post("stop")

    assert [Mailbox(tmp_path).take(id) for _ in range(3)] == [True, False, False]
    assert Mailbox(tmp_path).pending() == {}


def test_answer_reaches_the_waiting_caller_and_no_file_is_left(tmp_path: Path) -> None:
    id = Mailbox(tmp_path).post("stop")

    def drive() -> None:
        (pending,) = Mailbox(tmp_path).pending()
        assert Mailbox(tmp_path).take(pending)
        Mailbox(tmp_path).answer(pending, "no", good=False)

    timer = threading.Timer(0.3, drive)
    timer.start()
    found = Mailbox(tmp_path).wait(id, alive=lambda: True)
    timer.join()

    assert found is not None and (found.text, found.good) == ("no", False)
    assert list(tmp_path.iterdir()) == []


def test_wait_ends_with_the_driver_or_the_timeout(tmp_path: Path) -> None:
    id = Mailbox(tmp_path).post("stop")
    start = time.monotonic()

    assert Mailbox(tmp_path).wait(id, alive=lambda: False) is None
    assert Mailbox(tmp_path).wait(id, alive=lambda: True, patience=0.3) is None
    assert time.monotonic() - start < PATIENCE / 2


def test_job_waits_for_another_driver_to_end_some_time_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease(tmp_path / "lease.json", "sweep 'a'")
    start = time.monotonic()
    wait_for_driver(tmp_path, "a", 0.2)

    assert time.monotonic() - start >= 0.2
    assert f"driven by process {os.getpid()}" in capsys.readouterr().out

    timer = threading.Timer(0.3, lease.release)
    timer.start()
    wait_for_driver(tmp_path, "a", 600)
    timer.join()
    wait_for_driver(tmp_path, "a", 600)  # nobody drives it

    assert not is_alive(tmp_path / "lease.json")


def test_answer_written_just_before_the_death_of_the_driver_is_read(tmp_path: Path) -> None:
    id = Mailbox(tmp_path).post("stop")

    def dies() -> bool:
        Mailbox(tmp_path).answer(id, "it stops")
        return False

    found = Mailbox(tmp_path).wait(id, alive=dies)
    assert found is not None and found.text == "it stops"


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "directory.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "notes.txt")
    Mailbox(tmp_path).post("stop")

    requests = Mailbox(tmp_path).pending()  # does not hang
    assert [b'"stop"' in data for data in requests.values()].count(True) == 1
    assert not Mailbox(tmp_path).take("directory")
    assert (tmp_path / "notes.txt").read_text() == "mine"


class ServedSweep(Sweep):
    r"""Creates a manual driver and the server of its requests."""

    def __init__(self, directory: Path, trials: int = 8, **more: Any) -> None:
        self.targets: list[int] = []
        super().__init__(directory, trials, retarget=self.targets.append, **more)
        self.box = Mailbox(directory / REQUESTS)
        self.server = RequestServer(self.driver)

    def ask(self, kind: str, **content: Any) -> tuple[str, bool]:
        id = self.box.post(kind, **content)
        self.server()
        found = self.box.wait(id, lambda: False, patience=0.2)
        assert found is not None and list(self.box.directory.glob(f"*{id}*")) == []

        return found.text, found.good

    def states(self) -> list[str]:
        return [record.state for record in self.study.records()]


@pytest.fixture
def sweep(tmp_path: Path) -> ServedSweep:
    return ServedSweep(tmp_path)


def test_stop_of_the_sweep(sweep: ServedSweep) -> None:
    sweep.driver.suggest("a")
    text, good = sweep.ask("stop")

    assert good and "stops, with 1 run at work" in text and "To resume: sda-ray sweep" in text
    assert sweep.driver.stopping and sweep.driver.request.exists()
    assert sweep.driver.why == "`sda-ray stop` asked for it"


def test_stop_meant_for_a_previous_driver_is_dropped(tmp_path: Path) -> None:
    first = ServedSweep(tmp_path)
    first.box.post("stop", attempt=first.lease.attempt)
    first.box.post("enqueue", items=[{"learning_rate": 0.002}])
    first.lease.release()

    second = ServedSweep(tmp_path)
    second.server()
    assert not second.driver.stopping
    assert list(second.study.queue().values()) == [{"learning_rate": 0.002}]
    assert second.ask("stop", attempt=second.lease.attempt)[1] and second.driver.stopping


def test_running_trial_is_stopped_alone_and_stays_stopped(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=2, slots=1)
    sweep.driver.suggest("a")
    assert sweep.ask("stop", trial=1) == ("run 1 stops after its step, at epoch 0 or later", True)
    assert (tmp_path / "stop.1").exists() and not sweep.driver.stopping
    assert sweep.states() == ["running"]

    assert not sweep.tell("a", "stopped", last=3)
    assert sweep.driver.suggest("b") is not None  # its slot is free, and it is not adopted
    sweep.server()
    assert sweep.states() == ["stopped", "running"]
    assert not (tmp_path / "stop.1").exists()
    assert sweep.events == ["draw", "draw", "stopped"]

    sweep.tell("b", "complete", last=9)

    with pytest.raises(StopIteration):  # it counts as one of the two
        sweep.driver.suggest("c")

    assert sweep.driver.done
    assert sweep.study.records()[0].last == 3


def test_stopped_configuration_is_trained_with_no_further_seed(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=1, seeds=3)

    for name in "ab":  # the second is another seed of the first
        sweep.driver.suggest(name)

    assert sweep.ask("stop", trial=1)[1]
    assert (tmp_path / "stop.1").exists() and (tmp_path / "stop.2").exists()
    assert not sweep.tell("a", "stopped", last=3)
    assert sweep.driver.suggest("c") is None
    assert not sweep.tell("b", "stopped", last=2)
    sweep.server()
    assert sweep.states() == ["stopped", "stopped"]


def test_stopped_seed_is_not_replaced_and_leaves_the_others_alone(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=1, seeds=2)

    for name in "ab":
        sweep.driver.suggest(name)

    assert sweep.ask("stop", trial=2)[1]
    assert not sweep.tell("b", "stopped", last=2)
    assert sweep.driver.suggest("c") is None
    sweep.server()
    assert sweep.states() == ["running", "stopped"]


@pytest.mark.parametrize("end", ["lost", "complete", "failed"])
def test_run_that_ends_before_it_notices_the_stop(sweep: ServedSweep, end: str) -> None:
    sweep.driver.suggest("a")
    sweep.ask("stop", trial=1)

    if end == "lost":
        sweep.driver.lose("a", "killed")
    else:
        sweep.tell("a", end, "an error" if end == "failed" else "", last=9)

    sweep.server()
    assert sweep.states() == ["stopped" if end == "lost" else end]
    assert not sweep.driver.cancelled


def test_paused_run_is_stopped_once_its_process_has_ended(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=2, first=1)
    path = RunPath(tmp_path / f"calm-cat-1_{sweep.driver.suggest('a')['run_id']}")  # type: ignore[index]
    path.directory.mkdir()
    path.record.write_text(json.dumps({"status": "paused"}))
    sweep.driver.suggest("b")
    closed = False
    result = {"event": "running", "epochs": [(1, 1.0)], "error": ""}
    assert not sweep.driver.report("a", result, lambda status: lambda: closed)

    assert sweep.ask("stop", trial=1) == ("run 1, paused at epoch 1, is stopped", True)
    assert sweep.states() == ["running", "running"]
    closed = True
    sweep.tell("b", "running", last=1)  # notices that run 1 is closed
    sweep.server()
    assert sweep.states()[0] == "stopped"
    assert json.loads(path.record.read_text())["status"] == "stopped"
    assert sweep.ask("stop", trial=1) == ("run 1 is stopped already.", False)


def test_paused_run_of_a_closed_sweep_is_stopped(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=4, first=1)

    for name in "ab":
        sweep.driver.suggest(name)

    for name, loss in {"a": 1.0, "b": 2.0}.items():
        result = {"event": "running", "epochs": [(1, loss)], "error": ""}
        sweep.driver.report(name, result, lambda status: lambda: True)

    sweep.study.close()
    assert sweep.states() == ["pruned", "pruned"]
    assert sweep.ask("stop", trial=2)[1]
    assert sweep.states() == ["pruned", "stopped"]


def test_accepted_stop_of_a_run_outlives_the_driver(tmp_path: Path) -> None:
    first = ServedSweep(tmp_path)
    first.driver.suggest("a")
    first.ask("stop", trial=1)
    first.lease.release()
    (tmp_path / "stop.99").touch()

    second = ServedSweep(tmp_path)
    spec = second.driver.suggest("a")
    assert spec is not None and spec["index"] == 2  # run 1 is not adopted
    second.server()
    assert second.states() == ["stopped", "running"]


def test_number_of_trials_is_raised_and_lowered(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=2)
    sweep.driver.suggest("a")
    sweep.driver.suggest("b")
    assert sweep.driver.suggest("c") is None

    text, good = sweep.ask("trials", trials=4)
    assert good and text.endswith("continues to 4 trials: 2 more")
    assert sweep.driver.suggest("c") is not None

    text, good = sweep.ask("trials", trials=1)
    assert good and text.endswith("to 1 trials: it has 3, so no new ones are started")
    assert sweep.driver.suggest("d") is None
    assert sweep.targets == [4, 1]


@pytest.mark.parametrize("trials", [0, -1, 2.5, True, "3", None, [4]])
def test_invalid_number_of_trials_changes_nothing(sweep: ServedSweep, trials: Any) -> None:
    text, good = sweep.ask("trials", trials=trials)

    assert not good and "must be an integer from 1" in text
    assert sweep.targets == [] and sweep.driver.rules.target == 8


def test_queued_configurations_come_first(sweep: ServedSweep) -> None:
    items = [{"learning_rate": 0.002}, {"learning_rate": 0.003}]
    assert sweep.ask("enqueue", items=items) == ("2 configurations queued, to be tried next", True)

    found = [sweep.driver.suggest(name) for name in "abc"]
    rates = [spec["config"]["learning_rate"] for spec in found if spec is not None]
    assert rates[:2] == [0.002, 0.003] and rates[2] not in rates[:2]

    text, good = sweep.ask("enqueue", items=[{"learning_rate": 0.002}])
    assert not good and "has a run already" in text


def test_queue_longer_than_the_sweep_gives_a_warning(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=1)
    items = [{"learning_rate": 0.002}, {"learning_rate": 0.003}]

    assert (
        "room for 1 more of its 1 trials and 2 are queued: raise"
        in sweep.ask("enqueue", items=items)[0]
    )


def test_failed_runs_are_retried(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=2, slots=1)
    assert sweep.ask("retry") == ("no run has failed", True)

    first = sweep.driver.suggest("a")
    sweep.tell("a", "failed", "OSError: the disk", last=2)
    text, good = sweep.ask("retry")
    assert good and text == "retried from the last checkpoint: run 1"

    again = sweep.driver.suggest("b")
    assert first is not None and again is not None
    assert again["run_id"] == first["run_id"] and again["attempt"] > first["attempt"]
    sweep.tell("b", "complete", last=9)
    assert [(r.index, r.state, r.error) for r in sweep.study.records()] == [(1, "complete", "")]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("abdicate", {}),
        ("stop", {"trial": 99}),
        ("stop", {"trial": True}),
        ("stop", {"trial": {"a": []}}),
        ("enqueue", {}),
        ("enqueue", {"items": "all"}),
        ("enqueue", {"items": [3]}),
        ("enqueue", {"items": [{}]}),
        ("enqueue", {"items": [{"learning_rate": "x"}]}),
        ("enqueue", {"items": [{"unknown": 1}]}),
        ("prior", {}),
        ("prior", {"runs": [{"nonsense": 1}]}),
        ("prior", {"runs": [3]}),
    ],
)
def test_invalid_request_is_refused_and_changes_nothing(
    sweep: ServedSweep, kind: str, content: dict[str, Any]
) -> None:
    sweep.driver.suggest("a")
    journal = (sweep.driver.request.parent / "journal").read_bytes()
    text, good = sweep.ask(kind, **content)

    assert not good and len(text) > 10
    assert (sweep.driver.request.parent / "journal").read_bytes() == journal
    assert not sweep.driver.stopping and sweep.driver.suggest("b") is not None


@pytest.mark.parametrize(
    "content",
    ["", "nonsense", "[]", "3", '{"kind": 3, "content": {}}', '{"kind": "stop"}', "[" * 10**5],
)
def test_malformed_request_is_refused(sweep: ServedSweep, content: str) -> None:
    sweep.box.directory.mkdir()
    (sweep.box.directory / "x.json").write_text(content)
    sweep.server()
    reply = sweep.box.wait("x", lambda: False)

    assert reply is not None and not reply.good and "cannot be served" in reply.text
    assert list(sweep.box.directory.iterdir()) == [] and not sweep.driver.stopping


def test_files_other_than_requests_do_no_harm(sweep: ServedSweep) -> None:
    box = sweep.box.directory
    box.mkdir()
    (box / "a.json").write_text("nonsense")
    (box / "b.json").mkdir()
    (box / "c.txt").touch()
    sweep.server()
    sweep.server()

    assert sorted(f.name for f in box.iterdir()) == ["a.answer.json", "b.json", "c.txt"]
    assert sweep.driver.suggest("a") is not None


def test_finished_sweep_refuses_requests(tmp_path: Path) -> None:
    sweep = ServedSweep(tmp_path, trials=1)
    sweep.driver.suggest("a")
    sweep.tell("a", "complete", last=9)

    with pytest.raises(StopIteration):
        sweep.driver.suggest("b")

    text, good = sweep.ask("trials", trials=9)
    assert not good and "has just ended" in text and sweep.targets == []


def test_stopping_sweep_records_requests_for_its_next_start(sweep: ServedSweep) -> None:
    sweep.driver.stop()
    text, good = sweep.ask("trials", trials=9)

    assert good and "The sweep is stopping" in text and sweep.targets == [9]


PROGRAM = """
import os, sys
from contextlib import ExitStack
from pathlib import Path
from sda_ray.cluster.connect import connected
from sda_ray.core.config import CONFIG
from sda_ray.sweep.requests import RequestServer
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
    if event == "memory":  # now the data fits
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
    scratch = stack.enter_context(connected(cpus=2))

    from sda_ray.cluster.executor import execute
    execute(driver, {"cpu": 1, "gpu": 0}, scratch, own=True, requests=RequestServer(driver))

for record in study.records():
    print(("end", record.index, record.last, record.state), flush=True)

lease.release()
"""


class Place:
    r"""Creates a root directory in which a sweep runs as a process of its own."""

    def __init__(self, root: Path, data: Path, env: dict[str, str]) -> None:
        self.root = root
        self.env = {**env, "HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        self.env["TUNE_RESULT_BUFFER_LENGTH"] = "10"  # of a user's environment, without effect
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
                held = read_holder(path.lease) or {}
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
    r"""Makes a file of trajectories whose windows no machine can hold in memory."""

    with h5py.File(file, "w") as f:
        space = h5py.h5s.create_simple((400_000, 4, 2, 512, 512))
        form = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        form.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        form.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # the file is sparse
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


def test_running_sweep_serves_requests_of_other_processes(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(kind: str, **content: Any) -> str:
        start = time.monotonic()
        text = ask(place.directory, kind, **content)
        assert time.monotonic() - start < PATIENCE / 4
        assert capsys.readouterr().out == f"{text}.\n"

        return text

    place.start("1", "100000", "1")
    file = place.directory / "lease.json"
    driver = place.wait(lambda: read_holder(file) if is_alive(file) else None)
    assert driver["pid"] == place.process.pid

    # While Ray starts
    assert say("trials", trials=3).endswith("continues to 3 trials: 3 more")
    assert place.wait(lambda: place.events("target")) == [("target", 3, 0, "")]

    with pytest.raises(UserError) as error:  # a second driver
        Lease(place.directory / "lease.json", "sweep 'test'")

    for word in (driver["host"], str(driver["pid"]), driver["since"]):
        assert word in str(error.value)

    # While trials run
    path, _ = place.at_work(1, 1)
    assert say("enqueue", items=[{"learning_rate": 0.002}]) == (
        "1 configuration queued, to be tried next"
    )

    with pytest.raises(UserError, match="trials is 0"):
        ask(place.directory, "trials", trials=0)

    assert say("stop", trial=1).startswith("run 1 stops after its step")
    second, _ = place.at_work(2, 1)  # in the free slot
    assert json.loads(second.config.read_text())["learning_rate"] == 0.002
    assert json.loads(path.record.read_text())["status"] == "stopped"
    assert path.checkpoint.exists()

    assert "1 run at work" in say("stop")
    runs = place.end()
    assert runs[1][1] == "stopped" and runs[1][0] > 0
    assert runs[2][1] == "running" and runs[2][0] > 0
    assert json.loads(second.record.read_text())["status"] == "interrupted"

    # Once the driver has ended
    with pytest.raises(NotRunning, match="sweep 'test' is not running"):
        ask(place.directory, "trials", trials=9)

    with pytest.raises(UserError, match="there is no sweep"):
        stop_sweep(place.root / "runs", "other")

    assert list((place.directory / REQUESTS).iterdir()) == []


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

    # It hangs at a lock
    path, pid = place.at_work(1, 2)

    with open(path.lease.with_suffix(".lock"), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place.wait(lambda: is_gone(pid))

    stacks = path.directory / "stacks.txt"
    assert "in locked" in stacks.read_text()

    _, pid = place.at_work(1, 3)
    os.kill(pid, signal.SIGSTOP)
    path, pid = place.at_work(1, 4)
    os.kill(pid, signal.SIGKILL)

    assert place.end() == {1: (60, "complete"), 2: (60, "complete")}
    events = [event for event in place.events() if event[1] == 1]
    assert [event[0] for event in events[:-1]] == [
        *("draw", "memory", "adopt", "lost", "adopt", "lost", "adopt", "lost", "adopt", "complete")
    ]
    memory, hung, frozen, killed = (e[3] for e in events if e[0] in ("memory", "lost"))
    assert "out of memory" in memory and "a peak of" in memory
    assert "its process hung: " in hung and "stacks.txt says where" in hung
    assert "no sign of life for " in frozen
    assert "its worker process has died" in killed
    assert [json.loads(x)["epoch"] for x in path.metrics.read_text().splitlines()] == list(
        range(1, 61)
    )
