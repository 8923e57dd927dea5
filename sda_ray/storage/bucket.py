r"""The copy of a sweep in a bucket, so that the sweep outlives the machine that drives it.

While a driver runs, the directory on its machine counts, and nothing waits for the bucket but the
end of the sweep. The copy follows: the journal of the study at once when the state of a run has
changed, and within 5 s after reports; then the directories of the runs, in such an order that the
sweep can be resumed from the copy at any moment.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..core import (
    STALE,
    UserError,
    holder_alive,
    is_alive,
    read_json,
    this_process,
    write_atomic,
    write_json,
)
from ..runs import COPIED, RECORDS, RunPath, sweep_directory
from ..search import Study
from .replica import Replica, files_of
from .store import Bucket, Conflict, Damaged, Folder, Found, Unreachable

__all__ = [
    "Owner",
    "SweepReplica",
    "compare_journals",
    "fetch_records",
    "fetch_sweep",
    "replicated",
]

logger = logging.getLogger(__name__)

LAG = 5.0  # seconds that reports may stay behind
WANDB = 60.0  # seconds between two pushes of W&B's files of a running run
PAUSES = (1.0, 30.0)  # seconds between two tries, at first and at most
PATIENCE = 600.0  # seconds that the end of a sweep waits for a bucket that does not answer
REPORT = 7  # the operation in Optuna's journal that adds the value of an epoch
PARALLEL = 16  # directories that are fetched at the same time

QUICK = COPIED[:2]
JOURNAL = "study.journal"
SWEEP = ("script.py", "code", "sweep.json", JOURNAL)
MARK = "copy.json"  # beside a journal: the number of the driver that copied it last from here
SUMS = "sums.json"  # of copies before 2027: checksums, and the number of the driver
ID = re.compile(rb'"run_id": ?"([a-z0-9]{8})"')

HEARTBEAT = 10.0  # seconds between two renewals of the ownership
TRUST = 25.0  # seconds after the last confirmed renewal in which an owner still writes


@contextmanager
def replicated(
    url: str, runs: Path, name: str, patience: float = STALE
) -> Iterator[SweepReplica | None]:
    r"""Keeps a copy of a sweep in a bucket during the block; at first, fetches what is newer there.

    Arguments:
        url: `s3://bucket/prefix`.
        runs: The directory of all runs on this machine.
        name: The name of the sweep.
        patience: How long to watch for the heartbeat of a driver elsewhere, in seconds.

    Yields:
        The replica, or None if a driver on this machine runs the sweep and keeps the copy itself.

    Raises:
        UserError: If the bucket cannot be used, or a driver elsewhere runs the sweep.
    """

    bucket, directory = Bucket(url), sweep_directory(runs, name)
    bucket.check()

    if is_alive(directory / "lease.json"):
        yield None
        return

    with _answering(bucket):
        owner = Owner(bucket, f"sweeps/{name}/owner.json", f"sweep '{name}' in {url}", patience)

    replica = SweepReplica(bucket, runs, name, owner)

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
    r"""The copy of a sweep and its runs in a bucket.

    Arguments:
        bucket: The bucket.
        runs: The directory of all runs on this machine.
        name: The name of the sweep.
        owner: The ownership of the copy.
    """

    def __init__(self, bucket: Bucket, runs: Path, name: str, owner: Owner) -> None:
        self.bucket, self.runs, self.owner = bucket, runs, owner
        self.directory = sweep_directory(runs, name)
        self.sweep = self._replica(f"sweeps/{name}", self.directory)
        self.study: Study | None = None
        self.replicas: dict[str, Replica] = {}  # by run id
        self.settled: set[str] = set()  # runs that are closed, with all of their files copied
        self._wandb: dict[str, float] = {}  # when W&B's files of a run were pushed
        self._changed, self._finishing = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._failing: float | None = None  # since when pushes fail

    def _replica(self, key: str, directory: Path) -> Replica:
        attempt = {"attempt": str(self.owner.attempt)}

        return Replica(directory, Folder(self.bucket, key, self.owner.check, attempt))

    def follow(self, study: Study) -> None:
        r"""Starts to push what is added to a study, and to its runs."""

        write_json(self.directory / MARK, {"attempt": self.owner.attempt, "url": self.bucket.url})
        self.study = study
        study.journal.on_append = self._notice
        self._changed.set()

        for work, name in ((self._follow_journal, "journal"), (self._follow_runs, "runs")):
            self._threads.append(threading.Thread(target=work, name=f"push {name}", daemon=True))
            self._threads[-1].start()

    def check(self) -> None:
        r"""Raises a UserError if another driver has taken the sweep over."""

        if self.owner.successor is not None:
            self.owner.check()

    def finish(self, patience: float) -> None:
        r"""Pushes the rest, waits for that, and releases the copy.

        Arguments:
            patience: How long to retry if the bucket does not answer, in seconds.
        """

        self._finishing.set()
        self._changed.set()

        for thread in self._threads:
            thread.join()

        if self.study is not None and self.owner.successor is None:
            deadline = time.monotonic() + patience
            ids = self._unsettled()
            done = all(self._retry(lambda id=id: self._push_run(id), deadline) for id in ids)  # type: ignore[misc]

            if done and self._retry(self._push_journal, deadline):
                print(f"All of it is in {self.bucket.url}.")
            else:
                print(
                    f"Not all of it is in {self.bucket.url}. It is in {self.runs}: the same "
                    "command copies the rest."
                )

        self.owner.release()

    def _notice(self, logs: list[dict[str, Any]]) -> None:
        if any(log.get("op_code") != REPORT for log in logs):
            self._changed.set()

    def _follow_journal(self) -> None:
        while not self._finishing.is_set():
            self._changed.wait(LAG)
            self._changed.clear()
            self._retry(self._push_journal)

    def _follow_runs(self) -> None:
        while not self._finishing.wait(LAG / 2):
            self._retry(self._push_runs)

    def _retry(self, push: Callable[[], None], deadline: float | None = None) -> bool:
        r"""Pushes, again and again while that fails, and returns whether it is done.

        Arguments:
            push: The work.
            deadline: When to give up. Without it, when the sweep has ended.
        """

        pause = PAUSES[0]

        while self.owner.successor is None:
            try:
                push()
            except UserError as error:  # taken over
                logger.warning("%s", error)
                return False
            except Exception as error:
                self._warn(error)
            else:
                self._recover()
                return True

            if deadline is None and self._finishing.wait(pause):
                return False

            if deadline is not None and time.monotonic() + pause > deadline:
                return False

            if deadline is not None:
                time.sleep(pause)

            pause = min(2 * pause, PAUSES[1])

        return False

    def _warn(self, error: Exception) -> None:
        if self._failing is None:
            self._failing = time.monotonic()
            logger.warning(
                "nothing is copied to %s for now: %s: %s. The sweep continues, and all of it is "
                "in %s; copying is retried.",
                *(self.bucket.url, type(error).__name__, error, self.runs),
            )

    def _recover(self) -> None:
        if self._failing is not None:
            logger.warning(
                "%s is copied to again, after %.0f s.",
                *(self.bucket.url, time.monotonic() - self._failing),
            )
            self._failing = None

    def _push_journal(self) -> None:
        r"""Pushes the journal, after the directories of the runs that it says are closed or paused.

        Such a run can only be resumed from its directory.
        """

        assert self.study is not None
        size = self.study.journal.file.stat().st_size

        for record in self.study.records():
            if record.source:
                continue

            if record.state == "running" and not record.paused:
                self.settled.discard(record.run_id)
            elif record.run_id not in self.settled:
                self._push_run(record.run_id, closed=True)

        self.sweep.push(files_of(self.directory, SWEEP), {JOURNAL: size})

    def _push_runs(self) -> None:
        r"""Pushes the directories of runs; before and in between, the small files of all of them."""

        ids = self._unsettled()
        looked = 0.0

        for run_id in ids:
            if time.monotonic() - looked > LAG:
                looked = time.monotonic()

                for other in ids:
                    if (replica := self._find(other)) is not None:
                        replica.push(files_of(replica.directory, QUICK))

            self._push_run(run_id)

    def _unsettled(self) -> list[str]:
        assert self.study is not None
        records = self.study.records()

        return [r.run_id for r in records if not r.source and r.run_id not in self.settled]

    def _find(self, run_id: str) -> Replica | None:
        if run_id not in self.replicas and (path := RunPath.of_id(self.runs, run_id)) is not None:
            self.replicas[run_id] = self._replica(path.directory.name, path.directory)

        return self.replicas.get(run_id)

    def _push_run(self, run_id: str, closed: bool = False) -> None:
        r"""Pushes the directory of a run, and notes if that is the last time."""

        first = run_id not in self.replicas

        if (replica := self._find(run_id)) is None:
            return

        running = _status(replica.directory) == "running"

        if closed and first and not running and self._is_complete(replica):
            self.settled.add(run_id)
            return

        late = time.monotonic() - self._wandb.get(run_id, 0.0) > WANDB
        names = COPIED if late or not running else [name for name in COPIED if name != "wandb"]

        if "wandb" in names:
            self._wandb[run_id] = time.monotonic()

        gone = [name for name in replica.pushed if name in COPIED]
        replica.push(list(dict.fromkeys([*files_of(replica.directory, names), *gone])))

        if closed and not running:
            self.settled.add(run_id)

    def _is_complete(self, replica: Replica) -> bool:
        r"""Tells whether a driver before has copied a run: its record comes last."""

        found = self.bucket.get(f"{replica.directory.name}/run.json")

        return found is not None and found.data == (replica.directory / "run.json").read_bytes()


class Owner:
    r"""The ownership of a folder of a bucket: one driver at a time writes there.

    It is an object that names the driver and is renewed every 10 s, each time only in place of its
    last version. A driver that finds it unchanged for `patience` seconds, by its own clock, takes
    it over; the former owner then cannot renew it any more, and stops.

    Arguments:
        bucket: The bucket.
        key: The key of the object.
        what: The name of what is owned, for messages.
        patience: How long to watch for a heartbeat, in seconds.

    Raises:
        UserError: If another driver owns it.
        Unreachable: If the bucket does not answer.
    """

    def __init__(self, bucket: Bucket, key: str, what: str, patience: float = STALE) -> None:
        self.bucket, self.key, self.what = bucket, key, what
        self.successor: dict[str, Any] | None = None  # the driver that has taken over
        self._over = threading.Event()
        self._lock = threading.Lock()

        while not self._take(patience):
            pass  # another driver was quicker

        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def _take(self, patience: float) -> bool:
        before = self.bucket.get(self.key)
        holder = _parse(before)

        if before is not None and self._is_alive(before, patience):
            raise UserError(
                f"{self.what} is carried out by process {holder.get('pid')} on "
                f"{holder.get('host')} since {holder.get('since')}. Wait for it to end, or stop "
                "it, and try again."
            )

        last = holder.get("attempt")
        self.attempt = (last if type(last) is int else 0) + 1
        self.mine = this_process(self.attempt) | {"token": secrets.token_hex(8)}
        self._version = before.version if before else None

        try:
            self._write()
        except Conflict:
            return False

        return True

    def _is_alive(self, before: Found, patience: float) -> bool:
        holder = _parse(before)

        if (known := holder_alive(holder)) is not None:
            return known

        logger.warning(
            "%s was last carried out by process %s on %s, which cannot be seen from here: watching "
            "for its heartbeat for up to %.0f s.",
            *(self.what, holder.get("pid"), holder.get("host"), patience),
        )
        deadline = time.monotonic() + patience

        while time.monotonic() < deadline:
            time.sleep(min(2.0, patience / 10))
            now = self.bucket.get(self.key)

            if now is not None and now.version != before.version:
                return _parse(now).get("pid") is not None

        return False

    def _write(self) -> None:
        with self._lock:
            start = time.monotonic()
            data = json.dumps(self.mine | {"beat": secrets.token_hex(4)}).encode()
            self._version = self.bucket.put(self.key, data, self._version)
            self._confirmed = start

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT) and self.successor is None:
            with suppress(Unreachable):  # the next one tells
                self._renew()

    def _renew(self) -> None:
        try:
            self._write()
        except Conflict:
            now = self.bucket.get(self.key)
            holder = _parse(now)

            if now is None or holder.get("token") != self.mine["token"]:
                self.successor = holder
            else:  # our own write, whose answer was lost
                self._version = now.version

    def check(self) -> None:
        r"""Raises an exception if this driver may not write.

        Raises:
            UserError: If another driver has taken over.
            Unreachable: If that is not known, since the bucket has not answered for a while.
        """

        if time.monotonic() - self._confirmed > TRUST and self.successor is None:
            self._renew()

        if self.successor is not None:
            raise UserError(
                f"{self.what} was taken over by process {self.successor.get('pid')} on "
                f"{self.successor.get('host')}: this driver stops, and writes no more to "
                f"{self.bucket.url}."
            )

        if time.monotonic() - self._confirmed > TRUST:
            raise Unreachable(f"{self.bucket.url} has not confirmed that {self.what} is ours")

    def release(self) -> None:
        r"""Releases the ownership, if it is still held."""

        self._over.set()

        if self.successor is None:
            try:
                self.mine |= {"pid": None, "started": None}
                self._write()
            except (Conflict, Unreachable) as error:
                logger.warning("%s could not be released: %s", self.what, error)


def fetch_records(bucket: Bucket, runs: Path) -> None:
    r"""Fetches the small files of all sweeps and runs that are not here: enough to list them."""

    _fetch_records(bucket, runs, _keys(bucket))


def fetch_sweep(bucket: Bucket, runs: Path, name: str) -> None:
    r"""Fetches what a sweep is resumed from, if the copy is newer than the directory here.

    The longer one of two journals that begin alike is newer. If they have diverged, the copy is, if
    a driver elsewhere wrote it after the last one here; the journal here is kept beside it.

    Raises:
        UserError: If they have diverged for no known reason, or the copy is damaged.
    """

    keys = _keys(bucket)
    _fetch_records(bucket, runs, keys)
    directory, key = sweep_directory(runs, name), f"sweeps/{name}"
    file = directory / JOURNAL
    copy, driver = _read_journal(bucket, key, directory)
    here = file.read_bytes() if file.is_file() else b""
    newer = compare_journals(here, copy)

    if newer == "diverged":
        _check_diverged(bucket, key, directory, driver, (len(here), len(copy)))
        logger.warning(
            "%s has %d bytes that another driver did not know when it resumed the sweep: "
            "its journal of %d bytes takes the place, and this one is kept beside it.",
            *(file, len(here), len(copy)),
        )
        write_atomic(file.with_name(f"{JOURNAL}.parted-{driver}"), here)

    if newer != "here" or not here:
        below = [x.removeprefix(f"{key}/") for x in keys if x.startswith(f"{key}/")]
        names = [x for x in sorted(below) if x.startswith("code/") or x in SWEEP[:-1]]
        _fetch(bucket, key, directory, names, replace=True)

    if newer != "here":
        ids = {match.decode() for match in ID.findall(copy)}
        wanted = [x for x in _folders(keys) if x.rpartition("_")[2] in ids]
        _fetch_all(bucket, runs, {x: _in_folder(keys, x, RECORDS) for x in wanted}, replace=True)

        for folder in wanted:  # a finished run stays in the bucket
            if _status(runs / folder) != "finished":
                names = _in_folder(keys, folder, ("checkpoint.pth", "checkpoint.decay.pth"))
                _fetch(bucket, folder, runs / folder, names, replace=True)

        write_atomic(file, copy)  # the last: an interrupted fetch is repeated


def compare_journals(here: bytes, copy: bytes) -> str:
    r"""Returns which of two journals continues the other: `here`, `copy`, or `diverged`."""

    whole = here[: here.rfind(b"\n") + 1]

    if whole.startswith(copy):
        return "here"

    return "copy" if copy.startswith(whole) else "diverged"


def _read_journal(bucket: Bucket, key: str, directory: Path) -> tuple[bytes, int]:
    r"""Returns the copy of a journal, empty if there is none, and the number of its driver."""

    if (found := bucket.get(f"{key}/{JOURNAL}")) is None:
        return b"", 0

    if found.damaged:
        raise UserError(
            f"{bucket.url}/{key}/{JOURNAL} is damaged: its checksum is wrong. Restore an older "
            f"version of it; or delete it, to resume from {directory}."
        )

    if "attempt" in found.attributes:
        return found.data, int(found.attributes["attempt"])

    return found.data, _attempt(_parse(bucket.get(f"{key}/{SUMS}")))


def _check_diverged(
    bucket: Bucket, key: str, directory: Path, driver: int, sizes: tuple[int, int]
) -> None:
    try:
        last = _attempt(read_json(directory / MARK))
    except UserError:
        last = 0

    if last >= driver or last == 0:
        raise UserError(
            f"{directory / JOURNAL} ({sizes[0]} bytes) and its copy in {bucket.url} ({sizes[1]} "
            "bytes) have diverged, and which of them is right is not known. Move the wrong one "
            f"away: the directory, to resume from the copy; or {bucket.url}/{key}/, to resume "
            "from here."
        )


def _keys(bucket: Bucket) -> set[str]:
    r"""Returns the keys of all objects, but for those that would lead out of a directory."""

    return {x for x in bucket.list() if not x.startswith("/") and ".." not in x.split("/")}


def _folders(keys: Collection[str]) -> list[str]:
    r"""Returns the directories of runs that may be listed: those with a record."""

    files = (key for key in keys if re.fullmatch(r"[^/]+_[a-z0-9]{8}/run\.json", key))

    return sorted(key.removesuffix("/run.json") for key in files)


def _in_folder(keys: Collection[str], folder: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if f"{folder}/{name}" in keys]


def _fetch_records(bucket: Bucket, runs: Path, keys: Collection[str]) -> None:
    r"""Fetches the records of sweeps, then those of runs."""

    files = [x for x in keys if re.fullmatch(r"sweeps/[^/]+/sweep\.json", x)]
    sweeps = [x.removesuffix("/sweep.json") for x in files]
    names = ("sweep.json", "script.py")
    _fetch_all(bucket, runs, {x: _in_folder(keys, x, names) for x in sweeps})
    _fetch_all(bucket, runs, {x: _in_folder(keys, x, RECORDS) for x in _folders(keys)})


def _fetch_all(
    bucket: Bucket, runs: Path, names: dict[str, list[str]], replace: bool = False
) -> None:
    def fetch(folder: str) -> None:
        _fetch(bucket, folder, runs / folder, names[folder], replace)

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(fetch, names))


def _fetch(
    bucket: Bucket, folder: str, directory: Path, names: Iterable[str], replace: bool = False
) -> None:
    r"""Fetches files of a folder in order; one that is damaged is left out, with a warning.

    Arguments:
        bucket: The bucket.
        folder: The key of the folder.
        directory: The directory for the files.
        names: The names of the files.
        replace: Whether to replace files that exist.
    """

    for name in names:
        if replace or not (directory / name).exists():
            try:
                bucket.download(f"{folder}/{name}", directory / name)
            except FileNotFoundError:
                continue  # deleted meanwhile
            except Damaged as error:
                logger.warning("%s: it is left out.", error)


def _parse(found: Found | None) -> dict[str, Any]:
    try:
        content = json.loads(found.data) if found else {}
    except ValueError:
        content = {}

    return content if isinstance(content, dict) else {}


def _attempt(content: Any) -> int:
    attempt = content.get("attempt") if isinstance(content, dict) else None

    return attempt if type(attempt) is int else 0


def _status(directory: Path) -> str:
    try:
        return str(read_json(directory / "run.json")["status"])
    except (UserError, KeyError, TypeError):
        return ""
