r"""Brings the study up to date with the directories of its runs, after a crash.

A driver may die between any two appends to the journal, and a trial's process between any two
writes to its directory; the journal may even be an older copy. The driver then adopts the runs that
are in flight no more, whether they have a directory or not.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core import Lease, LeaseLost, UserError, read_holder, write_json
from ..runs import RunPath, finals, read_history, read_record
from .promotion import TrialRecord
from .study import Study

logger = logging.getLogger(__name__)

OPEN = ("running", "pruned")  # states of runs that may train on

# The final status in the directory of a closed run, written here if its process died before
CLOSED = {"pruned": "paused", "failed": "failed", "stopped": "stopped", "diverged": "diverged"}


@dataclass(frozen=True)
class DirectoryState:
    r"""What the directory of a run records.

    `values` are those of its epochs, NaN where the objective was not measured; `finals` those of
    all objectives, of a finished run. The `reason` says why it diverged or was stopped.
    """

    status: str = ""
    values: dict[int, float] = field(default_factory=dict)
    attempt: int = 0
    reason: str = ""
    finals: tuple[float, ...] = ()


def reconcile(
    record: TrialRecord, directory: DirectoryState, rungs: Sequence[int] = ()
) -> tuple[TrialRecord, str]:
    r"""Returns a run in agreement with its directory.

    The run must not be in flight. Beside the record that the study lacks, it returns the status to
    mark the directory with if the run's process died before it could, or an empty text.

    If the journal is so old that the run is not promoted that far in it, the rungs and the end that
    it has reached stay hidden until the rules promote the run.
    """

    if record.source:
        return record, ""

    # An attempt that the journal has lost used up its number all the same.
    after = replace(record, attempt=max(record.attempt, directory.attempt))

    if record.state in OPEN:
        reached = [x for x in rungs if x <= max(directory.values, default=0)]
        after = _ahead(after, max([0, *(x for x in reached if x < record.epochs)]))

    if record.state == "running":
        after = _caught_up(after, directory)

    values = {e: x for e, x in directory.values.items() if e <= after.until} | record.values
    after = replace(after, values=dict(sorted(values.items())))

    status = CLOSED.get("pruned" if after.paused else after.state)

    if status and directory.status == "running":
        return replace(after, attempt=after.attempt + 1), status

    return after, ""


def _caught_up(record: TrialRecord, directory: DirectoryState) -> TrialRecord:
    r"""Returns an open run, and its end if it has ended."""

    known = record.values.keys() | {e for e in directory.values if e <= record.epochs}
    current = directory.attempt >= record.attempt  # written by the last attempt
    ahead = record.until < record.epochs and max(known, default=0) >= record.until
    finals: tuple[float, ...] = ()
    state, reason = "running", ""

    if directory.status == "finished" and record.epochs in known and directory.finals:
        state, finals = "complete", directory.finals

        if not all(map(math.isfinite, finals)):
            state, reason, finals = "diverged", f"its end is {finals}", ()
    elif directory.status in ("diverged", "stopped") and current:
        state, reason = directory.status, directory.reason

    if ahead and state in ("complete", "diverged"):
        record = _ahead(record, record.epochs)

    return replace(record, state=state, error=reason, finals=finals)


def _ahead(record: TrialRecord, until: int) -> TrialRecord:
    r"""Returns a run that may go up to an epoch, of which nothing new counts for others yet."""

    if until <= record.until:
        return record

    return replace(
        record, until=until, shown=record.until if record.shown is None else record.shown
    )


def catch_up(study: Study, runs: Path, rungs: Sequence[int] = ()) -> None:
    r"""Brings a study up to date with the directories of its runs.

    It may be killed at any moment and repeated. The study's lease keeps other drivers away.
    """

    records = study.records()
    directories = read_directories(records, runs, study.objectives)

    for record in records:
        if record.run_id not in directories:
            continue

        after, status = reconcile(record, directories[record.run_id], rungs)
        record = study.record_attempt(record, after.attempt)

        # Optuna changes no finished trial
        if record.trial.state.is_finished() and after.values != record.values:
            number, opened = record.trial.number, replace(after, state="running")
            record = study.set_shown(study.add(opened, record.trial, number), after.shown)

        if after.until != record.until:
            record = study.extend(record, after.until, after.shown)

        record = study.report(record, after.values)

        if after.state != record.state:
            study.tell(record, after.state, after.error, after.finals)

        if status and (path := RunPath.of_id(runs, record.run_id)):
            mark_run(path, status, after.attempt)


def mark_run(
    path: RunPath, status: str, attempt: int | None = None, before: Sequence[str] = ("running",)
) -> None:
    r"""Replaces some statuses of a run, whose process is dead or loses its lease now.

    The lease is taken at the given attempt, by default the next one.
    """

    with suppress(LeaseLost), ExitStack() as stack:  # lost to another driver
        try:
            lease = Lease(path.lease, f"run {path.directory.name}", attempt, takeover=True)
            stack.callback(lease.release)
            found = read_record(path)

            if found.get("status") in before:
                with lease.hold():
                    write_json(path.record, found | {"status": status})
        except (OSError, UserError) as error:
            logger.warning("%s stays as it is: %s", path.record, error)


def read_directories(
    records: Sequence[TrialRecord], runs: Path, objectives: Sequence[str] = ("loss_valid",)
) -> dict[str, DirectoryState]:
    r"""Returns the states of the directories of runs, by run id.

    Of a directory that cannot be read, only the number of the last attempt is returned, with a
    warning: its run fails for that reason when it resumes.
    """

    paths = {path.id: path for path in RunPath.all(runs)}
    states = {}

    for record in records:
        path = paths.get(record.run_id)

        whole = record.state == "complete" and len(record.values) == record.epochs

        if path is None or record.source or whole:
            continue

        attempt = int((read_holder(path.lease) or {}).get("attempt", 0))

        try:
            states[record.run_id] = _read_directory(path, record, attempt, objectives)
        except (UserError, OSError) as error:
            states[record.run_id] = DirectoryState(attempt=attempt)
            logger.warning("%s is passed over: %s", path.directory.name, error)

    return states


def _read_directory(
    path: RunPath, record: TrialRecord, attempt: int, objectives: Sequence[str]
) -> DirectoryState:
    content = read_record(path)
    status, reason = content.get("status", ""), str(content.get("reason", ""))

    if record.state not in (*OPEN, "complete"):
        return DirectoryState(status, attempt=attempt, reason=reason)

    history = read_history(path.metrics)
    values = {e: line.get(objectives[0], math.nan) for e, line in history.items()}
    ends: Sequence[float] = ()

    if status == "finished" and record.epochs in values:
        ends = [values[record.epochs]] if len(objectives) == 1 else finals(path, objectives)

    return DirectoryState(status, values, attempt, reason, tuple(ends))
