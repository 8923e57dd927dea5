r"""Scratch space on a node that does not see a sweep's files, for attempts and for data.

It is in `$SDA_RAY_LOCAL`, or else the temporary directory, in `sda-ray-{uid}/`: `runs/` has a
directory for each attempt, which is removed with it; `data/` has the data sets that trials of this
user have fetched to this node, each once.
"""

import fcntl
import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core import UserError
from ..data import fingerprint

__all__ = ["CHUNK", "Private", "fetch", "find_data", "leftovers", "local_directory"]

CHUNK = 4 * 2**20  # bytes of one message through Ray
KEPT = 3  # data sets on a node that are not in use
WAIT = 0.5  # seconds, at most, between two tries to get the data that another trial fetches

Read = Callable[[int, int], tuple[bytes, str]]


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

        if root.is_symlink() or root.stat().st_uid != os.getuid():
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
    r"""A directory for an attempt, which is locked as long as this process lives.

    Arguments:
        run_id: The run.
        attempt: The number of the attempt.
    """

    def __init__(self, run_id: str, attempt: int) -> None:
        parent = local_directory("runs")
        self.directory = Path(tempfile.mkdtemp(prefix=f"{run_id}.{attempt}.", dir=parent))
        self._lock = open(self.directory / ".new", "w")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.replace(self.directory / ".new", self.directory / ".lock")

    def close(self) -> None:
        r"""Removes the directory. Safe to repeat."""

        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()


@contextmanager
def leftovers() -> Iterator[list[tuple[str, int, Path]]]:
    r"""Yields run, attempt and directory of attempts whose process died; then removes them."""

    dead, locks = [], []

    for directory in local_directory("runs").iterdir():
        run_id, _, suffix = directory.name.partition(".")
        attempt = suffix.partition(".")[0]

        with suppress(OSError):  # in use, or being created
            lock = open(directory / ".lock")  # noqa: SIM115
            locks.append(lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead.append((run_id, int(attempt) if attempt.isdigit() else 0, directory))

    try:
        yield dead
    finally:
        for _, _, directory in dead:
            shutil.rmtree(directory, ignore_errors=True)

        for lock in locks:
            lock.close()


def fetch(file: Path, size: int, read: Read, beat: Callable[[], None] = lambda: None) -> None:
    r"""Fetches a file in chunks, each of which comes with its SHA-256.

    Arguments:
        file: The file to write.
        size: The size of the file.
        read: Returns a chunk, given offset and length.
        beat: Called after each chunk.

    Raises:
        UserError: If the file does not fit on this node.
    """

    try:
        with open(file, "wb") as stream:
            while (offset := stream.tell()) < size:
                data, sha = read(offset, min(CHUNK, size - offset))

                if not data or hashlib.sha256(data).hexdigest() != sha:
                    raise RuntimeError(f"{file.name} was damaged on its way, or has changed")

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
    data: Path,
    expected: str,
    sizes: Callable[[], dict[str, int]],
    read: Callable[[str, int, int], tuple[bytes, str]],
    beat: Callable[[], None] = lambda: None,
) -> tuple[Path, Any]:
    r"""Finds the data of a sweep on this node, or fetches them, once for all trials of the node.

    Of the fetched data sets that are not in use, the three used last are kept, or fewer if the
    disk is full.

    Arguments:
        data: The directory of the data on the driver's node.
        expected: Their fingerprint.
        sizes: Returns the size of each file there.
        read: Returns a chunk of a file, given its name, offset and length.
        beat: Called now and then while that takes long.

    Returns:
        The directory, and a lock that keeps it until it is closed, if it was fetched.
    """

    if _has(data, expected):
        return data, None

    parent = local_directory("data")
    place = parent / expected
    held = open(parent / f"{expected}.lock", "a")  # noqa: SIM115

    try:
        while True:
            if _lock(held, fcntl.LOCK_SH) and _has(place, expected):
                os.utime(held.fileno())
                return place, held

            # Other trials may be here, too. The one that fetches keeps a shared lock as long as it
            # trains: waiting for an exclusive lock alone would hang.
            if not _lock(held, fcntl.LOCK_EX):
                fcntl.flock(held, fcntl.LOCK_UN)
                beat()
                time.sleep(random.uniform(0.5, 1.0) * WAIT)
            elif not _has(place, expected):
                shutil.rmtree(place, ignore_errors=True)
                _fetch_all(place, expected, sizes(), read, beat)
    except BaseException:
        held.close()
        raise


def _lock(file: Any, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _fetch_all(
    place: Path,
    expected: str,
    sizes: dict[str, int],
    read: Callable[[str, int, int], tuple[bytes, str]],
    beat: Callable[[], None],
) -> None:
    _make_room(place, sum(sizes.values()))
    aside = place.with_name(f"{place.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()

    try:
        for name, size in sizes.items():
            fetch(aside / name, size, lambda i, n, name=name: read(name, i, n), beat)  # type: ignore[misc]

        if fingerprint(aside) != expected:
            raise UserError(
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

        with suppress(OSError), open(file) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.with_suffix(".part"), ignore_errors=True)
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)


def _has(data: Path, expected: str) -> bool:
    r"""Tells whether a directory has the data with a fingerprint."""

    try:
        status = [(data / name).stat() for name in ("train.h5", "valid.h5")]
        times = tuple((x.st_size, x.st_mtime_ns, x.st_ino) for x in status)

        return _fingerprint(data, times) == expected
    except (OSError, UserError):
        return False


@lru_cache(maxsize=16)
def _fingerprint(data: Path, times: tuple[Any, ...]) -> str:
    return fingerprint(data)
