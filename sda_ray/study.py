r"""The study of a sweep: Optuna's record of what was tried, which is the truth about it.

It is an append-only journal with one writer, the driver of the sweep. A run enters it with one
line, complete, before it starts; every epoch's value is appended; and what is not yet told when a
driver dies is worked out by the next one, see :func:`reconcile`.
"""

import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from .checkpoint import RunPath
from .files import cut_torn_line, write_atomic, write_json
from .history import read_history
from .lease import Lease, holder
from .pruner import Record
from .record import read_record
from .sampler import quiet

__all__ = ["Study", "reconcile"]

logger = logging.getLogger(__name__)

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
        lease: The lease of the sweep: without it nothing is written.
    """

    def __init__(self, file: Path, name: str, lease: Lease) -> None:
        with quiet():
            self.storage = _open(file, lease)

            try:
                self.study = optuna.load_study(storage=self.storage, study_name=name)
            except KeyError:
                self.study = optuna.create_study(
                    storage=self.storage, study_name=name, direction="minimize"
                )

    def records(self) -> list[Record]:
        r"""Returns what the study says of each run, from the newest record of each."""

        trials = self.study.get_trials(deepcopy=False)
        newest = {t.user_attrs["run_id"]: t for t in trials if "run_id" in t.user_attrs}

        shown = self._shown()
        records = [_record(trial, shown) for trial in newest.values()]

        return sorted(records, key=lambda record: record.index)

    def add(self, record: Record, drawn: FrozenTrial, supersedes: int | None = None) -> Record:
        r"""Adds the record of a run that is about to start, in one line of the journal."""

        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
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
                    "supersedes": supersedes,
                },
            )
        )

        return _record(self.study.get_trials(deepcopy=False)[-1], self._shown())

    def start(self, record: Record, until: int, shown: int | None) -> Record:
        r"""Records that a run goes on, as a new attempt, up to an epoch.

        A run whose record is closed gets a new record that supersedes the closed one.
        """

        record = self.show(self._again(record), shown)
        attempt = record.attempt + 1

        if record.trial.state.is_finished():
            revived = replace(record, state="running", until=until, attempt=attempt)
            return self.add(revived, record.trial, supersedes=record.trial.number)

        return self._set(record, until=until, attempt=attempt)

    def extend(self, record: Record, until: int, shown: int | None) -> Record:
        r"""Records that a run in flight may go up to an epoch."""

        return self._set(self.show(self._again(record), shown), until=until)

    def show(self, record: Record, shown: int | None) -> Record:
        r"""Records up to which epoch the values of a run count for others.

        It stands in the study itself, since the run's trial may be finished, and before whatever
        follows from it.
        """

        if record.shown != shown:
            key = f"shown/{record.run_id}"
            self.storage.set_study_user_attr(self.study._study_id, key, shown)

        return self._again(record)

    def report(self, record: Record, values: dict[int, float]) -> Record:
        r"""Records the values of epochs that the study has not got."""

        for epoch in sorted(values.keys() - record.values.keys()):
            self.storage.set_trial_intermediate_value(record.trial._trial_id, epoch, values[epoch])

        return self._again(record)

    def tell(self, record: Record, state: str, error: str = "") -> Record:
        r"""Closes the record of a run.

        Arguments:
            record: The record.
            state: `complete`, `pruned`, `diverged`, `stopped` or `failed`.
            error: Why it failed or diverged.
        """

        if error:
            record = self._set(record, error=error[:2000])

        if state in ("diverged", "stopped"):
            record = self._set(record, status=state)

        final = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        value = record.values[record.last] if state == "complete" else None

        with quiet():
            self.study.tell(record.trial.number, value, final.get(state, TrialState.PRUNED))

        return self._again(record)

    def lose(self, record: Record) -> Record:
        r"""Records that a worker died under a run."""

        return self._set(record, lost=record.lost + 1)

    def revive(self, record: Record) -> Record:
        r"""Adds a record that takes over a closed one: its run is adopted next."""

        return self.add(replace(record, state="running"), record.trial, record.trial.number)

    def bring(self, record: Record, drawn: FrozenTrial) -> Record:
        r"""Adds the record of a complete run that was not made by this sweep, in one line.

        Arguments:
            record: The record, whose `source` says where the run comes from.
            drawn: A trial that has its parameters and their distributions.
        """

        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                value=record.values[record.last],
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
                    "source": record.source,
                },
            )
        )

        return _record(self.study.get_trials(deepcopy=False)[-1], self._shown())

    def queue(self) -> dict[int, dict[str, Any]]:
        r"""Returns the parameters that shall be tried before others, by their numbers.

        Those that a run was started for are not among them any more.
        """

        attrs = self.storage.get_study_user_attrs(self.study._study_id)
        taken = {record.queued for record in self.records()}
        items = {int(k.removeprefix("queue/")): x for k, x in attrs.items() if k[:6] == "queue/"}

        return {n: x for n, x in sorted(items.items()) if x is not None and n not in taken}

    def enqueue(self, params: dict[str, Any]) -> int:
        r"""Adds parameters, all or some, to the end of the queue, and returns their number."""

        attrs = self.storage.get_study_user_attrs(self.study._study_id)
        number = 1 + max((int(k[6:]) for k in attrs if k[:6] == "queue/"), default=0)
        self.storage.set_study_user_attr(self.study._study_id, f"queue/{number}", params)

        return number

    def dequeue(self, number: int) -> None:
        r"""Takes parameters out of the queue without a run."""

        self.storage.set_study_user_attr(self.study._study_id, f"queue/{number}", None)

    def close(self) -> None:
        r"""Tells the paused runs of a finished sweep pruned: nothing is left open."""

        for record in self.records():
            if record.state == "running" and record.paused:
                self.tell(record, "pruned")

    def _set(self, record: Record, **attrs: Any) -> Record:
        for key, value in attrs.items():
            if record.trial.user_attrs.get(key) != value:
                self.storage.set_trial_user_attr(record.trial._trial_id, key, value)

        return self._again(record)

    def _again(self, record: Record) -> Record:
        return _record(self.study.get_trials(deepcopy=False)[record.trial.number], self._shown())

    def _shown(self) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self.study._study_id)


def _record(trial: FrozenTrial, shown: dict[str, Any]) -> Record:
    attrs = trial.user_attrs
    status = attrs.get("status") if trial.state.is_finished() else None

    return Record(
        index=attrs["run"],
        run_id=attrs["run_id"],
        state=status or STATES[trial.state],
        until=attrs["until"],
        epochs=attrs["epochs"],
        values=dict(trial.intermediate_values),
        shown=shown.get(f"shown/{attrs['run_id']}"),
        attempt=attrs["attempt"],
        config=attrs["config"],
        trial=trial,
        error=attrs.get("error", ""),
        source=attrs.get("source", ""),
        queued=attrs.get("queued"),
        lost=attrs.get("lost", 0),
    )


def reconcile(study: Study, runs: Path) -> None:
    r"""Tells the study what the run directories know and a dead driver never told."""

    paths = {path.id: path for path in RunPath.all(runs)}

    for record in study.records():
        if record.state != "running" or (path := paths.get(record.run_id)) is None:
            continue

        values = {e: line["loss_valid"] for e, line in read_history(path.metrics).items()}
        record = study.report(record, {e: x for e, x in values.items() if e <= record.until})

        found = read_record(path)

        if record.paused and found.get("status") == "running":
            _pause(path, found)

        # A start that the journal has lost has taken its number all the same.
        attempt = int((holder(path.lease) or {}).get("attempt", 0))
        record = study._set(record, attempt=max(attempt, record.attempt))

        if found.get("status") == "finished" and record.last == record.epochs:
            study.tell(record, "complete")
        elif found.get("status") == "diverged":
            study.tell(record, "diverged", found.get("reason", ""))


def _pause(path: RunPath, found: dict[str, Any]) -> None:
    r"""Notes in the record of a run that it waits: its process reached a rung and is gone."""

    lease = Lease(path.lease, f"run {path.directory.name}", takeover=True)

    try:
        with lease.hold():
            write_json(path.record, found | {"status": "paused"})
    finally:
        lease.release()


class _Lock:
    r"""Creates Optuna's lock on a journal from our lease, and undoes torn appends."""

    def __init__(self, file: Path, lease: Lease) -> None:
        self.file = file
        self.lease = lease
        self.held = ExitStack()

    def acquire(self) -> bool:
        self.held.enter_context(self.lease.hold())
        self.held.callback(_cut, self.file, self.file.stat().st_size)

        return True

    def release(self) -> None:
        self.held.close()


def _cut(file: Path, end: int) -> None:
    r"""Cuts what was appended after `end` if its last line is torn, as by a full disk."""

    with open(file, "r+b") as stream:
        if stream.seek(0, os.SEEK_END) > end:
            stream.seek(-1, os.SEEK_END)

            if stream.read(1) != b"\n":
                stream.truncate(end)


def _open(file: Path, lease: Lease) -> JournalStorage:
    r"""Opens a journal, repairing what a dead writer left."""

    with lease.hold():
        if torn := cut_torn_line(file):
            logger.warning("%s: a torn last record was cut off.", file)
            write_atomic(file.with_suffix(".journal.torn"), torn)

        # A lock that a killed writer left would stall Optuna for 30 s, dashboards included.
        for stale in file.parent.glob(f"{file.name}.lock*"):
            stale.unlink(missing_ok=True)

    lock: Any = _Lock(file, lease)

    return JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
