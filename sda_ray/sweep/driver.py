r"""The driver of a sweep: decides what each free slot does next, and records the results.

It decides with the study and :mod:`sda_ray.search.promotion`, and does not know how trials run:
:mod:`sda_ray.cluster.executor` connects it to Ray Tune.
"""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cluster import RayGone
from ..core import LeaseGone, margin
from ..search import (
    Action,
    Propose,
    PruneRule,
    Rules,
    Study,
    TrialRecord,
    decide,
    draw_run,
    replicate_run,
    unhide,
)

logger = logging.getLogger(__name__)

TIME = "its time is up"
UNREACHED = 2  # attempts that W&B's server fails, after which new ones start offline
HOUSEKEEPING = 5.0  # seconds between two calls of the housekeeping
ALIKE = 3  # runs that fail alike, before any is complete, after which a sweep stops
LOST = 5  # times that a worker may die under a run
STRIKES = 3  # workers in a row that may die on a node, before it is avoided
SHORT = 1  # times that a run may be short of memory

Notify = Callable[[str, TrialRecord], None]


@dataclass(eq=False)
class Driver:
    r"""The driver of a sweep.

    Arguments:
        study: The study, reconciled with the run directories.
        rules: The rules of the sweep.
        propose: Draws a configuration given the runs, or returns None if there is no new one. See
            :func:`sda_ray.search.sampler.propose`.
        spec: The arguments that all trials share, see :class:`sda_ray.cluster.trial.Trial`.
        slots: Returns how many trials fit at a time.
        notify: Called with an event and a record whenever something happens to a run.
        request: The file whose existence asks all trials to stop after their step.
        stops: The rule of a pruner whose verdicts are final, see
            :func:`sda_ray.search.promotion.decide`.
        deadline: The end of the sweep's time, see :func:`sda_ray.core.system.deadline`.
        retarget: Records a new number of trials.
        house: The housekeeping, called every 5 s.
    """

    study: Study
    rules: Rules
    propose: Propose
    spec: dict[str, Any]
    slots: Callable[[], int]
    notify: Notify
    request: Path
    stops: PruneRule | None = None
    deadline: float | None = None
    retarget: Callable[[int], None] = lambda target: None
    house: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.request.unlink(missing_ok=True)

        self.live: dict[str, int] = {}  # name of a trial -> index of its run
        self.closing: dict[int, Callable[[], bool]] = {}  # index of a run -> whether it is closed
        self.home = ""  # the node that trials cannot avoid, since the driver's Ray ends with it
        self.noted: set[str] = set()  # the subjects of the notes that were passed on
        self.unreached: set[tuple[int, int]] = set()  # attempts that W&B's server failed
        self.cancelled: set[int] = set()  # runs that the user stops, until that is recorded
        self.losses = Losses()
        self.errors: list[str] = []
        self.exhausted = False
        self.stopping = False  # no new trials start
        self.signal = 0  # the signal that asked to stop
        self.unsaved: set[int] = set()  # runs that ended without a checkpoint since then
        self.why = ""  # the reason, if it is not a signal
        self.done = False  # nothing is left to do
        self.hopeless = False  # all runs fail alike
        self.fault: Exception | None = None

        self.start = self.kept = time.monotonic()
        self.longest = 0.0  # seconds that a trial went without checking for a request to stop

    def stop(self, why: str = "") -> None:
        r"""Stops the sweep: every trial saves a checkpoint after its step, and none starts."""

        self.why = self.why or why
        self.stopping = True
        lease = self.study.journal.lease

        if lease is None or not lease.is_lost():  # otherwise the trials are another driver's
            try:
                self.request.touch()
            except OSError as error:
                self.fault = self.fault or error

    def tick(self) -> None:
        r"""Checks the deadline and does the housekeeping. Called a few times a second."""

        now = time.monotonic()

        try:
            if self.deadline is not None and not self.stopping:
                early = margin(self.longest, self.deadline - self.start)

                if now > self.deadline - early:
                    self.stop(TIME)

            if now - self.kept > HOUSEKEEPING:
                self.kept = now
                self.house()
        except Exception as error:
            self.guard(error)

    def suggest(self, trial: str) -> dict[str, Any] | None:
        r"""Returns the arguments of a new trial, or None if there is nothing to do now.

        Raises:
            StopIteration: If nothing is left to do.
        """

        if self.stopping:
            raise StopIteration

        if len(self.live) >= self.slots():
            return None

        while True:
            action, records = self._decide(self.study.records(), self._busy())

            if action.kind == "stop":
                self.done = True
                raise StopIteration

            if action.kind == "wait":
                return None

            if action.kind == "draw":
                config = self.spec["config"]
                record = draw_run(self.study, records, self.rules, config, self.propose)

                if record is not None:
                    break

                self.exhausted = True
                continue

            assert action.record is not None

            if action.kind == "replicate":
                record = replicate_run(self.study, action.record, self.spec["config"])
                break

            if action.kind != "prune":
                record = self.study.start(action.record, action.until, action.shown)
                break

            self.notify("pruned", self.study.tell(action.record, "pruned"))

        self.live[trial] = record.index
        self.losses.places.pop(record.index, None)  # its node is not known yet
        self.notify(action.kind, record)

        return self.spec | {
            "config": self.spec["config"] | record.config,
            "run_id": record.run_id,
            "index": record.index,
            "params": record.trial.params,
            "attempt": record.attempt,
            "short": record.memory_errors,
            "avoid": sorted(self.losses.avoided),
            "replica_of": record.replica_of,
        }

    def _decide(
        self, records: Sequence[TrialRecord], busy: set[int]
    ) -> tuple[Action, list[TrialRecord]]:
        r"""Returns the next action, and the records with the values that count for others.

        Values that count once are recorded, so that they count whatever other runs do later.
        """

        shown = unhide(records, self.rules)

        for before, after in zip(records, shown, strict=True):
            if before.shown != after.shown:
                self.study.set_shown(before, after.shown)

        stopped = [
            replace(r, state="stopped")
            if r.index in self.cancelled and r.state == "running"
            else r
            for r in shown
        ]
        queued = bool(self.study.queue())

        return decide(stopped, busy, self.rules, self.exhausted, self.stops, queued), shown

    def at_work(self) -> set[int]:
        r"""Returns the runs that have a process, also those whose process is closing them."""

        for index, closed in list(self.closing.items()):
            if closed():
                del self.closing[index]

        return {*self.live.values(), *self.closing}

    def _busy(self) -> set[int]:
        return self.at_work() | self.cancelled

    def report(
        self, trial: str, result: dict[str, Any], close: Callable[[str], Callable[[], bool]]
    ) -> bool:
        r"""Records the result of a trial and returns whether the trial continues.

        Arguments:
            trial: The trial's name.
            result: The return value of :meth:`sda_ray.cluster.trial.Trial.step`.
            close: Ends the trial's attempt with a status, and returns a function that tells
                whether it has ended.
        """

        epochs = dict(result["epochs"])
        record = self.study.report(self._record(self.live[trial]), epochs)
        event, error = result["event"], result["error"]
        self._take_notes(record, result)

        while event == "running" and record.paused:
            if self._promote(record):
                record = self.study.report(record, epochs)  # with those that the journal had lost
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
        elif error and self.stopping and event in ("interrupted", "memory"):
            self.unsaved.add(record.index)

        if event != "running":
            del self.live[trial]

            if halt := result.get("halt"):
                self.stop(halt)
            elif result.get("leaving"):
                self.losses.leave(record.index)
            else:
                self.losses.acquit(record.index)

        if event == "stopped":
            self.cancelled.add(record.index)  # recorded once its process has ended
        else:
            self.notify(event, record)

        return bool(event == "running")

    def _take_notes(self, record: TrialRecord, result: dict[str, Any]) -> None:
        r"""Takes from a result what is not about the run itself."""

        self.longest = max(self.longest, result.get("longest", 0.0))

        if (node := result.get("node")) and node != self.home:
            self.losses.places[record.index] = node, result["host"]

        for subject, note in result.get("notes", ()):
            if subject not in self.noted:  # one trial says it for all
                self.noted.add(subject)
                logger.warning("%s", note)

        if why := result.get("unreached"):
            self.unreached.add((record.index, record.attempt))
            wandb = self.spec["wandb"]

            if len(self.unreached) >= UNREACHED and wandb["mode"] == "online":
                self.spec = self.spec | {"wandb": wandb | {"mode": "offline"}}
                logger.warning(
                    "%d runs could not use W&B's server: the rest of the sweep starts offline, "
                    "and `sda-ray sync --all` uploads it later. The last one was told: %s",
                    len(self.unreached),
                    why,
                )

    def _promote(self, record: TrialRecord) -> bool:
        r"""Promotes a run at a rung if its slot would be used for it anyway."""

        if self.stopping or record.index in self.cancelled:
            return False

        action, _ = self._decide(self.study.records(), self._busy() - {record.index})

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
        r"""Records that a worker was lost. Its run is adopted unless that happened too often.

        Arguments:
            trial: The trial's name.
            reason: A line about the loss.
            cause: `node`, which is never held against the run; `memory` or `start`, at most
                once; or `worker`.
        """

        index = self.live.pop(trial, None)

        if index is None:
            return

        record = self._record(index)

        if self.stopping:
            self.unsaved.add(index)

        if error := self.losses.count(self.study, record, cause, reason):
            self.notify("failed", self.study.tell(record, "failed", error))
            self._failed(error)
        else:
            event = "memory" if cause == "memory" else "lost"
            self.notify(event, replace(record, error=reason))

    def guard(self, error: Exception) -> None:
        r"""Stops the sweep gracefully because of an error of the driver itself."""

        if not isinstance(error, LeaseGone | RayGone):  # these end the command, which prints them
            logger.error("the sweep stops: %s: %s", type(error).__name__, error)

        self.fault = self.fault or error
        self.stop()

    def _record(self, index: int) -> TrialRecord:
        return next(record for record in self.study.records() if record.index == index)


# Failures outside the trials


def alike(errors: Sequence[str]) -> bool:
    r"""Returns whether runs fail for one reason: the same error but for paths and numbers."""

    kinds = {re.sub(r"\S*[/\d]\S*", "", error) for error in errors}

    return len(errors) >= ALIKE and len(kinds) == 1


class Losses:
    r"""Counts the workers lost under each run and on each node.

    The losses of a run are counted in the study, across drivers; those of a node by this driver,
    for this sweep.
    """

    def __init__(self) -> None:
        self.places: dict[int, tuple[str, str]] = {}  # index of a run -> id and name of its node
        self.strikes: dict[str, list[int]] = defaultdict(list)  # id of a node -> runs lost there
        self.blamed: set[int] = set()  # runs that kill their workers on any node
        self.avoided: dict[str, str] = {}  # id of a node where no trial starts -> why

    def count(self, study: Study, record: TrialRecord, cause: str, reason: str) -> str:
        r"""Counts a loss, and returns why the run fails, or an empty text.

        For causes see :func:`sda_ray.cluster.executor.cause_of`. A lost node is never held against
        a run. A worker that does not start lacks memory as a rule.
        """

        if cause in ("memory", "start"):
            what = "out of memory" if cause == "memory" else "its worker could not be started"
            short = study.record_memory_error(record).memory_errors

            return f"{what} {short} times, last of: {reason}" if short > SHORT else ""

        if cause == "node":
            return ""

        id, name = self.places.get(record.index, ("", ""))
        leaving = id in self.avoided and id not in self.strikes

        if id and not leaving and record.index not in self.blamed:
            self.strikes[id].append(record.index)

            if (deaths := len(self.strikes[id])) >= STRIKES and id not in self.avoided:
                why = f"node {name}: {deaths} workers in a row died there, last of: {reason}"
                self.avoided[id] = why
                logger.warning("%s. No trial of this sweep starts there any more.", why)

        if (lost := study.record_worker_death(record).worker_deaths) > LOST:
            self._blame({record.index})
            return f"its worker died {lost} times, last of: {reason}"

        return ""

    def acquit(self, index: int) -> None:
        r"""Records that an attempt has ended by itself, so that its node is fine.

        An avoided node stays avoided, unless all deaths there belong to one other run.
        """

        id, _ = self.places.get(index, ("", ""))

        if id not in self.avoided:
            self.strikes.pop(id, None)
        elif index not in (died := {*self.strikes.get(id, ())}) and len(died) == 1:
            self._blame(died)

    def forgive(self) -> bool:
        r"""Allows the nodes again that are avoided for the deaths of one run, and blames the run.

        Called when no other node is left. Returns whether there was such a node.
        """

        sole = [{*died} for id, died in self.strikes.items() if id in self.avoided]
        runs = {run for died in sole if len(died) == 1 for run in died}
        self._blame(runs)

        return bool(runs)

    def _blame(self, runs: set[int]) -> None:
        self.blamed |= runs

        for id, died in list(self.strikes.items()):
            if runs and {*died} <= self.blamed:
                del self.strikes[id]

                if why := self.avoided.pop(id, ""):
                    who = " and ".join(f"run {index}" for index in sorted({*died}))
                    node = why.partition(":")[0]
                    logger.warning("Trials may start on %s again: only %s died.", node, who)

    def leave(self, index: int) -> None:
        r"""Records that the node of a run leaves the cluster, so that no trial starts there."""

        id, name = self.places.get(index, ("", ""))

        if id and self.avoided.get(id) != (why := f"{name} is leaving"):
            self.strikes.pop(id, None)  # it stays avoided
            self.avoided[id] = why
            logger.warning("Node %s leaves the cluster: its trials resume elsewhere.", name)
