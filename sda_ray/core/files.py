r"""Files that are whole or absent: atomic replacement, JSON, and append-only lines of JSON."""

import contextlib
import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

__all__ = [
    "append_line",
    "cut_torn_line",
    "open_atomic",
    "open_regular",
    "read_json",
    "read_lines",
    "read_regular",
    "remove_leftovers",
    "write_atomic",
    "write_json",
]

MAX_JSON = 64 * 2**20  # bytes; files from strangers must not exhaust the memory


@contextlib.contextmanager
def open_atomic(file: Path | str, mode: int = 0o666) -> Iterator[BinaryIO]:
    r"""Opens a file for writing that takes its place, whole, when the block ends.

    The bytes are written aside in the same directory, synced and renamed: a reader, or a power
    cut, finds the old file or the new one. If the block raises, the old file stays. A killed
    writer leaves its aside file behind, see :func:`remove_leftovers`.

    Arguments:
        file: The file to create or replace.
        mode: The permissions of a new file, before the umask.

    Yields:
        A binary file to write to.
    """

    file = Path(file)
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())

        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise

    sync_directory(file.parent)


def write_atomic(file: Path | str, data: bytes, mode: int = 0o666) -> None:
    r"""Replaces a file by the given bytes, see :func:`open_atomic`."""

    with open_atomic(file, mode) as f:
        f.write(data)


def remove_leftovers(directory: Path | str) -> None:
    r"""Removes the aside files that killed writers left in a directory.

    Only the owner of the directory may call this: a writer whose aside file is removed fails.
    """

    for aside in Path(directory).glob(".*.tmp"):
        if not aside.is_dir():
            aside.unlink(missing_ok=True)


def open_regular(file: Path | str, flags: int = os.O_RDONLY) -> int:
    r"""Opens a regular file and returns its descriptor.

    A directory may come from a stranger: a link is followed only to where it lies, and pipes and
    devices, which may never end, are refused.

    Raises:
        UserError: If the file is not regular, or a link out of its directory.
        OSError: If the file cannot be opened.
    """

    target = Path(os.path.realpath(file))

    if os.path.islink(file) and not target.is_relative_to(os.path.realpath(Path(file).parent)):
        raise UserError(f"{file} is a link to {target}, out of its directory. Copy the file.")

    if os.path.lexists(target) and not stat.S_ISREG(os.lstat(target).st_mode):
        what = "Is a directory" if target.is_dir() else "it is not a regular file"
        raise UserError(f"{file} cannot be read: {what}.")

    return os.open(target, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def read_regular(file: Path | str, limit: int = MAX_JSON) -> bytes:
    r"""Returns what is in a file, see :func:`open_regular`, if it has at most `limit` bytes."""

    with os.fdopen(open_regular(file), "rb") as f:
        if (size := os.fstat(f.fileno()).st_size) > limit:
            raise UserError(f"{file} has {size} bytes, but at most {limit} are read.")

        return f.read(size)


def write_json(file: Path | str, obj: Any) -> None:
    r"""Replaces a file by an object as indented JSON, see :func:`open_atomic`.

    Non-finite numbers are written as `NaN` and `Infinity`, which Python reads back.
    """

    write_atomic(file, (json.dumps(obj, indent=2) + "\n").encode())


def read_json(file: Path | str) -> Any:
    r"""Returns the object in a JSON file.

    Raises:
        UserError: If the file is missing, unreadable, too large or not JSON.
    """

    try:
        return json.loads(read_regular(file))
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise

        raise UserError(f"{file} is damaged, or not JSON: {e}.") from e


def append_line(file: Path | str, obj: dict[str, Any]) -> None:
    r"""Appends an object as one line of JSON, in one write, and syncs it to the disk.

    If the disk is full, the file is left as it was. A file has one writer at a time, which calls
    :func:`cut_torn_line` before its first line.

    Raises:
        OSError: If the line could not be written whole.
    """

    line = json.dumps(obj).encode() + b"\n"
    new = not os.path.exists(file)
    handle = open_regular(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    try:
        end = os.fstat(handle).st_size

        try:
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

            os.fsync(handle)

            if new:
                sync_directory(Path(file).parent)
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def read_lines(file: Path | str) -> list[dict[str, Any]]:
    r"""Returns the objects of a file of JSON lines; of a missing file, none.

    A last line that was cut off by a crash is ignored.

    Raises:
        UserError: If another line is damaged or is not an object, or the file is unreadable.
    """

    try:
        data = read_regular(file)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from e

    objects = []

    for number, line in enumerate(io.BytesIO(data[: _whole(data)]), start=1):
        if (obj := _parse(line)) is None:
            raise UserError(f"{file} is damaged: line {number} is not a JSON object.")

        objects.append(obj)

    return objects


def cut_torn_line(file: Path | str) -> bytes:
    r"""Cuts off a last line that was not written whole, and returns it (empty if there is none).

    Only the writer of the file may call this.
    """

    try:
        data = read_regular(file)
    except FileNotFoundError:
        return b""

    torn = data[_whole(data) :]

    if torn:
        with os.fdopen(open_regular(file, os.O_RDWR), "r+b") as f:
            f.truncate(len(data) - len(torn))
            os.fsync(f.fileno())

    return torn


def sync_directory(directory: Path) -> None:
    r"""Makes the names in a directory survive a power cut."""

    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def _whole(data: bytes) -> int:
    r"""Returns how many leading bytes are whole lines; only the last one may be torn."""

    end = data.rfind(b"\n") + 1

    if end < len(data) or end == 0:
        return end

    # A power cut may leave a last line that has its end but not its middle.
    start = data.rfind(b"\n", 0, end - 1) + 1
    return end if _parse(data[start:end]) is not None else start


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        obj = json.loads(line)
    except (ValueError, RecursionError):
        return None

    return obj if isinstance(obj, dict) else None
