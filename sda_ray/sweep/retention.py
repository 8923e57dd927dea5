r"""Retention of checkpoints: which of a sweep's checkpoints are deleted when space is limited.

All checkpoints are kept unless the user asks for less. A deleted checkpoint never changes a
result: a run that continues without one trains again from its first epoch, to the same bits, and
its recorded epochs are compared with the new ones.
"""

import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core import UserError, format_size
from ..runs import RunPath, prune_run, resumable
from ..search import TrialRecord, rank_key, ranked

logger = logging.getLogger(__name__)

LOW = 0.1  # the free part of a disk below which a warning is given
AGAIN = 3600.0  # seconds until a warning is repeated
COST = 0.02  # the part of the driver's time that all calls may take


def parse_size(text: str) -> int:
    r"""Returns the bytes of `--disk`, given as `50GB`, `1.5 TB` or `800MiB`.

    Raises:
        UserError: If the text is no such size.
    """

    pattern = r"\s*(\d+\.?\d*|\.\d+)\s*(?:([kMGT])(i?)B?)?\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE)

    if match is None or match[2] is None:
        hint = "" if match is None else f" Did you mean {match[1]}GB?"
        raise UserError(
            f"--disk is '{text}', but must be a number and a unit (kB, MB, GB, TB, KiB, MiB, GiB, "
            f"TiB), as 50GB.{hint}"
        )

    unit = (1024 if match[3] else 1000) ** (1 + "kmgt".index(match[2].lower()))

    if (size := int(float(match[1]) * unit)) < 1:
        raise UserError(f"--disk is '{text}', but must be above 0.")

    return size


@dataclass(eq=False)
class Retention:
    r"""The retention of a sweep's checkpoints, called by the driver between decisions.

    Nothing is deleted unless `keep` or `limit` is set, and only files of runs whose `run.json`
    names the sweep and that no process holds. Under a `limit`, checkpoints are deleted in this
    order:

    1. those that no run resumes from: of runs that diverged or were stopped by the user,
    2. of failed and paused runs, from the worst on: the least advanced ones, by their loss,
    3. of complete runs, from the worst on: their weights stay, but they cannot be extended.

    Under `keep`, all are deleted but those of running and paused runs and of the best `keep`
    runs.
    """

    runs: Path  # of all sweeps
    sweep: str
    records: Callable[[], list[TrialRecord]]  # returns the current ones
    keep: int | None = None  # best runs whose checkpoints stay; by default all
    limit: int | None = None  # bytes that all checkpoints may take together; by default any
    notify: Callable[[str], None] = logger.warning  # called with a line for the user
    final: bool = False  # a pruned run never continues

    def __post_init__(self) -> None:
        self._sizes: dict[str, int] = {}  # bytes by run
        self._warned: dict[str, float] = {}
        self._next = -math.inf

    @property
    def size(self) -> int:
        r"""The bytes of all checkpoints of the sweep, as of the last call."""

        return sum(self._sizes.values())

    def __call__(self) -> None:
        r"""Deletes what is to be deleted, if it is time to look. May be called at any rate."""

        start = time.monotonic()

        if start >= self._next:
            self.finish()
            self._next = time.monotonic() + (time.monotonic() - start) / COST

    def finish(self) -> None:
        r"""Deletes all that is to be deleted, and warns if space is short."""

        records = [record for record in ranked(self.records()) if not record.source]

        try:
            paths = {path.id: path for path in RunPath.all(self.runs)}
            self._sizes = {
                record.run_id: sum(resumable(paths[record.run_id]).values())
                for record in records
                if record.run_id in paths
            }
            self._delete(records, paths)
            self._check_space()
        except FileNotFoundError:  # a directory that is gone ends the sweep by itself
            pass
        except OSError as error:  # a file system that is away for a while must not end a sweep
            self._warn("error", f"checkpoints cannot be examined: {error}.")

    def _candidates(self, records: Sequence[TrialRecord]) -> Iterator[TrialRecord]:
        r"""Yields the runs whose checkpoints are to be deleted, while there is a reason to."""

        firsts = (r for r in records if not r.replica_of)
        best = sorted((r for r in firsts if r.state not in ("diverged", "failed")), key=rank_key)
        kept = {record.index for record in best[: self.keep]}
        busy = {r.index for r in records if r.state == "running" and not r.paused}
        idle = [r for r in records if r.index not in busy and self._sizes.get(r.run_id)]
        idle.sort(key=rank_key, reverse=True)

        for record in sorted(idle, key=self._worth):
            waits = self._worth(record) == 1 and record.state != "failed"
            spare = self.keep is not None and not waits and record.index not in kept

            if spare or (self.limit is not None and self.size > self.limit):
                yield record

    def _worth(self, record: TrialRecord) -> int:
        r"""Returns what a checkpoint is good for: 0 nothing, 1 to resume, 2 to extend the run."""

        dead = ("diverged", "stopped", "pruned") if self.final else ("diverged", "stopped")

        return 0 if record.state in dead else 2 if record.state == "complete" else 1

    def _delete(self, records: Sequence[TrialRecord], paths: dict[str, RunPath]) -> None:
        deleted: list[TrialRecord] = []
        freed = 0

        for record in self._candidates(records):
            try:
                freed += prune_run(paths[record.run_id], self.sweep)
            except UserError as error:  # in use, say
                logger.debug("%s", error)
            else:
                self._sizes[record.run_id] = 0
                deleted.append(record)

        if deleted:
            shown = ", ".join(f"run {r.index} ({r.run_id})" for r in deleted[:5])
            more = f" and {len(deleted) - 5} more" if len(deleted) > 5 else ""
            again = any(self._worth(record) == 1 for record in deleted)
            self.notify(
                f"deleted {format_size(freed)} of checkpoints, of {shown}{more}."
                + " A run that continues starts again at epoch 0, to the same bits." * again
            )

    def _check_space(self) -> None:
        if self.limit is not None and self.size > self.limit:
            self._warn(
                "limit",
                f"checkpoints take {format_size(self.size)}, above the {format_size(self.limit)} "
                "of --disk: the remaining ones are in use or cannot be deleted.",
            )

        disk = shutil.disk_usage(self.runs)

        if disk.free < LOW * disk.total:
            self._warn(
                "disk",
                f"the disk of {self.runs} has {format_size(disk.free)} free, "
                f"{100 * disk.free / disk.total:.1f} % of it; checkpoints of this sweep take "
                f"{format_size(self.size)}. When it is full, trials train on with the checkpoints "
                f"they have. Make room: `sda-ray sweep {self.sweep} --keep-checkpoints 3`, "
                f"`sda-ray sweep {self.sweep} --disk 50GB`, or, at once, `sda-ray runs prune`.",
            )

    def _warn(self, kind: str, text: str) -> None:
        if time.monotonic() - self._warned.get(kind, -math.inf) >= AGAIN:
            self._warned[kind] = time.monotonic()
            self.notify(text)
