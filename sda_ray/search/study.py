r"""The study of a sweep: Optuna's record of what was tried, which is the truth about it.

It is an append-only journal with one writer, the driver of the sweep. A run enters it with one
line, complete, before it starts; the values of its epochs are appended; and what is not yet told
when a driver dies is worked out by the next one, see :mod:`sda_ray.search.reconcile`.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..core.errors import UserError
from ..runs.path import new_id
from .journal import Holder, open_study
from .promotion import Rules, TrialRecord, count_trials
from .sampler import quiet_optuna

__all__ = ["Propose", "Study", "draw_run", "queue_warning"]

logger = logging.getLogger(__name__)

# A configuration and its trial, or None, given the runs and parameters that it shall have
Propose = Callable[[Sequence[TrialRecord], dict[str, Any] | None], Any]

STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Study:
    r"""Creates the study of a sweep, or opens it.

    Arguments:
        file: The journal.
        name: The name of the sweep.
        lease: The lease of the sweep, or None to read alone: without it nothing is written.
        objectives: What is minimised, by name. The first is the value of the last epoch.

    Raises:
        UserError: If the journal is damaged, or another study's.
    """

    def __init__(
        self, file: Path, name: str, lease: Holder, objectives: Sequence[str] = ("loss_valid",)
    ) -> None:
        self.objectives = tuple(objectives)
        self._lock = threading.Lock()  # a live table reads from its own thread
        self._newest: dict[
            str, TrialRecord
        ] = {}  # the records, by run, and what they were made from
        self._trials: list[FrozenTrial] = []
        self._seen: dict[str, Any] | None = None

        with quiet_optuna():
            self.study, self.journal = open_study(file, name, lease, objectives)
            self.storage = self.journal.storage

        try:
            self.records()
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{file} is damaged: the record of a run lacks {error}. Restore a copy of the file."
            ) from error

    def records(self) -> list[TrialRecord]:
        r"""Returns what the study says of each run, from the newest record of each."""

        with self._lock:
            trials, attrs = self.study.get_trials(deepcopy=False), self._attrs()
            known = self._trials if attrs is self._seen else []

            # Optuna never changes a trial or these attributes, it replaces them. A run's trials
            # come in the order in which they take each other over.
            for number, trial in enumerate(trials):
                if number < len(known) and known[number] is trial:
                    continue

                if run_id := trial.user_attrs.get("run_id"):
                    self._newest[run_id] = _record(trial, attrs)

            self._trials, self._seen = trials, attrs

            return sorted(self._newest.values(), key=attrgetter("index"))

    def add(
        self, record: TrialRecord, drawn: FrozenTrial, supersedes: int | None = None
    ) -> TrialRecord:
        r"""Adds the record of a run that is about to start, in one line of the journal."""

        return self._add(record, drawn, TrialState.RUNNING, supersedes=supersedes)

    def start(self, record: TrialRecord, until: int, shown: int | None) -> TrialRecord:
        r"""Records that a run goes on, as a new attempt, up to an epoch.

        If its record is closed, a new one supersedes it.
        """

        record = self.show(self._again(record), shown)
        attempt = record.attempt + 1

        if record.trial.state.is_finished():
            revived = replace(record, state="running", until=until, attempt=attempt)
            return self.add(revived, record.trial, supersedes=record.trial.number)

        return self._set(record, until=until, attempt=attempt)

    def extend(self, record: TrialRecord, until: int, shown: int | None) -> TrialRecord:
        r"""Records that a run in flight may go up to an epoch."""

        return self._set(self.show(self._again(record), shown), until=until)

    def show(self, record: TrialRecord, shown: int | None) -> TrialRecord:
        r"""Records up to which epoch the values of a run count for others, closed or not."""

        if record.shown != shown:
            self._note(f"shown/{record.run_id}", shown)

        return self._again(record)

    def count(self, record: TrialRecord, attempt: int) -> TrialRecord:
        r"""Records the number of a run's last attempt, if others than the study have counted."""

        if record.trial.state.is_finished() and attempt > record.attempt:
            self._note(f"attempt/{record.run_id}", attempt)
        elif attempt > record.attempt:
            self._attr(record, "attempt", attempt)

        return self._again(record)

    def report(self, record: TrialRecord, values: dict[int, float]) -> TrialRecord:
        r"""Records the values of epochs that the study has not got, in one append.

        Epochs beyond those that the run was sent for are left out: they come when it goes on.
        """

        record = self._again(record)
        new = sorted(e for e in values.keys() - record.values.keys() if e <= record.until)

        with self.journal.together():
            for e in new:
                self.storage.set_trial_intermediate_value(record.trial._trial_id, e, values[e])

        return self._again(record)

    def tell(
        self,
        record: TrialRecord,
        state: str,
        error: str = "",
        finals: Sequence[float] | None = None,
    ) -> TrialRecord:
        r"""Closes the record of a run.

        Arguments:
            record: The record.
            state: `complete`, `pruned`, `diverged`, `stopped` or `failed`.
            error: Why it failed or diverged.
            finals: The values of all objectives of a complete run. By default the last value.
        """

        # The journal is older than the run's directory: it waits at its rung like any other.
        if state == "complete" and record.last == record.until < record.epochs:
            return record

        final = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        values = list(finals or [record.values[record.last]]) if state == "complete" else None

        with quiet_optuna(), self.journal.together():
            if error:
                self._attr(record, "error", error[:2000])

            if state in ("diverged", "stopped"):
                self._attr(record, "status", state)

            self.study.tell(record.trial.number, values, final.get(state, TrialState.PRUNED))

        return self._again(record)

    def lose(self, record: TrialRecord) -> TrialRecord:
        r"""Records that a worker died under a run."""

        return self._set(record, lost=record.lost + 1)

    def lack(self, record: TrialRecord) -> TrialRecord:
        r"""Records that a run was short of memory."""

        return self._set(record, short=record.short + 1)

    def revive(self, record: TrialRecord) -> TrialRecord:
        r"""Adds a record that takes over a closed one: its run is adopted next."""

        # What the run's directory says of the last attempt is no word on the next.
        revived = replace(record, state="running", attempt=record.attempt + 1, error="")

        return self.add(revived, record.trial, record.trial.number)

    def bring(self, record: TrialRecord, drawn: FrozenTrial) -> TrialRecord:
        r"""Adds the record of a complete run that was not made by this sweep, in one line.

        Arguments:
            record: The record, with `source` and, if there are several objectives, `finals`.
            drawn: A trial that has its parameters and their distributions.
        """

        values = record.finals or (record.values[record.last],)

        return self._add(record, drawn, TrialState.COMPLETE, values)

    def queue(self) -> dict[int, dict[str, Any]]:
        r"""Returns the parameters that shall be tried before others, by their numbers.

        Those that a run was started for are not among them any more.
        """

        items = {n: x for n, x in sorted(self._queued().items()) if x is not None}
        taken = {record.queued for record in self.records()} if items else set()

        return {n: x for n, x in items.items() if n not in taken}

    def enqueue(self, params: dict[str, Any]) -> int:
        r"""Adds parameters, all or some, to the end of the queue, and returns their number."""

        number = 1 + max(self._queued(), default=0)
        self._note(f"queue/{number}", params)

        return number

    def dequeue(self, number: int) -> None:
        r"""Takes parameters out of the queue without a run."""

        self._note(f"queue/{number}", None)

    def close(self) -> None:
        r"""Tells the paused runs of a finished sweep pruned: nothing is left open."""

        paused = [r for r in self.records() if r.state == "running" and r.paused]

        with self.journal.together():
            for record in paused:
                self.tell(record, "pruned")

    def _add(
        self,
        record: TrialRecord,
        drawn: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None = None,
        supersedes: int | None = None,
    ) -> TrialRecord:
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params=drawn.params,
                distributions=drawn.distributions,
                intermediate_values=record.values,
                user_attrs={
                    "run": record.index,
                    "run_id": record.run_id,
                    "until": record.until,
                    "epochs": record.epochs,
                    "attempt": record.attempt,
                    "config": record.config,
                    "queued": record.queued,
                    "source": record.source,
                    "supersedes": supersedes,
                },
            )
        )

        return _record(self.study.get_trials(deepcopy=False)[-1], self._attrs())

    def _set(self, record: TrialRecord, **attrs: Any) -> TrialRecord:
        with self.journal.together():
            for key, value in attrs.items():
                self._attr(record, key, value)

        return self._again(record)

    def _attr(self, record: TrialRecord, key: str, value: Any) -> None:
        if record.trial.user_attrs.get(key) != value:
            self.storage.set_trial_user_attr(record.trial._trial_id, key, value)

    def _note(self, key: str, value: Any) -> None:
        self.storage.set_study_user_attr(self.study._study_id, key, value)

    def _attrs(self) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self.study._study_id)

    def _queued(self) -> dict[int, dict[str, Any] | None]:
        return {int(k[6:]): x for k, x in self._attrs().items() if k.startswith("queue/")}

    def _again(self, record: TrialRecord) -> TrialRecord:
        return _record(self.storage.get_trial(record.trial._trial_id), self._attrs())


def _record(trial: FrozenTrial, notes: dict[str, Any]) -> TrialRecord:
    attrs, run_id = trial.user_attrs, trial.user_attrs["run_id"]
    status = attrs.get("status") if trial.state.is_finished() else None

    return TrialRecord(
        index=attrs["run"],
        run_id=run_id,
        state=status or STATES[trial.state],
        until=attrs["until"],
        epochs=attrs["epochs"],
        values=trial.intermediate_values,
        shown=notes.get(f"shown/{run_id}"),
        attempt=max(attrs["attempt"], notes.get(f"attempt/{run_id}", 0)),
        config=attrs["config"],
        trial=trial,
        error=attrs.get("error", ""),
        source=attrs.get("source", ""),
        queued=attrs.get("queued"),
        lost=attrs.get("lost", 0),
        short=attrs.get("short", 0),
        finals=tuple(trial.values) if trial.state == TrialState.COMPLETE else (),
    )


def draw_run(
    study: Study,
    records: list[TrialRecord],
    rules: Rules,
    config: dict[str, Any],
    propose: Propose,
) -> TrialRecord | None:
    r"""Adds a new run to a study, or returns None, and says so, if there is nothing new.

    A queued configuration that cannot be tried is dropped, with a warning: it has a run already,
    or does not fit the space.
    """

    drawn, queued = None, None

    for number, params in study.queue().items():
        why = "it has a run already"

        try:
            drawn = propose(records, params)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"

        if drawn is not None:
            queued = number
            break

        logger.warning("queued configuration %s is left out: %s.", params, why)
        study.dequeue(number)

    if drawn is None and (drawn := propose(records, None)) is None:
        runs, target = count_trials(records), rules.target
        logger.warning("SPACE has no more configurations: %s runs of %s trials.", runs, target)
        return None

    values, trial = drawn
    epochs = (config | values)["epochs"]
    until = min(rules.rungs[0], epochs) if rules.min_epochs else epochs
    index = 1 + len(records)
    record = TrialRecord(
        index, new_id(), "running", until, epochs, attempt=1, config=values, queued=queued
    )

    return study.add(record, trial)


def queue_warning(study: Study, target: int) -> str:
    r"""Returns a sentence if more is queued than a sweep of so many trials will try, or nothing."""

    room, waiting = max(0, target - count_trials(study.records())), len(study.queue())

    if waiting <= room:
        return ""

    return (
        f"The sweep has room for {room} more of its {target} trials and {waiting} are queued: "
        "raise --trials to try them all"
    )
