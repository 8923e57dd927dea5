r"""Ray Tune as the executor of a sweep.

Tune keeps no state for us: it asks the :class:`Driver` what to run (a searcher), reports the
results to it (a scheduler), and is made anew at every start. Its failure budget is zero, since it
cannot tell a bug from a lost machine: runs of lost workers are adopted by the driver.
"""

import logging
import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import ray
from ray import tune
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..core import HEARTBEAT, last_heartbeat, on_signals, read_holder, try_print
from ..runs import RunPath
from ..storage import Disconnected
from ..training import OTHER, STACKS, STALL, take_stacks
from .connect import RayGone, live_nodes
from .trial import Trial

logger = logging.getLogger(__name__)

CLOSING = 60.0  # seconds given to trials at the end to close their runs
PENDING = 1000  # trials that may wait for a node, at most
PATIENCE = 20.0  # seconds without a running trial before a warning
TICK = 0.25  # seconds between two checks of requests and of the deadline
LOOK = 5.0  # seconds between two checks of nodes and processes
GONE = 8.0  # seconds without a node after which Ray is given up
RECENT = 60.0  # seconds after the death of a node in which it may explain that of a worker
BEATS = 2  # heartbeats that may be missed in any case
PAUSE = 15.0  # seconds after which the driver itself was frozen, or its disk
RESTARTS = 3  # times in a row that Tune may fail before a result

NODE = (ActorUnavailableError, Disconnected, NodeDiedError)  # out of reach, or dead

Close = Callable[[str], Callable[[], bool]]


class Driver(Protocol):
    r"""Decides what trials do, see :class:`sda_ray.sweep.driver.Driver`."""

    request: Path
    live: dict[str, int]
    closing: dict[int, Callable[[], bool]]
    home: str
    stopping: bool
    signal: int
    why: str
    fault: Exception | None

    def suggest(self, trial: str) -> dict[str, Any] | None: ...
    def report(self, trial: str, result: dict[str, Any], close: Close) -> bool: ...
    def lose(self, trial: str, reason: str, cause: str = "worker") -> None: ...
    def guard(self, error: Exception) -> None: ...
    def stop(self, why: str = "") -> None: ...
    def tick(self) -> None: ...


class NotStarted(RayError):
    r"""Raised if Ray cannot start the worker of a trial, as for lack of memory."""


def execute(
    driver: Driver,
    resources: dict[str, float],
    scratch: Path,
    own: bool = False,
    requests: Callable[[], None] = lambda: None,
) -> None:
    r"""Runs trials until nothing is left to do, or until the driver or a signal asks to stop.

    Arguments:
        resources: The resources of a trial: `cpu` and `gpu`.
        scratch: A directory for what Tune writes, which is never read again.
        own: Whether this machine is the head node of our own Ray, and so never avoided.
        requests: Serves the requests that came in since its last call.

    Raises:
        Exception: Any error of the driver itself. The study is left such that the same command
            resumes the sweep.
    """

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the sweep reports errors itself

    driver.home = ray.get_runtime_context().get_node_id() if own else ""
    bundle = {key.upper(): x for key, x in resources.items() if x}
    executor = Executor(driver, bundle, requests)
    # Trials that wait for a node are what an autoscaler starts nodes for. Tune lets one wait.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(PENDING)
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"  # a trial waits at a rung for the answer
    starts = 0

    def stop(number: int) -> None:
        if driver.signal:
            raise KeyboardInterrupt

        driver.signal = number
        driver.stop()  # before anything is printed: the terminal may be gone
        try_print("\nStopping: every trial saves a checkpoint first. Once more to stop at once.")

    with on_signals(stop):
        while True:
            try:
                executor.run(scratch / f"tune-{starts}")
                break
            except RuntimeError as error:
                # Tune knows the death of an actor, but ends at any other error of Ray, such as
                # that of a worker killed by Ray's memory monitor, and with it all trials.
                if not isinstance(error.__cause__, RayError):
                    raise

                executor.lose_all(error.__cause__)
                starts += 1

        deadline = time.monotonic() + CLOSING

        while time.monotonic() < deadline and not all(f() for f in driver.closing.values()):
            time.sleep(0.05)

        requests()

    if driver.fault is not None:
        raise driver.fault


def _place(bundle: dict[str, float], config: dict[str, Any]) -> Any:
    if not (avoid := config.get("avoid")):
        return tune.PlacementGroupFactory([bundle])

    where = {"ray.io/node-id": f"!in({','.join(avoid)})"}

    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[where])


@dataclass
class Attempt:
    r"""An attempt at a run, as seen from the driver."""

    spec: dict[str, Any]
    actor: Any = None  # as its node, known from the first result on
    node: str = ""
    reason: str = ""  # why its process was ended by us
    sign: Any = None  # what changes while its process is alive
    since: float = 0.0  # when that changed last
    found: RunPath | None = None

    @property
    def path(self) -> RunPath | None:
        if self.found is None or not self.found.lease.exists():
            self.found = RunPath.of_id(Path(self.spec["runs"]), self.spec["run_id"])

        return self.found

    @property
    def holder(self) -> dict[str, Any]:
        return (self.path and read_holder(self.path.lease)) or {}

    def silence(self, fresh: bool = False) -> float:
        r"""Returns the seconds without a sign of life if the process counts as frozen, else 0.

        The sign is the heartbeat of the run's lease. A process that starts or ends has none, and
        more time. One that lives but hangs ends itself, see :mod:`sda_ray.training.watchdog`. A
        `fresh` look forgets how long it was silent before.
        """

        limit = max(self.spec.get("stall") or STALL, BEATS * HEARTBEAT)
        sign: Any = "none"
        held, now = self.holder, time.monotonic()

        if held.get("pid") is None or held["attempt"] < self.spec["attempt"]:
            limit *= OTHER
        elif self.found is not None:
            sign = held["attempt"], last_heartbeat(self.found.lease)

        if fresh or sign != self.sign:
            self.sign, self.since = sign, now

        return now - self.since if now - self.since > limit else 0.0


class Executor(FIFOScheduler):
    r"""Connects a driver to Tune, as its scheduler, and does the housekeeping in Tune's loop.

    Housekeeping serves requests, watches the deadline, and detects lost nodes and frozen processes.
    Tune is given no callbacks: with any, it imports W&B into the driver, a second at each start.
    """

    def __init__(
        self,
        driver: Driver,
        bundle: dict[str, float],
        requests: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.driver = driver
        self.bundle = bundle
        self.requests = requests
        self.attempts: dict[int, Attempt] = {}  # index of a run -> its newest attempt
        self.alive: set[str] = set()  # ids of the nodes that were up at the last look
        self.died = -RECENT  # when a node was last seen to be dead
        self.trials: list[Any] = []  # all of Tune's, at its last step
        self.ticked = self.looked = 0.0
        self.seen = self.busy = time.monotonic()  # when a node was alive, when a trial ran
        self.warned = self.announced = False
        self.restarts = 0

    def run(self, storage: Path) -> None:
        tune.run(
            tune.with_resources(Trial, partial(_place, self.bundle)),
            name="sweep",
            storage_path=str(storage),
            search_alg=_Searcher(self),
            scheduler=self,
            num_samples=-1,
            max_failures=0,
            reuse_actors="GPU" not in self.bundle,
            raise_on_failed_trial=False,
            verbose=0,
        )

    def suggest(self, name: str) -> dict[str, Any] | None:
        if (spec := self.driver.suggest(name)) is not None:
            self.attempts[spec["index"]] = Attempt(spec)

        return spec

    def report(self, name: str, result: dict[str, Any]) -> str:
        r"""Reports a result to the driver, and returns what Tune is to do with the trial."""

        driver, self.restarts = self.driver, 0
        index = driver.live.get(name, 0)  # 0 if the trial was dropped when it was about to begin
        attempt = self.attempts.setdefault(index, Attempt({}))
        attempt.actor = actor = result.pop("actor", None) or attempt.actor
        attempt.node = result.get("node", "")

        def close(status: str) -> Callable[[], bool]:
            task = actor.close.remote(status)
            return lambda: bool(ray.wait([task], timeout=0)[0])

        if not index:
            driver.closing[0] = close("interrupted")
            return TrialScheduler.STOP

        try:
            continues = driver.report(name, result, close)
        except Exception as error:
            driver.guard(error)
            continues = False

            with suppress(Exception):
                driver.closing[0] = close("interrupted")

        # Tune would keep the process, and with it what fills its memory, or a node that leaves
        if result["event"] == "memory" or (result.get("leaving") and not continues):
            ray.kill(actor)
            return TrialScheduler.CONTINUE

        return TrialScheduler.CONTINUE if continues else TrialScheduler.STOP

    # Lost workers

    def lose(self, name: str, error: BaseException | None) -> None:
        r"""Finds out why a trial was lost, and reports it to the driver."""

        if (index := self.driver.live.get(name)) is None:
            return

        attempt = self.attempts[index]
        cause, reason = cause_of(error)
        self._look_at_nodes()

        node, recent = attempt.node, time.monotonic() - self.died < RECENT

        if cause == "worker" and (node not in self.alive if node else recent):
            cause = "node"

        early = self.driver.request.with_name(f"stacks.{index}.txt")

        for stacks in (early, *([attempt.path.directory / STACKS] if attempt.path else [])):
            if take_stacks(stacks, attempt.spec["attempt"]):
                attempt.reason = attempt.reason or f"its process hung: {stacks} says where"

        if attempt.reason:
            cause, reason = "worker", attempt.reason

        self.driver.lose(name, reason, cause)

    def lose_all(self, error: RayError) -> None:
        r"""Takes all trials for lost, since Tune has ended with an error of Ray.

        It is held against those alone whose worker died of it: the others have been stopped.

        Raises:
            RayError: If that happens again and again.
        """

        if (restarts := self.restarts + 1) > RESTARTS:
            raise error

        self.restarts = restarts
        cause, reason = cause_of(error)
        names = list(self.driver.live)
        pids = {name: self.attempts[self.driver.live[name]].holder.get("pid") for name in names}
        killed = {name for name in names if pids[name] and f"pid={pids[name]}," in str(error)}

        for name in names:
            if name in killed or not killed:
                self.driver.lose(name, reason, cause)
            else:
                self.driver.lose(name, "Tune was started again", "node")

        self.trials = []

    def _look_at_nodes(self) -> None:
        r"""Notes which nodes are up. Tune would wait for ever if there were none."""

        alive, now = set(live_nodes()), time.monotonic()
        self.died = now if self.alive - alive else self.died
        self.seen = now if alive else self.seen
        self.alive = alive

        if now - self.seen > GONE and self.driver.fault is None:
            raise RayGone(f"Ray is gone: it has had no node for {now - self.seen:.0f} s")

    # Tune's loop

    def choose_trial_to_run(self, controller: Any) -> Any:
        r"""Does the housekeeping, and returns the trial to start, if any. Tune calls it in each step.

        On a stop, trials that wait for a node are dropped.
        """

        self.trials = controller.get_trials()
        self.tick()

        if isinstance(self.driver.fault, RayGone):  # Tune would wait for it
            raise self.driver.fault

        if not self.driver.stopping:
            return super().choose_trial_to_run(controller)

        for trial in self.trials:
            if trial.status == "PENDING":
                self.driver.live.pop(trial.trial_id, None)
                controller.request_stop_trial(trial)

        return None

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.report(trial.trial_id, result)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        try:
            self.lose(trial.trial_id, _error_of(trial))
        except Exception as error:
            self.driver.guard(error)

    def tick(self) -> None:
        r"""Does what is due. To be called as often as Tune calls anything."""

        now = time.monotonic()

        if now - self.ticked > TICK:
            self.ticked = now
            self.requests()
            self.driver.tick()
            self._warn_of_waiting()

            if self.driver.why and not self.announced:
                self.announced = True
                try_print(
                    f"\nStopping, since {self.driver.why}: every trial saves a checkpoint first."
                )

        if now - self.looked > LOOK:
            late, self.looked = now - self.looked > PAUSE, now

            try:
                self._look_at_nodes()
                self._end_frozen(late)
            except Exception as error:
                self.driver.guard(error)

    def _warn_of_waiting(self) -> None:
        r"""Warns once if no trial runs for long on a cluster: its nodes are full, or avoided."""

        if (
            self.driver.home
            or self.driver.stopping
            or any(trial.status == "RUNNING" for trial in self.trials)
        ):
            self.busy, self.warned = time.monotonic(), False
        elif time.monotonic() - self.busy > PATIENCE and not self.warned:
            self.warned = True
            logger.warning(
                "no node has room for a trial of %s at the moment: the sweep waits for one. "
                "`ray status` says what the cluster has.",
                " ".join(f"{key}={x:g}" for key, x in self.bundle.items()),
            )

    def _end_frozen(self, late: bool) -> None:
        r"""Ends processes without a sign of life, which Tune then reports as lost.

        If it is late, this process was frozen itself, so that nothing is known of others.
        """

        live, closing = self.driver.live, self.driver.closing
        running = {live.get(trial.trial_id) for trial in self.trials if trial.status == "RUNNING"}
        watched = running | {index for index, closed in closing.items() if not closed()}

        for attempt in [self.attempts[index] for index in watched if index in self.attempts]:
            if attempt.spec and (silent := attempt.silence(late)):
                attempt.reason = f"no sign of life for {silent:.0f} s from its process"

                if attempt.actor is not None:
                    ray.kill(attempt.actor)


class _Searcher(Searcher):
    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self.executor = executor

    def suggest(self, trial_id: str) -> Any:
        self.executor.tick()  # while there is no trial, Tune calls nothing else

        try:
            return self.executor.suggest(trial_id)
        except StopIteration:
            return Searcher.FINISHED
        except Exception as error:
            self.executor.driver.guard(error)
            return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass  # the scheduler knows more

    def save(self, checkpoint_path: str) -> None:
        pass  # the study is the truth


def _error_of(trial: Any) -> BaseException | None:
    r"""Returns the error that a trial of Tune has ended with.

    Tune pickles the errors of an actor that was started, of classes that may be unknown here, and
    keeps the text of others.
    """

    with suppress(Exception), open(trial.pickled_error_file, "rb") as f:
        return cast(BaseException, pickle.load(f))

    with suppress(Exception):
        text = Path(trial.error_file).read_text().partition("\n")[2]  # after a title
        return RuntimeError(text) if trial.pickled_error_file else NotStarted(text)

    return None


def cause_of(error: BaseException | None) -> tuple[str, str]:
    r"""Returns what has ended a worker, and one line about it, from the error of its trial.

    Returns:
        `memory`, `start`, `node` (dead, drained or out of reach) or `worker`; and the line.
    """

    cause = "worker"

    if isinstance(error, RayTaskError):
        error = error.as_instanceof_cause()

    if isinstance(error, OutOfMemoryError):
        cause = "memory"
    elif isinstance(error, NotStarted):
        cause = "start"
    elif isinstance(error, NODE) or (isinstance(error, RayActorError) and error.preempted):
        cause = "node"

    # Ray lists what may be behind any death
    text = "" if error is None else str(error).partition(" Some common causes")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = isinstance(error, OutOfMemoryError | NotStarted | ActorUnavailableError)
    shown = lines[:1] if first else lines[-1:]

    return cause, shown[0][:300] if shown else "unknown"
