r"""Ray Tune as the executor of a sweep.

Tune is given no state of its own: it asks :class:`Driver` what to run (a searcher), tells it what
came of it (a scheduler), and is made anew at every start. Its failure budget is zero, since it
cannot tell a bug from a lost machine: lost workers are adopted by the driver.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, Trainable
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..sweep.driver import Driver
from .lookout import Lookout
from .patches import memory_kills_are_deaths, trials_without_tune
from .scaling import node_of
from .trial import Trial

__all__ = ["execute"]

logger = logging.getLogger(__name__)

CLOSING = 60.0  # seconds given to trials in the end to close their runs
WAITING = 1000  # trials that may wait for a node, at most
PATIENCE = 20.0  # seconds that they wait before that is said


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
