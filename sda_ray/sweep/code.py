r"""The code that a sweep runs: what it was started with, kept in its record.

`runs/sweeps/{name}/code/` holds the package as it was, in a directory that is called after the hash
over names and contents, which `sweep.json` has. Driver and trials run from there, so that an edit
meanwhile changes nothing by accident. Whoever goes on does so with it, see :mod:`sda_ray.sweep.entry`;
code that is taken up later is kept beside it.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from ..core.files import sync_directory
from .entry import (
    PACKAGE,
    Refused,
    code_of,
    differing,
    digests,
    goes_on,
    point_at,
    recorded,
    redirect,
    verify,
)

__all__ = ["Code", "OtherCode", "check_code", "keep_code", "running"]

CHOICES = ("recorded", "current")


class OtherCode(UserError):
    r"""Signals that a sweep goes on with other code than this process runs.

    Arguments:
        text: What differs.
        place: Where the recorded code is, checked.
    """

    def __init__(self, text: str, place: Path) -> None:
        super().__init__(text)
        self.place = place


@dataclass(frozen=True)
class Code:
    r"""Creates the description of recorded code.

    Arguments:
        hash: The SHA-256 over names and contents.
        place: The directory that has the package.
    """

    hash: str
    place: Path

    @property
    def package(self) -> Path:
        return self.place / "sda_ray"


def check_code(directory: Path, choice: str = "recorded") -> None:
    r"""Checks that this process runs the code that a sweep shall go on with.

    Arguments:
        directory: The directory of the sweep, which may be new.
        choice: `recorded`, or `current` if other code than the recorded one is wanted.

    Raises:
        OtherCode: If the recorded code has to be run instead.
        UserError: If that cannot be.
    """

    if (found := recorded(directory)) is None:
        return

    place, code = found
    now = digests(PACKAGE)

    if code_of(now) == code:
        return

    before = {}

    try:
        before = verify(place, code)
    except (Refused, OSError) as error:
        if choice != "current":
            raise UserError(
                f"sweep '{directory.name}' cannot go on with the code that it was started with: "
                f"{error}. Restore it, or go on with the code of {PACKAGE}: --code current"
            ) from error

    if choice != "current":
        raise OtherCode(goes_on(directory.name, differing(before, now)), place)

    files = differing(before, now)
    print(
        f"sweep '{directory.name}' goes on with the code of {PACKAGE}: {len(files)} of its files "
        f"are not as recorded ({', '.join(files[:5])}{', …' * (len(files) > 5)}). What it was "
        f"started with is kept in {place}",
        flush=True,
    )


def keep_code(directory: Path) -> Code:
    r"""Keeps the code of this process in the record of a sweep, whole or not at all.

    To be called with the lease of the sweep in hand.
    """

    contents = {name: (PACKAGE / name).read_bytes() for name in digests(PACKAGE)}
    code = _hash(contents)
    place = directory / "code" / code[:16]

    with suppress(Refused, OSError):
        verify(place, code)
        return Code(code, place)

    place.parent.mkdir(exist_ok=True)

    for aside in place.parent.glob(".*.tmp"):  # of a start that was killed
        shutil.rmtree(aside, ignore_errors=True)

    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")

    try:
        for name, content in (contents | _origin()).items():
            _write(aside / "sda_ray" / name, content)

        sync_directory(aside / "sda_ray")
        shutil.rmtree(place, ignore_errors=True)  # what was refused
        os.rename(aside, place)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"the code cannot be kept in {place}: {error}.") from error

    sync_directory(place.parent)

    return Code(code, place)


def _hash(contents: dict[str, bytes]) -> str:
    from hashlib import sha256

    return code_of({name: sha256(content).hexdigest() for name, content in contents.items()})


def _origin() -> dict[str, bytes]:
    r"""Returns files on where the code is from, which the copy itself could not tell."""

    from ..runs.provenance import origin

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
    r"""Lets what is imported of the package in the block come from the recorded code."""

    before = redirect(code.place)

    try:
        yield
    finally:
        point_at(Path(before[0]))
