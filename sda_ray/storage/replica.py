r"""Replicas of run directories, pushed while a run is trained.

To the file server of the sweep, see :mod:`sda_ray.storage.client`: a thread of its own pushes, so
that training does not wait. At every instant the server has a run that can be resumed: lines of
metrics come before the checkpoint that is beyond them, weights before the record that says
`finished`.

To a bucket: `sums.json` is written before the files that it is about, and has the checksum of the
file that is on its way beside that of the file that is there: whatever moment a writer is killed
at, a reader tells a whole file from a damaged one, and finds files that go together.
"""

import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import UserError
from ..core.lease import LeaseGone, LeaseLost
from ..runs.path import COPIED, LOCAL
from ..runs.run import CHECKPOINT_SECONDS
from ..training.watchdog import STACKS
from .scratch import PIECE
from .server import APPENDED
from .store import PIECE as PART
from .store import Bucket, Damaged, Refused, Unreachable

__all__ = ["NOTHING", "RUN", "SUMS", "Disconnected", "Folder", "Replica", "files_of"]

logger = logging.getLogger(__name__)

PASS = 1.0  # seconds between two looks for files that have changed
SHARE = 0.5  # part of the time in which a checkpoint may be on its way
SMALL = 2**16  # bytes that do not queue with large files

METRICS = "metrics.jsonl"  # what is handed over first, and last:
LAST = ("samples.png", "state.pth", "checkpoint.pth", "checkpoint.decay.pth", "run.json")
HERE = (*LOCAL, STACKS)

SUMS = "sums.json"

RUN = COPIED
LINES = (".jsonl", ".journal")  # files that grow: as much as is whole of them
ON_ITS_WAY = 8  # checksums that are kept of a file whose uploads fail
NOTHING = ""  # the checksum of a file that is not there yet


class Disconnected(RuntimeError):
    r"""Signals that a trial was cut off from the server, or is no longer wanted there."""


class Replica:
    r"""Creates what hands over the files of a run to the server, at rest.

    Its `lost` is why the attempt is over, if it is; `failure` why files are not at the server yet;
    `notes` are for the user.

    Arguments:
        link: The link to the server.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
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
        r"""Notes that the server has a file as it is here."""

        self._sent[file.name] = _signature(file.stat())

        if file.name == METRICS:
            data = file.read_bytes()
            self._tails[METRICS] = len(data), hashlib.sha256(data)

    def start(self, directory: Path) -> None:
        r"""Begins to hand over what changes in the directory of a run."""

        self._directory = directory
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        r"""Ends that, whatever is still to be handed over."""

        with self._change:
            self._over = True
            self._change.notify_all()

        if self._thread is not None:
            self._thread.join(timeout=5)

    def tell(self) -> None:
        r"""Hands over the lines of metrics that are new, and returns when the server has them.

        Raises:
            Disconnected: If that cannot be.
        """

        with self.noted(), suppress(FileNotFoundError), open(self._directory / METRICS, "rb") as f:
            self._push(METRICS, f)

        self.check()

    def flush(self, beat: Callable[[], None] = lambda: None) -> None:
        r"""Hands over all that has changed, and returns when the server has it.

        Arguments:
            beat: Called whenever some of it has arrived.

        Raises:
            Disconnected: If that cannot be; but for a full disk, see `failure`.
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

        if isinstance(self.lost, LeaseGone | Disconnected):
            raise self.lost

        if self.lost is not None:
            raise Disconnected(f"the trial was cut off from the head: {self.lost}") from self.lost

    @contextmanager
    def noted(self) -> Iterator[None]:
        r"""Notes what goes wrong with the server instead of raising it."""

        try:
            yield
        except (Disconnected, LeaseLost, LeaseGone) as error:
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
        the server has of one is never newer than what it has of those before.
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
            self.connection("remove", "checkpoint.prev.pth")  # as a finished run has none

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

            self.connection("append", name, length, data, sha.hexdigest(), group=_group(data))
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
            self.connection("write", name, token, offset, data, whole, group=_group(data))
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


def files_of(directory: Path, names: Sequence[str]) -> list[str]:
    r"""Returns the regular files that there are of these names; of directories, all in them.

    What is hidden, or compiled, is left out.
    """

    found: list[str] = []

    for name in names:
        if (directory / name).is_dir():
            below = (p for p in sorted((directory / name).rglob("*")) if p.is_file())
            inner = [p.relative_to(directory) for p in below if not p.is_symlink()]
            found += [str(p) for p in inner if not any(map(_is_private, p.parts))]
        elif (directory / name).is_file() and not (directory / name).is_symlink():
            found.append(name)

    return found


class Folder:
    r"""Creates a directory with its copy in a bucket. One process at a time may write there.

    Arguments:
        bucket: The bucket.
        key: Where the copy is.
        directory: The directory.
        check: Called before anything is written. What it raises keeps it from that.
        attempt: The number of who writes, which `sums.json` tells.
    """

    def __init__(
        self,
        bucket: Bucket,
        key: str,
        directory: Path,
        check: Callable[[], None] = lambda: None,
        attempt: int = 0,
    ) -> None:
        self.bucket, self.key, self.directory = bucket, key, directory
        self.check, self.attempt = check, attempt
        self.by = 0  # who wrote the copy
        self.version: str | None = None  # of its checksums
        self.sums: dict[str, list[str]] | None = None
        self.seen: dict[str, tuple[int, ...]] = {}  # files as they were when they were copied
        self._lock = threading.Lock()

    def load(self, again: bool = False) -> dict[str, list[str]]:
        r"""Returns the checksums that files of the copy may have, by their names.

        Raises:
            UserError: If they cannot be made out.
        """

        if self.sums is None or again:
            found = self.bucket.peek(f"{self.key}/{SUMS}")
            data, self.version = found or (None, None)

            try:
                content: Any = json.loads(data or b'{"attempt": 0, "files": {}}')
                self.by, self.sums = int(content["attempt"]), dict(content["files"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.bucket.url}/{self.key}/{SUMS} is damaged ({error}). Restore an older "
                    "version of it, or delete it to do without the copy of this directory."
                ) from error

        return self.sums

    def changed(self, name: str) -> bool:
        r"""Tells whether a file is there and is not as it was when it was copied."""

        try:
            return self.seen.get(name) != _sign(os.stat(self.directory / name))
        except OSError:
            return False

    def copy(self, names: Sequence[str], journal: bytes | None = None) -> None:
        r"""Brings up what has changed, in the order of `names`, and takes away what is gone.

        Arguments:
            names: The files.
            journal: What to take for the content of the last of them.
        """

        with self._lock, ExitStack() as stack:
            sums = self.load()
            gone = [n for n in names if n in self.seen and not (self.directory / n).exists()]
            ready: list[tuple[str, tuple[int, ...], str, bytes | BinaryIO]] = []

            # What comes last is looked at first, lest it refer to what was not there yet
            for name in reversed(names):
                given = journal if name == names[-1] else None

                if (item := self._read(name, given, stack)) is not None:
                    ready.insert(0, (name, *item))

            if not ready and not gone:
                return

            for name in gone:
                sums.pop(name, None)
                del self.seen[name]

            for name, _, digest, _ in ready:
                *failed, there = sums.get(name) or [NOTHING]
                sums[name] = [digest, *failed[: ON_ITS_WAY - 2], there]

            self._write_sums(json.dumps({"attempt": self.attempt, "files": sums}).encode())

            for name, sign, digest, content in ready:
                self._write(name, content)
                sums[name], self.seen[name] = [digest], sign

            for name in gone:
                self.check()
                self.bucket.delete(f"{self.key}/{name}")

    def _read(self, name: str, given: bytes | None, stack: ExitStack) -> Any:
        r"""Returns signature, checksum and content of a file that has to go up, else None."""

        try:
            file = open(self.directory / name, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None

        stack.callback(file.close)
        sign = _sign(os.fstat(file.fileno()))

        if given is None and self.seen.get(name) == sign:
            return None

        content: bytes | BinaryIO = file

        if given is not None or name.endswith(LINES):
            data = file.read() if given is None else given
            content = data[: data.rfind(b"\n") + 1]
        elif sign[-1] <= PART:
            content = file.read()

        digest = _digest(content)

        if self._has(name, digest):
            self.seen[name] = sign
            return None

        return sign, digest, content

    def _has(self, name: str, digest: str) -> bool:
        r"""Tells whether the copy of a file has a checksum, and is not merely on its way."""

        known = self.load().get(name)
        first = known == [digest, NOTHING]  # a writer may have died before it was there

        return known == [digest] or (first and self.bucket.has(f"{self.key}/{name}"))

    def _write_sums(self, data: bytes) -> None:
        r"""Writes checksums in the place of those that are known, so that none come too late."""

        self.check()
        key = f"{self.key}/{SUMS}"

        try:
            self.version = self.bucket.swap(key, data, self.version)
        except Refused as error:  # by our own, if the answer was lost; else the next check tells
            self.version = (self.bucket.peek(key) or (b"", None))[1]
            raise Unreachable(f"{key} was written meanwhile") from error

    def _write(self, name: str, content: bytes | BinaryIO) -> None:
        self.check()

        if isinstance(content, bytes):
            self.bucket.write(f"{self.key}/{name}", content)
        else:
            content.seek(0)
            self.bucket.upload(f"{self.key}/{name}", content, self.check)

    def fetch(self, wanted: Callable[[str], bool], replace: bool = False) -> None:
        r"""Brings down files of the copy, and says which are damaged.

        Arguments:
            wanted: Whether to bring a file, by its name.
            replace: Whether to do so even if there is another in the directory.
        """

        order = [*(n for n in self.load() if n != "run.json"), "run.json"]

        for name in order:
            if name not in self.load() or not wanted(name) or not _is_safe(name):
                continue

            file = self.directory / name

            if not os.path.lexists(file) or (replace and self._differs(file, name)):
                self._bring(name, file)

    def _differs(self, file: Path, name: str) -> bool:
        with open(file, "rb") as stream:
            return _digest(stream) not in self.load()[name]

    def _bring(self, name: str, file: Path) -> None:
        key = f"{self.key}/{name}"

        for again in (False, True):  # a writer may just have been at it
            try:
                return self.bucket.download(key, file, self.load(again).get(name, []))
            except FileNotFoundError:
                return  # it was on its way when its writer died
            except Damaged as error:
                if again:
                    logger.warning("%s: it is left out.", error)


def _is_private(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _sign(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _digest(content: bytes | BinaryIO) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()

    digest = hashlib.sha256()

    while data := content.read(PART):
        digest.update(data)

    return digest.hexdigest()


def _is_safe(name: str) -> bool:
    r"""Tells whether a name leads nowhere but into the directory."""

    return not name.startswith("/") and ".." not in name.split("/")
