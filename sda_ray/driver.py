r"""The driver of a sweep: what each free slot does next, and what came of it.

It decides with the study and :mod:`sda_ray.pruner`, and knows nothing of how trials are carried
out: :mod:`sda_ray.executor` lets Ray Tune ask and tell.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import new_id
from .pruner import Record, Rules, Stops, decide, reveal
from .study import Study

__all__ = ["Driver", "Notify", "Propose"]

logger = logging.getLogger(__name__)

LOST = 5  # times that a worker may die under a run
ALIKE = 3  # runs that fail alike, before any is complete, after which the sweep stops
UNREACHED = 2  # attempts that W&B's server fails, after which new ones start offline

# A configuration and its trial, or None, given the runs and parameters that it shall have
Propose = Callable[[Sequence[Record], dict[str, Any] | None], Any]
Notify = Callable[[str, Record], None]


class Driver:
    r"""Creates the driver of a sweep.

    Arguments:
        study: The study, reconciled.
        rules: The rules of the sweep.
        propose: Draws a configuration, given the runs as they shall be seen, or None if there is
            no new one. See :func:`sda_ray.sampler.propose`.
        spec: What all trials are given, see :class:`sda_ray.trial.Trial`.
        slots: Tells how many trials fit at a time.
        notify: Called with a word and a record whenever something happens to a run.
        request: The file whose existence tells all trials to stop after their step.
        stops: The verdict on a run at a rung, if it is final, see :func:`sda_ray.pruner.decide`.
    """

    def __init__(
        self,
        study: Study,
        rules: Rules,
        propose: Propose,
        spec: dict[str, Any],
        slots: Callable[[], int],
        notify: Notify,
        request: Path,
        stops: Stops | None = None,
    ) -> None:
        self.study = study
        self.rules = rules
        self.propose = propose
        self.spec = spec
        self.slots = slots
        self.notify = notify
        self.request = request
        self.stops = stops
        self.request.unlink(missing_ok=True)

        self.live: dict[str, int] = {}  # who carries out what: a trial's name -> index of its run
        self.closing: dict[int, Callable[[], bool]] = {}  # index of a run -> whether it is closed
        self.lost: Counter[int] = Counter()
        self.unreached: set[tuple[int, int]] = set()  # attempts that W&B's server has failed
        self.errors: list[str] = []
        self.exhausted = False
        self.stopping = False  # asked to stop
        self.done = False  # nothing is left to do
        self.hopeless = False  # all runs fail for one reason
        self.fault: Exception | None = None

    def stop(self) -> None:
        r"""Asks for an end: every trial saves a checkpoint after its step, nothing new starts."""

        self.stopping = True
        self.request.touch()

    def suggest(self, trial: str) -> dict[str, Any] | None:
        r"""Returns what a new trial shall do, or None for nothing now.

        Raises:
            StopIteration: If there will be nothing any more.
        """

        if self.stopping:
            raise StopIteration

        if len(self.live) >= self.slots():
            return None

        records = self._reveal()
        action = decide(records, self._busy(), self.rules, self.exhausted, self.stops)

        if action.kind == "prune":
            assert action.record is not None
            self.notify("pruned", self.study.tell(action.record, "pruned"))
            return self.suggest(trial)

        if action.kind == "stop":
            self.done = True
            raise StopIteration

        if action.kind == "wait":
            return None

        if action.kind == "draw":
            record = self._draw(records)

            if record is None:
                self.exhausted = True
                return self.suggest(trial)
        else:
            assert action.record is not None
            record = self.study.start(action.record, action.until, action.shown)

        self.live[trial] = record.index
        self.notify(action.kind, record)

        return self.spec | {
            "config": self.spec["config"] | record.config,
            "run_id": record.run_id,
            "index": record.index,
            "attempt": record.attempt,
        }

    def _reveal(self) -> list[Record]:
        r"""Returns the runs. What is revealed once stays so, whatever other runs do later."""

        records = reveal(known := self.study.records(), self.rules)

        for before, after in zip(known, records, strict=True):
            if before.shown != after.shown:
                self.study.show(before, after.shown)

        return records

    def _draw(self, records: list[Record]) -> Record | None:
        drawn, queued = None, None

        for number, params in self.study.queue().items():
            if (drawn := self.propose(records, params)) is not None:
                queued = number
                break

            logger.warning("queued configuration %s has a run already: it is left out.", params)
            self.study.dequeue(number)

        if drawn is None and (drawn := self.propose(records, None)) is None:
            return None

        values, trial = drawn
        epochs = (self.spec["config"] | values)["epochs"]
        until = min(self.rules.rungs[0], epochs) if self.rules.min_epochs else epochs
        index = 1 + len(records)
        record = Record(
            index, new_id(), "running", until, epochs, attempt=1, config=values, queued=queued
        )

        return self.study.add(record, trial)

    def _busy(self) -> set[int]:
        r"""Returns the runs in flight, those included whose process has not let go of them."""

        for index, closed in list(self.closing.items()):
            if closed():
                del self.closing[index]

        return {*self.live.values(), *self.closing}

    def report(
        self, trial: str, result: dict[str, Any], close: Callable[[str], Callable[[], bool]]
    ) -> bool:
        r"""Takes in what a trial reports and returns whether it shall go on.

        Arguments:
            trial: The trial's name.
            result: What :meth:`sda_ray.trial.Trial.step` returned.
            close: Ends the trial's attempt with a status, and returns what tells the end of that.
        """

        record = self._find(self.live[trial])
        record = self.study.report(record, dict(result["epochs"]))
        event, error = result["event"], result["error"]

        if result.get("unreached"):
            self._unreached(record)

        if event == "running" and record.paused and not self._goes_on(record):
            event = "paused"
            self.closing[record.index] = close(event)
        elif event in ("complete", "diverged", "failed"):
            record = self.study.tell(record, event, error)

        if event == "failed":
            self._failed(error)

        if event != "running":
            del self.live[trial]

        self.notify(event, record)

        return bool(event == "running")

    def _unreached(self, record: Record) -> None:
        r"""Lets what starts from now on log offline, if W&B's server fails again and again."""

        self.unreached.add((record.index, record.attempt))

        if len(self.unreached) >= UNREACHED and self.spec["wandb"]["mode"] == "online":
            self.spec = self.spec | {"wandb": self.spec["wandb"] | {"mode": "offline"}}
            logger.warning(
                "W&B's server has failed %d runs: the rest of the sweep starts offline. "
                "`sda-ray sync --all` uploads it later.",
                len(self.unreached),
            )

    def _find(self, index: int) -> Record:
        return next(record for record in self.study.records() if record.index == index)

    def _goes_on(self, record: Record) -> bool:
        r"""Lets a run at a rung go on at once, if it is what the slot would be used for anyway."""

        if self.stopping:
            return False

        live = self._busy() - {record.index}
        action = decide(self._reveal(), live, self.rules, self.exhausted, self.stops)

        if action.kind == "prune" or action.record is None or action.record.index != record.index:
            return False

        self.study.extend(record, action.until, action.shown)

        return True

    def _failed(self, error: str) -> None:
        r"""Stops the sweep if all runs seem to fail for one reason."""

        self.errors.append(error)
        kinds = {re.sub(r"\S*[/\d]\S*", "", error) for error in self.errors}  # without paths
        complete = any(record.state == "complete" for record in self.study.records())

        if len(self.errors) >= ALIKE and len(kinds) == 1 and not complete:
            self.hopeless = True
            self.stop()

    def lose(self, trial: str, reason: str) -> None:
        r"""Takes in that a worker was lost. Its run is adopted, unless it was lost too often."""

        index = self.live.pop(trial, None)

        if index is None:
            return

        self.lost[index] += 1
        record = self._find(index)

        if self.lost[index] > LOST:
            error = f"its worker died {self.lost[index]} times, last of: {reason}"
            self.notify("failed", self.study.tell(record, "failed", error))
            self._failed(error)
        else:
            self.notify("lost", replace(record, error=reason))

    def guard(self, error: Exception) -> None:
        r"""Takes in an error of our own: the sweep stops, in good order."""

        logger.error("the sweep stops: %s: %s", type(error).__name__, error)
        self.fault = self.fault or error
        self.stop()
