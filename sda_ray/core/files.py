r"""Files that are whole or absent: atomic replacement, JSON, lines of JSON, and locks."""

import contextlib
import errno
import fcntl
import io
import json
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError, did_you_mean

# Bytes; files of others must not exhaust the memory
MAX_LINES = 64 * 2**20
MAX_JSON = 4 * 2**20


@contextlib.contextmanager
def open_atomic(file: Path | str, mode: int = 0o666) -> Iterator[BinaryIO]:
    r"""Opens a file for writing that takes its place, whole, when the block ends.

    The bytes are written aside in the same directory, synced and renamed: a reader, or a power
    cut, finds the old file or the new one. If the block raises, the old file stays. A killed
    writer leaves its aside file behind, see :func:`remove_leftovers`. The umask limits `mode`.
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
    r"""Removes the aside files that killed writers left in a directory, which the caller owns."""

    for aside in Path(directory).glob(".*.tmp"):
        if not aside.is_dir():
            aside.unlink(missing_ok=True)


def open_regular(file: Path | str, flags: int = os.O_RDONLY) -> int:
    r"""Opens a regular file and returns its descriptor.

    Run directories may come from others: links out of the directory are refused by a UserError,
    and so are pipes and devices, which may never end.
    """

    target = Path(os.path.realpath(file))

    if os.path.islink(file) and not target.is_relative_to(os.path.realpath(Path(file).parent)):
        raise UserError(f"{file} is a link to {target}, out of its directory. Copy the file.")

    if os.path.lexists(target) and not stat.S_ISREG(os.lstat(target).st_mode):
        what = "Is a directory" if target.is_dir() else "it is not a regular file"
        raise UserError(f"{file} cannot be read: {what}.")

    return os.open(target, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def read_regular(file: Path | str, limit: int = MAX_LINES) -> bytes:
    r"""Returns the content of a file of at most `limit` bytes, see :func:`open_regular`."""

    with os.fdopen(open_regular(file), "rb") as f:
        if (size := os.fstat(f.fileno()).st_size) > limit:
            raise UserError(f"{file} has {size} bytes, but at most {limit} are read.")

        return f.read(size)


def _read_values(file: Path | str, limit: int) -> bytes:
    r"""Returns JSON that takes a few times `limit` bytes at most once it is parsed.

    An empty list has 2 bytes in a file and 64 in memory: objects are counted, too.
    """

    data = read_regular(file, limit)

    if data.count(b",") + 8 * (data.count(b"{") + data.count(b"[")) > limit // 8:
        raise UserError(f"{file} is damaged: it has more values than any file of ours.")

    return data


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
        return json.loads(_read_values(file, MAX_JSON))
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from e
    except UserError:
        raise
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is damaged, or not JSON: {e}.") from e


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


def append(file: Path | str, data: bytes) -> None:
    r"""Appends bytes to a file, in one write, and syncs them to the disk: all of them, or none.

    A missing file is created. A file has one writer at a time, which calls :func:`cut_torn_lines`
    before its first append.

    Raises:
        OSError: If the bytes could not be written, as on a full disk. The file is as it was.
    """

    new = not os.path.lexists(file)
    handle = open_regular(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    with os.fdopen(handle, "ab", buffering=0) as f:
        end = f.seek(0, os.SEEK_END)

        try:
            if f.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

            os.fsync(handle)

            if new:
                sync_directory(Path(file).parent)
        except OSError:
            f.truncate(end)
            raise


def append_line(file: Path | str, obj: dict[str, Any]) -> None:
    r"""Appends an object as one line of JSON, see :func:`append`."""

    append(file, json.dumps(obj).encode() + b"\n")


def read_lines(file: Path | str) -> list[dict[str, Any]]:
    r"""Returns the objects in a file of JSON lines; none if the file is missing.

    Torn lines at the end, see :func:`find_torn_lines`, are left out.

    Raises:
        UserError: If another line is damaged or is not an object, or the file is unreadable.
    """

    try:
        data = _read_values(file, MAX_LINES)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from e

    end, objects = _whole(data), []
    _check_kept(file, end, data)

    for number, line in enumerate(io.BytesIO(data[:end]), start=1):
        if (obj := _parse(line)) is None:
            raise UserError(f"{file} is damaged: line {number} is not a JSON object.")

        objects.append(obj)

    return objects


def find_torn_lines(file: Path | str) -> tuple[int, bytes]:
    r"""Returns the length of a file of JSON lines up to its last whole line, and what follows.

    After a crash or a power cut, lines at the end may lack their end or their middle.
    """

    data = read_regular(file, limit=sys.maxsize)
    end = _whole(data)

    return end, data[end:]


def cut_torn_lines(file: Path | str) -> bytes:
    r"""Cuts off torn lines at the end, see :func:`find_torn_lines`, and returns them.

    Only the writer of the file may call this.
    """

    try:
        end, torn = find_torn_lines(file)
    except FileNotFoundError:
        return b""

    _check_kept(file, end, torn)

    if torn:
        with os.fdopen(open_regular(file, os.O_RDWR), "r+b") as f:
            f.truncate(end)
            os.fsync(f.fileno())

    return torn


def _check_kept(file: Path | str, end: int, torn: bytes) -> None:
    if end == 0 and torn.count(b"\n") > 1:  # another kind of file, rather than a torn one
        raise UserError(f"{file} is damaged: none of its lines is a JSON object.")


def _whole(data: bytes) -> int:
    r"""Returns the length of the bytes up to the end of the last line that is a JSON object."""

    end = len(data)

    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1

        if data[end - 1 : end] == b"\n" and _parse(data[start:end]) is not None:
            break

        end = start

    return end


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        obj = json.loads(line)
    except (ValueError, RecursionError):
        return None

    return obj if isinstance(obj, dict) else None


# Locks


@contextlib.contextmanager
def locked(file: Path | str, *, shared: bool = False, wait: bool = True) -> Iterator[BinaryIO]:
    r"""Holds an advisory lock on a file, which is created if it is missing, and yields the file.

    The lock ends with the block, or with the process. A link is not followed.

    Raises:
        BlockingIOError: If another process holds the lock and `wait` is false.
        OSError: If the file cannot be opened, or not be locked, see :func:`lock_works`.
    """

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

    with os.fdopen(os.open(file, flags, 0o644), "r+b") as f:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(f, how if wait else how | fcntl.LOCK_NB)

        yield f


@contextlib.contextmanager
def locked_at_once(file: Path, hint: str = "") -> Iterator[None]:
    r"""Holds a lock, or raises a UserError, with a hint, if it cannot be had without waiting."""

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(file, wait=False))
        except OSError as error:
            raise UserError(f"{file} cannot be locked: {error.strerror}.{hint}") from error

        yield


def lock_works(directory: Path | str) -> str | None:
    r"""Returns why file locks in a directory do not work, or None if they seem to.

    Leases rely on `flock`. Some file systems refuse it (Lustre without `-o flock`, NFS without a
    lock daemon); others grant it on each host for itself, so that two hosts may hold one lock.
    `sda-ray doctor` reports both.

    Example:
        >>> lock_works("/tmp") is None
        True
    """

    import psutil

    try:
        with tempfile.NamedTemporaryFile(prefix=".lock-", dir=directory) as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)

            with contextlib.suppress(BlockingIOError), locked(f.name, wait=False):
                return f"two processes can lock the same file in {directory}: {_REMEDY}"
    except OSError as e:
        if e.errno in NO_LOCKS:
            return f"files in {directory} cannot be locked ({e.strerror}): {_REMEDY}"

        return None  # missing or not writable: the caller's error says so

    place = Path(directory).resolve()
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda x: len(x.mountpoint))
    mount = [x for x in mounts if place.is_relative_to(x.mountpoint)][-1]
    local = LOCAL_OPTIONS.intersection(mount.opts.split(","))

    if mount.fstype in LOCAL_LOCKS or local:
        return (
            f"{directory} is on {mount.fstype} ({' '.join(sorted(local)) or 'as mounted'}), where "
            f"a lock is seen only on its own host: {_REMEDY}"
        )

    return None


# ENOLCK, ENOSYS, EOPNOTSUPP; NFS without a lock daemon also says EAGAIN
NO_LOCKS = (errno.EAGAIN, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LOCAL_LOCKS = {"fuse.sshfs", "fuse.s3fs", "fuse.goofys", "fuse.rclone"}
LOCAL_OPTIONS = {"localflock", "nolock", "local_lock=all", "local_lock=flock", "nobrl"}
_REMEDY = "mount it with working flock (Lustre: `-o flock`), or choose another place by --root."


# Runs


def default_root() -> Path:
    r"""Returns $SDA_RAY_ROOT, else the current directory, or a place in $SCRATCH if nothing of ours
    is here."""

    root, scratch, current = os.environ.get("SDA_RAY_ROOT"), os.environ.get("SCRATCH"), Path.cwd()

    if root:
        return Path(root).expanduser()

    if scratch and not (current / "runs").is_dir() and not (current / "data").is_dir():
        return Path(scratch) / "sda" / "kolmogorov"

    return current


def run_directories(runs: Path) -> Iterator[Path]:
    r"""Yields the directories of runs, `{name}_{id}`, in the order of their names."""

    for directory in sorted(runs.glob("*_" + "[a-z0-9]" * 8)):
        if directory.is_dir():
            yield directory


def find_run(runs: Path, run: str) -> Path:
    r"""Finds the directory of a run by name, id or an unambiguous prefix of a name or id.

    Raises:
        UserError: If there is no such run, or more than one.
    """

    names = {path: (path.name, *path.name.rsplit("_", 1)) for path in run_directories(runs)}
    exact = [path for path, known in names.items() if run in known]
    matches = exact or [p for p, known in names.items() if any(x.startswith(run) for x in known)]

    if len(matches) == 1:
        return matches[0]

    if matches:
        some = ", ".join(path.name for path in matches[:5])
        raise UserError(f"'{run}' could be any of {len(matches)} runs: {some}. Give its id.")

    hint = did_you_mean(run, (x for known in names.values() for x in known))
    raise UserError(f"there is no run '{run}' in {runs}, which holds {len(names)} runs.{hint}")
