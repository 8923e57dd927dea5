r"""The copy of a sweep in a bucket, so that the sweep outlives the machine that drives it.

While a driver runs, the directory on its machine counts, and nothing waits for the bucket but the
end of the sweep. The copy follows: the journal of the study as soon as the state of a run has
changed, and within 5 s after reports; then the directories of the runs, in such an order that the
sweep can be resumed from the copy at any moment.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core import (
    STALE,
    Lease,
    LeaseLost,
    UserError,
    is_alive,
    read_json,
    write_atomic,
    write_json,
)
from ..runs import COPIED, RECORDS, RunPath, sweep_directory
from ..search import Study, TrialRecord
from .replica import Replica, files_of
from .store import Bucket, Damaged, Folder, LeaseObject, Unreachable

logger = logging.getLogger(__name__)

LAG = 5.0  # seconds that reports may stay behind
PAUSE = 5.0  # seconds between two tries
PATIENCE = 600.0  # seconds that the end of a sweep waits for a bucket that does not answer
TRUST = 25.0  # seconds after a heartbeat of the lease in which its holder still writes
REPORT = 7  # the operation in Optuna's journal that adds the value of an epoch
PARALLEL = 16  # objects that are fetched at the same time

JOURNAL = "study.journal"
SWEEP = ("script.py", "code", "sweep.json", JOURNAL)
RESUMED = ("checkpoint.pth", "checkpoint.decay.pth")
MARK = "copy.json"  # beside a journal: the number of the driver that copied it last from here
ID = re.compile(rb'"run_id": ?"([a-z0-9]{8})"')


@contextmanager
def replicated(
    url: str, runs: Path, name: str, patience: float = STALE
) -> Iterator[SweepReplica | None]:
    r"""Keeps a copy of a sweep in a bucket during the block; fetches a newer copy first.

    For `patience` seconds it watches for the heartbeat of a driver elsewhere.

    Yields:
        The replica, or None if a driver on this machine runs the sweep and keeps the copy itself.

    Raises:
        UserError: If the bucket cannot be used, or a driver elsewhere runs the sweep.
    """

    bucket = Bucket(url)
    bucket.check()

    if is_alive(sweep_directory(runs, name) / "lease.json"):
        yield None
        return

    record = LeaseObject(bucket, f"sweeps/{name}/owner.json")
    lease = Lease(record, f"sweep '{name}' in {url}", patience=patience)
    replica = SweepReplica(bucket, runs, name, lease)

    try:
        with _answering(bucket):
            fetch_sweep(bucket, runs, name)

        yield replica
    except BaseException:
        replica.finish(0.0)
        raise

    replica.finish(PATIENCE)


@contextmanager
def _answering(bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except Unreachable as error:
        raise UserError(f"{bucket.url} does not answer: {error}. Try again.") from error


class SweepReplica:
    r"""The copy of a sweep and its runs in a bucket, under a lease."""

    def __init__(self, bucket: Bucket, runs: Path, name: str, lease: Lease) -> None:
        self.bucket, self.runs, self.lease = bucket, runs, lease
        self.directory = sweep_directory(runs, name)
        self.sweep = self._replica(f"sweeps/{name}", self.directory)
        self.study: Study | None = None
        self.lost: LeaseLost | None = None  # once another driver has taken the copy over
        self.replicas: dict[str, Replica] = {}  # by run id
        self.settled: set[str] = set()  # runs that are closed, with all of their files copied
        self._changed, self._finishing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="replica", daemon=True)
        self._failing: float | None = None  # since when pushes fail

    def _replica(self, key: str, directory: Path) -> Replica:
        attempt = {"attempt": str(self.lease.attempt)}

        return Replica(directory, Folder(self.bucket, key, self._confirm, attempt))

    def _confirm(self) -> None:
        r"""Raises an exception unless the lease is known to be held."""

        if time.monotonic() - self.lease.confirmed > TRUST:
            self.lease.renew()

    def follow(self, study: Study) -> None:
        r"""Starts to push changes of a study and of its runs."""

        write_json(self.directory / MARK, {"attempt": self.lease.attempt, "url": self.bucket.url})
        self.study = study
        study.journal.on_append = self._notice
        self._changed.set()
        self._thread.start()

    def check(self) -> None:
        r"""Raises a UserError if another driver has taken the sweep over."""

        if self.lost is not None:
            raise UserError(
                f"{self.lost}: this driver stops, and writes no more to {self.bucket.url}."
            )

    def finish(self, patience: float) -> None:
        r"""Pushes the rest, retries for `patience` seconds, and releases the copy."""

        if self.study is not None:
            self._finishing.set()
            self._changed.set()
            self._thread.join()
            deadline, done = time.monotonic() + patience, False

            while self.lost is None and not (done := self._push()):
                if time.monotonic() + PAUSE > deadline:
                    break

                time.sleep(PAUSE)

            if done:
                print(f"All of it is in {self.bucket.url}.")
            elif self.lost is None:
                print(
                    f"Not all of it is in {self.bucket.url}. It is in {self.runs}: the same "
                    "command copies the rest."
                )

        self.lease.release()

    def _notice(self, logs: list[dict[str, Any]]) -> None:
        if any(log.get("op_code") != REPORT for log in logs):
            self._changed.set()

    def _follow(self) -> None:
        while not self._finishing.is_set() and self.lost is None:
            self._changed.wait(LAG)

            if not self._push():
                self._finishing.wait(PAUSE)

    def _push(self) -> bool:
        r"""Pushes what has changed: the journal first, and again whenever it has changed.

        Returns:
            Whether all of it is in the bucket.
        """

        try:
            self._confirm()
            self._push_journal()

            for record in self._records():
                if record.run_id not in self.settled:
                    self._push_run(record.run_id)

                if self._changed.is_set():
                    self._push_journal()
        except LeaseLost as error:
            self.lost = error
            logger.warning("%s.", error)
            return False
        except Exception as error:
            if self._failing is None:
                self._failing = time.monotonic()
                logger.warning(
                    "nothing is copied to %s for now: %s: %s. The sweep continues, and all of it "
                    "is in %s; copying is retried.",
                    *(self.bucket.url, type(error).__name__, error, self.runs),
                )

            return False

        if self._failing is not None:
            seconds = time.monotonic() - self._failing
            logger.warning("%s is copied to again, after %.0f s.", self.bucket.url, seconds)
            self._failing = None

        return True

    def _records(self) -> list[TrialRecord]:
        assert self.study is not None

        return [record for record in self.study.records() if not record.source]

    def _push_journal(self) -> None:
        r"""Pushes the journal, after the directories of the runs that it says are closed or paused.

        Such a run can only be resumed from its directory.
        """

        assert self.study is not None
        self._changed.clear()
        size = self.study.journal.file.stat().st_size

        for record in self._records():
            if record.state == "running" and not record.paused:
                self.settled.discard(record.run_id)
            elif record.run_id not in self.settled:
                self._push_run(record.run_id, closed=True)

        self.sweep.push(files_of(self.directory, SWEEP), {JOURNAL: size})

    def _push_run(self, run_id: str, closed: bool = False) -> None:
        r"""Pushes the directory of a run, and notes if that is the last time.

        The files of W&B, which grow and are pushed whole, go with a checkpoint or at the end.
        """

        if first := run_id not in self.replicas:
            if (path := RunPath.of_id(self.runs, run_id)) is None:
                return

            self.replicas[run_id] = self._replica(path.directory.name, path.directory)

        replica = self.replicas[run_id]
        running = _field(replica.directory / "run.json", "status") == "running"

        if not (closed and first and not running and self._is_complete(replica)):
            late = not running or replica.changed("checkpoint.pth")
            names = [name for name in COPIED if late or name != "wandb"]
            replica.push(files_of(replica.directory, names))

        if closed and not running:
            self.settled.add(run_id)

    def _is_complete(self, replica: Replica) -> bool:
        r"""Tells whether a driver before has copied a run: its record comes last."""

        found = self.bucket.get(f"{replica.directory.name}/run.json")

        return found is not None and found.data == (replica.directory / "run.json").read_bytes()


def fetch_records(bucket: Bucket, runs: Path) -> None:
    r"""Fetches the small files of all sweeps and runs that are not here: enough to list them.

    Raises:
        UserError: If the bucket cannot be used.
    """

    bucket.check()

    with _answering(bucket):
        _fetch(bucket, runs, _records(_keys(bucket)))


def fetch_sweep(bucket: Bucket, runs: Path, name: str) -> None:
    r"""Fetches what a sweep is resumed from, if the copy is newer than the directory here.

    The longer one of two journals that begin alike is newer. If they have diverged, the copy is, if
    a driver elsewhere wrote it after the last one here; the journal here is kept beside it.

    Raises:
        UserError: If they have diverged for no known reason, or the copy is damaged.
    """

    keys = _keys(bucket)
    _fetch(bucket, runs, _records(keys))
    directory, key = sweep_directory(runs, name), f"sweeps/{name}"
    file = directory / JOURNAL
    found = bucket.get(f"{key}/{JOURNAL}")

    if found is not None and found.damaged:
        raise UserError(
            f"{bucket.url}/{key}/{JOURNAL} is damaged: its checksum is wrong. Restore an older "
            f"version of it; or delete it, to resume from {directory}."
        )

    copy = found.data if found else b""
    here = file.read_bytes() if file.is_file() else b""
    newer = compare_journals(here, copy)

    if found is not None and newer == "diverged":
        driver = int(found.attributes.get("attempt", 0))
        _set_aside(file, driver, f"{bucket.url}/{key}", (len(here), len(copy)))

    if newer != "here" or not here:
        code = [x for x in keys if x.startswith(f"{key}/code/")]
        _fetch(bucket, runs, [*code, *_below(keys, [key], SWEEP[:-1])], replace=True)

    if newer != "here":
        ids = {match.decode() for match in ID.findall(copy)}
        wanted = [x for x in _folders(keys) if x.rpartition("_")[2] in ids]
        _fetch(bucket, runs, _below(keys, wanted, RECORDS), replace=True)

        # The files of a finished run stay in the bucket
        resumed = [x for x in wanted if _field(runs / x / "run.json", "status") != "finished"]
        _fetch(bucket, runs, _below(keys, resumed, RESUMED), replace=True)

        write_atomic(file, copy)  # the last: an interrupted fetch is repeated


def _set_aside(file: Path, driver: int, copy: str, sizes: tuple[int, int]) -> None:
    r"""Keeps a journal aside from which the copy of a later driver has diverged."""

    last = _field(file.with_name(MARK), "attempt")

    if not (isinstance(last, int) and 0 < last < driver):
        raise UserError(
            f"{file} ({sizes[0]} bytes) and its copy in {copy}/ ({sizes[1]} bytes) have diverged, "
            "and which of them is right is not known. Move the wrong one away: the directory, to "
            f"resume from the copy; or {copy}/, to resume from here."
        )

    logger.warning(
        "%s has %d bytes that another driver did not know when it resumed the sweep: "
        "its journal of %d bytes takes the place, and this one is kept beside it.",
        *(file, *sizes),
    )
    write_atomic(file.with_name(f"{JOURNAL}.parted-{driver}"), file.read_bytes())


def compare_journals(here: bytes, copy: bytes) -> str:
    r"""Returns which of two journals continues the other: `here`, `copy`, or `diverged`."""

    whole = here[: here.rfind(b"\n") + 1]

    if whole.startswith(copy):
        return "here"

    return "copy" if copy.startswith(whole) else "diverged"


def _keys(bucket: Bucket) -> set[str]:
    r"""Returns the keys of all objects, but for those that would lead out of a directory."""

    return {x for x in bucket.list() if not x.startswith("/") and ".." not in x.split("/")}


def _folders(keys: Iterable[str]) -> list[str]:
    r"""Returns the directories of runs that may be listed: those with a record."""

    files = (key for key in keys if re.fullmatch(r"[^/]+_[a-z0-9]{8}/run\.json", key))

    return sorted(key.removesuffix("/run.json") for key in files)


def _below(keys: Collection[str], folders: Iterable[str], names: Iterable[str]) -> list[str]:
    return [f"{x}/{name}" for x in folders for name in names if f"{x}/{name}" in keys]


def _records(keys: Collection[str]) -> list[str]:
    sweeps = [x for x in keys if re.fullmatch(r"sweeps/[^/]+/(sweep\.json|script\.py)", x)]

    return [*sweeps, *_below(keys, _folders(keys), RECORDS)]


def _fetch(bucket: Bucket, runs: Path, keys: Iterable[str], replace: bool = False) -> None:
    r"""Fetches objects to the same place below `runs`; damaged ones are left out, with a warning."""

    def fetch(key: str) -> None:
        try:
            bucket.download(key, runs / key)
        except FileNotFoundError:
            pass  # deleted meanwhile
        except Damaged as error:
            logger.warning("%s: it is left out.", error)

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(fetch, [x for x in keys if replace or not (runs / x).exists()]))


def _field(file: Path, key: str) -> Any:
    try:
        return read_json(file)[key]
    except (UserError, KeyError, TypeError):
        return None
