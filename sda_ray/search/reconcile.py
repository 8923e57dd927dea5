r"""What the directories of runs know and a dead driver never told the study.

A driver may die between any two appends to the journal, and a trial's process between any two
writes to its directory; the journal itself may be an older copy. :func:`reconcile` says, without
doing anything, what makes one whole of the two again and what comes next; :func:`catch_up` does
it. Runs that nobody carries out any more are adopted by the driver, whether they had come to a
directory or not.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.errors import UserError
from ..core.files import write_json
from ..core.lease import Lease, LeaseLost, read_holder
from ..runs.metrics import finals, read_history
from ..runs.path import RunPath
from ..runs.record import read_record
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

# What the directory of a closed run says in the end, if its last process could not
CLOSED = {"pruned": "paused", "failed": "failed", "stopped": "stopped", "diverged": "diverged"}


@dataclass(frozen=True)
class DirectoryState:
    r"""Creates what the directory of a run says of it.

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
    r"""Creates a step towards a whole study.

    Arguments:
        kind: `count` (an attempt that the study has not), `extend` (up to `until`, shown up to
            `shown`), `report` (values), `tell` (a state) or `mark` (the directory of a run whose
            process is gone, with a status).
        record: The run, as it is before all steps.
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
    found: Mapping[str, DirectoryState],
    rules: Rules | None = None,
    stops: PruneRule | None = None,
) -> list[Step | Action]:
    r"""Returns what has to be done first, and what comes next.

    Arguments:
        records: The runs of the sweep, as the study has them. Nobody carries them out.
        found: What the directories of runs say, by their ids. A run may have none.
        rules: The rules of the sweep. Without them it is not asked what comes next.
        stops: See :func:`sda_ray.search.promotion.decide`.

    Returns:
        The steps to a whole study; then, given rules, what a free slot is used for.
    """

    steps = [
        step
        for record in records
        if not record.source and record.run_id in found
        for step in _steps(record, found[record.run_id])
    ]

    if rules is None:
        return [*steps]

    return [*steps, decide(project_steps(records, steps), (), rules, stops=stops)]


def _steps(record: TrialRecord, found: DirectoryState) -> list[Step]:
    steps: list[Step] = []

    # A start that the journal has lost has taken its number all the same.
    if found.attempt > record.attempt:
        steps.append(Step("count", record, attempt=found.attempt))

    if record.state == "running":
        steps += _closed(record, found) or _open(record, found)

    now = _after(record, steps)
    status = CLOSED.get("pruned" if now.paused else now.state)

    if status and found.status == "running":
        attempt = now.attempt + 1
        steps += [
            Step("count", record, attempt=attempt),
            Step("mark", record, attempt=attempt, state=status),
        ]

    return steps


def _closed(record: TrialRecord, found: DirectoryState) -> list[Step]:
    r"""Returns how to close the record of a run that has come to its end.

    If the journal is so much older than the directory that the run should not even have got
    there, its end stays hidden until the rules would have let it.
    """

    values = {e: x for e, x in found.values.items() if e <= record.epochs}
    known = record.values | values
    current = found.attempt >= record.attempt  # said by the last attempt, not one before
    ahead = record.until < record.epochs and max(known, default=0) >= record.until

    if found.status == "finished" and record.epochs in known and found.finals:
        state, reason = "complete", ""

        if not all(map(math.isfinite, found.finals)):
            state, reason = "diverged", f"its end is {found.finals}"
    elif found.status == "diverged" and current:
        state, reason = "diverged", found.reason
    elif found.status == "stopped" and current:
        state, reason, ahead = "stopped", found.reason, False
    else:
        return []

    steps = []

    if ahead:
        shown = record.until if record.shown is None else record.shown
        steps.append(Step("extend", record, until=record.epochs, shown=shown))

    until = record.epochs if ahead else record.until
    steps += _missing(record, values, until)

    ends = found.finals if state == "complete" else ()

    return [*steps, Step("tell", record, state=state, reason=reason, finals=ends)]


def _open(record: TrialRecord, found: DirectoryState) -> list[Step]:
    return _missing(record, found.values, record.until)


def _missing(record: TrialRecord, values: dict[int, float], until: int) -> list[Step]:
    new = {e: x for e, x in values.items() if e <= until and e not in record.values}

    return [Step("report", record, values=new)] if new else []


def project_steps(records: Sequence[TrialRecord], steps: Sequence[Step]) -> list[TrialRecord]:
    r"""Returns the runs as they are after some steps."""

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
    r"""Takes the steps. It may be killed anywhere and done again."""

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
    r"""Notes in the record of a run how it is, since its process is gone, or shall be."""

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
    r"""Returns what the directories of runs say, by their ids.

    A directory that cannot be read is passed over with a warning, but for the number of its last
    attempt: its run, if it has to go on, fails for that reason.
    """

    paths = {path.id: path for path in RunPath.all(runs)}
    own = [r for r in records if not r.source and r.state != "complete" and r.run_id in paths]
    found = {}

    for done, record in enumerate(own, start=1):
        path = paths[record.run_id]

        try:
            found[record.run_id] = _read_directory(path, record, objectives)
        except (UserError, OSError) as error:
            found[record.run_id] = DirectoryState(attempt=_attempt(path))
            logger.warning("%s is passed over: %s", path.directory.name, error)

        progress(done, len(own))

    return found


def _read_directory(
    path: RunPath, record: TrialRecord, objectives: Sequence[str]
) -> DirectoryState:
    content = read_record(path)
    attempt = _attempt(path)
    status, reason = content.get("status", ""), str(content.get("reason", ""))

    if record.state != "running":  # all is told
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
    r"""Tells the study what the directories of its runs know. The driver goes on from there.

    Arguments:
        study: The study. Its lease makes sure that nobody else drives the sweep.
        runs: The directory of all runs.
    """

    records = study.records()
    steps = reconcile(records, read_directories(records, runs, study.objectives))
    apply_steps(study, [step for step in steps if isinstance(step, Step)], runs)
