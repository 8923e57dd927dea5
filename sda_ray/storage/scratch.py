r"""Scratch space on a node that does not see a sweep's files, for attempts and for data.

It is in `$SDA_RAY_LOCAL`, or else the temporary directory, in `sda-ray-{uid}/`: `runs/` has a
directory for each attempt, which is removed with it; `data/` has the data sets that trials of this
user have fetched to this node, each once.
"""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..core import UserError, locked
from ..data import DataChanged, fingerprint, has_fingerprint
from .replica import CHUNK

KEPT = 3  # data sets on a node that are not in use
WAIT = 0.5  # seconds between two checks whether another trial has fetched the data

Read = Callable[[int, int], bytes]


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
        self._lock = ExitStack()

        with _directories() as parent:
            self.directory = Path(tempfile.mkdtemp(prefix=f"{run_id}.{attempt}.", dir=parent))
            self._lock.enter_context(locked(self.directory / ".lock"))

    def close(self) -> None:
        r"""Removes the directory. Safe to repeat."""

        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()


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


def fetch(file: Path, size: int, read: Read, beat: Callable[[], None] = lambda: None) -> None:
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
    data: Path, expected: str, ask: Callable[..., Any], beat: Callable[[], None] = lambda: None
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


def _fetch_all(
    place: Path, expected: str, ask: Callable[..., Any], beat: Callable[[], None]
) -> None:
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
        return has_fingerprint(data, expected)
    except (OSError, UserError):
        return False
