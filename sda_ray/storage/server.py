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

from ..core import (
    Lease,
    LeaseLost,
    check_present,
    cut_torn_lines,
    remove_leftovers,
    sync_directory,
)
from ..runs import RESUMED
from ..training import STACKS, TAKEN

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
LOOK = 0.2  # seconds for which one look for stop requests serves all trials

APPENDED = (".jsonl", ".wandb", ".log")  # files that only grow
DATA = ("train.h5", "valid.h5")
GROUPS = {"pulse": 4, "files": 6}  # threads: heartbeats never wait for files


class UnknownAttempt(RuntimeError):
    r"""Raised if a server does not know an attempt: it was restarted, or the attempt has ended."""


class Attempt:
    r"""One attempt at a run: its lease, and the files that are on their way."""

    lease: Lease
    directory: Path

    def __init__(self, number: int) -> None:
        self.number = number
        self.lock = threading.RLock()  # of all that is done for the attempt
        self.taken = False  # whether it has the lease
        self.heard = time.monotonic()
        self.tails: dict[str, tuple[int, Any]] = {}  # growing file -> its length, SHA-256
        self.asides: dict[str, tuple[Path, int, Any]] = {}  # token -> file, its length, SHA-256
        self.done: set[str] = set()  # tokens

    def silent(self) -> float:
        r"""Returns the seconds since the last heartbeat."""

        return time.monotonic() - self.heard

    def release(self) -> None:
        r"""Releases the lease, if it was taken."""

        if self.taken:
            self.lease.release()


class FileServer:
    r"""The actor that serves the files of a sweep.

    Its methods may be called at the same time, and again if an answer was lost. All that write for
    an attempt raise LeaseLost if a later one has started, UnknownAttempt if it must be opened
    first, and LeaseGone if the directory of the run was deleted.

    Arguments:
        name: The name of the actor, by which its leases are its own after a restart.
        runs: The directory of all runs.
        data: The directory of the data.
        request: The file whose existence asks all trials to stop, see
            :class:`sda_ray.cluster.trial.Trial`.
    """

    def __init__(self, name: str, runs: str, data: str, request: str) -> None:
        self.name = name
        self.runs, self.data, self.request = Path(runs), Path(data), Path(request)
        self.newest: dict[str, Attempt] = {}  # by run id
        self._lock = threading.Lock()  # of `newest`
        self._looked, self._requests = 0.0, frozenset[str]()

    def ready(self) -> str:
        r"""Returns the name, once the actor has started."""

        return self.name

    def open(self, run_id: str, attempt: int) -> dict[str, Any]:
        r"""Takes the lease of a run for an attempt.

        Returns:
            `name`, the name of the run's directory, empty if it has none yet; and `sizes`, those of
            the files that the attempt may need to resume the run.

        Raises:
            LeaseLost: If a later attempt has started.
        """

        directory = self._start(run_id, attempt).directory
        sizes = {x: (directory / x).stat().st_size for x in RESUMED if (directory / x).is_file()}
        name = "" if directory.name.startswith(".") else directory.name

        return {"name": name, "sizes": sizes if name else {}}

    def _start(self, run_id: str, number: int) -> Attempt:
        if not re.fullmatch("[a-z0-9]{8}", run_id):
            raise ValueError(f"{run_id!r} is no id of a run")

        with self._lock:
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
        named = sorted(x for x in self.runs.glob(f"*_{run_id}") if x.is_dir())
        directory = named[0] if named else link

        if link.is_symlink() and not named:
            link.unlink()

        if not named:  # the trial names it, see `settle`
            link.mkdir(exist_ok=True)

        attempt.lease = Lease(
            directory / "lease.json",
            f"run {run_id}",
            attempt.number,
            takeover=True,
            agent=self.name,
            alive=lambda: attempt.silent() < PULSE,
        )

        with attempt.lease.hold():
            remove_leftovers(directory)
            cut_torn_lines(directory / "metrics.jsonl")

            if link.is_symlink():  # of an attempt that was killed
                link.unlink()

        attempt.directory, attempt.taken = directory, True

    def _find(self, run_id: str, number: int) -> Attempt:
        r"""Returns an attempt, and counts the call as its heartbeat."""

        with self._lock:
            attempt = self.newest.get(run_id)

        if attempt is None or attempt.number < number or not attempt.taken:
            raise UnknownAttempt(f"attempt {number} at run {run_id} is not known here")

        _check(run_id, attempt, number)
        attempt.heard = time.monotonic()

        return attempt

    @contextmanager
    def _locked(self, run_id: str, number: int) -> Iterator[Attempt]:
        r"""Locks an attempt for the duration of the block.

        Raises:
            LeaseGone: If the block fails because the directory of the run was deleted.
        """

        attempt = self._find(run_id, number)

        with attempt.lock:
            try:
                yield attempt
            except OSError:
                check_present(attempt.lease.file)
                raise

    def settle(self, run_id: str, attempt: int, name: str) -> None:
        r"""Names the directory of a new run."""

        target = self.runs / name

        if target.parent != self.runs or not name.endswith(f"_{run_id}") or name[0] == ".":
            raise ValueError(f"{name!r} is no name for run {run_id}")

        with self._locked(run_id, attempt) as at:
            if at.directory.name == f".{run_id}":
                with at.lease.hold():
                    at.directory.rename(target)
                    sync_directory(self.runs)
                    at.directory, at.lease.file = target, target / "lease.json"

    def ping(self, run_id: str, attempt: int, number: int) -> str:
        r"""Takes a heartbeat, and returns the request to stop run `number`: `all`, `alone` or none.

        Releases the leases of attempts that have been silent for very long.
        """

        self._find(run_id, attempt)

        with self._lock:
            silent = [x for x in self.newest.values() if x.silent() > SILENCE]

        for other in silent:
            other.release()

        if time.monotonic() - self._looked > LOOK:
            with suppress(OSError):
                self._requests = frozenset(os.listdir(self.request.parent))
                self._looked = time.monotonic()

        if f"{self.request.name}.{number}" in self._requests:
            return "alone"

        return "all" if self.request.name in self._requests else ""

    def read(self, run_id: str, attempt: int, name: str, offset: int, size: int) -> Any:
        r"""Returns a chunk of a file of a run, and its SHA-256."""

        if name not in RESUMED:
            raise ValueError(f"{name!r} is no file that a trial needs")

        with self._locked(run_id, attempt) as at:
            return _read_chunk(at.directory / name, offset, size)

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
            before: The SHA-256 of the file before.
        """

        with self._locked(run_id, attempt) as at:
            file = _place(at.directory, name)

            if name not in at.tails:
                at.tails[name] = _tail(file)

            length, sha = at.tails[name]

            if offset + len(data) == length and offset < length:  # the answer was lost
                return

            if offset != length or sha.hexdigest() != before:
                raise ValueError(f"{file} has {length} other bytes than the trial's {offset}")

            with at.lease.hold():
                _append(file, offset, data)

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
        r"""Takes the next chunk of a file of a run; the last one puts the file in place, synced.

        Arguments:
            run_id: The run.
            attempt: The attempt.
            name: The file.
            token: The name of this version of the file until it is whole.
            offset: The offset of the chunk.
            data: The chunk.
            whole: The SHA-256 of the file, with its last chunk.
        """

        with self._locked(run_id, attempt) as at:
            if token in at.done:  # the answer was lost
                return

            place = _place(at.directory, name)

            if offset == 0 and token not in at.asides:
                for old, (aside, _, _) in list(at.asides.items()):  # abandoned by the trial
                    aside.unlink(missing_ok=True)
                    del at.asides[old]

                aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
                at.asides[token] = aside, 0, hashlib.sha256()

            aside, length, sha = at.asides[token]

            try:
                if offset == length:
                    mode = 0o600 if name == "diff.patch" else 0o666
                    _append(aside, offset, data, mode, sync=whole is not None)
                    sha.update(data)
                    at.asides[token] = aside, length + len(data), sha
                elif offset + len(data) != length:  # the answer was lost
                    raise ValueError(f"a chunk of {name} at {offset} comes after {length}")

                if whole is None:
                    return

                if sha.hexdigest() != whole:
                    raise ValueError(f"{name} was damaged on its way")

                with at.lease.hold():
                    _keep_previous(place)
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

        with self._locked(run_id, attempt) as at:
            file = at.directory / name

            with at.lease.hold():
                if name == "checkpoint.prev.pth":
                    file.unlink(missing_ok=True)
                elif name == "checkpoint.pth" and file.exists():
                    os.replace(file, file.with_suffix(".damaged.pth"))

    def close(self, run_id: str, attempt: int) -> None:
        r"""Ends an attempt, and releases its lease."""

        with suppress(UnknownAttempt), self._locked(run_id, attempt) as at, self._lock:
            at.release()

            if self.newest.get(run_id) is at:
                del self.newest[run_id]

    def keep_stacks(self, run_id: str, attempt: int, text: str) -> None:
        r"""Keeps the stack traces of a process that hung."""

        for directory in self.runs.glob(f"*_{run_id}"):
            with suppress(OSError), open(directory / STACKS, "a") as stream:
                stream.write(f"{text.rstrip()}\nIt hung, {TAKEN} {attempt}.\n")

    def data_sizes(self) -> dict[str, int]:
        r"""Returns the files of data that a training reads, and their sizes."""

        return {name: (self.data / name).stat().st_size for name in DATA}

    def read_data(self, name: str, offset: int, size: int) -> Any:
        r"""Returns a chunk of a file of data, and its SHA-256."""

        if name not in DATA:
            raise ValueError(f"{name!r} is no file that a training reads")

        return _read_chunk(self.data / name, offset, size)


def _check(run_id: str, attempt: Attempt, number: int) -> None:
    if attempt.number > number:
        raise LeaseLost(f"run {run_id} is at attempt {attempt.number}, and {number} is over")


@contextmanager
def serve_files(runs: Path, data: Path, request: Path) -> Iterator[dict[str, str]]:
    r"""Runs a file server on this node during the block.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        request: The file that asks trials to stop, in the directory of the sweep.

    Yields:
        The address: `actor` and `namespace` of the server, and `probe` and `nonce`, a file that
        every node with this very directory sees, and its content.
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


def _read_chunk(file: Path, offset: int, size: int) -> tuple[bytes, str]:
    r"""Returns a chunk of a file, and its SHA-256."""

    with open(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read(size)

    return data, hashlib.sha256(data).hexdigest()


def _place(directory: Path, name: str) -> Path:
    r"""Returns the path of a file of a run: in its directory, or in that of W&B below.

    Raises:
        ValueError: If it is no file of a run, or would be outside of its directory.
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


def _tail(file: Path) -> tuple[int, Any]:
    r"""Returns the length of a file, 0 if there is none, and its SHA-256, to be updated."""

    sha, length = hashlib.sha256(), 0

    with suppress(FileNotFoundError), open(file, "rb") as stream:
        while chunk := stream.read(2**20):
            sha.update(chunk)
            length += len(chunk)

    return length, sha


def _append(file: Path, end: int, data: bytes, mode: int = 0o666, sync: bool = True) -> None:
    r"""Writes at the end of a file, all or nothing."""

    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    stream: BinaryIO

    with open(os.open(file, flags, mode), "wb", buffering=0) as stream:
        try:
            view = memoryview(data)

            while view:
                view = view[stream.write(view) :]

            if sync:
                os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), end)
            raise


def _keep_previous(place: Path) -> None:
    r"""Keeps the newest checkpoint as the previous one, as :mod:`sda_ray.runs.checkpoint` does."""

    if place.name != "checkpoint.pth" or not place.exists():
        return

    previous = place.with_name("checkpoint.prev.pth")
    previous.unlink(missing_ok=True)

    try:
        os.link(place, previous)
    except OSError:  # a file system without links
        os.replace(place, previous)
