r"""The files of a sweep, on behalf of trials on nodes that do not see them.

The node of the driver has `runs/`, and data. A depot is an actor of Ray's there: it takes in what
trials elsewhere leave, and gives them what they go on from. It holds the lease of each run that it
writes to, under the number of the trial's attempt: whoever comes back with an older one, since it
was cut off and taken for dead, is refused.
"""

import hashlib
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.files import sync_directory
from ..core.presence import held
from ..runs.path import RESUMED
from ..training.watchdog import STACKS, TAKEN
from .attempts import Attempts, Unknown
from .pieces import append_to, digest, keep_previous, place_of, take_piece

__all__ = ["APPENDED", "DATA", "GROUPS", "Depot"]

LOOK = 0.2  # seconds for which a look for the wish to stop serves all

APPENDED = (".jsonl", ".wandb", ".log")  # files that only grow
DATA = ("train.h5", "valid.h5")
GROUPS = {"pulse": 4, "files": 6}  # threads: signs of life never wait for files


class Depot:
    r"""Creates a depot. Its methods may be called at the same time, and again after a failure.

    Arguments:
        name: Its name, by which its leases are its own after a restart.
        runs: The directory of all runs.
        data: The directory of the data.
        request: The file whose existence tells all trials to stop, see
            :class:`sda_ray.cluster.trial.Trial`.
    """

    def __init__(self, name: str, runs: str, data: str, request: str) -> None:
        self.name = name
        self.runs, self.data, self.request = Path(runs), Path(data), Path(request)
        self.attempts = Attempts(name, self.runs)
        self.looked, self.names = 0.0, frozenset[str]()

    def ready(self) -> str:
        return self.name

    def open(self, run_id: str, attempt: int) -> dict[str, Any]:
        r"""Takes the lease of a run for an attempt.

        Returns:
            `named`, the name of the run's directory, or nothing if it has none yet; and `sizes`,
            the files that an attempt may need to go on.

        Raises:
            LeaseLost: If a later attempt has begun.
        """

        directory = self.attempts.begin(run_id, attempt).directory
        sizes = {x: (directory / x).stat().st_size for x in RESUMED if (directory / x).is_file()}
        named = "" if directory.name.startswith(".") else directory.name

        return {"named": named, "sizes": sizes if named else {}}

    def settle(self, run_id: str, attempt: int, name: str) -> None:
        r"""Gives the directory of a new run its name."""

        self.attempts.settle(run_id, attempt, name)

    def ping(self, run_id: str, attempt: int, number: int) -> str:
        r"""Takes a sign of life, and returns whether run `number` shall stop: `all` or `alone`."""

        self.attempts.find(run_id, attempt)
        self.attempts.give_up()

        if time.monotonic() - self.looked > LOOK:
            with suppress(OSError):
                self.names = frozenset(os.listdir(self.request.parent))
                self.looked = time.monotonic()

        if f"{self.request.name}.{number}" in self.names:
            return "alone"

        return "all" if self.request.name in self.names else ""

    def read(self, run_id: str, attempt: int, name: str, offset: int, size: int) -> Any:
        r"""Returns a piece of a file of a run, and its SHA-256."""

        if name not in RESUMED:
            raise ValueError(f"{name!r} is no file that a trial needs")

        with self.attempts.at(run_id, attempt) as at:
            return take_piece(at.directory / name, offset, size)

    def append(
        self, run_id: str, attempt: int, name: str, offset: int, data: bytes, before: str
    ) -> None:
        r"""Appends to a file of a run that only grows.

        Arguments:
            run_id: The run.
            attempt: The attempt.
            name: The file.
            offset: The length of the file before.
            data: What to append.
            before: The SHA-256 of what was there before.
        """

        with self.attempts.at(run_id, attempt) as at:
            file = place_of(at.directory, name)

            if name not in at.tails:
                at.tails[name] = digest(file)

            length, sha = at.tails[name]

            if offset + len(data) == length and offset < length:  # the answer was lost
                return

            if offset != length or sha.hexdigest() != before:
                raise ValueError(f"{file} has {length} other bytes than the trial's {offset}")

            with held(at.lease):
                append_to(file, offset, data)

            sha.update(data)
            at.tails[name] = offset + len(data), sha

    def write(
        self,
        run_id: str,
        attempt: int,
        name: str,
        token: str,
        offset: int,
        data: bytes,
        whole: str | None,
    ) -> None:
        r"""Takes the next piece of a file of a run; the last one puts it in its place, synced.

        Arguments:
            run_id: The run.
            attempt: The attempt.
            name: The file.
            token: What this file is called as long as it is not whole.
            offset: Where the piece begins.
            data: The piece.
            whole: The SHA-256 of the file, with its last piece.
        """

        with self.attempts.at(run_id, attempt) as at:
            if token in at.done:  # the answer was lost
                return

            place = place_of(at.directory, name)

            if offset == 0 and token not in at.asides:
                for old, (aside, _, _) in list(at.asides.items()):  # given up by the trial
                    aside.unlink(missing_ok=True)
                    del at.asides[old]

                aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
                at.asides[token] = aside, 0, hashlib.sha256()

            aside, length, sha = at.asides[token]

            try:
                if offset == length:
                    mode = 0o600 if name == "diff.patch" else 0o666
                    append_to(aside, offset, data, mode, sync=whole is not None)
                    sha.update(data)
                    at.asides[token] = aside, length + len(data), sha
                elif offset + len(data) != length:  # the answer was lost
                    raise ValueError(f"a piece of {name} at {offset} comes after {length}")

                if whole is None:
                    return

                if sha.hexdigest() != whole:
                    raise ValueError(f"{name} was damaged on its way")

                with held(at.lease):
                    keep_previous(place)
                    os.replace(aside, place)
                    sync_directory(place.parent)
            except BaseException:
                del at.asides[token]
                aside.unlink(missing_ok=True)
                raise

            del at.asides[token]
            at.done.add(token)
            at.tails.pop(name, None)

    def remove(self, run_id: str, attempt: int, name: str) -> None:
        r"""Removes the previous checkpoint, or sets the newest one aside, which is damaged."""

        with self.attempts.at(run_id, attempt) as at:
            file = at.directory / name

            with held(at.lease):
                if name == "checkpoint.prev.pth":
                    file.unlink(missing_ok=True)
                elif name == "checkpoint.pth" and file.exists():
                    os.replace(file, file.with_suffix(".damaged.pth"))

    def close(self, run_id: str, attempt: int) -> None:
        r"""Gives the lease back."""

        with suppress(Unknown):
            self.attempts.end(run_id, attempt)

    def leave(self, run_id: str, attempt: int, text: str) -> None:
        r"""Keeps the stacks that a process which hung has left behind."""

        for directory in self.runs.glob(f"*_{run_id}"):
            with suppress(OSError), open(directory / STACKS, "a") as stream:
                stream.write(f"{text.rstrip()}\nIt hung, {TAKEN} {attempt}.\n")

    def data_sizes(self) -> dict[str, int]:
        r"""Returns the files of data that a training reads, and their bytes."""

        return {name: (self.data / name).stat().st_size for name in DATA}

    def data_piece(self, name: str, offset: int, size: int) -> Any:
        r"""Returns a piece of a file of data, and its SHA-256."""

        if name not in DATA:
            raise ValueError(f"{name!r} is no file that a training reads")

        return take_piece(self.data / name, offset, size)
