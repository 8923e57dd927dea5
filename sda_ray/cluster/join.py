r"""Where a sweep runs, and how another machine joins it for a while: `sda-ray join`.

The driver of a sweep keeps `runs/sweeps/{name}/head.json` for as long as it runs. A Ray that belongs
to the sweep has a token of its own: it lies beside, in `token`, for its owner only.

A machine that joins finds the sweep by that, adds a node to its Ray, and takes it away again without
loss: nothing new starts there, the trials on it save a checkpoint and go on elsewhere, and only then
its Ray ends.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.lease import Lease, LeaseLost
from ..core.system import LEAST, deadline
from .ray_node import DRAIN, END, Member, member, own_cpus, own_gpus, own_ip, write_secret

__all__ = ["announced", "find_token", "is_again", "join", "read_head", "stay"]

LOOK = 2.0  # seconds between two looks at whether the sweep goes on
TWICE = 1.0  # seconds within which the same wish may come twice, as `timeout` and srun send it
GONE = 6.0  # seconds without its notice after which it does not

Why = Callable[[], str]


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


def join(
    directory: Path, cpus: int | None = None, gpus: int | None = None, wait: float = 0.0
) -> None:
    r"""Adds this machine to a sweep that runs, until the sweep ends or this process is asked to.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for that, and so does the end of a Slurm job, in time.

    Arguments:
        directory: The directory of the sweep, named as the sweep is.
        cpus: The CPUs to offer, by default as many as this process may use.
        gpus: The GPUs to offer, by default those that Slurm gives, or that Ray finds.
        wait: The minutes to wait for a sweep that does not run, now or when its driver is gone.

    Raises:
        UserError: If nobody drives the sweep, or its Ray cannot be joined.
    """

    for option, value in {"cpus": cpus, "gpus": gpus}.items():
        if value is not None and value < (option == "cpus"):
            raise UserError(
                f"--{option} is {value}, but must be at least {int(option == 'cpus')}."
            )

    name = directory.name

    with _asked() as asked:
        last = 0

        while (head := _await_head(directory, last, 60 * wait, asked)) is not None:
            last = head["attempt"]
            ip = own_ip(head["ip"])

            with member(find_token(directory), head["address"], ip, cpus, gpus) as node:
                offer = own_cpus(os.environ) if cpus is None else cpus
                more = own_gpus(os.environ) if gpus is None else gpus
                print(
                    f"joined sweep '{name}', driven on {head['host']}, with {offer} CPUs"
                    f"{'' if more is None else f' and {more} GPUs'}. Ctrl-C leaves, without loss.",
                    flush=True,
                )
                why = stay(node, _watch(directory, last, asked))
                print(f"left sweep '{name}': {why}.", flush=True)

            if asked() or not wait:
                return


def stay(node: Member, over: Why) -> str:
    r"""Keeps a node until there is a reason to leave, leaves, and returns the reason.

    Arguments:
        node: The node.
        over: Returns why to leave, or nothing. A reason that begins with `the sweep` is no reason
            to wait for trials.
    """

    while node.lives() and not (why := over()):
        time.sleep(0.2)

    if not node.lives():
        return "its Ray is gone, and so is its driver, or the network between"

    if not why.startswith("the sweep"):
        print(f"Leaving, since {why}: trials here save a checkpoint first.", flush=True)
        node.leave()
        until = time.monotonic() + DRAIN + END

        while node.lives() and time.monotonic() < until:
            time.sleep(0.1)

    return why


@contextmanager
def _asked() -> Iterator[Why]:
    r"""Yields what tells why this process is asked to leave, or nothing. A second signal ends it."""

    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    heard: list[float] = []
    end = deadline(None, os.environ)

    def handle(number: int, frame: Any) -> None:
        now = time.monotonic()

        if heard and now - heard[0] > TWICE and number != signal.SIGUSR1:
            raise KeyboardInterrupt

        heard.append(now)

    def why() -> str:
        if heard:
            return "this was asked for"

        return "its time is up" if end is not None and time.monotonic() > end - LEAST else ""

    before = {n: signal.signal(n, handle) for n in every}

    try:
        yield why
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _await_head(directory: Path, last: int, wait: float, asked: Why) -> dict[str, Any] | None:
    r"""Returns where a sweep runs, other than before; None once there is no reason to wait."""

    name, until, silent = directory.name, time.monotonic() + wait, ""

    while not asked():
        if directory.is_dir():
            head = read_head(directory)

            if head is not None and head["attempt"] > last:
                _check_reach(name, head)

                if wait == 0 or _answers(head):
                    return head

                if head["address"] != silent:
                    silent = head["address"]
                    said = f"Nobody answers at {silent}, where sweep '{name}' ran last: waiting."
                    print(said, flush=True)

        if time.monotonic() >= until:
            if last:
                return None

            raise UserError(
                f"nobody drives sweep '{name}' now, so there is nothing to join. Start it with "
                f"`sda-ray sweep {name}`, or wait for it with --wait MINUTES."
            )

        time.sleep(min(LOOK, 0.1 + wait))

    return None


def _answers(head: dict[str, Any]) -> bool:
    r"""Tells whether there is still somebody where a sweep says that it runs."""

    host, _, port = head["address"].rpartition(":")

    try:
        socket.create_connection((host, int(port)), LOOK).close()
    except (OSError, ValueError):
        return False

    return True


def _check_reach(name: str, head: dict[str, Any]) -> None:
    if head["ip"].startswith("127.") and head["host"] != socket.gethostname():
        raise UserError(
            f"sweep '{name}' runs on {head['host']}, whose Ray listens on {head['ip']} alone: it "
            "found no network when it started. Stop the sweep and carry it on there, once there "
            "is one, or on a cluster with --address."
        )


def _watch(directory: Path, attempt: int, asked: Why) -> Why:
    r"""Returns what tells why to leave: if asked to, and if the sweep ends or is another's."""

    looked = seen = time.monotonic()

    def why() -> str:
        nonlocal looked, seen

        if (reason := asked()) or (now := time.monotonic()) - looked < LOOK:
            return reason

        looked, head = now, read_head(directory)

        if head is None:  # or a file system away for a while
            return "the sweep has ended, or stopped" if now - seen > GONE else ""

        seen = now

        return "" if head["attempt"] == attempt else "the sweep has another driver"

    return why
