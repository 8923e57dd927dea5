r"""The copy of a sweep in a bucket, so that it outlives the machine that drives it.

While a driver runs, the directory on its machine counts, and nothing waits for the bucket but the
end of the sweep. The copy follows: the journal of the study at once when the state of a run
has changed, and within 5 s after reports; then the directories of the runs, in such an order that
the sweep can be resumed from the copy at any moment.
"""

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_atomic, write_json
from ..core.lease import STALE, holder_alive, is_alive, this_process
from ..runs.path import COPIED, RECORDS, RunPath, sweep_directory
from ..search.study import Study
from .replica import NOTHING, RUN, SUMS, Folder, files_of
from .store import Bucket, Refused, Unreachable

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
SLOW = 60.0  # seconds between two times that W&B's files of a running run are copied
PAUSES = (1.0, 30.0)  # seconds between two tries, first and in the end
PATIENCE = 600.0  # seconds that the end of a sweep waits for a bucket that does not answer
REPORT = 7  # what Optuna's journal calls the value of an epoch
QUICK = COPIED[:2]
SWEEP = ("script.py", "code", "sweep.json", "study.journal")

BEAT = 10.0  # seconds between two signs of life
TRUST = 25.0  # seconds after the last that was confirmed, in which an owner still writes

MARK = "copy.json"  # beside a journal: the number of the driver that copied it last from here
AT_ONCE = 16  # directories
ID = re.compile(rb'"run_id": ?"([a-z0-9]{8})"')


@contextmanager
def replicated(url: str, runs: Path, name: str, patience: float = STALE) -> Iterator[Any]:
    r"""Copies a sweep to a bucket for as long as the block lasts, and from there to begin with.

    Arguments:
        url: `s3://bucket/prefix`.
        runs: The directory of all runs on this machine.
        name: The name of the sweep.
        patience: How long to watch for a sign of life of a driver elsewhere.

    Yields:
        What copies, or None if a driver of this machine is at it, which copies itself.

    Raises:
        UserError: If the bucket cannot be used, or a driver elsewhere is at the sweep.
    """

    bucket, directory = Bucket(url), sweep_directory(runs, name)
    bucket.check()

    if is_alive(directory / "lease.json"):
        yield None
        return

    try:
        owner = Owner(bucket, f"sweeps/{name}/owner.json", f"sweep '{name}' in {url}", patience)
    except Unreachable as error:
        raise UserError(f"{url} does not answer: {error}. Try again.") from error

    replica = SweepReplica(bucket, runs, name, owner)

    try:
        try:
            fetch_sweep(bucket, runs, name)
        except Unreachable as error:
            raise UserError(f"{url} does not answer: {error}. Try again.") from error

        yield replica
    except BaseException:
        replica.finish(0.0)
        raise

    replica.finish(PATIENCE)


class SweepReplica:
    r"""Creates what copies a sweep to a bucket.

    Arguments:
        bucket: The bucket.
        runs: The directory of all runs on this machine.
        name: The name of the sweep.
        owner: The ownership of the copy.
    """

    def __init__(self, bucket: Bucket, runs: Path, name: str, owner: "Owner") -> None:
        self.bucket, self.runs, self.owner = bucket, runs, owner
        self.directory = sweep_directory(runs, name)
        self.sweep = self._folder(f"sweeps/{name}", self.directory)
        self.study: Study | None = None
        self.folders: dict[str, Folder] = {}  # by the runs' ids
        self.settled: set[str] = set()  # runs that are closed, with all of their files copied
        self.slow: dict[str, float] = {}  # when W&B's files of a run were copied
        self._now, self._over = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._since: float | None = None  # when the bucket ceased to answer

    def _folder(self, key: str, directory: Path) -> Folder:
        return Folder(self.bucket, key, directory, self.owner.check, self.owner.attempt)

    def follow(self, study: Study) -> None:
        r"""Copies what comes to a study, and to the runs in it, from now on."""

        write_json(self.directory / MARK, {"attempt": self.owner.attempt, "url": self.bucket.url})
        self.study = study
        study.journal.on_append = self._notice
        self._now.set()

        for work, name in ((self._follow_journal, "journal"), (self._follow_runs, "runs")):
            self._threads.append(threading.Thread(target=work, name=f"copy {name}", daemon=True))
            self._threads[-1].start()

    def check(self) -> None:
        r"""Raises a UserError if another driver has taken the sweep over."""

        if self.owner.taken is not None:
            self.owner.check()

    def _notice(self, logs: list[dict[str, Any]]) -> None:
        if any(log.get("op_code") != REPORT for log in logs):
            self._now.set()

    def _follow_journal(self) -> None:
        while not self._over.is_set():
            self._now.wait(LAG)
            self._now.clear()
            self._patiently(self._copy_journal)

    def _follow_runs(self) -> None:
        while not self._over.wait(LAG / 2):
            self._patiently(self._copy_runs)

    def _patiently(self, work: Callable[[], None], until: float | None = None) -> bool:
        r"""Does what needs the bucket, again and again if it fails, and tells whether it is done.

        Arguments:
            work: What to do.
            until: When to give up. Without it, when the sweep has ended.
        """

        pause = PAUSES[0]

        while self.owner.taken is None:
            try:
                work()
            except UserError as error:  # taken over, or damaged
                logger.warning("%s", error)
                return False
            except Exception as error:
                self._warn(error)
            else:
                self._relax()
                return True

            if until is None and self._over.wait(pause):
                return False

            if until is not None and time.monotonic() + pause > until:
                return False

            if until is not None:
                time.sleep(pause)

            pause = min(2 * pause, PAUSES[1])

        return False

    def _warn(self, error: Exception) -> None:
        if self._since is None:
            self._since = time.monotonic()
            logger.warning(
                "nothing is copied to %s for now: %s: %s. The sweep goes on, and all of it is in "
                "%s; it is tried again.",
                *(self.bucket.url, type(error).__name__, error, self.runs),
            )

    def _relax(self) -> None:
        if self._since is not None:
            logger.warning(
                "%s is copied to again, after %.0f s.",
                *(self.bucket.url, time.monotonic() - self._since),
            )
            self._since = None

    def _copy_journal(self) -> None:
        r"""Copies the journal, after the directories of the runs that it says are closed or paused.

        A run that is at rest has nothing but its directory to go on from.
        """

        assert self.study is not None
        journal = self.study.journal.file.read_bytes()

        for record in self.study.records():
            if record.source:
                continue

            if record.state == "running" and not record.paused:
                self.settled.discard(record.run_id)
            elif record.run_id not in self.settled:
                self._copy_run(record.run_id, closed=True)

        self.sweep.copy(files_of(self.directory, SWEEP), journal)

    def _copy_runs(self) -> None:
        r"""Copies the directories of runs: at first what is small of all, in between, too."""

        ids = self._open()
        looked = 0.0

        for run_id in ids:
            if time.monotonic() - looked > LAG:
                looked = time.monotonic()

                for other in ids:
                    if (folder := self._find(other)) is not None:
                        folder.copy(files_of(folder.directory, QUICK))

            self._copy_run(run_id)

    def _open(self) -> list[str]:
        assert self.study is not None
        records = self.study.records()

        return [r.run_id for r in records if not r.source and r.run_id not in self.settled]

    def _find(self, run_id: str) -> Folder | None:
        if run_id not in self.folders and (path := RunPath.of_id(self.runs, run_id)) is not None:
            self.folders[run_id] = self._folder(path.directory.name, path.directory)

        return self.folders.get(run_id)

    def _copy_run(self, run_id: str, closed: bool = False) -> None:
        r"""Copies the directory of a run, and notes if that is the last time."""

        if (folder := self._find(run_id)) is None:
            return

        running = _status(folder.directory) == "running"
        late = time.monotonic() - self.slow.get(run_id, 0.0) > SLOW
        names = RUN if late or not running else [name for name in RUN if name != "wandb"]

        if "wandb" in names:
            self.slow[run_id] = time.monotonic()

        folder.copy(files_of(folder.directory, [*names, *(n for n in folder.seen if n in RUN)]))

        if closed and not running:
            self.settled.add(run_id)

    def finish(self, patience: float) -> None:
        r"""Copies what is left, waits for that, and gives the copy back.

        Arguments:
            patience: How long to try if the bucket does not answer, in seconds.
        """

        self._over.set()
        self._now.set()

        for thread in self._threads:
            thread.join()

        if self.study is not None and self.owner.taken is None:
            until = time.monotonic() + patience
            ids = self._open()
            done = all(self._patiently(lambda id=id: self._copy_run(id), until) for id in ids)  # type: ignore[misc]

            if done and self._patiently(self._copy_journal, until):
                print(f"All of it is in {self.bucket.url}.")
            else:
                print(
                    f"Not all of it is in {self.bucket.url}. It is in {self.runs}: the same "
                    "command copies the rest."
                )

        self.owner.release()


def _status(directory: Path) -> str:
    try:
        return str(read_json(directory / "run.json")["status"])
    except (UserError, KeyError, TypeError):
        return ""


class Owner:
    r"""Creates the ownership of a folder and takes it: one driver at a time writes there.

    It is an object that names the driver and is written anew every 10 s, each time only in the
    place of what was written last. Whoever finds it unchanged for `patience` seconds, by their own
    clock, takes it over; its former owner then cannot write it any more, and stops.

    Arguments:
        bucket: The bucket.
        key: The key of the object.
        what: What is owned, for messages.
        patience: How long to watch for a sign of life.

    Raises:
        UserError: If another driver owns it.
        Unreachable: If the bucket does not answer.
    """

    def __init__(self, bucket: Bucket, key: str, what: str, patience: float = STALE) -> None:
        self.bucket, self.key, self.what = bucket, key, what
        self.taken: dict[str, Any] | None = None  # by whom it was taken over
        self._over = threading.Event()
        self._lock = threading.Lock()

        while not self._take(patience):
            pass  # somebody was quicker

        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def _take(self, patience: float) -> bool:
        before = self.bucket.peek(self.key)
        found = _parse(before)

        if before is not None and self._lives(found, before[1], patience):
            raise UserError(
                f"{self.what} is carried out by process {found.get('pid')} on "
                f"{found.get('host')} since {found.get('since')}. Wait for it to end, or stop it, "
                "and try again."
            )

        last = found.get("attempt")
        self.attempt = (last if type(last) is int else 0) + 1
        self.mine = this_process(self.attempt) | {"token": secrets.token_hex(8)}
        self._version = before[1] if before else None

        try:
            self._write()
        except Refused:
            return False

        return True

    def _lives(self, found: dict[str, Any], version: str, patience: float) -> bool:
        if (known := holder_alive(found)) is not None:
            return known

        logger.warning(
            "%s was last carried out by process %s on %s, which cannot be seen from here: watching "
            "for a sign of life for up to %.0f s.",
            *(self.what, found.get("pid"), found.get("host"), patience),
        )
        deadline = time.monotonic() + patience

        while time.monotonic() < deadline:
            time.sleep(min(2.0, patience / 10))
            now = self.bucket.peek(self.key)

            if now is not None and now[1] != version:
                return _parse(now).get("pid") is not None

        return False

    def _write(self) -> None:
        with self._lock:
            start = time.monotonic()
            data = json.dumps(self.mine | {"beat": secrets.token_hex(4)}).encode()
            self._version = self.bucket.swap(self.key, data, self._version)
            self._confirmed = start

    def _beat(self) -> None:
        while not self._over.wait(BEAT) and self.taken is None:
            try:
                self._renew()
            except Unreachable:  # the next beat tells
                continue

    def _renew(self) -> None:
        try:
            self._write()
        except Refused:
            now = self.bucket.peek(self.key)

            if now is None or (found := _parse(now)).get("token") != self.mine["token"]:
                self.taken = found if now else {}
            else:  # written by us, with an answer that was lost
                self._version = now[1]

    def check(self) -> None:
        r"""Raises what keeps this driver from writing.

        Raises:
            UserError: If another driver has taken over.
            Unreachable: If it is not known, since the bucket has not answered for a while.
        """

        if time.monotonic() - self._confirmed > TRUST and self.taken is None:
            self._renew()

        if self.taken is not None:
            raise UserError(
                f"{self.what} was taken over by process {self.taken.get('pid')} on "
                f"{self.taken.get('host')}: this driver stops, and writes no more to "
                f"{self.bucket.url}."
            )

        if time.monotonic() - self._confirmed > TRUST:
            raise Unreachable(f"{self.bucket.url} has not confirmed that {self.what} is ours")

    def release(self) -> None:
        r"""Gives the ownership back, if it is still held."""

        self._over.set()

        if self.taken is None:
            try:
                self.mine |= {"pid": None, "started": None}
                self._write()
            except (Refused, Unreachable) as error:
                logger.warning("%s could not be given back: %s", self.what, error)


def _parse(found: tuple[bytes, str] | None) -> dict[str, Any]:
    try:
        content = json.loads(found[0]) if found else {}
    except ValueError:
        content = {}

    return content if isinstance(content, dict) else {}


def fetch_records(bucket: Bucket, runs: Path) -> None:
    r"""Fetches what is small of all sweeps and runs that are not here: enough to list them."""

    keys = bucket.sizes()
    folders = {key.rpartition("/")[0] for key in keys if key.endswith(f"/{SUMS}")}
    sweeps = sorted(key for key in folders if key.startswith("sweeps/"))
    _fetch(bucket, runs, sweeps, ("sweep.json", "script.py"))
    _fetch(bucket, runs, sorted(key for key in folders if f"{key}/run.json" in keys), RECORDS)


def fetch_sweep(bucket: Bucket, runs: Path, name: str) -> None:
    r"""Fetches what a sweep can be carried on with, if the copy is newer than what is here.

    The longer one of two journals that begin alike is newer. If they have parted, the copy is, if
    it was written by a driver elsewhere after the last one here; what is here is kept beside it.

    Raises:
        UserError: If they have parted and it is not known how, or the copy is damaged.
    """

    fetch_records(bucket, runs)
    directory = sweep_directory(runs, name)
    file = directory / "study.journal"
    folder = Folder(bucket, f"sweeps/{name}", directory)
    copy, here = _journal(folder), file.read_bytes() if file.is_file() else b""
    newer = compare_journals(here, copy)

    if newer == "parted":
        _check_parted(folder, len(here), len(copy))
        logger.warning(
            "%s has %d bytes that another driver did not know of when it carried the sweep on: "
            "its journal of %d bytes takes the place, and this one is kept beside it.",
            *(file, len(here), len(copy)),
        )
        write_atomic(file.with_name(f"study.journal.parted-{folder.by}"), here)

    if newer in ("copy", "parted") or not here:
        folder.fetch(lambda name: name != "study.journal", replace=True)

    if newer in ("copy", "parted"):
        ids = {match.decode() for match in ID.findall(copy)}
        keys = [key for key in _folders(bucket) if key.rpartition("_")[2] in ids]
        _clear(bucket, keys)
        _fetch(bucket, runs, keys, RECORDS, replace=True)
        _fetch_checkpoints(bucket, runs, keys)
        write_atomic(file, copy)  # the last: an interrupted fetch is begun anew


def compare_journals(here: bytes, copy: bytes) -> str:
    r"""Tells which of two journals goes on where the other ends: `here`, `copy`, or `parted`."""

    whole = here[: here.rfind(b"\n") + 1]

    if whole.startswith(copy):
        return "here"

    return "copy" if copy.startswith(whole) else "parted"


def _journal(folder: Folder) -> bytes:
    r"""Returns the copy of a journal; if there is none, nothing."""

    from hashlib import sha256

    for again in (False, True):  # a writer may just have been at it
        accepted = folder.load(again).get("study.journal", [])
        data = folder.bucket.read(f"{folder.key}/study.journal")

        if data is None and (len(accepted) < 2 or NOTHING in accepted):
            return b""  # none, or its first was on its way

        if data is not None and sha256(data).hexdigest() in accepted:
            return data

    raise UserError(
        f"{folder.bucket.url}/{folder.key}/study.journal is damaged: its checksum is wrong. "
        f"Restore an older version of it and of {SUMS} beside it; or delete both, to go on from "
        f"what is in {folder.directory}."
    )


def _check_parted(folder: Folder, here: int, copy: int) -> None:
    try:
        last = int(read_json(folder.directory / MARK)["attempt"])
    except (UserError, KeyError, TypeError, ValueError):
        last = 0

    if last >= folder.by or last == 0:
        raise UserError(
            f"{folder.directory / 'study.journal'} ({here} bytes) and its copy in "
            f"{folder.bucket.url} ({copy} bytes) have parted, and which of them is right is not "
            "known. Move the one away that is not: the directory, to go on from the copy; or "
            f"{folder.bucket.url}/{folder.key}/, to go on from here."
        )


def _folders(bucket: Bucket) -> list[str]:
    keys = bucket.sizes()
    found = (key.rpartition("/")[0] for key in keys if key.endswith(f"/{SUMS}"))

    return sorted(key for key in found if f"{key}/run.json" in keys)


def _clear(bucket: Bucket, keys: Iterable[str]) -> None:
    r"""Deletes what killed uploads have left aside in folders that nobody writes to now."""

    own = frozenset(keys)

    for key in bucket.sizes():
        if key.endswith(".tmp") and key.rpartition("/")[0] in own:
            bucket.delete(key)


def _fetch(
    bucket: Bucket, runs: Path, keys: Iterable[str], names: Iterable[str], replace: bool = False
) -> None:
    wanted = frozenset(names)

    def fetch(key: str) -> None:
        Folder(bucket, key, runs / key).fetch(lambda name: name in wanted, replace)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, keys))


def _fetch_checkpoints(bucket: Bucket, runs: Path, keys: Iterable[str]) -> None:
    r"""Fetches what runs go on from that are not finished; a finished one stays in the bucket."""

    for key in keys:
        try:
            status = read_json(runs / key / "run.json")["status"]
        except (UserError, KeyError, TypeError):
            status = ""

        if status != "finished":
            checkpoints = ("checkpoint.pth", "checkpoint.decay.pth")
            _fetch(bucket, runs, [key], checkpoints, replace=True)
