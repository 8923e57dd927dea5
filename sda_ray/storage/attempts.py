r"""The attempts at runs that a depot writes for, each of which holds the lease of its run.

See :mod:`sda_ray.storage.server`.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.files import cut_torn_line, remove_leftovers, sync_directory
from ..core.lease import Lease, LeaseLost
from ..core.presence import check_present, held

__all__ = ["Attempt", "Attempts", "Unknown"]

PULSE = 20.0  # seconds without a sign of life from a trial after which its lease has none either
SILENCE = 900.0  # seconds after which its lease is given back


class Unknown(RuntimeError):
    r"""Signals that a depot does not know an attempt: it was started again, or has ended it."""


class Attempt:
    r"""Creates what a depot knows of one attempt at a run."""

    lease: Lease
    directory: Path

    def __init__(self, number: int) -> None:
        self.number = number
        self.lock = threading.RLock()  # of all that is done for the attempt
        self.taken = False  # whether it has the lease
        self.heard = time.monotonic()
        self.tails: dict[str, tuple[int, Any]] = {}  # growing file -> its length, digest of it
        self.asides: dict[str, tuple[Path, int, Any]] = {}  # token -> file, its length, digest
        self.done: set[str] = set()  # tokens

    def silent(self) -> float:
        return time.monotonic() - self.heard

    def release(self) -> None:
        if self.taken:
            self.lease.release()


class Attempts:
    r"""Creates the attempts of a depot, the newest one at each run.

    Arguments:
        agent: The name of the depot.
        runs: The directory of all runs.
    """

    def __init__(self, agent: str, runs: Path) -> None:
        self.agent, self.runs = agent, runs
        self.newest: dict[str, Attempt] = {}
        self.lock = threading.Lock()  # of `newest`

    def begin(self, run_id: str, number: int) -> Attempt:
        r"""Takes the lease of a run for an attempt. May be repeated.

        Raises:
            LeaseLost: If a later attempt has begun.
        """

        if not re.fullmatch("[a-z0-9]{8}", run_id):
            raise ValueError(f"{run_id!r} is no id of a run")

        with self.lock:
            before = self.newest.get(run_id)

            if before is None or before.number < number:
                self.newest[run_id] = Attempt(number)

            attempt = self.newest[run_id]

        _check(run_id, attempt, number)

        if before is not None and before is not attempt:
            before.release()

        with attempt.lock:
            if not attempt.taken:
                self._take(run_id, attempt)

            attempt.heard = time.monotonic()

        return attempt

    def _take(self, run_id: str, attempt: Attempt) -> None:
        link = self.runs / f".{run_id}"
        found = sorted(x for x in self.runs.glob(f"*_{run_id}") if x.is_dir())
        directory = found[0] if found else link

        if link.is_symlink() and not found:
            link.unlink()

        if not found:  # it gets its name from the trial, see Run
            link.mkdir(exist_ok=True)

        attempt.lease = Lease(
            directory / "lease.json",
            f"run {run_id}",
            attempt.number,
            takeover=True,
            agent=self.agent,
            alive=lambda: attempt.silent() < PULSE,
        )

        with held(attempt.lease):
            remove_leftovers(directory)
            cut_torn_line(directory / "metrics.jsonl")

            if link.is_symlink():  # of an attempt that was killed
                link.unlink()

        attempt.directory, attempt.taken = directory, True

    def find(self, run_id: str, number: int) -> Attempt:
        r"""Returns an attempt, which gives a sign of life by that.

        Raises:
            LeaseLost: If a later one has begun.
            Unknown: If it has to begin.
        """

        with self.lock:
            attempt = self.newest.get(run_id)

        if attempt is None or attempt.number < number or not attempt.taken:
            raise Unknown(f"attempt {number} at run {run_id} is not known here")

        _check(run_id, attempt, number)
        attempt.heard = time.monotonic()

        return attempt

    @contextmanager
    def at(self, run_id: str, number: int) -> Iterator[Attempt]:
        r"""Has an attempt to itself for the duration of the block, see :meth:`find`.

        Raises:
            Vanished: If the block fails because the directory of the run is gone.
        """

        attempt = self.find(run_id, number)

        with attempt.lock:
            try:
                yield attempt
            except OSError:
                check_present(attempt.lease.file)
                raise

    def settle(self, run_id: str, number: int, name: str) -> None:
        r"""Gives the directory of a new run its name."""

        target = self.runs / name

        if target.parent != self.runs or not name.endswith(f"_{run_id}") or name[0] == ".":
            raise ValueError(f"{name!r} is no name for run {run_id}")

        with self.at(run_id, number) as attempt:
            if attempt.directory.name == f".{run_id}":
                with held(attempt.lease):
                    attempt.directory.rename(target)
                    sync_directory(self.runs)
                    attempt.directory, attempt.lease.file = target, target / "lease.json"

    def end(self, run_id: str, number: int) -> None:
        r"""Gives the lease of a run back."""

        with self.at(run_id, number) as attempt, self.lock:
            attempt.release()

            if self.newest.get(run_id) is attempt:
                del self.newest[run_id]

    def give_up(self) -> None:
        r"""Gives the leases back of attempts that have given no sign of life for very long."""

        with self.lock:
            silent = [x for x in self.newest.values() if x.silent() > SILENCE]

        for attempt in silent:
            attempt.release()


def _check(run_id: str, attempt: Attempt, number: int) -> None:
    if attempt.number > number:
        raise LeaseLost(f"run {run_id} is at attempt {attempt.number}, and {number} is over")
