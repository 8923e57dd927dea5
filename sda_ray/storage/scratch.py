r"""Private places on a node that does not see a sweep's files: for attempts, and for data.

They lie in `$SDA_RAY_LOCAL`, or else the temporary directory, in `sda-ray-{uid}/`: `runs/` has a
directory for each attempt, removed with it; `data/` has the data sets that trials of this node and
user have fetched, each once.
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

from ..core.errors import UserError
from ..data.dataset import fingerprint

__all__ = ["CHUNK", "Private", "fetch", "find_data", "leftovers", "local_directory"]

CHUNK = 4 * 2**20  # bytes that go through Ray at once
KEPT = 3  # data sets on a node, those in use apart
WAIT = 0.5  # seconds, at most, between two looks whether another trial has fetched the data

Read = Callable[[int, int], tuple[bytes, str]]


def local_directory(what: str) -> Path:
    r"""Returns a directory of this node that is for this user alone.

    Raises:
        UserError: If there can be none.
    """

    parent = Path(os.environ.get("SDA_RAY_LOCAL") or tempfile.gettempdir()).absolute()
    root = parent / f"sda-ray-{os.getuid()}"

    try:
        parent.mkdir(parents=True, exist_ok=True)

        with suppress(FileExistsError):
            root.mkdir(mode=0o700)

        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise UserError(f"{root} belongs to somebody else. Set SDA_RAY_LOCAL on this node.")

        root.chmod(0o700)
        (root / what).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"files of trials cannot be kept in {root}: {error.strerror}. Set SDA_RAY_LOCAL on "
            "this node to a directory that can be written."
        ) from error

    return root / what


class Private:
    r"""Creates a directory for an attempt, locked for as long as this process has it.

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
    r"""Yields run, attempt and directory of attempts whose process has died; then removes them."""

    found, locks = [], []

    for directory in local_directory("runs").iterdir():
        run_id, _, rest = directory.name.partition(".")
        attempt = rest.partition(".")[0]

        with suppress(OSError):  # in use, or just being made
            lock = open(directory / ".lock")  # noqa: SIM115
            locks.append(lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append((run_id, int(attempt) if attempt.isdigit() else 0, directory))

    try:
        yield found
    finally:
        for _, _, directory in found:
            shutil.rmtree(directory, ignore_errors=True)

        for lock in locks:
            lock.close()


def fetch(file: Path, size: int, read: Read, beat: Callable[[], None] = lambda: None) -> None:
    r"""Fetches a file in pieces, each of which comes with its SHA-256.

    Raises:
        UserError: If there is no room for it here.
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
    r"""Finds the data of a sweep on this node; what is not there is fetched, once for all trials.

    Of data sets that were fetched and are not in use, the three that were used last are kept, or
    fewer if there is no room otherwise.

    Arguments:
        data: Where the data are on the node of the driver.
        expected: Their fingerprint.
        sizes: Returns the bytes of each file there.
        read: Returns a piece of a file, given its name, the offset and the length.
        beat: Called now and then while it takes long.

    Returns:
        The directory, and what keeps it there until it is closed, if anything.
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

            # Others may have seen the same just now. One of them fetches, and then keeps a shared
            # lock for as long as it trains: who waited for an exclusive one alone would hang.
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
                "the data on the node of the driver have changed since the sweep was started."
            )

        aside.rename(place)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _make_room(place: Path, size: int) -> None:
    r"""Removes data sets that nobody uses, the longest unused first: all but some, or for room."""

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
    r"""Tells whether a directory has the data of a fingerprint."""

    try:
        status = [(data / name).stat() for name in ("train.h5", "valid.h5")]
        times = tuple((x.st_size, x.st_mtime_ns, x.st_ino) for x in status)

        return _fingerprint(data, times) == expected
    except (OSError, UserError):
        return False


@lru_cache(maxsize=16)
def _fingerprint(data: Path, times: tuple[Any, ...]) -> str:
    return fingerprint(data)
