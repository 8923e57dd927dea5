r"""The files of a sweep, served to trials on nodes that do not see them.

The node of the driver has `runs/`, and data. A file server is a Ray actor there: it writes what
trials elsewhere push, and returns what they resume from. It holds the lease of each run that it
writes to, under the number of the trial's attempt: an older attempt, cut off and taken for dead,
is refused when it comes back.
"""

import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..core.files import cut_torn_lines, remove_leftovers, sync_directory
from ..core.lease import Lease, LeaseLost, check_present
from ..runs.path import RESUMED
from ..training.watchdog import STACKS, TAKEN

__all__ = [
    "APPENDED",
    "DATA",
    "FileServer",
    "UnknownAttempt",
    "on_node",
    "serve_files",
]

START = 300.0  # seconds that a server may take to start
PULSE = 20.0  # seconds without a heartbeat of a trial after which its lease has none either
SILENCE = 900.0  # seconds after which its lease is released
TIMEOUT = 60.0  # seconds for a node to answer
LOOK = 0.2  # seconds for which one look for stop requests serves all trials

APPENDED = (".jsonl", ".wandb", ".log")  # files that only grow
DATA = ("train.h5", "valid.h5")
GROUPS = {"pulse": 4, "files": 6}  # threads: heartbeats never wait for files


class UnknownAttempt(RuntimeError):
    r"""Signals that a server does not know an attempt: it was started again, or has ended it."""


class Attempt:
    r"""Creates what a server knows of one attempt at a run."""

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
    r"""Creates the attempts of a server, the newest one at each run.

    Arguments:
        agent: The name of the server.
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

        with attempt.lease.hold():
            remove_leftovers(directory)
            cut_torn_lines(directory / "metrics.jsonl")

            if link.is_symlink():  # of an attempt that was killed
                link.unlink()

        attempt.directory, attempt.taken = directory, True

    def find(self, run_id: str, number: int) -> Attempt:
        r"""Returns an attempt, which gives a sign of life by that.

        Raises:
            LeaseLost: If a later one has begun.
            UnknownAttempt: If it has to begin.
        """

        with self.lock:
            attempt = self.newest.get(run_id)

        if attempt is None or attempt.number < number or not attempt.taken:
            raise UnknownAttempt(f"attempt {number} at run {run_id} is not known here")

        _check(run_id, attempt, number)
        attempt.heard = time.monotonic()

        return attempt

    @contextmanager
    def at(self, run_id: str, number: int) -> Iterator[Attempt]:
        r"""Has an attempt to itself for the duration of the block, see :meth:`find`.

        Raises:
            LeaseGone: If the block fails because the directory of the run is gone.
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
                with attempt.lease.hold():
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


class FileServer:
    r"""Creates a server. Its methods may be called at the same time, and again after a failure.

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

            with at.lease.hold():
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

                with at.lease.hold():
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

            with at.lease.hold():
                if name == "checkpoint.prev.pth":
                    file.unlink(missing_ok=True)
                elif name == "checkpoint.pth" and file.exists():
                    os.replace(file, file.with_suffix(".damaged.pth"))

    def close(self, run_id: str, attempt: int) -> None:
        r"""Gives the lease back."""

        with suppress(UnknownAttempt):
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


@contextmanager
def serve_files(runs: Path, data: Path, request: Path) -> Iterator[dict[str, str]]:
    r"""Starts a server on this node, which ends with the block.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        request: The file by which trials are told to stop, in the directory of the sweep.

    Yields:
        What a trial is told: `actor` and `namespace`, by which the server is found, and `probe`
        and `nonce`, a file that every node which has the directory sees, and what it says.
    """

    import ray

    nonce = secrets.token_hex(16)
    name, here = f"server-{nonce[:8]}", ray.get_runtime_context()
    actor = ray.remote(concurrency_groups=GROUPS)(FileServer).options(
        name=name,
        num_cpus=0,
        max_restarts=-1,
        **on_node(here.get_node_id()),
    )
    server = actor.remote(name, str(runs), str(data), str(request))

    for old in request.parent.glob(".probe-*"):
        old.unlink(missing_ok=True)

    probe = request.with_name(f".probe-{nonce[:8]}")
    probe.write_text(nonce)

    try:
        ray.get(server.ready.remote(), timeout=START)
        told = {"actor": name, "namespace": here.namespace}
        yield told | {"probe": str(probe), "nonce": nonce}
    finally:
        probe.unlink(missing_ok=True)

        with suppress(Exception):  # Ray may be gone
            ray.kill(server)


def on_node(id: str) -> dict[str, Any]:
    r"""Returns the options by which a task or an actor runs on a node, given Ray's id of it."""

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(id, soft=False)}


def take_piece(file: Path, offset: int, size: int) -> tuple[bytes, str]:
    r"""Returns a piece of a file, and its SHA-256."""

    with open(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read(size)

    return data, hashlib.sha256(data).hexdigest()


def place_of(directory: Path, name: str) -> Path:
    r"""Returns where a file of a run goes: in its directory, or W&B's in there.

    Raises:
        ValueError: If it is no file of a run, or would lie elsewhere.
    """

    parts = Path(name).parts
    ours = len(parts) == 1 and not name.startswith((".", "lease."))

    if ".." in parts or Path(name).is_absolute() or not (ours or parts[:1] == ("wandb",)):
        raise ValueError(f"{name!r} is no file of a run")

    place = directory / name

    if len(parts) > 1:
        place.parent.mkdir(parents=True, exist_ok=True)

        if not place.parent.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"{name!r} leads out of the run")

    return place


def digest(file: Path) -> tuple[int, Any]:
    r"""Returns the length of a file, 0 if there is none, and the SHA-256 of it, to go on with."""

    sha, length = hashlib.sha256(), 0

    with suppress(FileNotFoundError), open(file, "rb") as stream:
        while piece := stream.read(2**20):
            sha.update(piece)
            length += len(piece)

    return length, sha


def append_to(file: Path, end: int, data: bytes, mode: int = 0o666, sync: bool = True) -> None:
    r"""Writes at the end of a file, all or nothing."""

    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    stream: BinaryIO

    with open(os.open(file, flags, mode), "wb", buffering=0) as stream:
        try:
            rest = memoryview(data)

            while rest:
                rest = rest[stream.write(rest) :]

            if sync:
                os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), end)
            raise


def keep_previous(place: Path) -> None:
    r"""Keeps the checkpoint before as the previous one, as :mod:`sda_ray.runs.checkpoint` does."""

    if place.name != "checkpoint.pth" or not place.exists():
        return

    previous = place.with_name("checkpoint.prev.pth")
    previous.unlink(missing_ok=True)

    try:
        os.link(place, previous)
    except OSError:  # a file system without links
        os.replace(place, previous)
