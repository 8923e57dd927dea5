r"""The files of a sweep, served to trials on nodes that do not see them.

The node of the driver has `runs/`, and data. A file server is a Ray actor there: it writes what
trials elsewhere push, and returns what they resume from. A trial takes the lease of its run through
the server, which checks it before each write: an older attempt, cut off and taken for dead, is
refused when it comes back.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..core import (
    Conflict,
    FileBackend,
    LeaseLost,
    append,
    check_present,
    cut_torn_lines,
    read_holder,
    remove_leftovers,
    sync_directory,
)
from ..runs import RESUMED, RunPath, keep_previous
from ..training import STACKS, TAKEN
from .replica import digest

START = 300.0  # seconds that a server may take to start

APPENDED = (".jsonl", ".wandb", ".log")  # files that only grow
DATA = ("train.h5", "valid.h5")
GROUPS = {"pulse": 4, "lease": 4, "files": 6}  # threads: a ping never waits for files


class FileServer:
    r"""The actor that serves the files of a sweep.

    Its methods may be called at the same time, and again if an answer was lost or the actor was
    restarted. Those with an attempt raise LeaseLost unless it has the lease of the run, and
    LeaseGone if the directory of the run was deleted.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        request: The file whose existence asks all trials to stop, see :func:`stop_scope`.
    """

    def __init__(self, runs: str, data: str, request: str) -> None:
        self.runs, self.data, self.request = Path(runs), Path(data), Path(request)
        self.directories: dict[str, Path] = {}  # by run id

    def ready(self) -> bool:
        return True

    def _directory(self, run_id: str) -> Path:
        r"""Returns the directory of a run, `.{id}` until the trial has named it."""

        if not re.fullmatch("[a-z0-9]{8}", run_id):
            raise ValueError(f"{run_id!r} is no id of a run")

        if run_id not in self.directories:
            path = RunPath.of_id(self.runs, run_id)
            self.directories[run_id] = path.directory if path else self.runs / f".{run_id}"

        return self.directories[run_id]

    def _check(self, run_id: str, attempt: int) -> None:
        file = self._directory(run_id) / "lease.json"

        if (holder := read_holder(file)) is None:
            check_present(file)
            raise OSError(f"{file} cannot be read")

        if holder["pid"] is None or holder["attempt"] != attempt:
            raise LeaseLost(
                f"run {run_id} is at attempt {holder['attempt']}, and {attempt} is over"
            )

    @contextmanager
    def _held(self, run_id: str, attempt: int) -> Iterator[Path]:
        r"""Locks the lease of an attempt for the block, and yields the directory of the run."""

        directory = self._directory(run_id)

        try:
            with FileBackend(directory / "lease.json").lock():
                self._check(run_id, attempt)
                yield directory
        except OSError:
            check_present(directory / "lease.json")
            raise

    def prepare(self, run_id: str) -> None:
        r"""Makes a directory for the lease of a run, if it has none yet."""

        self.directories.pop(run_id, None)
        directory = self._directory(run_id)

        if directory.name == f".{run_id}":
            if directory.is_symlink():  # to a directory that was deleted
                directory.unlink()

            directory.mkdir(exist_ok=True)

    def read_lease(self, run_id: str) -> tuple[bytes, int] | None:
        return FileBackend(self._directory(run_id) / "lease.json").read()

    def write_lease(self, run_id: str, data: bytes | None, version: int | None) -> int:
        r"""Replaces the lease record of a version; without data, gives it a heartbeat.

        Raises:
            Conflict: If the record has another version.
        """

        backend = FileBackend(self._directory(run_id) / "lease.json")

        with backend.lock():
            record = backend.read()

            if record is not None and record[0] == data:  # the answer was lost
                return record[1]

            if version != (record and record[1]):
                raise Conflict(f"run {run_id} was taken meanwhile")

            return backend.beat(b"", version) if data is None else backend.write(data, version)

    def open(self, run_id: str, attempt: int) -> dict[str, Any]:
        r"""Cleans up after the attempt before.

        Returns:
            `name`, that of the run's directory, empty if it has none yet; and `sizes`, those of the
            files that the run may be resumed from.
        """

        with self._held(run_id, attempt) as directory:
            remove_leftovers(directory)
            cut_torn_lines(directory / "metrics.jsonl")
            link = self.runs / f".{run_id}"

            if link.is_symlink():  # of an attempt that was killed
                link.unlink()

            files = [directory / name for name in RESUMED if directory != link]

            return {
                "name": "" if directory == link else directory.name,
                "sizes": {x.name: x.stat().st_size for x in files if x.is_file()},
            }

    def settle(self, run_id: str, attempt: int, name: str) -> None:
        r"""Names the directory of a new run."""

        target = self.runs / name

        if target.parent != self.runs or not name.endswith(f"_{run_id}") or name[0] == ".":
            raise ValueError(f"{name!r} is no name for run {run_id}")

        with self._held(run_id, attempt) as directory:
            if directory.name == f".{run_id}":
                directory.rename(target)
                self.directories[run_id] = target
                sync_directory(self.runs)

    def ping(self, run_id: str, attempt: int, number: int) -> str:
        r"""Returns what run `number` is asked, see :func:`stop_scope`."""

        self._check(run_id, attempt)

        return stop_scope(self.request, number)

    def read(self, run_id: str, attempt: int, name: str, offset: int, size: int) -> bytes:
        r"""Returns a chunk of a file of a run."""

        if name not in RESUMED:
            raise ValueError(f"{name!r} is no file that a trial needs")

        with self._held(run_id, attempt) as directory:
            return _read(directory / name, offset, size)

    def append(self, run_id: str, attempt: int, name: str, offset: int, data: bytes) -> None:
        r"""Appends to a file of a run that only grows, and had `offset` bytes before."""

        with self._held(run_id, attempt) as directory:
            file = _place(directory, name)
            length = file.stat().st_size if file.exists() else 0

            if offset < length and _read(file, offset, length) == data:  # the answer was lost
                return

            if offset != length:
                raise ValueError(f"{file} has {length} other bytes than the trial's {offset}")

            append(file, data)

    def write(
        self, run_id: str, attempt: int, name: str, offset: int, data: bytes, sha: str | None
    ) -> None:
        r"""Takes a chunk of a file of a run; the one at offset 0 begins the file anew.

        The last chunk comes with the SHA-256 of the file, and puts it in place, synced.
        """

        with self._held(run_id, attempt) as directory:
            place = _place(directory, name)
            aside = place.with_name(f".{place.name}.tmp")

            if sha and not aside.exists() and _digest(place) == sha:  # the answer was lost
                return

            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            flags |= 0 if offset else os.O_TRUNC
            mode = 0o600 if name == "diff.patch" else 0o666

            try:
                with open(os.open(aside, flags, mode), "wb") as stream:
                    stream.seek(offset)
                    stream.write(data)

                    if sha is None:
                        return

                    stream.flush()
                    os.fsync(stream.fileno())

                if _digest(aside) != sha:
                    raise ValueError(f"{name} was damaged on its way")

                if name == "checkpoint.pth":
                    keep_previous(RunPath(directory))

                os.replace(aside, place)
                sync_directory(place.parent)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise

    def remove(self, run_id: str, attempt: int, name: str) -> None:
        r"""Removes the previous checkpoint, or sets the newest one aside, which is damaged."""

        with self._held(run_id, attempt) as directory:
            file = directory / name

            if name == "checkpoint.prev.pth":
                file.unlink(missing_ok=True)
            elif name == "checkpoint.pth" and file.exists():
                os.replace(file, file.with_suffix(".damaged.pth"))

    def keep_stacks(self, run_id: str, attempt: int, text: str) -> None:
        for directory in self.runs.glob(f"*_{run_id}"):
            with suppress(OSError), open(directory / STACKS, "a") as stream:
                stream.write(f"{text.rstrip()}\nIt hung, {TAKEN} {attempt}.\n")

    def data_sizes(self) -> dict[str, int]:
        return {name: (self.data / name).stat().st_size for name in DATA}

    def read_data(self, name: str, offset: int, size: int) -> bytes:
        r"""Returns a chunk of a file of data."""

        if name not in DATA:
            raise ValueError(f"{name!r} is no file that a training reads")

        return _read(self.data / name, offset, size)


def stop_scope(request: Path, number: int) -> str:
    r"""Returns whether a stop file asks `all` trials or run `number` `alone`, or nothing.

    The file `request` stops all trials of the sweep, `request.N` only run N.
    """

    names: list[str] = []

    with suppress(OSError):  # the file system may be away for a while
        # A listing is fresh on NFS, where the absence of a file may be cached
        names = os.listdir(request.parent)

    if f"{request.name}.{number}" in names:
        return "alone"

    return "all" if request.name in names else ""


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
    server = actor.remote(str(runs), str(data), str(request))

    for old in request.parent.glob(".probe-*"):
        old.unlink(missing_ok=True)

    probe = request.with_name(f".probe-{nonce[:8]}")
    probe.write_text(nonce)

    try:
        ray.get(server.ready.remote(), timeout=START)
        address = {"actor": name, "namespace": here.namespace}
        yield address | {"probe": str(probe), "nonce": nonce}
    finally:
        probe.unlink(missing_ok=True)

        with suppress(Exception):  # Ray may be gone
            ray.kill(server)


def on_node(id: str) -> dict[str, Any]:
    r"""Returns the options by which a task or an actor runs on a node, given Ray's id of it."""

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(id, soft=False)}


def _read(file: Path, offset: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(offset)

        return stream.read(size)


def _digest(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return digest(stream)
    except FileNotFoundError:
        return ""


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
