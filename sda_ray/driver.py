r"""The driver of a sweep: it decides with the study, and Ray Tune carries out.

Tune is given no state of its own: it asks :class:`Driver` what to run (a searcher), tells it what
came of it (a scheduler), and is made anew at every start. Its failure budget is zero, since it
cannot tell a bug from a lost machine: lost workers are adopted here.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from .checkpoint import new_id
from .pruner import Record, Rules, decide, in_top, reveal
from .study import Study
from .trial import Trial

__all__ = ["Driver"]

logger = logging.getLogger(__name__)

LOST = 5  # times that a worker may die under a run


class Driver:
    r"""Creates the driver of a sweep.

    Arguments:
        study: The study, reconciled.
        rules: The rules of the sweep.
        space: Gives the values of the keys that vary, for an Optuna trial.
        spec: What all trials are given, see :class:`sda_ray.trial.Trial`.
        slots: Tells how many trials fit at a time.
        notify: Called with a word and a record whenever something happens to a run.
    """

    def __init__(
        self,
        study: Study,
        rules: Rules,
        space: Callable[[Any], dict[str, Any]],
        spec: dict[str, Any],
        slots: Callable[[], int],
        notify: Callable[[str, Record], None],
    ) -> None:
        self.study = study
        self.rules = rules
        self.space = space
        self.spec = spec
        self.slots = slots
        self.notify = notify

        self.live: dict[str, int] = {}  # Tune's trial id -> index of the run
        self.closing: dict[int, Any] = {}  # index of a run -> its actor's last task
        self.lost: Counter[int] = Counter()
        self.errors: list[str] = []
        self.exhausted = False
        self.stopping = False  # asked to stop
        self.done = False  # nothing is left to do
        self.fault: BaseException | None = None

    def run(self, resources: dict[str, float], reuse: bool, scratch: Path) -> None:
        r"""Runs trials until nothing is left to do, or until it is asked to stop.

        Arguments:
            resources: What Ray shall keep for a trial: `cpu` and `gpu`.
            reuse: Whether the process of a trial is kept for the next one.
            scratch: A directory for what Tune writes, which is nothing to keep.

        Raises:
            BaseException: Whatever went wrong in the driver itself. The study is left such that
                the same command carries on.
        """

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # we say it ourselves
        tune.run(
            tune.with_resources(Trial, resources),
            name="sweep",
            storage_path=str(scratch / "tune"),
            search_alg=_Searcher(self),
            scheduler=_Scheduler(self),
            num_samples=-1,
            max_failures=0,
            reuse_actors=reuse,
            raise_on_failed_trial=False,
            verbose=0,
        )

        if self.fault is not None:
            raise self.fault

    def stop(self) -> None:
        r"""Asks for an end: every trial saves a checkpoint after its step, nothing new starts."""

        self.stopping = True

    # What Tune asks and tells

    def suggest(self, tune_id: str) -> dict[str, Any] | None:
        r"""Returns what the next trial shall do, None for nothing now, or raises StopIteration."""

        if self.stopping:
            raise StopIteration

        if len(self.live) >= self.slots():
            return None

        records = self.study.records()
        action = decide(records, self._busy(), self.rules, self.exhausted)

        if action.kind == "stop":
            self.done = True
            raise StopIteration

        if action.kind == "wait":
            return None

        if action.kind == "draw":
            record = self._draw(records)

            if record is None:
                self.exhausted = True
                return self.suggest(tune_id)
        else:
            assert action.record is not None
            record = action.record
            shown = record.shown

            if action.kind == "promote":
                shown = max(record.visible) if action.hidden else None

            record = self.study.start(record, action.until, shown)

        self.live[tune_id] = record.index
        self.notify(action.kind, record)

        return self.spec | {
            "config": self.spec["config"] | record.config,
            "run_id": record.run_id,
            "index": record.index,
            "attempt": record.attempt,
        }

    def _draw(self, records: list[Record]) -> Record | None:
        drawn = self.study.draw(self.space, reveal(records, self.rules))

        if drawn is None:
            return None

        values, trial = drawn
        epochs = (self.spec["config"] | values)["epochs"]
        until = min(self.rules.rungs[0], epochs) if self.rules.min_epochs else epochs
        record = Record(
            len(records) + 1, new_id(), "running", until, epochs, attempt=1, config=values
        )

        return self.study.add(record, trial)

    def _busy(self) -> set[int]:
        r"""Returns the runs in flight, those included whose process has not let go of them."""

        for index, task in list(self.closing.items()):
            if ray.wait([task], timeout=0)[0]:
                del self.closing[index]

        return {*self.live.values(), *self.closing}

    def on_result(self, tune_id: str, result: dict[str, Any], actor: Any) -> bool:
        r"""Takes in what a trial reports and returns whether it shall go on."""

        index = self.live[tune_id]
        record = next(r for r in self.study.records() if r.index == index)
        record = self.study.report(record, dict(result["epochs"]))
        event, error = result["event"], result["error"]

        if event != "running":
            state = {"finished": "complete"}.get(event, event)
            self.study.tell(record, state, error)
            del self.live[tune_id]
            self.notify(state, replace(record, error=error))

            if state == "failed":
                self._failed(error)

            return False

        if record.paused and not self._goes_on(record):
            self._let_go(tune_id, actor, "paused")
            self.notify("paused", record)
            return False

        if self.stopping:
            self._let_go(tune_id, actor, "interrupted")
            self.notify("interrupted", record)
            return False

        self.notify("running", record)
        return True

    def _goes_on(self, record: Record) -> bool:
        r"""Lets a run at a rung go on to the next one, if it is among the best there."""

        records = reveal(self.study.records(), self.rules)

        if not in_top(record, record.until, records, self.rules.eta):
            return False

        self.study.extend(record, self.rules.after(record.until))

        return True

    def _let_go(self, tune_id: str, actor: Any, status: str) -> None:
        self.closing[self.live.pop(tune_id)] = actor.close.remote(status)

    def _failed(self, error: str) -> None:
        self.errors.append(error)

        if len(self.errors) >= 3 and len(set(self.errors[:3])) == 1:
            self.stop()

    def on_error(self, tune_id: str, reason: str) -> None:
        r"""Takes in that a worker was lost. Its run is adopted, unless it was lost too often."""

        index = self.live.pop(tune_id, None)

        if index is None:
            return

        self.lost[index] += 1
        record = next(r for r in self.study.records() if r.index == index)

        if self.lost[index] > LOST:
            error = f"its worker died {self.lost[index]} times, last of: {reason}"
            self.study.tell(record, "failed", error)
            self.notify("failed", replace(record, error=error))
            self._failed(error)
        else:
            self.notify("lost", replace(record, error=reason))

    def guard(self, error: BaseException) -> None:
        r"""Keeps an error of our own from tearing Tune down: the sweep stops in good order."""

        logger.error("the sweep stops: %s: %s", type(error).__name__, error)
        self.fault = self.fault or error
        self.stop()


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
        pass

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
        try:
            actor = trial.temporary_state.ray_actor
            goes_on = self.driver.on_result(trial.trial_id, result, actor)
        except Exception as error:
            self.driver.guard(error)
            goes_on = False

        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        try:
            self.driver.on_error(trial.trial_id, _reason(trial))
        except Exception as error:
            self.driver.guard(error)


def _reason(trial: Any) -> str:
    r"""Returns the last line of what Tune noted of a lost worker."""

    file = Path(trial.error_file or "")
    lines = file.read_text().splitlines() if file.is_file() else []
    said = [line.strip() for line in lines if line.strip()]

    return said[-1].partition(". Some common causes")[0][:300] if said else "unknown"
