r"""Replicas of run directories, elsewhere, from which a run can be resumed at any moment.

A file is pushed after those that it refers to: lines of metrics before the checkpoint that is
beyond them, weights before the record that says `finished`. So whenever a writer dies, the files of
the replica go together.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from ..runs import COPIED, LOCAL
from ..training import STACKS

CHUNK = 5 * 2**20  # bytes that are sent at once; no part of an upload to S3 may have fewer
LINES = (".jsonl", ".journal")  # files that grow by lines: only whole lines are pushed

Signature = tuple[int, int, int]


class Target(Protocol):
    r"""The place of a replica: on the head node, or in a bucket."""

    def put(self, name: str, file: BinaryIO, size: int) -> None:
        r"""Replaces a file, whole or not at all, by the first bytes of an open one."""

    def remove(self, name: str) -> None:
        r"""Removes a file."""


class Replica:
    r"""A replica of a directory."""

    def __init__(self, directory: Path, target: Target) -> None:
        self.directory, self.target = directory, target
        self.pushed: dict[str, Signature] = {}  # files as they were when they were pushed
        self._lock = threading.Lock()

    def push(self, names: Sequence[str], sizes: Mapping[str, int] | None = None) -> None:
        r"""Pushes the files that have changed, in this order, then removes those that were deleted.

        The last file is opened first, so that no file is newer than those pushed before it.

        Arguments:
            names: The files. Those that do not exist are skipped.
            sizes: How many bytes to push of files that grow meanwhile.
        """

        with self._lock, ExitStack() as stack:
            paths = {name: self.directory / name for name in self.pushed}
            # If the parent is missing, the disk is away
            deleted = [
                x for x, path in paths.items() if path.parent.is_dir() and not path.exists()
            ]
            files: list[tuple[str, BinaryIO]] = []

            for name in reversed(names):
                with suppress(FileNotFoundError):
                    file = stack.enter_context(open(self.directory / name, "rb"))
                    files.insert(0, (name, file))

            for name, stream in files:
                self._push(name, stream, (sizes or {}).get(name))

            for name in deleted:
                self.target.remove(name)
                del self.pushed[name]

    def _push(self, name: str, file: BinaryIO, limit: int | None) -> None:
        signature = _signature(os.fstat(file.fileno()), limit)

        if self.pushed.get(name) == signature:
            return

        size = signature[1]

        if name.endswith(LINES):
            size = file.read(size).rfind(b"\n") + 1
            file.seek(0)

        if size or not signature[1]:  # not before the first line is whole
            self.target.put(name, file, size)
            self.pushed[name] = signature

    def know(self, name: str) -> None:
        self.pushed[name] = _signature((self.directory / name).stat())

    def changed(self, name: str) -> bool:
        r"""Tells whether a file exists and has changed since it was pushed."""

        try:
            return self.pushed.get(name) != _signature((self.directory / name).stat())
        except OSError:
            return False


def files_of(directory: Path, names: Sequence[str]) -> list[str]:
    r"""Returns the regular files of these names that exist, and all those in directories of them.

    Files in directories are left out if they are hidden or compiled.
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


def run_files(directory: Path) -> list[str]:
    r"""Returns all files of a run that mean something on another machine, in the order of pushes."""

    present = {entry.name for entry in directory.iterdir() if entry.is_file()}
    others = sorted(x for x in present.difference(COPIED, LOCAL, [STACKS]) if not _is_private(x))
    first = [*COPIED[:2], *others, "wandb"]  # what W&B has lost is sent again, if metrics have it

    return files_of(directory, [*first, *(x for x in COPIED if x not in first)])


def chunks(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    r"""Yields the bytes of a file from `start` to `size`, in chunks, each with its offset.

    An empty file has one chunk.
    """

    file.seek(start)

    for offset in range(start, size or 1, CHUNK):
        data = file.read(min(CHUNK, size - offset))

        if len(data) < min(CHUNK, size - offset):
            raise OSError(f"a file has become shorter than {size} bytes while it was read")

        yield offset, data


def digest(file: BinaryIO, size: int | None = None) -> str:
    r"""Returns the SHA-256 of the first bytes of a file, or of all."""

    size = os.fstat(file.fileno()).st_size if size is None else size
    sha = hashlib.sha256()

    for _, data in chunks(file, 0, size):
        sha.update(data)

    return sha.hexdigest()


def _is_private(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _signature(status: os.stat_result, limit: int | None = None) -> Signature:
    size = status.st_size if limit is None else min(limit, status.st_size)

    return status.st_ino, size, status.st_mtime_ns
