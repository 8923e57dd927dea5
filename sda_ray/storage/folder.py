r"""A directory and its copy in a bucket, with checksums beside the copy.

`sums.json` is written before the files that it is about, and has the checksum of the file that is
on its way beside that of the file that is there: whatever moment a writer is killed at, a reader
tells a whole file from a damaged one, and finds files that go together.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import UserError
from ..runs.path import COPIED
from .store import PIECE, Bucket, Damaged, Refused, Unreachable

__all__ = ["NOTHING", "RUN", "SUMS", "Folder", "files_of"]

logger = logging.getLogger(__name__)

SUMS = "sums.json"

RUN = COPIED
LINES = (".jsonl", ".journal")  # files that grow: as much as is whole of them
ON_ITS_WAY = 8  # checksums that are kept of a file whose uploads fail
NOTHING = ""  # the checksum of a file that is not there yet


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
        elif sign[-1] <= PIECE:
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

    while data := content.read(PIECE):
        digest.update(data)

    return digest.hexdigest()


def _is_safe(name: str) -> bool:
    r"""Tells whether a name leads nowhere but into the directory."""

    return not name.startswith("/") and ".." not in name.split("/")
