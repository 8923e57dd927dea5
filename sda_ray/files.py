r"""Files that are whole or absent: atomic replacement, JSON, and append-only lines of JSON."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

__all__ = [
    "append_line",
    "cut_torn_line",
    "open_atomic",
    "read_json",
    "read_lines",
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
        aside.unlink(missing_ok=True)


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
        if (size := os.path.getsize(file)) > MAX_JSON:
            raise UserError(f"{file} has {size} bytes, but at most {MAX_JSON} are read.")

        return json.loads(Path(file).read_bytes())
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
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    try:
        end = os.fstat(handle).st_size

        try:
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)

    if new:
        sync_directory(Path(file).parent)


def read_lines(file: Path | str) -> list[dict[str, Any]]:
    r"""Returns the objects of a file of JSON lines; of a missing file, none.

    A last line that was cut off by a crash is ignored.

    Raises:
        UserError: If another line is damaged or is not an object, or the file is unreadable.
    """

    try:
        data = Path(file).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from e

    lines = data[: _whole(data)].splitlines()
    objects = [_parse(line) for line in lines]

    for number, obj in enumerate(objects, start=1):
        if obj is None:
            raise UserError(f"{file} is damaged: line {number} is not a JSON object.")

    return [obj for obj in objects if obj is not None]


def cut_torn_line(file: Path | str) -> bytes:
    r"""Cuts off a last line that was not written whole, and returns it (empty if there is none).

    Only the writer of the file may call this.
    """

    try:
        data = Path(file).read_bytes()
    except FileNotFoundError:
        return b""

    torn = data[_whole(data) :]

    if torn:
        with open(file, "r+b") as f:
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
