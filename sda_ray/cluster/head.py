r"""Where a sweep runs: `runs/sweeps/{name}/head.json`, for machines that want to join it.

The driver of the sweep keeps it for as long as it runs. A Ray that belongs to the sweep has a token
of its own: it lies beside, in `token`, for its owner only.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.lease import Lease, LeaseLost

__all__ = ["announced", "find_token", "is_again", "read_head", "write_secret"]


@contextmanager
def announced(
    directory: Path, lease: Lease, address: str, token: str | None, job: str | None = None
) -> Iterator[Callable[[Mapping[str, str]], None]]:
    r"""Lets other machines find a sweep for as long as the block lasts.

    All is written under the lease: a driver that was taken over changes nothing.

    Arguments:
        directory: The directory of the sweep.
        lease: The lease of the sweep.
        address: The address of Ray, `IP:PORT`.
        token: The token of a Ray that belongs to the sweep, and ends with it. Others have the
            token that their user keeps.
        job: The Slurm job that the sweep runs in, which may start again, see :func:`is_again`.

    Yields:
        What takes the ids of the nodes where no trial starts any more, and why; for those who ask.
    """

    head, secret, restart = (directory / name for name in ("head.json", "token", "job.json"))
    content = {
        "host": socket.gethostname(),
        "ip": address.rpartition(":")[0],
        "pid": os.getpid(),
        "address": address,
        "attempt": lease.attempt,
        "code": _code(directory),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }

    with lease.hold():
        secret.unlink(missing_ok=True)

        if token is not None:
            write_secret(secret, token)

        if job is None:
            restart.unlink(missing_ok=True)
        else:
            write_json(restart, {"job": job})

        write_json(head, content)

    def tell(avoided: Mapping[str, str]) -> None:
        if content.get("avoided", {}) != avoided:
            content["avoided"] = dict(avoided)

            with suppress(LeaseLost, OSError), lease.hold():
                write_json(head, content)

    try:
        yield tell
    finally:
        with suppress(LeaseLost, OSError), lease.hold():
            head.unlink(missing_ok=True)
            secret.unlink(missing_ok=True)


def _code(directory: Path) -> str | None:
    r"""Returns the hash of the code that a sweep runs, if it is recorded."""

    with suppress(UserError, AttributeError):
        return read_json(directory / "sweep.json").get("code")

    return None


def read_head(directory: Path) -> dict[str, Any] | None:
    r"""Returns what the driver of a sweep says of where it runs, or None if nobody drives it."""

    try:
        found = read_json(directory / "head.json")
    except UserError:  # absent, or on its way
        return None

    known = isinstance(found, dict) and isinstance(found.get("address"), str)

    return found if known and type(found.get("attempt")) is int else None


def find_token(directory: Path) -> str | None:
    r"""Returns the token of a Ray that belongs to a sweep, or None if it has none of its own.

    Raises:
        UserError: If there is one that is not for this user, or not for this user alone.
    """

    file = directory / "token"

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error}. Only the user who runs the sweep can join it."
        ) from error

    with os.fdopen(descriptor) as f:
        if os.fstat(descriptor).st_mode & 0o077:
            raise UserError(
                f"{file} can be read by others than its owner, who could then run code in the "
                "sweep. Stop the sweep and carry it on: its token is another one then."
            )

        return f.read().strip() or None


def is_again(directory: Path, job: str | None) -> bool:
    r"""Tells whether a Slurm job was the last to drive a sweep: it has started again then."""

    try:
        found = read_json(directory / "job.json")
    except UserError:
        return False

    return job is not None and isinstance(found, dict) and found.get("job") == job


def write_secret(file: Path, text: str) -> None:
    r"""Writes a new file that nobody else can read at any time."""

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    with os.fdopen(descriptor, "w") as f:
        f.write(text + "\n")
