r"""Brings the study up to date with the directories of its runs, after a crash.

A driver may die between any two appends to the journal, and a trial's process between any two
writes to its directory; the journal may even be an older copy. :func:`reconcile` returns the steps
that make the two consistent, and what comes next; :func:`catch_up` takes them. The driver then
adopts the runs that are in flight no more, whether they have a directory or not.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core import Lease, LeaseLost, UserError, read_holder, write_json
from ..runs import RunPath, finals, read_history, read_record
from .promotion import Action, PruneRule, Rules, TrialRecord, decide
from .study import Study

__all__ = [
    "DirectoryState",
    "Step",
    "apply_steps",
    "catch_up",
    "project_steps",
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
        kind: `count` (an attempt that the study lacks), `extend` (up to `until`, shown up to
            `shown`), `report` (values), `tell` (a state) or `mark` (the directory of a run whose
            process died, with a status).
        record: The run before all steps.
        attempt: The number of the attempt.
        until: The epoch up to which the run may go.
        shown: The last epoch whose value counts for others.
        values: The values that the study lacks.
        state: The state or status.
        reason: Why it diverged, or was stopped.
        finals: The values of all objectives.
    """

    kind: str
    record: TrialRecord
    attempt: int = 0
    until: int = 0
    shown: int | None = None
    values: dict[int, float] = field(default_factory=dict)
    state: str = ""
    reason: str = ""
    finals: tuple[float, ...] = ()


def reconcile(
    records: Sequence[TrialRecord],
    directories: Mapping[str, DirectoryState],
    rules: Rules | None = None,
    stops: PruneRule | None = None,
) -> list[Step | Action]:
    r"""Returns the steps to take first, and what comes next.

    Arguments:
        records: The runs of the sweep, as the study has them. None is in flight.
        directories: The states of the runs' directories, by run id. A run may have none.
        rules: The rules of the sweep, or None to return steps alone.
        stops: See :func:`sda_ray.search.promotion.decide`.

    Returns:
        The steps; then, given rules, what a free slot is used for.
    """

    steps = [
        step
        for record in records
        if not record.source and record.run_id in directories
        for step in _steps(record, directories[record.run_id])
    ]

    if rules is None:
        return [*steps]

    return [*steps, decide(project_steps(records, steps), (), rules, stops=stops)]


def _steps(record: TrialRecord, directory: DirectoryState) -> list[Step]:
    steps: list[Step] = []

    # An attempt that the journal has lost used up its number all the same.
    if directory.attempt > record.attempt:
        steps.append(Step("count", record, attempt=directory.attempt))

    if record.state == "running":
        steps += _closed(record, directory) or _missing(record, directory.values, record.until)

    now = _after(record, steps)
    status = CLOSED.get("pruned" if now.paused else now.state)

    if status and directory.status == "running":
        attempt = now.attempt + 1
        steps += [
            Step("count", record, attempt=attempt),
            Step("mark", record, attempt=attempt, state=status),
        ]

    return steps


def _closed(record: TrialRecord, directory: DirectoryState) -> list[Step]:
    r"""Returns the steps that close the record of a run that has ended.

    If the journal is so old that the run is not promoted that far in it, the end stays hidden until
    the rules promote the run.
    """

    values = {e: x for e, x in directory.values.items() if e <= record.epochs}
    known = record.values | values
    current = directory.attempt >= record.attempt  # written by the last attempt
    ahead = record.until < record.epochs and max(known, default=0) >= record.until

    if directory.status == "finished" and record.epochs in known and directory.finals:
        state, reason = "complete", ""

        if not all(map(math.isfinite, directory.finals)):
            state, reason = "diverged", f"its end is {directory.finals}"
    elif directory.status == "diverged" and current:
        state, reason = "diverged", directory.reason
    elif directory.status == "stopped" and current:
        state, reason, ahead = "stopped", directory.reason, False
    else:
        return []

    steps = []

    if ahead:
        shown = record.until if record.shown is None else record.shown
        steps.append(Step("extend", record, until=record.epochs, shown=shown))

    until = record.epochs if ahead else record.until
    steps += _missing(record, values, until)

    ends = directory.finals if state == "complete" else ()

    return [*steps, Step("tell", record, state=state, reason=reason, finals=ends)]


def _missing(record: TrialRecord, values: dict[int, float], until: int) -> list[Step]:
    new = {e: x for e, x in values.items() if e <= until and e not in record.values}

    return [Step("report", record, values=new)] if new else []


def project_steps(records: Sequence[TrialRecord], steps: Sequence[Step]) -> list[TrialRecord]:
    r"""Returns the runs after some steps."""

    own: dict[int, list[Step]] = {}

    for step in steps:
        own.setdefault(step.record.index, []).append(step)

    return [_after(record, own.get(record.index, [])) for record in records]


def _after(record: TrialRecord, steps: Sequence[Step]) -> TrialRecord:
    for step in steps:
        if step.kind == "count":
            record = replace(record, attempt=max(record.attempt, step.attempt))
        elif step.kind == "extend":
            record = replace(record, until=step.until, shown=step.shown)
        elif step.kind == "report":
            record = replace(record, values=record.values | step.values)
        elif step.kind == "tell":
            record = replace(record, state=step.state, error=step.reason, finals=step.finals)

    return record


def apply_steps(study: Study, steps: Sequence[Step], runs: Path) -> None:
    r"""Takes steps. It may be killed at any moment and repeated."""

    records = {record.index: record for record in study.records()}
    marked = any(step.kind == "mark" for step in steps)
    paths = {path.id: path for path in RunPath.all(runs)} if marked else {}

    for step in steps:
        record = records[step.record.index]

        if step.kind == "count":
            record = study.record_attempt(record, step.attempt)
        elif step.kind == "extend":
            record = study.extend(record, step.until, step.shown)
        elif step.kind == "report":
            record = study.report(record, step.values)
        elif step.kind == "tell":
            record = study.tell(record, step.state, step.reason, step.finals)
        elif step.kind == "mark" and record.run_id in paths:
            _mark(paths[record.run_id], step.attempt, step.state)

        records[record.index] = record


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
    records: Sequence[TrialRecord],
    runs: Path,
    objectives: Sequence[str] = ("loss_valid",),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, DirectoryState]:
    r"""Returns the states of the directories of runs, by run id.

    Of a directory that cannot be read, only the number of the last attempt is returned, with a
    warning: its run fails for that reason when it resumes.
    """

    paths = {path.id: path for path in RunPath.all(runs)}
    own = [r for r in records if not r.source and r.state != "complete" and r.run_id in paths]
    states = {}

    for done, record in enumerate(own, start=1):
        path = paths[record.run_id]

        try:
            states[record.run_id] = _read_directory(path, record, objectives)
        except (UserError, OSError) as error:
            states[record.run_id] = DirectoryState(attempt=_attempt(path))
            logger.warning("%s is passed over: %s", path.directory.name, error)

        progress(done, len(own))

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
    apply_steps(study, [step for step in steps if isinstance(step, Step)], runs)
