r"""What hands a run over to the depot while it is trained elsewhere, see :mod:`sda_ray.storage.client`.

A thread of its own does so, such that training does not wait. At every instant the depot has a run
that can be gone on with: lines of metrics come before the checkpoint that is beyond them, weights
before the record that says `finished`.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..core.lease import LeaseLost
from ..core.presence import Vanished
from ..runs.path import LOCAL
from ..runs.run import CHECKPOINT_SECONDS
from ..training.watchdog import STACKS
from .link import Cut, Link
from .scratch import PIECE
from .server import APPENDED

__all__ = ["Mirror"]

PASS = 1.0  # seconds between two looks for files that have changed
SHARE = 0.5  # part of the time in which a checkpoint may be on its way
SMALL = 2**16  # bytes that do not queue with large files

METRICS = "metrics.jsonl"  # what is handed over first, and last:
LAST = ("samples.png", "state.pth", "checkpoint.pth", "checkpoint.decay.pth", "run.json")
HERE = (*LOCAL, STACKS)


class Mirror:
    r"""Creates what hands over the files of a run to the depot, at rest.

    Its `lost` is why the attempt is over, if it is; `failure` why files are not at the depot yet;
    `notes` are for the user.

    Arguments:
        link: The link to the depot.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.lost: Exception | None = None
        self.failure: Exception | None = None
        self.notes: dict[str, str] = {}  # by what they are about
        self._directory = Path()
        self._moved = 0  # bytes
        self._sent: dict[str, Any] = {}  # file -> what it was like when it was handed over
        self._tails: dict[str, tuple[int, Any]] = {}  # growing file -> length, digest
        self._next = 0.0  # when a checkpoint may be handed over again
        self._thread: threading.Thread | None = None
        self._over = False
        self._change = threading.Condition()
        self._asked = self._passed = 0
        self._lines = threading.Lock()  # of the file of metrics

    def know(self, file: Path) -> None:
        r"""Notes that the depot has a file as it is here."""

        self._sent[file.name] = _signature(file.stat())

        if file.name == METRICS:
            data = file.read_bytes()
            self._tails[METRICS] = len(data), hashlib.sha256(data)

    def start(self, directory: Path) -> None:
        r"""Begins to hand over what changes in the directory of a run."""

        self._directory = directory
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        r"""Ends that, whatever is still to be handed over."""

        with self._change:
            self._over = True
            self._change.notify_all()

        if self._thread is not None:
            self._thread.join(timeout=5)

    def tell(self) -> None:
        r"""Hands over the lines of metrics that are new, and returns when the depot has them.

        Raises:
            Cut: If that cannot be.
        """

        with self.noted(), suppress(FileNotFoundError), open(self._directory / METRICS, "rb") as f:
            self._push(METRICS, f)

        self.check()

    def flush(self, beat: Callable[[], None] = lambda: None) -> None:
        r"""Hands over all that has changed, and returns when the depot has it.

        Arguments:
            beat: Called whenever some of it has arrived.

        Raises:
            Cut: If that cannot be; but for a full disk, see `failure`.
        """

        moved = self._moved

        if self._thread is None:  # there is nothing yet
            return

        with self._change:
            self._asked += 1
            mine = self._asked
            self._change.notify_all()

            while self._passed < mine and self.lost is None and self._thread.is_alive():
                self._change.wait(1.0)

                if self._moved != moved:
                    moved = self._moved
                    beat()

        self.check()

    def check(self) -> None:
        r"""Raises why the attempt is over, if it is."""

        if isinstance(self.lost, Vanished | Cut):
            raise self.lost

        if self.lost is not None:
            raise Cut(f"the trial was cut off from the head: {self.lost}") from self.lost

    @contextmanager
    def noted(self) -> Iterator[None]:
        r"""Notes what goes wrong with the depot instead of raising it."""

        try:
            yield
        except (Cut, LeaseLost, Vanished) as error:
            self.lost = self.lost or error
        except Exception as error:  # a full disk: tried again at the next pass
            self.failure = error
            self.notes["disk"] = f"a run cannot be kept on the head, which is tried again: {error}"

    def _run(self) -> None:
        while self.lost is None:
            with self._change:
                if self._asked == self._passed and not self._over:
                    self._change.wait(PASS)

                if self._over:
                    return

                asked = self._asked

            self.failure = None

            with self.noted():
                self._pass(whole=asked != self._passed)

            with self._change:
                self._passed = asked
                self._change.notify_all()

    def _pass(self, whole: bool) -> None:
        r"""Hands over what has changed; a checkpoint only if it is time, or if `whole`.

        Files are opened before anything is handed over, those first that are handed over last: what
        the depot has of one is never newer than what it has of those before.
        """

        names = [*_names(self._directory)]
        names += [f"wandb/{name}" for name in _names(self._directory / "wandb", deep=True)]
        rest = sorted({*names} - {METRICS, *LAST, *HERE})
        order = [name for name in (METRICS, *rest, *LAST) if name in names]

        if not whole and time.monotonic() < self._next:
            order.remove("checkpoint.pth")

        with ExitStack() as stack:
            opened = []

            for name in reversed(order):
                with suppress(FileNotFoundError):
                    file = open(self._directory / name, "rb")  # noqa: SIM115
                    opened.append((name, stack.enter_context(file)))

            for name, file in reversed(opened):
                self._push(name, file)

        if whole and "state.pth" in names and "checkpoint.prev.pth" not in names:
            self.link("remove", "checkpoint.prev.pth")  # as a finished run has none

    def _push(self, name: str, file: BinaryIO) -> None:
        signature = _signature(os.fstat(file.fileno()))

        if self._sent.get(name) == signature:
            return

        if name.endswith(APPENDED):
            with self._lines:
                self._extend(name, file)
        else:
            self._replace(name, file, signature[1])

        self._sent[name] = signature

    def _extend(self, name: str, file: BinaryIO) -> None:
        length, sha = self._tails.get(name) or (0, hashlib.sha256())

        while file.seek(length) == length and (data := file.read(PIECE)):
            if name == METRICS:
                data = data[: data.rfind(b"\n") + 1]

            if not data:
                return

            self.link("append", name, length, data, sha.hexdigest(), group=_group(data))
            sha.update(data)
            length += len(data)
            self._tails[name] = length, sha
            self._moved += len(data)

    def _replace(self, name: str, file: BinaryIO, size: int) -> None:
        token, sha, start, offset = secrets.token_hex(8), hashlib.sha256(), time.monotonic(), 0

        while True:
            data = file.read(PIECE)
            sha.update(data)
            last = offset + len(data) >= size or not data
            whole = sha.hexdigest() if last else None
            self.link("write", name, token, offset, data, whole, group=_group(data))
            offset += len(data)
            self._moved += len(data)

            if last:
                break

        if name == "checkpoint.pth":
            self._measure(offset, start)

    def _measure(self, size: int, start: float) -> None:
        r"""Stretches the time between two checkpoints that are handed over, if they take long.

        The training does not wait for them: what they may take is the link, half of the time.
        """

        took = time.monotonic() - start
        between = took / SHARE
        self._next = start + between

        if between > CHECKPOINT_SECONDS:
            self.notes["link"] = (
                f"{os.uname().nodename} hands files to the head at {size / took / 1e6:.3g} MB/s: a "
                f"checkpoint of {size / 1e6:.3g} MB takes {took:.0f} s, so that there is one every "
                f"{between / 60:.0f} min, and at each rung: a node that is lost loses as much."
            )


def _names(directory: Path, deep: bool = False) -> list[str]:
    r"""Returns the files in a directory that are whole and no links."""

    found = []

    with suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            if entry.is_file(follow_symlinks=False) and not entry.name.endswith(".tmp"):
                found.append(entry.name)
            elif deep and entry.is_dir(follow_symlinks=False):
                found += [f"{entry.name}/{name}" for name in _names(Path(entry.path), True)]

    return found


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _group(data: bytes) -> str:
    return "pulse" if len(data) < SMALL else "files"
