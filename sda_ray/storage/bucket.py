r"""The copy of a sweep in a bucket, so that it outlives the machine that drives it.

While a driver runs, the directory on its machine is what counts, and nothing waits for the bucket
but the end of the sweep. The copy follows: the journal of the study at once when the state of a run
has changed, and within 5 s after reports; then the directories of the runs, in such an order that
the sweep can be carried on from the copy at any moment.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.holder import STALE, is_alive
from ..runs.path import COPIED, RunPath, sweep_directory
from ..search.study import Study
from .fetching import MARK, fetch_sweep
from .folder import RUN, Folder, files_of
from .owner import Owner
from .store import Bucket, Unreachable

__all__ = ["Copier", "copied"]

logger = logging.getLogger(__name__)

LAG = 5.0  # seconds that reports may stay behind
SLOW = 60.0  # seconds between two times that W&B's files of a running run are copied
PAUSES = (1.0, 30.0)  # seconds between two tries, first and in the end
PATIENCE = 600.0  # seconds that the end of a sweep waits for a bucket that does not answer
REPORT = 7  # what Optuna's journal calls the value of an epoch
QUICK = COPIED[:2]
SWEEP = ("script.py", "code", "sweep.json", "study.journal")


@contextmanager
def copied(url: str, runs: Path, name: str, patience: float = STALE) -> Iterator[Any]:
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

    copier = Copier(bucket, runs, name, owner)

    try:
        try:
            fetch_sweep(bucket, runs, name)
        except Unreachable as error:
            raise UserError(f"{url} does not answer: {error}. Try again.") from error

        yield copier
    except BaseException:
        copier.finish(0.0)
        raise

    copier.finish(PATIENCE)


class Copier:
    r"""Creates what copies a sweep to a bucket.

    Arguments:
        bucket: The bucket.
        runs: The directory of all runs on this machine.
        name: The name of the sweep.
        owner: The ownership of the copy.
    """

    def __init__(self, bucket: Bucket, runs: Path, name: str, owner: Owner) -> None:
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
        study.journal.appended = self._notice
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
