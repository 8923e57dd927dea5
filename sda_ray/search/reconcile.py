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


def reconcile(record: TrialRecord, directory: DirectoryState) -> tuple[TrialRecord, str]:
    r"""Returns a run in agreement with its directory.

    The run must not be in flight. Beside the record that the study lacks, it returns the status to
    mark the directory with if the run's process died before it could, or an empty text.
    """

    if record.source:
        return record, ""

    # An attempt that the journal has lost used up its number all the same.
    after = replace(record, attempt=max(record.attempt, directory.attempt))

    if record.state == "running":
        after = _caught_up(after, directory)

    status = CLOSED.get("pruned" if after.paused else after.state)

    if status and directory.status == "running":
        return replace(after, attempt=after.attempt + 1), status

    return after, ""


def _caught_up(record: TrialRecord, directory: DirectoryState) -> TrialRecord:
    r"""Returns an open run with all values, and its end if it has ended.

    If the journal is so old that the run is not promoted that far in it, the end stays hidden until
    the rules promote the run.
    """

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
        shown = record.until if record.shown is None else record.shown
        record = replace(record, until=record.epochs, shown=shown)

    values = {e: x for e, x in directory.values.items() if e <= record.until} | record.values

    return replace(record, values=values, state=state, error=reason, finals=finals)


def catch_up(study: Study, runs: Path) -> None:
    r"""Brings a study up to date with the directories of its runs.

    It may be killed at any moment and repeated. The study's lease keeps other drivers away.
    """

    records = study.records()
    directories = read_directories(records, runs, study.objectives)

    for record in records:
        if record.run_id not in directories:
            continue

        after, status = reconcile(record, directories[record.run_id])
        record = study.record_attempt(record, after.attempt)

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

        if path is None or record.source or record.state == "complete":
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

    if record.state != "running":  # closed
        return DirectoryState(status, attempt=attempt, reason=reason)

    history = read_history(path.metrics)
    values = {e: line.get(objectives[0], math.nan) for e, line in history.items()}
    ends: Sequence[float] = ()

    if status == "finished" and record.epochs in values:
        ends = [values[record.epochs]] if len(objectives) == 1 else finals(path, objectives)

    return DirectoryState(status, values, attempt, reason, tuple(ends))
