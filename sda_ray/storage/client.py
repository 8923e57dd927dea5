r"""A run on a node that does not see the sweep's files: trained here, kept by the depot.

The run has a private directory on this node, which begins with what the depot has of it, and ends
with the attempt. Whoever is cut off from the depot trains no further: its run goes on elsewhere.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runs.checkpoint import read_checkpoint
from ..runs.path import RunPath
from ..training.watchdog import STACKS
from .link import PATIENCE, Link
from .replica import Mirror
from .scratch import Private, fetch, find_data, leftovers

__all__ = ["Away", "data_of"]

PING = 2.0  # seconds between two signs of life, and two looks for the wish to stop

Beat = Callable[[], None]


class Away:
    r"""Creates the place of an attempt at a run, with what the depot has of the run.

    Its `runs` is to be the directory of all runs for the attempt.

    Arguments:
        depot: What :func:`sda_ray.storage.link.opened` yielded.
        run_id: The run.
        attempt: The number of the attempt.
        number: The number of the run in its sweep.
        patience: The seconds without the depot after which the attempt is over.

    Raises:
        Cut: If the depot is out of reach.
        UserError: If files cannot be kept on this node.
    """

    def __init__(
        self,
        depot: dict[str, str],
        run_id: str,
        attempt: int,
        number: int,
        patience: float = PATIENCE,
    ) -> None:
        self.link = Link(depot, run_id, attempt, patience)
        self.mirror = Mirror(self.link)
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
                    self.link.ask("leave", run_id, attempt, text)

    def open(self, beat: Beat = lambda: None) -> None:
        r"""Takes the run's lease at the depot, and fetches what going on needs.

        Arguments:
            beat: Called now and then while it takes long.

        Raises:
            LeaseLost: If a later attempt has begun.
        """

        told = self.link("open")
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
                self.mirror.know(directory / name)

        damaged = newest.exists() and not _is_whole(newest)

        if previous.name in sizes and (damaged or not newest.exists()):
            self._fetch(previous, sizes[previous.name], beat)

        if damaged:  # it must not become the previous one of the next
            self.link("remove", newest.name)

    def _fetch(self, file: Path, size: int, beat: Beat) -> None:
        fetch(file, size, lambda i, n: self.link("read", file.name, i, n), beat)

    def watch(self, path: RunPath) -> None:
        r"""Begins to hand over what changes in the directory of the run, which is open."""

        self.link("settle", path.directory.name)
        self.mirror.start(path.directory)

    def _pulse(self) -> None:
        while not self._over.is_set() and self.mirror.lost is None:
            with self.mirror.noted():
                self.wanted = self.link("ping", self.number, group="pulse")

            self._over.wait(PING)

    def wish(self) -> str:
        r"""Returns whether the run shall stop: `all` or `alone`, or nothing.

        Raises:
            Cut: If the depot is lost.
        """

        self.mirror.check()

        return self.wanted

    def close(self, beat: Beat = lambda: None) -> Exception | None:
        r"""Hands over what is left, ends the attempt, and removes the directory. Safe to repeat.

        Returns:
            Why the depot has not got all of it, if it has not.
        """

        wrong: Exception | None = None

        if self._over.is_set():
            return None

        try:
            self.mirror.flush(beat)
            wrong = self.mirror.failure

            if self._open:
                self.link("close")
        except Exception as error:
            wrong = error

        self._over.set()
        self.mirror.stop()
        self.private.close()

        return wrong


def data_of(depot: dict[str, str], data: Path, expected: str, beat: Beat) -> tuple[Path, Any]:
    r"""Returns where the data of a sweep are on this node, see :func:`sda_ray.storage.scratch.find_data`."""

    link = Link(depot, "", 0)

    def sizes() -> Any:
        return link.ask("data_sizes")

    def read(*what: Any) -> Any:
        return link.ask("data_piece", *what)

    return find_data(data, expected, sizes, read, beat)


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_checkpoint(checkpoint)
    except ValueError:
        return False

    return True
