r"""A run on a node that does not see the sweep's files: trained here, kept on the head node.

The run has a private directory on this node, which starts with the files that the head has, and is
removed with the attempt. A thread pushes what changes, so that training does not wait. A trial that
is cut off from the head stops: its run is resumed elsewhere.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..core import LeaseGone, LeaseLost
from ..runs import CHECKPOINT_SECONDS, RunPath, read_checkpoint
from ..training import STACKS
from .replica import Replica, run_files
from .scratch import CHUNK, Private, fetch, find_data, leftovers
from .server import APPENDED, UnknownAttempt

__all__ = ["Connection", "Disconnected", "HeadNode", "RemoteRun", "data_of", "shares_files"]

PATIENCE = 60.0  # seconds without an answer after which a trial stops
RETRY = 0.5  # seconds before a failed call is repeated
PING = 2.0  # seconds between two heartbeats, which return requests to stop
PASS = 1.0  # seconds between two looks for files that have changed
SHARE = 0.5  # part of the time in which a checkpoint may be on its way
SMALL = 2**16  # bytes that do not queue with large files

METRICS, CHECKPOINT, PREVIOUS = "metrics.jsonl", "checkpoint.pth", "checkpoint.prev.pth"

Beat = Callable[[], None]


class Disconnected(RuntimeError):
    r"""Raised if a trial is cut off from the head node, or its attempt is over there."""


class Connection:
    r"""The connection of an attempt at a run to the file server of its sweep.

    Arguments:
        server: The address that :func:`sda_ray.storage.server.serve_files` yields.
        run_id: The run.
        attempt: The number of the attempt.
        patience: The seconds without an answer after which the attempt is cut off.
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
        r"""Calls a method of the server for this attempt, and retries while it is out of reach.

        Raises:
            Disconnected: If it is out of reach for too long.
            LeaseLost: If a later attempt has started.
        """

        try:
            return self.ask(method, self.run_id, self.attempt, *args, group=group)
        except UnknownAttempt:  # the server was restarted
            self.ask("open", self.run_id, self.attempt)
            return self.ask(method, self.run_id, self.attempt, *args, group=group)

    def ask(self, method: str, *args: Any, group: str = "files") -> Any:
        r"""Calls a method of the server."""

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


class HeadNode:
    r"""The directory of a run on the head node, as the target of a replica.

    Its `moved` counts the bytes sent, and `uploads` has size and seconds of the last upload of each
    file that is not appended to.

    Arguments:
        connection: The connection to the file server.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.moved = 0
        self.uploads: dict[str, tuple[int, float]] = {}
        self._tails: dict[str, tuple[int, Any]] = {}  # growing file -> its length there, SHA-256
        self._appending = threading.Lock()

    def know(self, name: str, data: bytes) -> None:
        r"""Notes what the head has of a growing file."""

        self._tails[name] = len(data), hashlib.sha256(data)

    def put(self, name: str, file: BinaryIO, size: int) -> None:
        r"""Sends a file in chunks, or what is new at the end of one that only grows."""

        if name.endswith(APPENDED):
            with self._appending:
                self._append(name, file, size)
        else:
            start = time.monotonic()
            self._replace(name, file, size)
            self.uploads[name] = size, time.monotonic() - start

    def remove(self, name: str) -> None:
        self.connection("remove", name)

    def _append(self, name: str, file: BinaryIO, size: int) -> None:
        length, sha = self._tails.get(name) or (0, hashlib.sha256())
        file.seek(length)

        while length < size and (data := file.read(min(CHUNK, size - length))):
            self.connection("append", name, length, data, sha.hexdigest(), group=_group(data))
            sha.update(data)
            length += len(data)
            self._tails[name] = length, sha
            self.moved += len(data)

    def _replace(self, name: str, file: BinaryIO, size: int) -> None:
        token, sha, offset, last = secrets.token_hex(8), hashlib.sha256(), 0, False
        file.seek(0)

        while not last:
            data = file.read(min(CHUNK, size - offset))
            sha.update(data)
            last = offset + len(data) >= size or not data
            whole = sha.hexdigest() if last else None
            self.connection("write", name, token, offset, data, whole, group=_group(data))
            offset += len(data)
            self.moved += len(data)


class RemoteRun:
    r"""An attempt at a run whose directory is on the head node.

    Its `runs` takes the place of the directory of all runs for the attempt, and its `notes` are
    messages for the user, by topic.

    Arguments:
        server: The address that :func:`sda_ray.storage.server.serve_files` yields.
        run_id: The run.
        attempt: The number of the attempt.
        number: The number of the run in its sweep.
        patience: The seconds without the server after which the attempt is cut off.

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
        self._lines: Replica | None = None  # of the metrics alone, which never wait for the rest
        self._files: Replica | None = None
        self._request = ""
        self._opened = False
        self._over = threading.Event()
        self._next = 0.0  # when a checkpoint may be pushed again
        self._change = threading.Condition()
        self._asked = self._done = 0  # flushes
        self._thread: threading.Thread | None = None

        with leftovers() as found:
            for old in found:
                self._send_stacks(*old)

        self.private = Private(run_id, attempt)
        self.runs = self.private.directory

    def open(self, beat: Beat = lambda: None) -> None:
        r"""Takes the run's lease on the head, and fetches the files that resuming needs.

        Arguments:
            beat: Called now and then while that takes long.

        Raises:
            LeaseLost: If a later attempt has started.
        """

        run = self.connection("open")
        self._opened = True
        threading.Thread(target=self._ping, name="heartbeat", daemon=True).start()

        if run["name"]:
            self._fetch(self.runs / run["name"], run["sizes"], beat)

    def watch(self, path: RunPath) -> None:
        r"""Starts to push what changes in the directory of the run, which is open."""

        self.connection("settle", path.directory.name)

        if self._files is None:
            self._set_directory(path.directory)

        self._thread = threading.Thread(target=self._push, name="replica", daemon=True)
        self._thread.start()

    def push_lines(self) -> None:
        r"""Pushes the new lines of metrics, and returns when the head has them.

        Raises:
            Disconnected: If that is not possible.
        """

        assert self._lines is not None

        with self._noted():
            self._lines.push([METRICS])

        self.check()

    def flush(self, beat: Beat = lambda: None) -> None:
        r"""Pushes all that has changed, and returns when the head has it, or its disk is full.

        Arguments:
            beat: Called whenever some of it has arrived.

        Raises:
            Disconnected: If that is not possible.
        """

        moved = self.head.moved

        if self._thread is None:  # there is nothing yet
            return

        with self._change:
            self._asked += 1
            mine = self._asked
            self._change.notify_all()

            while self._done < mine and self._lost is None and self._thread.is_alive():
                self._change.wait(1.0)

                if self.head.moved != moved:
                    moved = self.head.moved
                    beat()

        self.check()

    def check(self) -> None:
        r"""Raises the reason why the attempt is over, if it is."""

        if isinstance(self._lost, LeaseGone | Disconnected):
            raise self._lost

        if self._lost is not None:
            raise Disconnected(
                f"the trial was cut off from the head: {self._lost}"
            ) from self._lost

    def stop_request(self) -> str:
        r"""Returns the request to stop: `all`, `alone`, or nothing.

        Raises:
            Disconnected: If the attempt is cut off.
        """

        self.check()

        return self._request

    def close(self, beat: Beat = lambda: None) -> Exception | None:
        r"""Pushes the rest, ends the attempt, and removes the directory. Safe to repeat.

        Returns:
            Why the head does not have all of it, if so.
        """

        error: Exception | None = None

        if self._over.is_set():
            return None

        try:
            self.flush(beat)
            error = self._failure

            if self._opened:
                self.connection("close")
        except Exception as e:
            error = e

        with self._change:
            self._over.set()
            self._change.notify_all()

        if self._thread is not None:
            self._thread.join(timeout=5)

        self.private.close()

        return error

    def _send_stacks(self, run_id: str, attempt: int, directory: Path) -> None:
        for file in (directory / STACKS, *directory.glob(f"*_{run_id}/{STACKS}")):
            with suppress(OSError):
                if text := file.read_text(errors="replace"):
                    self.connection.ask("keep_stacks", run_id, attempt, text)

    def _set_directory(self, directory: Path) -> None:
        self._lines, self._files = (Replica(directory, self.head) for _ in range(2))

    def _fetch(self, directory: Path, sizes: dict[str, int], beat: Beat) -> None:
        r"""Fetches the files of a run; the previous checkpoint only if the newest is damaged."""

        directory.mkdir()
        self._set_directory(directory)
        assert self._files is not None

        def get(name: str) -> None:
            read = lambda offset, size: self.connection("read", name, offset, size)  # noqa: E731
            fetch(directory / name, sizes[name], read, beat)

        for name in ("config.json", "run.json", METRICS, CHECKPOINT):
            if name in sizes:
                get(name)
                self._files.know([name])

        if METRICS in sizes:
            self.head.know(METRICS, (directory / METRICS).read_bytes())

        damaged = CHECKPOINT in sizes and not _is_whole(directory / CHECKPOINT)

        if PREVIOUS in sizes and (damaged or CHECKPOINT not in sizes):
            get(PREVIOUS)

        if damaged:  # it must not become the previous one of the next
            self.connection("remove", CHECKPOINT)

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
        while self._lost is None:
            with self._change:
                if self._asked == self._done and not self._over.is_set():
                    self._change.wait(PASS)

                if self._over.is_set():
                    return

                asked = self._asked

            self._failure = None

            with self._noted():
                self._push_files(flush=asked != self._done)

            with self._change:
                self._done = asked
                self._change.notify_all()

    def _push_files(self, flush: bool) -> None:
        r"""Pushes what has changed; a checkpoint only when it is due, or to flush."""

        assert self._files is not None
        directory = self._files.directory
        names = run_files(directory)

        if not flush and time.monotonic() < self._next:
            names = [name for name in names if name != CHECKPOINT]

        self._files.push(names)

        if CHECKPOINT in self.head.uploads:
            self._stretch(*self.head.uploads.pop(CHECKPOINT))

        if flush and "state.pth" in names and not (directory / PREVIOUS).exists():
            self.head.remove(PREVIOUS)  # a finished run has none

    def _stretch(self, size: int, took: float) -> None:
        r"""Stretches the time between two pushes of a checkpoint, if one takes long.

        Training does not wait for it, and it may take half of the network's time.
        """

        between = took / SHARE
        self._next = time.monotonic() + between - took

        if between > CHECKPOINT_SECONDS:
            self.notes["link"] = (
                f"{os.uname().nodename} sends files to the head at {size / took / 1e6:.3g} MB/s: "
                f"a checkpoint of {size / 1e6:.3g} MB takes {took:.0f} s, so that there is one "
                f"every {between / 60:.0f} min, and at each rung: a lost node loses as much."
            )


def data_of(server: dict[str, str], data: Path, expected: str, beat: Beat) -> tuple[Path, Any]:
    r"""Returns the data of a sweep on this node, see :func:`sda_ray.storage.scratch.find_data`."""

    connection = Connection(server, "", 0)

    def sizes() -> Any:
        return connection.ask("data_sizes")

    def read(name: str, offset: int, size: int) -> Any:
        return connection.ask("read_data", name, offset, size)

    return find_data(data, expected, sizes, read, beat)


def shares_files(server: dict[str, str]) -> bool:
    r"""Tells whether this node has the very directory of the sweep, and may write there.

    Arguments:
        server: The address that :func:`sda_ray.storage.server.serve_files` yields.
    """

    file = Path(server["probe"])

    try:
        return file.read_text() == server["nonce"] and os.access(file.parent, os.W_OK)
    except OSError:
        return False


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_checkpoint(checkpoint)
    except ValueError:
        return False

    return True


def _group(data: bytes) -> str:
    return "pulse" if len(data) < SMALL else "files"
