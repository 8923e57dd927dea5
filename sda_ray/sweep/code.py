r"""The code that a sweep runs: a copy of the package, kept in the record of the sweep.

`runs/sweeps/{name}/code/{hash}/sda_ray` is the package as it was when the sweep started. The
directory is named after the hash over names and contents that `sweep.json` has. Driver and trials
run from the copy, so that editing the package does not change a sweep that is running. A sweep is
resumed with its recorded code unless the user asks for the current code, which is then recorded
beside the older one.
"""

import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..core import UserError, read_json, say, write_atomic, write_json
from ..runs import PACKAGE, code_of, digests, origin

__all__ = [
    "Code",
    "OtherCode",
    "check_code",
    "damage",
    "differing",
    "execute",
    "keep_code",
    "recorded_code",
    "running",
]

NAMED = 5  # files that are named where some differ

# The program of a process that runs recorded code: sys.path is right before anything is imported
PROGRAM = """\
import os, runpy, sys
_, sys.path[0], command, *arguments = sys.argv
sys.argv = [command, *arguments]
if command.endswith(".py"):
    sys.path.insert(1, os.path.dirname(command))
    runpy.run_path(command, run_name="__main__")
else:
    runpy.run_module("sda_ray", run_name="__main__")
"""


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


def damage(code: Code) -> str:
    r"""Returns why recorded code must not be run, or an empty string.

    It must be complete and unchanged, and no part of it may belong to another user.
    """

    if not code.package.is_dir():
        return f"{code.package} is missing"

    try:
        for part in (code.place.parent, code.place, code.package, *code.package.rglob("*")):
            status = part.lstat()

            if status.st_uid not in (0, os.geteuid()):
                return f"{part} belongs to another user (number {status.st_uid})"

            if stat.S_ISLNK(status.st_mode):
                return f"{part} is a link"

        if code_of(digests(code.package)) == code.hash:
            return ""
    except OSError as error:
        return str(error)

    return f"{code.package} is not what was recorded: files in it are changed or damaged"


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    r"""Returns the names of the files that differ between two copies of the package."""

    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def check_code(directory: Path, choice: str = "recorded") -> None:
    r"""Checks that this process runs the code that a sweep is to be resumed with.

    Arguments:
        directory: The directory of the sweep, which may be new.
        choice: `recorded`, or `current` to resume with the code of this process.

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
            "(--code current resumes with those)",
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

    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(place), command, *arguments])


def keep_code(directory: Path) -> Code:
    r"""Copies the code of this process into the record of a sweep, as a whole or not at all.

    The caller holds the lease of the sweep.
    """

    files, copies = digests(PACKAGE), directory / "code"
    code = Code(hash := code_of(files), copies / hash[:16])

    if not damage(code):
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
