r"""The study of a sweep: Optuna's record of its trials, which is the truth about it.

It is an append-only journal with one writer, the driver of the sweep. A run enters it in one line,
complete, before it starts; the values of its epochs are appended. What a driver has not recorded
when it dies is reconstructed by the next one, see :mod:`sda_ray.search.reconcile`.
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import optuna
from optuna.trial import FrozenTrial, TrialState

from ..core import Lease, UserError
from ..runs import new_id
from .journal import open_study
from .promotion import Rules, TrialRecord, count_trials
from .sampler import quiet_optuna

logger = logging.getLogger(__name__)

# Returns a configuration and its trial, or None, given the runs and parameters that it must have
Propose = Callable[[Sequence[TrialRecord], dict[str, Any] | None], Any]

STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Study:
    r"""Creates the study of a sweep, or opens it.

    Without the lease of the sweep nothing is written. The objectives are minimised; the first is
    what runs are compared by: the value of each epoch, or NaN where it is not measured.

    Raises:
        UserError: If the journal is damaged, or belongs to another study.
    """

    def __init__(
        self,
        file: Path,
        name: str,
        lease: Lease | None,
        objectives: Sequence[str] = ("loss_valid",),
    ) -> None:
        self.objectives = tuple(objectives)
        self._lock = threading.Lock()  # the live view reads in its own thread
        self._newest: dict[str, TrialRecord] = {}  # by run, and what the records were made from
        self._trials: list[FrozenTrial] = []
        self._known_attrs: dict[str, Any] | None = None

        with quiet_optuna():
            self.study, self.journal = open_study(file, name, lease, objectives)
            self.storage = self.journal.storage
            self.id = self.storage.get_study_id_from_name(name)

        try:
            for record in self.records():
                msgspec.convert(vars(record), TrialRecord)

                for key, domain in record.trial.distributions.items():
                    if hasattr(domain, "low") and not math.isfinite(record.trial.params[key]):
                        raise ValueError(f"{key} is {record.trial.params[key]}")
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is wrong: {error}"
            raise UserError(
                f"{file} is damaged: the record of a run {what}. Restore a copy of the file."
            ) from error

        # Later lines name trials by number: without the first line of one, they mean another
        if any(t.user_attrs.get("number", t.number) != t.number for t in self._trials):
            raise UserError(
                f"{file} is damaged: it lacks the start of a run. Restore a copy of the file, or "
                "remove it: what it held is then restored from the directories of the runs."
            )

    def records(self) -> list[TrialRecord]:
        r"""Returns the newest record of each run, in the order of the runs."""

        with self._lock:
            trials, attrs = self.study.get_trials(deepcopy=False), self._study_attrs()
            known = self._trials if attrs == self._known_attrs else []

            # Optuna replaces a trial that changes. A later trial of a run supersedes earlier ones.
            for trial, before in zip_longest(trials, known):
                if trial is not before and (run_id := trial.user_attrs.get("run_id")):
                    self._newest[run_id] = _record(trial, attrs)

            self._trials = trials
            self._known_attrs = dict(attrs)  # Optuna 4 changes them in place

            return sorted(self._newest.values(), key=attrgetter("index"))

    def add(
        self, record: TrialRecord, drawn: FrozenTrial, supersedes: int | None = None
    ) -> TrialRecord:
        r"""Adds the record of a run, in one line of the journal.

        Arguments:
            record: The record of a run that is about to start; or of a complete one from outside
                this sweep, with `source` and, if there are several objectives, `finals`.
            drawn: A trial that has its parameters and their distributions.
            supersedes: The number of the trial that had the record of the run before.
        """

        complete = record.state == "complete"
        attrs = {
            "run": record.index,
            "number": len(self.study.get_trials(deepcopy=False)),
            "run_id": record.run_id,
            "until": record.until,
            "epochs": record.epochs,
            "attempt": record.attempt,
            "config": record.config,
            "queued": record.queued,
            "source": record.source,
            "supersedes": supersedes,
        }

        if record.replica_of:
            attrs["replica_of"] = record.replica_of

        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if complete else TrialState.RUNNING,
                values=(record.finals or (record.values[record.last],)) if complete else None,
                params=drawn.params,
                distributions=drawn.distributions,
                intermediate_values=record.values,
                user_attrs=attrs,
            )
        )

        return _record(self.study.get_trials(deepcopy=False)[-1], self._study_attrs())

    def start(self, record: TrialRecord, until: int, shown: int | None) -> TrialRecord:
        r"""Records that a run resumes, as a new attempt, up to an epoch.

        A new record supersedes one that is closed.
        """

        record = self.set_shown(self._refreshed(record), shown)
        attempt = record.attempt + 1

        if record.trial.state.is_finished():
            revived = replace(record, state="running", until=until, attempt=attempt)
            return self.add(revived, record.trial, supersedes=record.trial.number)

        return self._set(record, until=until, attempt=attempt)

    def extend(self, record: TrialRecord, until: int, shown: int | None) -> TrialRecord:
        r"""Records that a run in flight may continue up to an epoch."""

        return self._set(self.set_shown(self._refreshed(record), shown), until=until)

    def set_shown(self, record: TrialRecord, shown: int | None) -> TrialRecord:
        r"""Records the last epoch whose value counts for other runs, also of a closed run."""

        if record.shown != shown:
            self._set_study_attr(f"shown/{record.run_id}", shown)

        return self._refreshed(record)

    def record_attempt(self, record: TrialRecord, attempt: int) -> TrialRecord:
        r"""Records the number of a run's last attempt, if it is above the one in the study."""

        if record.trial.state.is_finished() and attempt > record.attempt:
            self._set_study_attr(f"attempt/{record.run_id}", attempt)
        elif attempt > record.attempt:
            self._set_attr(record, "attempt", attempt)

        return self._refreshed(record)

    def report(self, record: TrialRecord, values: dict[int, float]) -> TrialRecord:
        r"""Records the values of epochs that the study lacks, in one append.

        Epochs after `until` are left out: they are recorded once the run is promoted.
        """

        record = self._refreshed(record)
        new = sorted(e for e in values.keys() - record.values.keys() if e <= record.until)
        trial_id = self._storage_id(record)

        with self.journal.batch():
            for epoch in new:
                self.storage.set_trial_intermediate_value(trial_id, epoch, values[epoch])

        return self._refreshed(record)

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
            error: The reason.
            finals: The values of all objectives of a complete run. By default the last value.
        """

        # The journal is older than the run's directory: the run waits at its rung like any other.
        if state == "complete" and record.last == record.until < record.epochs:
            return record

        final = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        values = list(finals or [record.values[record.last]]) if state == "complete" else None

        with quiet_optuna(), self.journal.batch():
            if error:
                self._set_attr(record, "error", error[:2000])

            if state in ("diverged", "stopped"):
                self._set_attr(record, "status", state)

            self.study.tell(record.trial.number, values, final.get(state, TrialState.PRUNED))

        return self._refreshed(record)

    def record_worker_death(self, record: TrialRecord) -> TrialRecord:
        r"""Records that the worker of a run died."""

        return self._set(record, lost=record.worker_deaths + 1)

    def record_memory_error(self, record: TrialRecord) -> TrialRecord:
        r"""Records that a run ran out of memory."""

        return self._set(record, short=record.memory_errors + 1)

    def next_index(self) -> int:
        r"""Returns the number of the next run. Numbers of runs that are lost are not used again."""

        return 1 + max((record.index for record in self.records()), default=0)

    def queue(self) -> dict[int, dict[str, Any]]:
        r"""Returns the parameters that are to be tried before others, by their numbers.

        They leave the queue when a run starts with them.
        """

        items = {n: x for n, x in sorted(self._queued().items()) if x is not None}
        taken = {record.queued for record in self.records()} if items else set()

        return {n: x for n, x in items.items() if n not in taken}

    def enqueue(self, params: dict[str, Any]) -> int:
        r"""Adds parameters, all or some of a space, to the queue and returns their number."""

        number = 1 + max(self._queued(), default=0)
        self._set_study_attr(f"queue/{number}", params)

        return number

    def dequeue(self, number: int) -> None:
        r"""Removes parameters from the queue without a run."""

        self._set_study_attr(f"queue/{number}", None)

    def close(self) -> None:
        r"""Closes a finished sweep: its paused runs are recorded as pruned."""

        paused = [r for r in self.records() if r.state == "running" and r.paused]

        with self.journal.batch():
            for record in paused:
                self.tell(record, "pruned")

    def _set(self, record: TrialRecord, **attrs: Any) -> TrialRecord:
        with self.journal.batch():
            for key, value in attrs.items():
                self._set_attr(record, key, value)

        return self._refreshed(record)

    def _set_attr(self, record: TrialRecord, key: str, value: Any) -> None:
        if record.trial.user_attrs.get(key) != value:
            self.storage.set_trial_user_attr(self._storage_id(record), key, value)

    def _set_study_attr(self, key: str, value: Any) -> None:
        self.storage.set_study_user_attr(self.id, key, value)

    def _study_attrs(self) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self.id)

    def _storage_id(self, record: TrialRecord) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.id, record.trial.number)

    def _queued(self) -> dict[int, dict[str, Any] | None]:
        return {int(k[6:]): x for k, x in self._study_attrs().items() if k.startswith("queue/")}

    def _refreshed(self, record: TrialRecord) -> TrialRecord:
        return _record(self.storage.get_trial(self._storage_id(record)), self._study_attrs())


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
        worker_deaths=attrs.get("lost", 0),
        memory_errors=attrs.get("short", 0),
        finals=tuple(trial.values) if trial.state == TrialState.COMPLETE else (),
        replica_of=attrs.get("replica_of", 0),
    )


def draw_run(
    study: Study,
    records: list[TrialRecord],
    rules: Rules,
    config: dict[str, Any],
    propose: Propose,
) -> TrialRecord | None:
    r"""Adds a new run to a study, or returns None, with a warning, if there is nothing new to draw.

    Queued configurations come first. One that has a run already, or does not fit the space, is
    dropped with a warning.
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
    record = TrialRecord(
        study.next_index(),
        new_id(),
        "running",
        until,
        epochs,
        attempt=1,
        config=values,
        queued=queued,
    )

    return study.add(record, trial)


def replicate_run(study: Study, record: TrialRecord, config: dict[str, Any]) -> TrialRecord:
    r"""Adds a run with the configuration of another one and the next seed that it lacks."""

    first = (config | record.config)["seed"]
    used = {r.config["seed"] for r in study.records() if r.replica_of == record.index}
    seed = next(s for n in count(1) if (s := (first + n) % 2**63) not in used)
    replica = TrialRecord(
        study.next_index(),
        new_id(),
        "running",
        record.epochs,
        record.epochs,
        attempt=1,
        config=record.config | {"seed": seed},
        replica_of=record.index,
    )

    return study.add(replica, record.trial)
