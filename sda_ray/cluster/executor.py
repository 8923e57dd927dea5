r"""Ray Tune as the executor of a sweep.

Tune is given no state of its own: it asks :class:`Driver` what to run (a searcher), tells it what
came of it (a scheduler), and is made anew at every start. Its failure budget is zero, since it
cannot tell a bug from a lost machine: lost workers are adopted by the driver.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, Trainable
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..core.errors import UserError
from ..core.lease import HEARTBEAT, is_alive, is_local, last_heartbeat, read_holder
from ..runs.path import RunPath
from ..search.promotion import TrialRecord
from ..sweep.driver import Driver
from ..sweep.failures import cause_of
from ..sweep.requests import RequestServer
from ..training.watchdog import OTHER, STACKS, STALL, TAKEN, take_stacks
from .patches import memory_kills_are_deaths, trials_without_tune
from .slots import node_of
from .trial import Trial

__all__ = ["Lookout", "Vigil", "end", "execute"]

logger = logging.getLogger(__name__)

CLOSING = 60.0  # seconds given to trials in the end to close their runs
WAITING = 1000  # trials that may wait for a node, at most
PATIENCE = 20.0  # seconds that they wait before that is said
TICK = 0.25  # seconds between two looks at the clock and the mailbox
LOOK = 5.0  # seconds between two looks at whether processes are frozen
GONE = 10.0  # seconds without a node after which Ray is given up
DOUBT = 60.0  # seconds in which Ray notices that a node is dead
BEATS = 2  # heartbeats that may be missed in any case
AWAY = 15.0  # seconds after which it was the driver itself that was frozen, or its disk


def execute(driver: Driver, resources: dict[str, float], scratch: Path, own: bool = False) -> None:
    r"""Runs trials until nothing is left to do, or until the driver or a signal asks to stop.

    Arguments:
        driver: The driver.
        resources: What Ray shall keep for a trial: `cpu` and `gpu`.
        scratch: A directory for what Tune writes, which is nothing to keep.
        own: Whether the Ray is our own, whose node is never avoided.

    Raises:
        Exception: Whatever went wrong in the driver itself. The study is left such that the same
            command carries on.
    """

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # we say it ourselves

    lookout = Lookout(driver)
    # Trials that wait for a node are what the cluster starts nodes for. Tune lets one wait.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(WAITING)
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"  # a trial waits at a rung for the answer

    with _on_signals(driver.stop), memory_kills_are_deaths(), trials_without_tune(Trial):
        tune.run(
            tune.with_resources(Trainable, _place(resources)),
            name="sweep",
            storage_path=str(scratch / "tune"),
            search_alg=_Searcher(driver, lookout),
            scheduler=_Scheduler(driver, lookout),
            callbacks=[lookout, _Placement(driver, own)],
            num_samples=-1,
            max_failures=0,
            reuse_actors=not resources["gpu"],
            raise_on_failed_trial=False,
            verbose=0,
        )

        deadline = time.monotonic() + CLOSING

        while not all(closed() for closed in driver.closing.values()):
            if time.monotonic() > deadline:
                break

            time.sleep(0.05)

        lookout.desk()

    if driver.fault is not None:
        raise driver.fault


@contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    r"""Stops in good order at SIGINT, SIGTERM and SIGHUP, unless they are ignored.

    A second one interrupts at once.
    """

    def handle(number: int, frame: Any) -> None:
        for other in before:
            signal.signal(other, interrupt)

        print(
            "\nStopping: every trial saves a checkpoint first. Once more to stop at once.",
            flush=True,
        )
        stop()

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: was for n in every if (was := signal.getsignal(n)) is not signal.SIG_IGN}

    for number in before:
        signal.signal(number, handle)

    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _place(resources: dict[str, float]) -> Callable[[dict[str, Any]], Any]:
    r"""Returns what tells, by a trial's config, what Ray shall keep for it, and where not."""

    bundle = {key.upper(): x for key, x in resources.items() if x}

    def place(config: dict[str, Any]) -> Any:
        if not (avoid := config.get("avoid")):
            return tune.PlacementGroupFactory([bundle])

        where = {"ray.io/node-id": f"!in({','.join(avoid)})"}

        return tune.PlacementGroupFactory([bundle], bundle_label_selector=[where])

    return place


class _Placement(Callback):
    r"""Creates what notes where trials are, and says that they have waited long for a node.

    Of a Ray of our own nothing is noted: its one node is never avoided.
    """

    def __init__(self, driver: Driver, own: bool) -> None:
        self.driver = driver
        self.own = own
        self.since: float | None = None
        self.said = False

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        index = self.driver.live.get(trial.trial_id)

        if index is not None and not self.own:
            self.driver.losses.places[index] = node_of(trial.temporary_state.ray_actor)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        waiting = sum(trial.status == "PENDING" for trial in trials)

        if not waiting or any(trial.status == "RUNNING" for trial in trials):
            self.since, self.said = None, False
        elif self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > PATIENCE and not self.said:
            self.said = True
            logger.warning(
                "%d trials wait for room: the cluster starts nodes for them, or others use those "
                "that are up. `ray status` says more.",
                waiting,
            )


class RayGone(UserError):
    r"""Signals that nothing is left of Ray that could carry out a trial."""


class Lookout(Callback):
    r"""Creates what is done in Tune's loop beside trials: requests, the clock, lost processes."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.desk = RequestServer(driver)
        self.vigil = Vigil(Path(driver.spec["runs"]), driver.spec.get("stall") or STALL)
        self.actors: dict[int, Any] = {}  # index of a run -> its actor, the newest
        self.nodes: dict[str, str] = {}  # a trial's name -> the node it was seen on
        self.reasons: dict[str, str] = {}  # a trial's name -> why its process was ended
        self.doubts: dict[str, tuple[str, float]] = {}  # … -> what Ray said, until when to wait
        self.trials: list[Any] = []  # all of Tune's
        self.ticked = self.looked = 0.0
        self.seen = time.monotonic()  # when there was a node alive
        self.stopping = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials
        self.tick()

        if isinstance(self.driver.fault, RayGone):  # with it, what Tune waits for
            raise self.driver.fault

    def tick(self) -> None:
        r"""Does what is due. To be called as often as Tune does anything at all."""

        now = time.monotonic()

        if now - self.ticked > TICK:
            self.ticked = now
            self.desk()
            self.driver.tick()
            self._announce()

        if now - self.looked > LOOK:
            self.looked = now

            try:
                self._see_nodes()
                self._end_frozen()
                self._settle_doubts()
            except Exception as error:
                self.driver.guard(error)

    def _see_nodes(self) -> None:
        r"""Notes that there is a node. Tune waits for ever where there is none any more."""

        if any(node["Alive"] for node in ray.nodes()):
            self.seen = self.looked
        elif self.looked - self.seen > GONE and self.driver.fault is None:
            raise RayGone(
                f"Ray is gone: for {self.looked - self.seen:.0f} s it has had no node. Nothing is "
                "lost: the same command carries on."
            )

    def _announce(self) -> None:
        driver = self.driver

        if driver.stopping and not self.stopping and driver.why:
            print(
                f"\nStopping, since {driver.why}: every trial saves a checkpoint first.",
                flush=True,
            )

        self.stopping = driver.stopping

    def _end_frozen(self) -> None:
        r"""Ends processes that have given no sign of life for long: their runs are lost then."""

        live, closing = self.driver.live, self.driver.closing
        running = [t for t in self.trials if t.status == "RUNNING" and t.trial_id in live]
        at_work = {live[trial.trial_id]: trial for trial in running}
        open_ = {index for index, closed in closing.items() if not closed()}

        if not (watched := {*at_work, *open_}):
            return

        for index, trial in at_work.items():
            self.actors[index] = trial.temporary_state.ray_actor or self.actors.get(index)

        records = [r for r in self.driver.study.records() if r.index in watched]

        for record, silent in self.vigil.look(records):
            if (path := self.vigil.path(record)) is not None:
                reason = end(path, record, silent)

                if record.index in at_work:
                    self.reasons[at_work[record.index].trial_id] = reason

            if (actor := self.actors.get(record.index)) is not None:
                ray.kill(actor)

    def _settle_doubts(self) -> None:
        r"""Takes trials for lost that Ray cannot reach, once it is known what is dead."""

        if not self.doubts:
            return

        dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}

        for name, (reason, until) in list(self.doubts.items()):
            if (gone := self._node(name) in dead) or time.monotonic() > until:
                del self.doubts[name]
                self.driver.lose(name, reason, "node" if gone else "worker")

    def _node(self, name: str) -> str:
        r"""Returns the node of a trial: where it has reported from, or else was started."""

        started = self.driver.losses.places.get(self.driver.live.get(name, 0), ("", ""))

        return self.nodes.get(name, started[0])

    def lose(self, trial: Any) -> None:
        r"""Finds out what a trial was lost to, and lets the driver know."""

        name = trial.trial_id

        if (index := self.driver.live.get(name)) is None:
            return

        file = Path(trial.error_file or "")
        cause, reason = cause_of(file.read_text() if file.is_file() else "")
        record = next(r for r in self.driver.study.records() if r.index == index)
        path = self.vigil.path(record)
        early = self.driver.request.with_name(f"stacks.{index}.txt")

        for stacks in (early, *([path.directory / STACKS] if path else [])):
            if take_stacks(stacks, record.attempt):
                self.reasons.setdefault(name, f"its process hung: {stacks} says where")

        if name in self.reasons:
            cause, reason = "worker", self.reasons.pop(name)

        if cause == "unclear":
            self.doubts[name] = reason, time.monotonic() + DOUBT
        else:
            self.driver.lose(name, reason, cause)


class Vigil:
    r"""Creates the watch over the runs of a sweep.

    Arguments:
        runs: The directory of all runs.
        stall: The seconds without a sign of life after which a process counts as frozen.
    """

    def __init__(self, runs: Path, stall: float) -> None:
        self.runs = runs
        self.limit = max(stall, BEATS * HEARTBEAT)
        self.paths: dict[str, RunPath] = {}
        self.seen: dict[int, tuple[Any, float]] = {}  # index of a run -> last sign of life, when
        self.looked = time.monotonic()

    def look(self, records: Iterable[TrialRecord]) -> list[tuple[TrialRecord, float]]:
        r"""Returns which of the runs that have a process are frozen, and for how many seconds."""

        now = time.monotonic()
        before, self.seen = self.seen if now - self.looked < AWAY else {}, {}
        frozen = []

        for record in records:
            sign, limit = self._sign(record)
            last, since = before.get(record.index, (None, now))
            self.seen[record.index] = sign, (since if sign == last else now)
            silent = now - self.seen[record.index][1]

            if silent > limit:
                frozen.append((record, silent))

        self.looked = time.monotonic()

        return frozen

    def path(self, record: TrialRecord) -> RunPath | None:
        r"""Returns where a run is, if it has a directory yet."""

        known = self.paths.get(record.run_id)

        if known is None or not known.lease.exists():
            if (found := RunPath.of_id(self.runs, record.run_id)) is None:
                return None

            self.paths[record.run_id] = known = found

        return known

    def _sign(self, record: TrialRecord) -> tuple[Any, float]:
        r"""Returns what changes while a run's process lives, and how long it may not."""

        if (path := self.path(record)) is not None:
            found = read_holder(path.lease)

            if found and found["pid"] is not None and found["attempt"] >= record.attempt:
                return (found["attempt"], last_heartbeat(path.lease)), self.limit

        return record.attempt, OTHER * self.limit  # it starts, or is done with it


def end(path: RunPath, record: TrialRecord, silent: float) -> str:
    r"""Ends the process of a frozen run, if it is on this machine, and returns what it was at.

    The same is noted beside the stacks of processes that hung.
    """

    found = read_holder(path.lease) or {}
    pid, where = found.get("pid"), found.get("host")
    state = ""

    agent = bool(found.get("agent"))  # which holds the leases of others, too

    if pid and not agent and is_local(found) and is_alive(path.lease):
        state = ", ".join(filter(None, (_proc(pid, name) for name in ("status", "wchan"))))

        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)

    who = "the process elsewhere" if agent else f"process {pid} on {where}"
    said = f"no sign of life for {silent:.0f} s from {who}"
    said += f" ({state})" if state else ""

    with suppress(OSError), open(path.directory / STACKS, "a") as stream:
        stream.write(f"{said}, {TAKEN} {record.attempt}.\n")

    return said


def _proc(pid: int, name: str) -> str:
    r"""Returns what the kernel says of a process."""

    try:
        text = Path(f"/proc/{pid}/{name}").read_text().strip()
    except OSError:
        return ""

    if name == "status":
        return next((" ".join(x.split()) for x in text.splitlines() if x[:6] == "State:"), "")

    return f"waits in {text}" if text not in ("", "0") else ""


class _Searcher(Searcher):
    r"""Creates the face of the driver that Tune asks for trials."""

    def __init__(self, driver: Driver, lookout: Lookout) -> None:
        super().__init__()
        self.driver = driver
        self.lookout = lookout

    def suggest(self, trial_id: str) -> Any:
        self.lookout.tick()  # Tune does nothing but ask while there is no trial

        try:
            return self.driver.suggest(trial_id)
        except StopIteration:
            return Searcher.FINISHED
        except Exception as error:
            self.driver.guard(error)
            return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass  # the scheduler knows more

    def save(self, checkpoint_path: str) -> None:
        pass  # the study is the truth

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is carried on from its study, never from Tune's state")


class _Scheduler(FIFOScheduler):
    r"""Creates the face of the driver that Tune tells results."""

    def __init__(self, driver: Driver, lookout: Lookout) -> None:
        super().__init__()
        self.driver = driver
        self.lookout = lookout

    def choose_trial_to_run(self, controller: Any) -> Any:
        r"""Returns what to start, if anything. What waits for a node is no reason to go on."""

        if not self.driver.stopping:
            return super().choose_trial_to_run(controller)

        for trial in controller.get_trials():
            if trial.status == "PENDING" and trial.temporary_state.ray_actor is None:
                self.driver.live.pop(trial.trial_id, None)
                controller.request_stop_trial(trial)

        return None

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        actor = trial.temporary_state.ray_actor

        self.lookout.nodes[trial.trial_id] = result.get("node", "")
        self.lookout.actors[self.driver.live.get(trial.trial_id, 0)] = actor

        def close(status: str) -> Callable[[], bool]:
            task = actor.close.remote(status)
            return lambda: bool(ray.wait([task], timeout=0)[0])

        if trial.trial_id not in self.driver.live:  # let go of when it was about to begin
            self.driver.closing[0] = close("interrupted")
            return TrialScheduler.STOP

        try:
            goes_on = self.driver.report(trial.trial_id, result, close)
        except Exception as error:
            self.driver.guard(error)
            goes_on = False

            with suppress(Exception):
                self.driver.closing[0] = close("interrupted")

        # Tune would keep the process, and with it what fills its memory, or a node that leaves
        if result["event"] == "memory" or (result.get("leaving") and not goes_on):
            ray.kill(actor)
            return TrialScheduler.CONTINUE

        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        try:
            self.lookout.lose(trial)
        except Exception as error:
            self.driver.guard(error)
