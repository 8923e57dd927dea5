r"""A run on a node that does not see the sweep's files: trained here, kept by the file server.

The run has a private directory on this node, which begins with what the server has of it, and ends
with the attempt. A trial that is cut off from the server stops: its run resumes elsewhere.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runs.checkpoint import read_checkpoint
from ..runs.path import RunPath
from ..training.watchdog import STACKS
from .replica import Disconnected, Replica
from .scratch import Private, fetch, find_data, leftovers
from .server import UnknownAttempt

__all__ = ["Connection", "RemoteRun", "data_of", "shares_files"]

PATIENCE = 60.0  # seconds without an answer after which a trial stops
RETRY = 0.5  # seconds before a failed call is tried again
PING = 2.0  # seconds between two heartbeats, which also return stop requests

Beat = Callable[[], None]


class Connection:
    r"""Creates the link of an attempt at a run to the server of its sweep.

    Arguments:
        server: What :func:`sda_ray.storage.server.serve_files` yielded.
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
        r"""Calls a method of the server for this attempt, again and again if it is out of reach.

        Raises:
            Disconnected: If it is so for too long.
            LeaseLost: If another attempt has begun.
        """

        try:
            return self.ask(method, self.run_id, self.attempt, *args, group=group)
        except UnknownAttempt:  # it was started again
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

                found = ray.get(ref)
                self.heard = time.monotonic()

                return found
            except ray.exceptions.RayTaskError as error:  # what the server has raised
                self.heard = time.monotonic()
                raise error.cause from None
            except ray.exceptions.RayError as error:
                self._check(str(error).strip().partition("\n")[0])
                time.sleep(RETRY)

    def _check(self, why: str) -> None:
        if (silent := time.monotonic() - self.heard) > self.patience:
            raise Disconnected(f"the trial was cut off from the head for {silent:.0f} s: {why}")


class RemoteRun:
    r"""Creates the place of an attempt at a run, with what the server has of the run.

    Its `runs` is to be the directory of all runs for the attempt.

    Arguments:
        server: What :func:`sda_ray.storage.server.serve_files` yielded.
        run_id: The run.
        attempt: The number of the attempt.
        number: The number of the run in its sweep.
        patience: The seconds without the server after which the attempt is over.

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
        self.connection = Connection(server, run_id, attempt, patience)
        self.replica = Replica(self.connection)
        self.number = number
        self.wanted = ""
        self._over = threading.Event()
        self._open = False

        with leftovers() as found:
            for old in found:
                self._leave(*old)

        self.private = Private(run_id, attempt)
        self.runs = self.private.directory

    def _leave(self, run_id: str, attempt: int, directory: Path) -> None:
        for file in (directory / STACKS, *directory.glob(f"*_{run_id}/{STACKS}")):
            with suppress(OSError):
                if text := file.read_text(errors="replace"):
                    self.connection.ask("leave", run_id, attempt, text)

    def open(self, beat: Beat = lambda: None) -> None:
        r"""Takes the run's lease at the server, and fetches what going on needs.

        Arguments:
            beat: Called now and then while it takes long.

        Raises:
            LeaseLost: If a later attempt has begun.
        """

        told = self.connection("open")
        self._open = True
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        sizes = told["sizes"]

        if not told["named"]:
            return

        directory = self.runs / told["named"]
        directory.mkdir()
        newest, previous = (directory / f"checkpoint.{x}" for x in ("pth", "prev.pth"))

        for name in ("config.json", "run.json", "metrics.jsonl", newest.name):
            if name in sizes:
                self._fetch(directory / name, sizes[name], beat)
                self.replica.know(directory / name)

        damaged = newest.exists() and not _is_whole(newest)

        if previous.name in sizes and (damaged or not newest.exists()):
            self._fetch(previous, sizes[previous.name], beat)

        if damaged:  # it must not become the previous one of the next
            self.connection("remove", newest.name)

    def _fetch(self, file: Path, size: int, beat: Beat) -> None:
        fetch(file, size, lambda i, n: self.connection("read", file.name, i, n), beat)

    def watch(self, path: RunPath) -> None:
        r"""Begins to hand over what changes in the directory of the run, which is open."""

        self.connection("settle", path.directory.name)
        self.replica.start(path.directory)

    def _pulse(self) -> None:
        while not self._over.is_set() and self.replica.lost is None:
            with self.replica.noted():
                self.wanted = self.connection("ping", self.number, group="pulse")

            self._over.wait(PING)

    def wish(self) -> str:
        r"""Returns whether the run shall stop: `all` or `alone`, or nothing.

        Raises:
            Disconnected: If the server is lost.
        """

        self.replica.check()

        return self.wanted

    def close(self, beat: Beat = lambda: None) -> Exception | None:
        r"""Hands over what is left, ends the attempt, and removes the directory. Safe to repeat.

        Returns:
            Why the server has not got all of it, if it has not.
        """

        wrong: Exception | None = None

        if self._over.is_set():
            return None

        try:
            self.replica.flush(beat)
            wrong = self.replica.failure

            if self._open:
                self.connection("close")
        except Exception as error:
            wrong = error

        self._over.set()
        self.replica.stop()
        self.private.close()

        return wrong


def data_of(server: dict[str, str], data: Path, expected: str, beat: Beat) -> tuple[Path, Any]:
    r"""Returns where the data of a sweep are on this node, see :func:`sda_ray.storage.scratch.find_data`."""

    connection = Connection(server, "", 0)

    def sizes() -> Any:
        return connection.ask("data_sizes")

    def read(*what: Any) -> Any:
        return connection.ask("data_piece", *what)

    return find_data(data, expected, sizes, read, beat)


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_checkpoint(checkpoint)
    except ValueError:
        return False

    return True


def shares_files(server: dict[str, str]) -> bool:
    r"""Tells whether this node has the very directory of the sweep, and may write there.

    Arguments:
        server: What :func:`sda_ray.storage.server.serve_files` yielded.
    """

    file = Path(server["probe"])

    try:
        return file.read_text() == server["nonce"] and os.access(file.parent, os.W_OK)
    except OSError:
        return False
