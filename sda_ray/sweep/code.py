r"""The code that a sweep runs: a copy of the package, kept in the record of the sweep.

`runs/sweeps/{name}/code/{hash}/sda_ray` is the package as it was when the sweep started. The
directory is named after the hash over names and contents that `sweep.json` has. Driver and trials
run from the copy, so that editing the package does not change a sweep that is running. A sweep is
resumed with its recorded code unless the user asks for the current code, which is then recorded
beside the older one.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..core import UserError, sync_directory
from ..runs import PACKAGE, code_of, digests, origin

__all__ = [
    "Code",
    "CodeDamaged",
    "OtherCode",
    "check_code",
    "differing",
    "execute",
    "keep_code",
    "recorded_code",
    "running",
    "verify",
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


class CodeDamaged(Exception):
    r"""Raised if recorded code must not be run. The message says why."""


class OtherCode(UserError):
    r"""Raised if a sweep has to be resumed with other code than this process runs.

    Arguments:
        text: What differs.
        place: The directory with the recorded code, verified.
    """

    def __init__(self, text: str, place: Path) -> None:
        super().__init__(text)
        self.place = place


@dataclass(frozen=True)
class Code:
    r"""A recorded copy of the package.

    Arguments:
        hash: The SHA-256 over names and contents.
        place: The directory that contains the package.
    """

    hash: str
    place: Path

    @property
    def package(self) -> Path:
        return self.place / "sda_ray"


def recorded_code(directory: Path) -> Code | None:
    r"""Returns the code that a sweep has recorded, not verified, or None if there is none."""

    try:
        code = json.loads((directory / "sweep.json").read_bytes()).get("code")
    except (OSError, ValueError, AttributeError):
        return None

    if not isinstance(code, str) or not re.fullmatch("[0-9a-f]{64}", code):
        return None

    return Code(code, directory / "code" / code[:16])


def verify(code: Code) -> dict[str, str]:
    r"""Returns the digests of recorded code.

    Raises:
        CodeDamaged: If the copy is incomplete or changed, or another user owns a part of it.
    """

    if not code.package.is_dir():
        raise CodeDamaged(f"{code.package} is missing")

    inside = [
        Path(where, x) for where, *kinds in os.walk(code.package) for names in kinds for x in names
    ]

    for part in (code.place.parent, code.place, code.package, *inside):
        status = os.lstat(part)

        if status.st_uid not in (0, os.geteuid()):
            raise CodeDamaged(f"{part} belongs to another user (number {status.st_uid})")

        if os.path.islink(part):
            raise CodeDamaged(f"{part} is a link")

    if code_of(files := digests(code.package)) != code.hash:
        raise CodeDamaged(
            f"{code.package} is not what was recorded: files in it are changed or damaged"
        )

    return files


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

    if (code := recorded_code(directory)) is None:
        return

    name, before, now = directory.name, {}, digests(PACKAGE)

    if code_of(now) == code.hash:
        return

    try:
        before = verify(code)
    except (CodeDamaged, OSError) as error:
        if choice != "current":
            raise UserError(
                f"sweep '{name}' cannot be resumed with the code that it was started with: "
                f"{error}. Restore it, or resume with the code of {PACKAGE}: --code current"
            ) from error

    files = differing(before, now)
    count = f"{len(files)} file{'s' * (len(files) != 1)} of {PACKAGE}"
    differ = f"differ{'s' * (len(files) == 1)} from it: {_listed(files)}"

    if choice != "current":
        raise OtherCode(
            f"sweep '{name}' resumes with its recorded code. {count} {differ} "
            "(--code current resumes with those)",
            code.place,
        )

    print(
        f"sweep '{name}' resumes with the code of {PACKAGE}. Its recorded code stays in "
        f"{code.place}; {count} {differ}",
        flush=True,
    )


def _listed(files: Sequence[str]) -> str:
    return ", ".join(files[:NAMED]) + ", …" * (len(files) > NAMED)


def execute(place: Path, command: str, arguments: Sequence[str]) -> NoReturn:
    r"""Replaces this process by one that runs recorded code, of this or an earlier version.

    Arguments:
        place: The directory that contains the package.
        command: `sda-ray`, or the path of a sweep script.
        arguments: Its arguments.
    """

    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(place), command, *arguments])


def keep_code(directory: Path) -> Code:
    r"""Copies the code of this process into the record of a sweep, as a whole or not at all.

    The caller holds the lease of the sweep.
    """

    contents = {name: (PACKAGE / name).read_bytes() for name in digests(PACKAGE)}
    hash = code_of({name: hashlib.sha256(data).hexdigest() for name, data in contents.items()})
    code = Code(hash, directory / "code" / hash[:16])
    place = code.place

    with suppress(CodeDamaged, OSError):
        verify(code)
        return code

    place.parent.mkdir(exist_ok=True)

    for aside in place.parent.glob(".*.tmp"):  # of a start that was killed
        shutil.rmtree(aside, ignore_errors=True)

    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")

    try:
        for name, content in (contents | _origin()).items():
            _write(aside / "sda_ray" / name, content)

        sync_directory(aside / "sda_ray")
        shutil.rmtree(place, ignore_errors=True)  # a damaged copy
        os.rename(aside, place)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"the code cannot be kept in {place}: {error}.") from error

    sync_directory(place.parent)

    return code


def _origin() -> dict[str, bytes]:
    r"""Returns files that describe the commit of the code and its uncommitted changes."""

    described, diff = origin()
    files = {"origin.json": json.dumps(described, indent=2).encode() + b"\n"}

    return files if diff is None else {**files, "origin.patch": diff}


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o600 if file.suffix == ".patch" else 0o666

    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


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
