r"""The driver of a sweep: what each free slot does next, and what came of it.

It decides with the study and :mod:`sda_ray.search.promotion`, and knows nothing of how trials are carried
out: :mod:`sda_ray.cluster.executor` lets Ray Tune ask and tell.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.system import margin
from ..search.promotion import PruneRule, Rules, TrialRecord, decide, unhide
from ..search.study import Propose, Study, draw_run
from .failures import Losses, Outage, alike

__all__ = ["TIME", "Driver", "Notify"]

logger = logging.getLogger(__name__)

TIME = "its time is up"
HOUSE = 5.0  # seconds between two times of keeping house

Notify = Callable[[str, TrialRecord], None]


class Driver:
    r"""Creates the driver of a sweep.

    Arguments:
        study: The study, reconciled.
        rules: The rules of the sweep.
        propose: Draws a configuration, given the runs as they shall be seen, or None if there is
            no new one. See :func:`sda_ray.search.sampler.propose`.
        spec: What all trials are given, see :class:`sda_ray.cluster.trial.Trial`.
        slots: Tells how many trials fit at a time.
        notify: Called with a word and a record whenever something happens to a run.
        request: The file whose existence tells all trials to stop after their step.
        stops: The verdict on a run at a rung, if it is final, see :func:`sda_ray.search.promotion.decide`.
        deadline: The end of the sweep's time, see :func:`sda_ray.core.system.deadline`.
        retarget: Records another number of runs wanted than the sweep was started with.
        house: Called every 5 s, to look after the disk.
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
        stops: PruneRule | None = None,
        deadline: float | None = None,
        retarget: Callable[[int], None] = lambda target: None,
        house: Callable[[], None] = lambda: None,
    ) -> None:
        self.study = study
        self.rules = rules
        self.propose = propose
        self.spec = spec
        self.slots = slots
        self.notify = notify
        self.request = request
        self.stops = stops
        self.deadline = deadline
        self.retarget = retarget
        self.house = house
        self.request.unlink(missing_ok=True)

        self.live: dict[str, int] = {}  # who carries out what: a trial's name -> index of its run
        self.closing: dict[int, Callable[[], bool]] = {}  # index of a run -> whether it is closed
        self.noted: set[str] = set()  # what notes were about that were passed on
        self.unwanted: set[int] = set()  # runs that the user stops, until that is told
        self.losses = Losses()
        self.outage = Outage()
        self.errors: list[str] = []
        self.exhausted = False
        self.stopping = False  # asked to stop
        self.why = ""  # what asked, if not a signal
        self.done = False  # nothing is left to do
        self.hopeless = False  # all runs fail for one reason
        self.fault: Exception | None = None

        self.start = self.kept = time.monotonic()
        self.longest = 0.0  # seconds that a trial went without looking for the wish to stop

    def stop(self, why: str = "") -> None:
        r"""Asks for an end: every trial saves a checkpoint after its step, nothing new starts."""

        self.why = self.why or why
        self.stopping = True

        if (
            lease := self.study.journal.lease
        ) is None or not lease.is_lost():  # the trials are another driver's then
            self.request.touch()

    def tick(self) -> None:
        r"""Looks at the clock. To be called a few times a second, whatever else happens."""

        now = time.monotonic()

        try:
            if self.deadline is not None and not self.stopping:
                early = margin(self.longest, self.deadline - self.start)

                if now > self.deadline - early:
                    self.stop(TIME)

            if now - self.kept > HOUSE:
                self.kept = now
                self.house()
        except Exception as error:
            self.guard(error)

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
            config = self.spec["config"]
            record = draw_run(self.study, records, self.rules, config, self.propose)

            if record is None:
                self.exhausted = True
                return self.suggest(trial)
        else:
            assert action.record is not None
            record = self.study.start(action.record, action.until, action.shown)

        self.live[trial] = record.index
        self.losses.places.pop(record.index, None)  # nobody knows yet where it goes on
        self.notify(action.kind, record)

        return self.spec | {
            "config": self.spec["config"] | record.config,
            "run_id": record.run_id,
            "index": record.index,
            "attempt": record.attempt,
            "short": record.short,
            "avoid": sorted(self.losses.avoided),
        }

    def _reveal(self) -> list[TrialRecord]:
        r"""Returns the runs. What is revealed once stays so, whatever other runs do later."""

        records = unhide(known := self.study.records(), self.rules)

        for before, after in zip(known, records, strict=True):
            if before.shown != after.shown:
                self.study.show(before, after.shown)

        return records

    def at_work(self) -> set[int]:
        r"""Returns the runs in flight, those included whose process has not let go of them."""

        for index, closed in list(self.closing.items()):
            if closed():
                del self.closing[index]

        return {*self.live.values(), *self.closing}

    def _busy(self) -> set[int]:
        return self.at_work() | self.unwanted

    def report(
        self, trial: str, result: dict[str, Any], close: Callable[[str], Callable[[], bool]]
    ) -> bool:
        r"""Takes in what a trial reports and returns whether it shall go on.

        Arguments:
            trial: The trial's name.
            result: What :meth:`sda_ray.cluster.trial.Trial.step` returned.
            close: Ends the trial's attempt with a status, and returns what tells the end of that.
        """

        record = self._find(self.live[trial])
        record = self.study.report(record, dict(result["epochs"]))
        event, error = result["event"], result["error"]
        self.longest = max(self.longest, result.get("longest", 0.0))

        for about, note in result.get("notes", {}).items():
            if about not in self.noted:  # one trial says it for all
                self.noted.add(about)
                logger.warning("%s", note)

        if result.get("unreached"):
            self.spec = self.outage.note(self.spec, record, result["unreached"])

        while event == "running" and record.paused:
            if self._goes_on(record):  # it may bring epochs that an older journal had lost
                record = self.study.report(self._find(record.index), dict(result["epochs"]))
            else:
                event = "paused"
                self.closing[record.index] = close(event)

        if event == "complete":
            record = self.study.tell(record, event, finals=result.get("finals"))
        elif event == "memory" and not self.losses.count(self.study, record, event, error):
            record = replace(record, error=error)
        elif event in ("diverged", "memory", "failed"):
            event = "diverged" if event == "diverged" else "failed"
            record = self.study.tell(record, event, error)

        if event == "failed":
            self._failed(error)

        if event != "running":
            del self.live[trial]

            if result.get("leaving"):
                self.losses.leave(record.index)
            else:
                self.losses.acquit(record.index)

        if event == "stopped":
            self.unwanted.add(record.index)  # told when its process has let go of it
        else:
            self.notify(event, record)

        return bool(event == "running")

    def _find(self, index: int) -> TrialRecord:
        return next(record for record in self.study.records() if record.index == index)

    def _goes_on(self, record: TrialRecord) -> bool:
        r"""Lets a run at a rung go on at once, if it is what the slot would be used for anyway."""

        if self.stopping or record.index in self.unwanted:
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
        complete = any(record.state == "complete" for record in self.study.records())

        if alike(self.errors) and not complete:
            self.hopeless = True
            self.stop()

    def lose(self, trial: str, reason: str, cause: str = "worker") -> None:
        r"""Takes in that a worker was lost. Its run is adopted, unless it was lost too often.

        Arguments:
            trial: The trial's name.
            reason: What is known of it.
            cause: `node`, which is never held against the run; `memory`, once at most; or `worker`.
        """

        index = self.live.pop(trial, None)

        if index is None:
            return

        record = self._find(index)

        if error := self.losses.count(self.study, record, cause, reason):
            self.notify("failed", self.study.tell(record, "failed", error))
            self._failed(error)
        else:
            event = "memory" if cause == "memory" else "lost"
            self.notify(event, replace(record, error=reason))

    def guard(self, error: Exception) -> None:
        r"""Takes in an error of our own: the sweep stops, in good order."""

        logger.error("the sweep stops: %s: %s", type(error).__name__, error)
        self.fault = self.fault or error
        self.stop()
