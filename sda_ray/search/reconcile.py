r"""Brings the study up to date with the directories of its runs, after a crash.

A driver may die between any two appends to the journal, and a trial's process between any two
writes to its directory; the journal may even be an older copy. :func:`reconcile` returns the steps
that make the two consistent; :func:`catch_up` takes them. The driver then adopts the runs that are
in flight no more, whether they have a directory or not.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core import Lease, LeaseLost, UserError, read_holder, write_json
from ..runs import RunPath, finals, read_history, read_record
from .promotion import TrialRecord
from .study import Study

__all__ = [
    "DirectoryState",
    "Step",
    "apply_steps",
    "catch_up",
    "read_directories",
    "reconcile",
]

logger = logging.getLogger(__name__)

# The final status in the directory of a closed run, written here if its process died before
CLOSED = {"pruned": "paused", "failed": "failed", "stopped": "stopped", "diverged": "diverged"}


@dataclass(frozen=True)
class DirectoryState:
    r"""What the directory of a run records.

    Arguments:
        status: The status in `run.json`.
        values: The value at each epoch.
        attempt: The number of the last attempt.
        reason: Why it diverged, or was stopped.
        finals: The values of all objectives of a finished run.
    """

    status: str = ""
    values: dict[int, float] = field(default_factory=dict)
    attempt: int = 0
    reason: str = ""
    finals: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    r"""A step that brings the study and the directories together.

    Arguments:
        kind: `count` (an attempt that the study lacks), `extend` (up to an epoch), `report`
            (values), `tell` (the end) or `mark` (the directory of a run whose process died).
        record: The run after the step.
        status: The status that the directory is marked with.
    """

    kind: str
    record: TrialRecord
    status: str = ""


def reconcile(
    records: Sequence[TrialRecord], directories: Mapping[str, DirectoryState]
) -> list[Step]:
    r"""Returns the steps that bring the study and the directories together.

    Arguments:
        records: The runs of the sweep, as the study has them. None is in flight.
        directories: The states of the runs' directories, by run id. A run may have none.
    """

    return [
        step
        for record in records
        if not record.source and record.run_id in directories
        for step in _steps(record, directories[record.run_id])
    ]


def _steps(record: TrialRecord, directory: DirectoryState) -> Iterator[Step]:
    # An attempt that the journal has lost used up its number all the same.
    if directory.attempt > record.attempt:
        record = replace(record, attempt=directory.attempt)
        yield Step("count", record)

    if record.state == "running":
        for step in _closed(record, directory) or _missing(record, directory.values):
            record = step.record
            yield step

    status = CLOSED.get("pruned" if record.paused else record.state)

    if status and directory.status == "running":
        record = replace(record, attempt=record.attempt + 1)
        yield Step("count", record)
        yield Step("mark", record, status)


def _closed(record: TrialRecord, directory: DirectoryState) -> list[Step]:
    r"""Returns the steps that close the record of a run that has ended.

    If the journal is so old that the run is not promoted that far in it, the end stays hidden until
    the rules promote the run.
    """

    known = record.values.keys() | {e for e in directory.values if e <= record.epochs}
    current = directory.attempt >= record.attempt  # written by the last attempt
    ahead = record.until < record.epochs and max(known, default=0) >= record.until
    finals: tuple[float, ...] = ()

    if directory.status == "finished" and record.epochs in known and directory.finals:
        state, reason, finals = "complete", "", directory.finals

        if not all(map(math.isfinite, finals)):
            state, reason, finals = "diverged", f"its end is {finals}", ()
    elif directory.status in ("diverged", "stopped") and current:
        state, reason = directory.status, directory.reason
    else:
        return []

    steps = []

    if ahead and state != "stopped":
        shown = record.until if record.shown is None else record.shown
        record = replace(record, until=record.epochs, shown=shown)
        steps.append(Step("extend", record))

    for step in _missing(record, directory.values):
        record = step.record
        steps.append(step)

    end = replace(record, state=state, error=reason, finals=finals)

    return [*steps, Step("tell", end)]


def _missing(record: TrialRecord, values: dict[int, float]) -> list[Step]:
    r"""Returns the step that reports the values, as far as the run may go, that a record lacks."""

    new = {e: x for e, x in values.items() if e <= record.until and e not in record.values}

    return [Step("report", replace(record, values=record.values | new))] if new else []


def apply_steps(study: Study, steps: Sequence[Step], runs: Path) -> None:
    r"""Takes steps. It may be killed at any moment and repeated."""

    records = {record.index: record for record in study.records()}
    marked = any(step.kind == "mark" for step in steps)
    paths = {path.id: path for path in RunPath.all(runs)} if marked else {}

    for step in steps:
        after = step.record
        record = records[after.index]

        if step.kind == "count":
            record = study.record_attempt(record, after.attempt)
        elif step.kind == "extend":
            record = study.extend(record, after.until, after.shown)
        elif step.kind == "report":
            record = study.report(record, after.values)
        elif step.kind == "tell":
            record = study.tell(record, after.state, after.error, after.finals)
        elif after.run_id in paths:
            _mark(paths[after.run_id], after.attempt, step.status)

        records[after.index] = record


def _mark(path: RunPath, attempt: int, status: str) -> None:
    r"""Writes a status to the record of a run, whose process is dead or loses its lease now."""

    with suppress(LeaseLost), ExitStack() as stack:  # lost to another driver
        try:
            lease = Lease(path.lease, f"run {path.directory.name}", attempt, takeover=True)
            stack.callback(lease.release)
            found = read_record(path)

            if found.get("status") == "running":
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

        if path is None or record.source or record.state == "complete":
            continue

        try:
            states[record.run_id] = _read_directory(path, record, objectives)
        except (UserError, OSError) as error:
            states[record.run_id] = DirectoryState(attempt=_attempt(path))
            logger.warning("%s is passed over: %s", path.directory.name, error)

    return states


def _read_directory(
    path: RunPath, record: TrialRecord, objectives: Sequence[str]
) -> DirectoryState:
    content = read_record(path)
    attempt = _attempt(path)
    status, reason = content.get("status", ""), str(content.get("reason", ""))

    if record.state != "running":  # closed
        return DirectoryState(status, attempt=attempt, reason=reason)

    history = read_history(path.metrics)
    values = {e: line["loss_valid"] for e, line in history.items() if "loss_valid" in line}
    ends: Sequence[float] = ()

    if status == "finished" and record.epochs in values:
        ends = [values[record.epochs]] if len(objectives) == 1 else finals(path, objectives)

    return DirectoryState(status, values, attempt, reason, tuple(ends))


def _attempt(path: RunPath) -> int:
    return int((read_holder(path.lease) or {}).get("attempt", 0))


def catch_up(study: Study, runs: Path) -> None:
    r"""Brings a study up to date with the directories of its runs.

    Arguments:
        study: The study. Its lease keeps other drivers away.
        runs: The directory of all runs.
    """

    records = study.records()
    steps = reconcile(records, read_directories(records, runs, study.objectives))
    apply_steps(study, steps, runs)
