r"""The code that a sweep runs: a copy of the package, kept in the record of the sweep.

`runs/sweeps/{name}/code/{hash}/sda_ray` is the package as it was when the sweep started. The
directory is named after the hash over names and contents that `sweep.json` has. Driver and trials
run from the copy, so that editing the package does not change a sweep that is running. A sweep is
resumed with its recorded code unless the user asks for the current code, which is then recorded
beside the older one.
"""

import grp
import os
import pwd
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..core import UserError, python_command, read_json, say, write_atomic, write_json
from ..runs import PACKAGE, code_of, digests, origin

NAMED = 5  # files that are named where some differ


class OtherCode(UserError):
    r"""Raised if a sweep has to be resumed with the verified code of a directory instead."""

    def __init__(self, text: str, place: Path) -> None:
        super().__init__(text)
        self.place = place


@dataclass(frozen=True)
class Code:
    r"""A recorded copy of the package, with the SHA-256 over its names and contents."""

    hash: str
    place: Path

    @property
    def package(self) -> Path:
        return self.place / "sda_ray"


def recorded_code(directory: Path) -> Code | None:
    r"""Returns the code that a sweep has recorded, not verified, or None if there is none."""

    with suppress(UserError, AttributeError):
        hash = read_json(directory / "sweep.json").get("code")

        if isinstance(hash, str) and re.fullmatch("[0-9a-f]{64}", hash):
            return Code(hash, directory / "code" / hash[:16])

    return None


def unsafe(path: Path) -> str:
    r"""Returns why others may have replaced a file or directory, or an empty string.

    It and all directories on the way must belong to the caller or to root, and nobody else may
    write to them. A sticky directory of root is accepted on the way, as the temporary one, and the
    root directory is not checked: who may write there may replace Python itself.
    """

    path = Path(os.path.abspath(path))

    for part in (*reversed(path.parents), path)[1:]:
        status = part.lstat()

        if fault := _fault(part, status):
            return fault

        if stat.S_ISLNK(status.st_mode):
            return unsafe(part.parent / os.readlink(part) / path.relative_to(part))

    return ""


def _fault(part: Path, status: os.stat_result) -> str:
    mode, shared = status.st_mode, status.st_mode & 0o022

    if status.st_uid not in (0, os.geteuid()):
        return f"{part} belongs to another user (number {status.st_uid})"

    if shared == 0o020 and _is_private(status.st_gid):
        shared = 0

    if not shared or stat.S_ISLNK(mode) or (mode & stat.S_ISVTX and not status.st_uid):
        return ""

    return f"others may write to {part} (mode {mode & 0o7777:o}; `chmod go-w` it)"


def _is_private(group: int) -> bool:
    r"""Tells whether a group is the caller's alone, as where the umask is 002."""

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False

    own = user.pw_uid != 0 and user.pw_gid == group and user.pw_name == entry.gr_name

    return own and {*entry.gr_mem} <= {user.pw_name}


def damage(code: Code) -> str:
    r"""Returns why recorded code must not be run, or an empty string.

    It must be complete and unchanged, with nothing beside it, and safe from others, see
    :func:`unsafe`. There may be bytecode, which :func:`_drop_bytecode` removes, and aside files of
    a killed writer.
    """

    try:
        if fault := unsafe(code.place):
            return fault

        files = digests(code.package)
        known = {code.package / name for name in (*files, "origin.json", "origin.patch")}

        for part in code.place.rglob("*"):
            if fault := _fault(part, status := part.lstat()):
                return fault

            if stat.S_ISLNK(status.st_mode):
                return f"{part} is a link"

            cached = part.parent.name == "__pycache__" and part.suffix == ".pyc"
            aside = part.name.startswith(".") and part.suffix == ".tmp"

            if not (stat.S_ISDIR(status.st_mode) or part in known or cached or aside):
                return f"{part} was not recorded"

        if code_of(files) == code.hash:
            return ""
    except OSError as error:
        return str(error)

    return f"{code.package} is not what was recorded: files in it are changed or damaged"


def _drop_bytecode(place: Path) -> None:
    r"""Removes bytecode, which Python would run in place of the recorded code."""

    for cache in place.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    r"""Returns the names of the files that differ between two copies of the package."""

    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def check_code(directory: Path, choice: str = "recorded") -> None:
    r"""Checks that this process runs the code that a sweep, maybe a new one, is resumed with.

    The choice is `recorded`, or `current` to resume with the code of this process.

    Raises:
        OtherCode: If the recorded code has to be run instead.
        UserError: If the recorded code cannot be run.
    """

    code, now = recorded_code(directory), digests(PACKAGE)

    if code is None or code_of(now) == code.hash:
        return

    name, damaged = directory.name, damage(code)

    if damaged and choice != "current":
        raise UserError(
            f"sweep '{name}' cannot be resumed with the code that it was started with: {damaged}. "
            f"Restore it, or resume with the code of {PACKAGE}: --code current"
        )

    files = differing({} if damaged else digests(code.package), now)
    changes = f"{len(files)} file{'s' * (len(files) > 1)} of {PACKAGE} changed since: "
    changes += ", ".join(files[:NAMED]) + ", …" * (len(files) > NAMED)

    if choice != "current":
        raise OtherCode(
            f"sweep '{name}' resumes with its recorded code. {changes} "
            f"(`sda-ray sweep {name} --code current` resumes with those)",
            code.place,
        )

    say(
        f"sweep '{name}' resumes with the code of {PACKAGE}. Its recorded code stays in "
        f"{code.place}; {changes}",
    )


def execute(place: Path, command: str, arguments: Sequence[str]) -> NoReturn:
    r"""Replaces this process by one that runs recorded code, of this or an earlier version.

    The command is `sda-ray`, or the path of a sweep script.
    """

    _drop_bytecode(place)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, python_command(command, *arguments, place=place))


def keep_code(directory: Path) -> Code:
    r"""Copies the code of this process into the record of a sweep, as a whole or not at all.

    The caller holds the lease of the sweep.
    """

    files, copies = digests(PACKAGE), directory / "code"
    code = Code(hash := code_of(files), copies / hash[:16])

    if not damage(code):
        _drop_bytecode(code.place)
        return code

    aside = Code(hash, copies / ".new.tmp")
    shutil.rmtree(aside.place, ignore_errors=True)  # of a start that was killed

    try:
        for name in files:
            (aside.package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / name, aside.package / name)

        commit, diff = origin()
        write_json(aside.package / "origin.json", commit)

        if diff is not None:
            write_atomic(aside.package / "origin.patch", diff, 0o600)

        for part in (aside.place, *aside.place.rglob("*")):
            part.chmod(part.stat().st_mode & ~0o022)  # whatever the umask

        # The package may have been edited since it was hashed
        code = Code(hash := code_of(digests(aside.package)), copies / hash[:16])
        shutil.rmtree(code.place, ignore_errors=True)  # a damaged copy
        aside.place.rename(code.place)
    except OSError as error:
        shutil.rmtree(aside.place, ignore_errors=True)
        raise UserError(f"the code cannot be kept in {copies}: {error}.") from error

    return code


@contextmanager
def running(code: Code) -> Iterator[None]:
    r"""Imports modules of the package from recorded code for as long as the block lasts."""

    before = Path(next(iter(sys.modules["sda_ray"].__path__)))
    _import_from(code.package)

    try:
        yield
    finally:
        _import_from(before)


def _import_from(package: Path) -> None:
    r"""Points the search paths of the package and its subpackages to a directory."""

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "sda_ray" and hasattr(module, "__path__"):
            module.__path__[:] = [str(package.joinpath(*name.split(".")[1:]))]
