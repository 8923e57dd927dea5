r"""A run on a node that does not see the sweep's files: trained here, kept on the head node.

The run has a private directory on this node, which starts with the files that the head has, and is
removed with the attempt. A thread pushes what changes, so that training does not wait. A trial that
is cut off from the head stops: its run is resumed elsewhere.

Files are in `$SDA_RAY_LOCAL`, or else the temporary directory, in `sda-ray-{uid}/`: `runs/` has the
directories of attempts; `data/` the data sets that trials of this user have fetched, each once.
"""

import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..core import Lease, LeaseGone, LeaseLost, UserError, locked
from ..data import DataChanged, fingerprint
from ..runs import CHECKPOINT_SECONDS, RESUMED, RunPath, read_checkpoint
from ..training import STACKS
from .replica import CHUNK, Replica, chunks, digest, run_files
from .server import APPENDED

PATIENCE = 60.0  # seconds without an answer after which a trial stops
RETRY = 0.5  # seconds before a failed call is repeated
PING = 2.0  # seconds between two requests for the stop scope
PASS = 1.0  # seconds between two passes over the files
SMALL = 2**16  # bytes that do not queue with large files
KEPT = 3  # data sets on a node that are not in use
WAIT = 0.5  # seconds between two checks whether another trial has fetched the data

METRICS, CHECKPOINT, PREVIOUS = "metrics.jsonl", "checkpoint.pth", "checkpoint.prev.pth"

Beat = Callable[[], None]
Read = Callable[[int, int], bytes]


class Disconnected(RuntimeError):
    r"""Raised if a trial is cut off from the head node, or its attempt is over there."""


class Connection:
    r"""The connection of an attempt at a run to the file server of its sweep.

    Arguments:
        server: The address that :func:`sda_ray.storage.server.serve_files` yields.
        run_id: The run.
        attempt: The number of the attempt, which is cut off after `patience` without an answer.
    """

    def __init__(
        self, server: dict[str, str], run_id: str, attempt: int, patience: float = PATIENCE
    ) -> None:
        import ray

        self.run_id, self.attempt, self.patience = run_id, attempt, patience
        self.heard = time.monotonic()

        try:
            self.actor = ray.get_actor(server["actor"], server["namespace"])
        except ValueError as error:  # the driver has ended
            raise Disconnected(f"the trial was cut off from the head: {error}") from error

    def __call__(self, method: str, *args: Any, group: str = "files") -> Any:
        return self.ask(method, self.run_id, self.attempt, *args, group=group)

    def ask(self, method: str, *args: Any, group: str = "files") -> Any:
        r"""Calls a method of the server, and retries while it is out of reach.

        Raises:
            Disconnected: If it is out of reach for too long.
            LeaseLost: If a later attempt has started.
        """

        import ray

        while True:
            ref = getattr(self.actor, method).options(concurrency_group=group).remote(*args)

            try:
                while not ray.wait([ref], timeout=1.0)[0]:
                    self._check("no answer")

                answer = ray.get(ref)
                self.heard = time.monotonic()

                return answer
            except ray.exceptions.RayTaskError as error:  # raised by the method
                self.heard = time.monotonic()
                raise error.cause from None
            except ray.exceptions.RayError as error:
                self._check(str(error).strip().partition("\n")[0])
                time.sleep(RETRY)

    def _check(self, why: str) -> None:
        if (silent := time.monotonic() - self.heard) > self.patience:
            raise Disconnected(f"the trial was cut off from the head for {silent:.0f} s: {why}")


class RemoteLease:
    r"""The record of a :class:`sda_ray.core.lease.Lease` on the head node, as its backend."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def read(self) -> Any:
        return self._ask("read_lease")

    def write(self, data: bytes, version: Any) -> Any:
        return self._ask("write_lease", data, version)

    def beat(self, data: bytes, version: Any) -> Any:
        return self._ask("write_lease", None, version)

    def lock(self) -> AbstractContextManager[object]:
        return nullcontext()  # the server compares versions

    def _ask(self, method: str, *args: Any) -> Any:
        return self.connection.ask(method, self.connection.run_id, *args, group="lease")


class HeadNode:
    r"""The directory of a run on the head node, as the target of a replica."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.beat: Beat = lambda: None  # called with each chunk
        self.lengths: dict[str, int] = {}  # of files that only grow, as they are there
        self._appending = threading.Lock()

    def put(self, name: str, file: BinaryIO, size: int) -> None:
        r"""Sends a file in chunks; of one that only grows, its new end."""

        if name.endswith(APPENDED):
            with self._appending:
                for offset, data in chunks(file, self.lengths.get(name, 0), size):
                    self._send("append", name, offset, data)
                    self.lengths[name] = offset + len(data)
        else:
            sha = digest(file, size)

            for offset, data in chunks(file, 0, size):
                last = offset + len(data) == size
                self._send("write", name, offset, data, sha if last else None)

    def remove(self, name: str) -> None:
        r"""Does nothing: a file that is missing here may be about to be replaced."""

    def _send(self, method: str, name: str, offset: int, data: bytes, *args: Any) -> None:
        group = "pulse" if len(data) < SMALL else "files"
        self.connection(method, name, offset, data, *args, group=group)
        self.beat()


class RemoteRun:
    r"""An attempt at a run whose directory is on the head node.

    Its `runs` takes the place of the directory of all runs for the attempt, and its `notes` are
    messages for the user, by topic. All methods but :meth:`close` raise :class:`Disconnected` once
    the attempt is cut off.

    Arguments:
        number: The number of the run in its sweep. For others see :class:`Connection`.

    Raises:
        Disconnected: If the server is out of reach.
        UserError: If files cannot be kept on this node.
    """

    def __init__(
        self,
        server: dict[str, str],
        run_id: str,
        attempt: int,
        number: int,
        patience: float = PATIENCE,
    ) -> None:
        self.number = number
        self.notes: dict[str, str] = {}
        self.connection = Connection(server, run_id, attempt, patience)
        self.head = HeadNode(self.connection)
        self._lost: Exception | None = None  # why the attempt is over
        self._failure: Exception | None = None  # why files are not on the head yet
        self._files: Replica | None = None
        self._request = ""
        self._over = threading.Event()
        self._next = 0.0  # when a checkpoint may be pushed again
        self._lease: Lease | None = None

        with leftovers() as found:
            for old in found:
                self._send_stacks(*old)

        self.private = Private(run_id, attempt)
        self.runs = self.private.directory

    def open(self, beat: Beat = lambda: None) -> None:
        r"""Takes the run's lease, and fetches the files to resume from, with a beat per chunk."""

        run_id, attempt = self.connection.run_id, self.connection.attempt
        self.connection.ask("prepare", run_id)
        record = RemoteLease(self.connection)
        self._lease = Lease(record, f"run {run_id}", attempt, takeover=True)
        threading.Thread(target=self._ping, name="ping", daemon=True).start()
        run = self.connection("open")

        if run["name"]:
            self._fetch(self.runs / run["name"], run["sizes"], beat)

    def watch(self, path: RunPath) -> None:
        self.connection("settle", path.directory.name)

        if self._files is None:
            self._files = Replica(path.directory, self.head)

        threading.Thread(target=self._push, name="replica", daemon=True).start()

    def push_lines(self) -> None:
        r"""Pushes the new lines of metrics, and returns when the head has them."""

        assert self._files is not None
        metrics = self._files.directory / METRICS

        if metrics.exists():
            with self._noted(), open(metrics, "rb") as file:
                self.head.put(METRICS, file, os.fstat(file.fileno()).st_size)

        self.check()

    def flush(self, beat: Beat = lambda: None) -> None:
        r"""Pushes all that has changed, and returns when the head has it, or its disk is full."""

        if self._files is None:  # there is nothing yet
            return

        self.check()
        self.head.beat = beat

        with self._noted():
            self._push_files(flush=True)

        self.head.beat = lambda: None
        self.check()

    def check(self) -> None:
        r"""Raises the reason why the attempt is over, if it is."""

        if isinstance(self._lost, LeaseLost):
            raise Disconnected(f"the trial was cut off from the head: {self._lost}")

        if self._lost is not None:
            raise self._lost

    def stop_request(self) -> str:
        self.check()

        return self._request

    def close(self, beat: Beat = lambda: None) -> Exception | None:
        r"""Pushes the rest, ends the attempt, and removes the directory. Safe to repeat.

        Returns:
            Why the head does not have all of it, if so.
        """

        if self._over.is_set():
            return None

        self._over.set()

        try:
            self.flush(beat)
            error = self._failure
        except Exception as e:
            error = e

        if self._lease is not None:
            with suppress(Exception):  # it expires without heartbeats
                self._lease.release()

        self.private.close()

        return error

    def _send_stacks(self, run_id: str, attempt: int, directory: Path) -> None:
        for file in (directory / STACKS, *directory.glob(f"*_{run_id}/{STACKS}")):
            with suppress(OSError):
                if text := file.read_text(errors="replace"):
                    self.connection.ask("keep_stacks", run_id, attempt, text)

    def _fetch(self, directory: Path, sizes: dict[str, int], beat: Beat) -> None:
        r"""Fetches the files of a run; the previous checkpoint only if the newest is damaged."""

        directory.mkdir()
        self._files = Replica(directory, self.head)
        self.head.lengths[METRICS] = sizes.get(METRICS, 0)
        whole = CHECKPOINT in sizes

        for name in RESUMED:
            if name not in sizes or (name == PREVIOUS and whole):
                continue

            fetch(directory / name, sizes[name], partial(self.connection, "read", name), beat)

            if name != PREVIOUS:
                self._files.know(name)

            if name == CHECKPOINT:
                try:
                    read_checkpoint(directory / name)
                except ValueError:  # it must not become the previous one of the next
                    self.connection("remove", name)
                    whole = False

    @contextmanager
    def _noted(self) -> Iterator[None]:
        r"""Notes an error of the head instead of raising it."""

        try:
            yield
        except (Disconnected, LeaseLost, LeaseGone) as error:
            self._lost = self._lost or error
        except Exception as error:  # a full disk: the next pass retries
            self._failure = error
            self.notes["disk"] = f"a run cannot be kept on the head, which is retried: {error}"

    def _ping(self) -> None:
        while not self._over.is_set() and self._lost is None:
            with self._noted():
                self._request = self.connection("ping", self.number, group="pulse")

            self._over.wait(PING)

    def _push(self) -> None:
        while not self._over.wait(PASS) and self._lost is None:
            with self._noted():
                self._push_files()

    def _push_files(self, flush: bool = False) -> None:
        r"""Pushes what has changed; a checkpoint only when it is due, or to flush."""

        assert self._files is not None
        directory = self._files.directory
        names = run_files(directory)

        if not flush and time.monotonic() < self._next:
            names = [name for name in names if name != CHECKPOINT]

        before, start = self._files.pushed.get(CHECKPOINT), time.monotonic()
        self._files.push(names)
        saved = self._files.pushed.get(CHECKPOINT)

        if saved is not None and saved != before:
            self._stretch(saved[1], time.monotonic() - start)

        if flush and "state.pth" in names and not (directory / PREVIOUS).exists():
            self.connection("remove", PREVIOUS)  # a finished run has none

        self._failure = None

    def _stretch(self, size: int, took: float) -> None:
        r"""Leaves the network to others for as long as a checkpoint took."""

        self._next, between = time.monotonic() + took, 2 * took

        if between > CHECKPOINT_SECONDS:
            self.notes["link"] = (
                f"{os.uname().nodename} sends files to the head at {size / took / 1e6:.3g} MB/s: "
                f"a checkpoint of {size / 1e6:.3g} MB takes {took:.0f} s, so that there is one "
                f"every {between / 60:.0f} min, and at each rung: a lost node loses as much."
            )


def shares_files(server: dict[str, str]) -> bool:
    r"""Tells whether this node has the very directory of the sweep, and may write there."""

    file = Path(server["probe"])

    try:
        return file.read_text() == server["nonce"] and os.access(file.parent, os.W_OK)
    except OSError:
        return False


# Directories on this node


def local_directory(what: str) -> Path:
    r"""Returns a directory on this node that only this user can read.

    Raises:
        UserError: If it cannot be created.
    """

    parent = Path(os.environ.get("SDA_RAY_LOCAL") or tempfile.gettempdir()).absolute()
    root = parent / f"sda-ray-{os.getuid()}"

    try:
        parent.mkdir(parents=True, exist_ok=True)

        with suppress(FileExistsError):
            root.mkdir(mode=0o700)

        if not stat.S_ISDIR((status := root.lstat()).st_mode) or status.st_uid != os.getuid():
            raise UserError(f"{root} belongs to another user. Set SDA_RAY_LOCAL on this node.")

        root.chmod(0o700)
        (root / what).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"files of trials cannot be kept in {root}: {error.strerror}. Set SDA_RAY_LOCAL on "
            "this node to a directory that can be written."
        ) from error

    return root / what


class Private:
    r"""A directory for an attempt, which is locked as long as this process lives."""

    def __init__(self, run_id: str, attempt: int) -> None:
        with _directories() as parent, ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix=f"{run_id}.{attempt}.", dir=parent))
            stack.enter_context(locked(self.directory / ".lock"))
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.close = stack.pop_all().close  # removes the directory, and may be repeated


@contextmanager
def _directories() -> Iterator[Path]:
    r"""Yields the directory of those of attempts, and keeps others from looking at them."""

    directory = local_directory("runs")

    with locked(directory.with_suffix(".lock")):
        yield directory


@contextmanager
def leftovers() -> Iterator[list[tuple[str, int, Path]]]:
    r"""Yields run, attempt and directory of attempts whose process died; then removes them."""

    dead = []

    with ExitStack() as stack:
        with _directories() as parent:
            for directory in parent.glob("*.*.*"):
                with suppress(OSError):  # in use
                    stack.enter_context(locked(directory / ".lock", wait=False))
                    stack.callback(shutil.rmtree, directory, ignore_errors=True)
                    run_id, attempt, _ = directory.name.split(".")
                    dead.append((run_id, int(attempt), directory))

        yield dead


def fetch(file: Path, size: int, read: Read, beat: Beat = lambda: None) -> None:
    r"""Fetches a file by `read`, which returns a chunk given offset and length.

    Raises:
        UserError: If the file does not fit on this node.
    """

    try:
        with open(file, "wb") as stream:
            while (offset := stream.tell()) < size:
                if not (data := read(offset, min(CHUNK, size - offset))):
                    raise RuntimeError(f"{file.name} has changed while it was fetched")

                stream.write(data)
                beat()

            stream.flush()
    except OSError as error:
        raise UserError(
            f"{file.name}, of {size / 2**20:.0f} MB, cannot be kept in {file.parent} on "
            f"{os.uname().nodename}: {error.strerror}. Make room there, or set SDA_RAY_LOCAL on "
            "this node to another directory."
        ) from error


def find_data(
    data: Path, expected: str, ask: Callable[..., Any], beat: Beat = lambda: None
) -> tuple[Path, Any]:
    r"""Finds the data of a sweep on this node, or fetches them, once for all trials of the node.

    Of the fetched data sets that are not in use, the three used last are kept, or fewer if the
    disk is full.

    Arguments:
        data: The directory of the data on the driver's node.
        expected: Their fingerprint.
        ask: Calls a method of the file server there.
        beat: Called now and then while that takes long.

    Returns:
        The directory, and a lock that keeps it until it is closed, if it was fetched.
    """

    if _has(data, expected):
        return data, None

    place = local_directory("data") / expected

    with ExitStack() as stack:
        used = stack.enter_context(locked(place.with_suffix(".lock"), shared=True))

        while not _has(place, expected):
            try:
                with locked(place.with_suffix(".fetch"), wait=False):
                    if not _has(place, expected):
                        _fetch_all(place, expected, ask, beat)
            except BlockingIOError:  # another trial fetches them
                beat()
                time.sleep(WAIT)

        os.utime(used.fileno())

        return place, stack.pop_all()


def _fetch_all(place: Path, expected: str, ask: Callable[..., Any], beat: Beat) -> None:
    sizes = ask("data_sizes")
    _make_room(place, sum(sizes.values()))
    aside = place.with_name(f"{place.name}.part")
    shutil.rmtree(place, ignore_errors=True)  # damaged
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()

    try:
        for name, size in sizes.items():
            fetch(aside / name, size, partial(ask, "read_data", name), beat)

        if fingerprint(aside) != expected:
            raise DataChanged(
                "the data on the driver's node have changed since the sweep was started."
            )

        aside.rename(place)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _make_room(place: Path, size: int) -> None:
    r"""Removes data sets that are not in use, the longest unused first, for others and for space."""

    locks = sorted(place.parent.glob("*.lock"), key=lambda x: x.stat().st_mtime)
    others = [x for x in locks if x.stem != place.name]

    for i, file in enumerate(others):
        if len(others) - i < KEPT and shutil.disk_usage(place.parent).free > size:
            return

        with suppress(OSError), locked(file, wait=False):
            shutil.rmtree(file.with_suffix(".part"), ignore_errors=True)
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)


def _has(data: Path, expected: str) -> bool:
    try:
        return fingerprint(data) == expected
    except (OSError, UserError):
        return False
