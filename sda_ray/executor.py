r"""Ray Tune as the executor of a sweep.

Tune is given no state of its own: it asks :class:`Driver` what to run (a searcher), tells it what
came of it (a scheduler), and is made anew at every start. Its failure budget is zero, since it
cannot tell a bug from a lost machine: lost workers are adopted by the driver.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from .driver import Driver
from .trial import Trial

__all__ = ["execute"]

CLOSING = 60.0  # seconds given to trials in the end to close their runs


def execute(driver: Driver, resources: dict[str, float], scratch: Path) -> None:
    r"""Runs trials until nothing is left to do, or until the driver or a signal asks to stop.

    Arguments:
        driver: The driver.
        resources: What Ray shall keep for a trial: `cpu` and `gpu`.
        scratch: A directory for what Tune writes, which is nothing to keep.

    Raises:
        Exception: Whatever went wrong in the driver itself. The study is left such that the same
            command carries on.
    """

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # we say it ourselves

    with _on_signals(driver.stop):
        tune.run(
            tune.with_resources(Trial, resources),
            name="sweep",
            storage_path=str(scratch / "tune"),
            search_alg=_Searcher(driver),
            scheduler=_Scheduler(driver),
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


class _Searcher(Searcher):
    r"""Creates the face of the driver that Tune asks for trials."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def suggest(self, trial_id: str) -> Any:
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

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        actor = trial.temporary_state.ray_actor

        def close(status: str) -> Callable[[], bool]:
            task = actor.close.remote(status)
            return lambda: bool(ray.wait([task], timeout=0)[0])

        try:
            goes_on = self.driver.report(trial.trial_id, result, close)
        except Exception as error:
            self.driver.guard(error)
            goes_on = False

            with suppress(Exception):
                self.driver.closing[0] = close("interrupted")

        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        try:
            self.driver.lose(trial.trial_id, _reason(trial))
        except Exception as error:
            self.driver.guard(error)


def _reason(trial: Any) -> str:
    r"""Returns the last line of what Tune noted of a lost worker."""

    file = Path(trial.error_file or "")
    lines = file.read_text().splitlines() if file.is_file() else []
    said = [line.strip() for line in lines if line.strip()]

    return said[-1].partition(". Some common causes")[0][:300] if said else "unknown"
