r"""Ray Tune as the executor of a sweep.

Tune keeps no state for us: it asks the :class:`Driver` what to run (a searcher) and tells it the
results (a scheduler), and is made anew at every start. Its failure budget is zero, since it cannot
tell a bug from a lost machine: runs of lost workers are adopted by the driver.
"""

import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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
from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..core import HEARTBEAT, UserError, is_alive, is_local, last_heartbeat, read_holder
from ..runs import RunPath
from ..search import Study, TrialRecord
from ..storage import Disconnected
from ..training import OTHER, STACKS, STALL, TAKEN, take_stacks
from .trial import Trial

__all__ = ["Driver", "Housekeeping", "Liveness", "cause_of", "end_frozen", "execute"]

logger = logging.getLogger(__name__)

CLOSING = 60.0  # seconds given to trials at the end to close their runs
PENDING = 1000  # trials that may wait for a node, at most
PATIENCE = 20.0  # seconds that they wait before a warning
TICK = 0.25  # seconds between two checks of requests and of the deadline
LOOK = 5.0  # seconds between two checks of whether processes are frozen
GONE = 10.0  # seconds without a node after which Ray is given up
DOUBT = 60.0  # seconds in which Ray notices that a node is dead
BEATS = 2  # heartbeats that may be missed in any case
PAUSE = 15.0  # seconds after which the driver itself was frozen, or its disk
RESTARTS = 3  # times in a row that Tune may fail before a result

Close = Callable[[str], Callable[[], bool]]


class Losses(Protocol):
    places: dict[int, tuple[str, str]]  # index of a run -> id and name of its node


class Driver(Protocol):
    r"""Decides what trials do, see :class:`sda_ray.sweep.driver.Driver`."""

    study: Study
    spec: dict[str, Any]
    request: Path
    live: dict[str, int]
    closing: dict[int, Callable[[], bool]]
    stopping: bool
    signal: int
    why: str
    fault: Exception | None

    @property
    def losses(self) -> Losses: ...
    def suggest(self, trial: str) -> dict[str, Any] | None: ...
    def report(self, trial: str, result: dict[str, Any], close: Close) -> bool: ...
    def lose(self, trial: str, reason: str, cause: str = "worker") -> None: ...
    def guard(self, error: Exception) -> None: ...
    def stop(self, why: str = "") -> None: ...
    def tick(self) -> None: ...


class RayGone(UserError):
    r"""Raised if Ray has no node left that could run a trial."""


def execute(
    driver: Driver,
    resources: dict[str, float],
    scratch: Path,
    own: bool = False,
    requests: Callable[[], None] = lambda: None,
) -> None:
    r"""Runs trials until nothing is left to do, or until the driver or a signal asks to stop.

    Arguments:
        driver: The driver.
        resources: The resources of a trial: `cpu` and `gpu`.
        scratch: A directory for what Tune writes, which is never read again.
        own: Whether the Ray is our own, whose node is never avoided.
        requests: Serves the requests that came in since its last call.

    Raises:
        Exception: Any error of the driver itself. The study is left such that the same command
            resumes the sweep.
    """

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the sweep reports errors itself

    housekeeping = Housekeeping(driver, requests, own)
    # Trials that wait for a node are what an autoscaler starts nodes for. Tune lets one wait.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(PENDING)
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"  # a trial waits at a rung for the answer
    starts = 0

    with _on_signals(driver):
        while True:
            try:
                _tune(driver, resources, scratch / f"tune-{starts}", housekeeping)
                break
            except RuntimeError as error:
                # Tune knows the death of an actor, but ends at any other error of Ray, such as
                # that of a worker killed by Ray's memory monitor, and with it all trials.
                if not isinstance(error.__cause__, RayError):
                    raise

                housekeeping.lose_all(error.__cause__)
                starts += 1

        deadline = time.monotonic() + CLOSING

        while not all(closed() for closed in driver.closing.values()):
            if time.monotonic() > deadline:
                break

            time.sleep(0.05)

        requests()

    if driver.fault is not None:
        raise driver.fault


def _tune(
    driver: Driver, resources: dict[str, float], storage: Path, housekeeping: "Housekeeping"
) -> None:
    tune.run(
        tune.with_resources(Trial, _place(resources)),
        name="sweep",
        storage_path=str(storage),
        search_alg=_Searcher(driver, housekeeping),
        scheduler=_Scheduler(driver, housekeeping),
        callbacks=[housekeeping],
        num_samples=-1,
        max_failures=0,
        reuse_actors=not resources["gpu"],
        raise_on_failed_trial=False,
        verbose=0,
    )


@contextmanager
def _on_signals(driver: Driver) -> Iterator[None]:
    r"""Stops gracefully at SIGINT, SIGTERM and SIGHUP, unless they are ignored.

    A second signal interrupts at once.
    """

    def handle(number: int, frame: Any) -> None:
        for other in before:
            signal.signal(other, interrupt)

        driver.signal = number
        driver.stop()  # before anything is printed: the terminal may be gone
        _say("\nStopping: every trial saves a checkpoint first. Once more to stop at once.")

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


def _say(text: str) -> None:
    r"""Prints a line. A stream that is gone, as with a closed terminal, is null from then on."""

    for stream, line in ((sys.stderr, ""), (sys.stdout, text)):
        try:
            print(line, file=stream, flush=True)
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _place(resources: dict[str, float]) -> Callable[[dict[str, Any]], Any]:
    r"""Returns a function from a trial's config to its resources and excluded nodes."""

    bundle = {key.upper(): x for key, x in resources.items() if x}

    def place(config: dict[str, Any]) -> Any:
        if not (avoid := config.get("avoid")):
            return tune.PlacementGroupFactory([bundle])

        where = {"ray.io/node-id": f"!in({','.join(avoid)})"}

        return tune.PlacementGroupFactory([bundle], bundle_label_selector=[where])

    return place


class _Searcher(Searcher):
    r"""The driver as Tune asks it for trials."""

    def __init__(self, driver: Driver, housekeeping: "Housekeeping") -> None:
        super().__init__()
        self.driver = driver
        self.housekeeping = housekeeping

    def suggest(self, trial_id: str) -> Any:
        self.housekeeping.tick()  # while there is no trial, Tune calls nothing else

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
        raise NotImplementedError("a sweep is resumed from its study, never from Tune's state")


class _Scheduler(FIFOScheduler):
    r"""The driver as Tune tells it results."""

    def __init__(self, driver: Driver, housekeeping: "Housekeeping") -> None:
        super().__init__()
        self.driver = driver
        self.housekeeping = housekeeping

    def choose_trial_to_run(self, controller: Any) -> Any:
        r"""Returns the trial to start, if any. On a stop, trials that wait for a node are dropped."""

        if not self.driver.stopping:
            return super().choose_trial_to_run(controller)

        for trial in controller.get_trials():
            if trial.status == "PENDING":
                self.driver.live.pop(trial.trial_id, None)
                controller.request_stop_trial(trial)

        return None

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        actor = self.housekeeping.see(trial.trial_id, result)

        def close(status: str) -> Callable[[], bool]:
            task = actor.close.remote(status)
            return lambda: bool(ray.wait([task], timeout=0)[0])

        if trial.trial_id not in self.driver.live:  # dropped when it was about to begin
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
            self.housekeeping.lose(trial.trial_id, _error_of(trial))
        except Exception as error:
            self.driver.guard(error)


def _error_of(trial: Any) -> BaseException | None:
    r"""Returns the error that a trial of Tune has ended with.

    Tune pickles it for this process, but for errors that are no death of an actor, such as that of
    a worker which is killed for lack of memory while it starts: of these it writes the text only.
    """

    with suppress(Exception), open(trial.pickled_error_file, "rb") as f:
        return cast(BaseException, pickle.load(f))

    with suppress(Exception):
        lines = Path(trial.error_file).read_text().splitlines()[1:]  # after `Failure # 1`
        text = "\n".join(lines)

        return OutOfMemoryError(text) if "low on memory" in text else RayError(text)

    return None


class Housekeeping(Callback):
    r"""Housekeeping in Tune's loop: serve requests, watch the deadline, detect lost workers.

    Arguments:
        driver: The driver.
        requests: Serves the requests that came in since its last call.
        own: Whether the Ray is our own, whose node is never avoided.
    """

    def __init__(
        self, driver: Driver, requests: Callable[[], None] = lambda: None, own: bool = False
    ) -> None:
        self.driver = driver
        self.requests = requests
        self.own = own
        self.liveness = Liveness(Path(driver.spec["runs"]), driver.spec.get("stall") or STALL)
        self.actors: dict[int, Any] = {}  # index of a run -> its actor, the newest
        self.nodes: dict[str, str] = {}  # name of a trial -> the node it reported from
        self.reasons: dict[str, str] = {}  # name of a trial -> why its process was ended
        self.doubts: dict[str, tuple[str, float]] = {}  # … -> what Ray said, until when to wait
        self.alive: set[str] = set()  # ids of the nodes that were up at the last look
        self.died: dict[str, float] = {}  # ids of nodes -> when they were seen to be dead
        self.trials: list[Any] = []  # all of Tune's
        self.ticked = self.looked = 0.0
        self.seen = time.monotonic()  # when a node was alive
        self.waiting: float | None = None  # since when all trials wait for a node
        self.warned = False
        self.restarts = 0
        self.stopping = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials
        self._warn_of_waiting()
        self.tick()

        if isinstance(self.driver.fault, RayGone):  # Tune would wait for it
            raise self.driver.fault

    def tick(self) -> None:
        r"""Does what is due. To be called as often as Tune calls anything."""

        now = time.monotonic()

        if now - self.ticked > TICK:
            self.ticked = now
            self.requests()
            self.driver.tick()
            self._announce_stop()

        if now - self.looked > LOOK:
            self.looked = now

            try:
                self._see_nodes()
                self._end_frozen()
                self._settle_doubts()
            except Exception as error:
                self.driver.guard(error)

    def see(self, name: str, result: dict[str, Any]) -> Any:
        r"""Notes where a trial runs, which its results tell, and returns its actor."""

        index = self.driver.live.get(name, 0)
        self.nodes[name] = id = result.get("node", "")
        self.restarts = 0

        if (actor := result.pop("actor", None)) is not None:
            self.actors[index] = actor

            if not self.own:
                names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
                self.driver.losses.places[index] = id, names.get(id, "")

        return self.actors.get(index)

    def _warn_of_waiting(self) -> None:
        count = sum(trial.status == "PENDING" for trial in self.trials)

        if not count or any(trial.status == "RUNNING" for trial in self.trials):
            self.waiting, self.warned = None, False
        elif self.waiting is None:
            self.waiting = time.monotonic()
        elif time.monotonic() - self.waiting > PATIENCE and not self.warned:
            self.warned = True
            logger.warning(
                "%d trials wait for room: the cluster starts nodes for them, or others use those "
                "that are up. `ray status` says more.",
                count,
            )

    def _see_nodes(self) -> None:
        r"""Notes which nodes are up. Tune would wait for ever if there were none."""

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.died |= dict.fromkeys(self.alive - alive, time.monotonic())
        self.alive = alive

        if alive:
            self.seen = self.looked
        elif self.looked - self.seen > GONE and self.driver.fault is None:
            raise RayGone(
                f"Ray is gone: it has had no node for {self.looked - self.seen:.0f} s. Nothing is "
                "lost: the same command resumes the sweep."
            )

    def _announce_stop(self) -> None:
        driver = self.driver

        if driver.stopping and not self.stopping and driver.why:
            _say(f"\nStopping, since {driver.why}: every trial saves a checkpoint first.")

        self.stopping = driver.stopping

    def _end_frozen(self) -> None:
        r"""Ends processes that are silent for long: their runs are lost then."""

        live, closing = self.driver.live, self.driver.closing
        running = {t.trial_id for t in self.trials if t.status == "RUNNING" and t.trial_id in live}
        at_work = {live[name]: name for name in running}
        open_ = {index for index, closed in closing.items() if not closed()}

        if not (watched := {*at_work, *open_}):
            return

        records = [r for r in self.driver.study.records() if r.index in watched]

        for record, silent in self.liveness.look(records):
            if (path := self.liveness.path(record)) is not None:
                reason = end_frozen(path, record, silent)

                if record.index in at_work:
                    self.reasons[at_work[record.index]] = reason

            if (actor := self.actors.get(record.index)) is not None:
                ray.kill(actor)

    def _settle_doubts(self) -> None:
        r"""Takes trials that Ray cannot reach for lost, once it is known which nodes are dead."""

        if not self.doubts:
            return

        dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}

        for name, (reason, until) in list(self.doubts.items()):
            if (gone := self._node(name) in dead) or time.monotonic() > until:
                del self.doubts[name]
                self.driver.lose(name, reason, "node" if gone else "worker")

    def _node(self, name: str) -> str:
        r"""Returns the node of a trial, which is unknown before its first report."""

        place = self.driver.losses.places.get(self.driver.live.get(name, 0), ("", ""))

        return self.nodes.get(name, place[0])

    def _has_died(self, node: str) -> bool:
        r"""Tells whether a node is dead; if it is unknown, whether any has died just now."""

        self._see_nodes()
        now = time.monotonic()

        if node:
            return node not in self.alive

        return any(now - when < DOUBT for when in self.died.values())

    def lose(self, name: str, error: BaseException | None) -> None:
        r"""Finds out why a trial was lost, and lets the driver know."""

        if (index := self.driver.live.get(name)) is None:
            return

        cause, reason = cause_of(error)
        record = next(r for r in self.driver.study.records() if r.index == index)
        path = self.liveness.path(record)
        early = self.driver.request.with_name(f"stacks.{index}.txt")

        if cause == "worker" and self._has_died(self._node(name)):
            cause = "node"

        for stacks in (early, *([path.directory / STACKS] if path else [])):
            if take_stacks(stacks, record.attempt):
                self.reasons.setdefault(name, f"its process hung: {stacks} says where")

        if name in self.reasons:
            cause, reason = "worker", self.reasons.pop(name)

        if cause == "unclear":
            self.doubts[name] = reason, time.monotonic() + DOUBT
        else:
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
        lost = {name for name in self.driver.live if self._was_killed(name, str(error))}

        for name in list(self.driver.live):
            if name in lost or not lost:
                self.driver.lose(name, reason, cause)
            else:
                self.driver.lose(name, "Tune was started again", "node")

        self.actors.clear()
        self.trials = []

    def _was_killed(self, name: str, message: str) -> bool:
        r"""Tells whether Ray's message names the process of a trial."""

        record = next(r for r in self.driver.study.records() if r.index == self.driver.live[name])
        path = self.liveness.path(record)
        pid = (read_holder(path.lease) or {}).get("pid") if path is not None else None

        return pid is not None and f"pid={pid}," in message


def cause_of(error: BaseException | None) -> tuple[str, str]:
    r"""Returns what has ended a worker, and one line about it, from the error of its trial.

    Returns:
        `memory`, `node`, `unclear` (its node may be dead without Ray knowing it yet) or `worker`;
        and the line.
    """

    cause = "worker"

    if isinstance(error, RayTaskError):
        error = error.as_instanceof_cause()

    if isinstance(error, OutOfMemoryError):
        cause = "memory"
    elif isinstance(error, ActorUnavailableError):
        cause = "unclear"
    elif isinstance(error, Disconnected | NodeDiedError) or (
        isinstance(error, RayActorError) and error.preempted
    ):
        cause = "node"

    # Ray lists what may be behind any death
    text = "" if error is None else str(error).partition(" Some common causes")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = lines[:1] if cause in ("memory", "unclear") else lines[-1:]

    return cause, shown[0][:300] if shown else "unknown"


class Liveness:
    r"""Detects trials whose process is frozen as a whole, or cut off, by their leases' heartbeats.

    A process that lives and hangs detects that itself, see :mod:`sda_ray.training.watchdog`.

    Arguments:
        runs: The directory of all runs.
        stall: The seconds without a heartbeat after which a process counts as frozen.
    """

    def __init__(self, runs: Path, stall: float) -> None:
        self.runs = runs
        self.limit = max(stall, BEATS * HEARTBEAT)
        self.paths: dict[str, RunPath] = {}
        self.seen: dict[int, tuple[Any, float]] = {}  # index of a run -> last heartbeat, when
        self.looked = time.monotonic()

    def look(self, records: Iterable[TrialRecord]) -> list[tuple[TrialRecord, float]]:
        r"""Returns the runs whose process is frozen, and for how many seconds."""

        now = time.monotonic()
        before, self.seen = self.seen if now - self.looked < PAUSE else {}, {}
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
        r"""Returns the path of a run, if it has a directory yet."""

        known = self.paths.get(record.run_id)

        if known is None or not known.lease.exists():
            if (path := RunPath.of_id(self.runs, record.run_id)) is None:
                return None

            self.paths[record.run_id] = known = path

        return known

    def _sign(self, record: TrialRecord) -> tuple[Any, float]:
        r"""Returns what changes while a run's process lives, and for how long it may stand still."""

        if (path := self.path(record)) is not None:
            held = read_holder(path.lease)

            if held and held["pid"] is not None and held["attempt"] >= record.attempt:
                return (held["attempt"], last_heartbeat(path.lease)), self.limit

        return record.attempt, OTHER * self.limit  # it starts, or has ended


def end_frozen(path: RunPath, record: TrialRecord, silent: float) -> str:
    r"""Kills the process of a frozen run, if it is on this machine, and returns its last state.

    The state is also appended to the stacks of processes that hung.
    """

    held = read_holder(path.lease) or {}
    pid, where = held.get("pid"), held.get("host")
    state = ""

    agent = bool(held.get("agent"))  # a process that holds the leases of others, too

    if pid and not agent and is_local(held) and is_alive(path.lease):
        state = ", ".join(filter(None, (_proc(pid, name) for name in ("status", "wchan"))))

        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)

    who = "the process elsewhere" if agent else f"process {pid} on {where}"
    text = f"no sign of life for {silent:.0f} s from {who}"
    text += f" ({state})" if state else ""

    with suppress(OSError), open(path.directory / STACKS, "a") as stream:
        stream.write(f"{text}, {TAKEN} {record.attempt}.\n")

    return text


def _proc(pid: int, name: str) -> str:
    r"""Returns what the kernel tells about a process."""

    try:
        text = Path(f"/proc/{pid}/{name}").read_text().strip()
    except OSError:
        return ""

    if name == "status":
        return next((" ".join(x.split()) for x in text.splitlines() if x[:6] == "State:"), "")

    return f"waits in {text}" if text not in ("", "0") else ""
