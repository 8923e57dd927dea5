r"""Both sides of joining a running sweep with another machine: `sda-ray join`.

The driver of a sweep notes the address of its Ray in the sweep's lease while it runs. A Ray that
belongs to the sweep has its own token, in the file `token` beside it, readable by its owner alone.

A machine that joins reads both, adds a node to the Ray, and removes it again without loss: nothing
new starts there, its trials save a checkpoint and resume elsewhere, and only then the node ends.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..core import (
    LEAST,
    Lease,
    LeaseLost,
    UserError,
    deadline,
    on_signals,
    read_notes,
    say,
    write_atomic,
)
from .ray_node import RayNode, answers, own_ip, started

POLL = 2.0  # seconds between two looks at the lease
PROBE = 5.0  # seconds between two connections to the head of a Ray
SILENT = 60.0  # seconds without an answer from there after which a node leaves
PATIENCE = 6.0  # seconds without a driver after which the sweep counts as stopped

Reason = Callable[[], str]  # why to leave, or an empty string


@contextmanager
def announced(directory: Path, lease: Lease, address: str, token: str | None) -> Iterator[None]:
    r"""Announces the Ray of a sweep to other machines within the block.

    All is written under the lease: a driver that was taken over changes nothing. The token is None
    for a cluster that does not belong to the sweep.
    """

    file = directory / "token"

    with lease.hold():
        file.unlink(missing_ok=True)

        if token is not None:
            write_atomic(file, token.encode(), mode=0o600)

    lease.note(address=address)

    try:
        yield
    finally:
        with suppress(LeaseLost, OSError):
            lease.note(address=None)

            with lease.hold():
                file.unlink(missing_ok=True)


def read_head(directory: Path) -> dict[str, Any] | None:
    r"""Returns `address`, `host` and `attempt` of a sweep's driver, or None without one."""

    holder, notes = read_notes(directory / "lease.json")
    address = notes.get("address")

    if holder is None or holder["pid"] is None or not isinstance(address, str):
        return None

    return {"address": address, "host": holder["host"], "attempt": holder["attempt"]}


def find_token(directory: Path) -> str | None:
    r"""Returns the token of a Ray that belongs to a sweep, or None if there is none.

    Raises:
        UserError: If the token belongs to another user, or others can read it.
    """

    file = directory / "token"

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
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
                "sweep. Stop the sweep and resume it: it gets a new token."
            )

        return f.read().strip() or None


def is_requeued(directory: Path, job: str | None) -> bool:
    r"""Tells whether a Slurm job was the last to drive a sweep, as the sweep's lease notes."""

    return job is not None and read_notes(directory / "lease.json")[1].get("job") == job


def join_sweep(
    directory: Path, cpus: int | None = None, gpus: int | None = None, wait: float = 0.0
) -> None:
    r"""Adds this machine to a running sweep, until the sweep ends or this process has to leave.

    It leaves on SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGUSR1, and in time before the end of a Slurm job.

    Arguments:
        directory: The directory of the sweep, named as the sweep is.
        cpus: The CPUs to offer, by default as many as this process may use.
        gpus: The GPUs to offer, by default those that Slurm gives, or that Ray finds.
        wait: The minutes to wait for a sweep that is not running, now or once its driver has gone.

    Raises:
        UserError: If the sweep is not running, or its Ray cannot be joined.
    """

    for option, value, least in (("cpus", cpus, 1), ("gpus", gpus, 0)):
        if value is not None and value < least:
            raise UserError(f"--{option} is {value}, but must be at least {least}.")

    name = directory.name

    with _leave_requested() as requested:
        last = 0

        while (head := _await_head(directory, last, 60 * wait, requested)) is not None:
            last = head["attempt"]
            ip = own_ip(head["address"].rpartition(":")[0])

            with started(find_token(directory), head["address"], ip, cpus, gpus) as node:
                say(
                    f"joined sweep '{name}', driven on {head['host']}, with {node.cpus} CPUs"
                    f"{'' if node.gpus is None else f' and {node.gpus} GPUs'}. Ctrl-C leaves, "
                    "without loss.",
                )
                why = stay(node, _watch(directory, last, requested))
                say(f"left sweep '{name}': {why}.")

            if requested() or not wait:
                return


def stay(node: RayNode, over: Reason) -> str:
    r"""Keeps a node until there is a reason to leave, then leaves and returns the reason.

    A reason that begins with `the sweep` leaves no trials to wait for. One is that the head does not
    answer: Ray itself takes minutes to find that out if the head's machine has lost its power.
    """

    seen = looked = time.monotonic()

    while node.is_running() and not (why := over()):
        if time.monotonic() - looked > PROBE:
            answered, looked = answers(node.address), time.monotonic()
            seen = looked if answered else seen

            if looked - seen > SILENT:
                return f"the sweep's head at {node.address} does not answer"

        time.sleep(0.2)

    if not node.is_running():
        return "its Ray is gone: the driver has ended, or the network is down"

    if not why.startswith("the sweep"):
        say(f"Leaving, since {why}: trials here save a checkpoint first.")
        node.leave()

    return why


@contextmanager
def _leave_requested() -> Iterator[Reason]:
    r"""Yields a function for the reason to leave. A second signal ends the process at once."""

    received: list[int] = []
    end = deadline(None, os.environ)

    def handle(number: int) -> None:
        if received and number != signal.SIGUSR1:
            raise KeyboardInterrupt

        received.append(number)

    def why() -> str:
        if received:
            return "a signal asked for it"

        return "its Slurm job ends" if end is not None and time.monotonic() > end - LEAST else ""

    with on_signals(handle, signal.SIGUSR1):
        yield why


def _await_head(
    directory: Path, last: int, wait: float, requested: Reason
) -> dict[str, Any] | None:
    r"""Returns a new announcement of a sweep; None once there is no reason to wait for one."""

    name, until, silent = directory.name, time.monotonic() + wait, ""

    while not requested():
        head = read_head(directory)

        if head is not None and head["attempt"] > last:
            _check_reach(name, head)

            if wait == 0 or answers(head["address"]):
                return head

            if head["address"] != silent:
                silent = head["address"]
                say(f"No answer from {silent}, where sweep '{name}' ran last: waiting.")

        if time.monotonic() >= until:
            if last:
                return None

            raise UserError(
                f"sweep '{name}' is not running, so there is nothing to join. Start it with "
                f"`sda-ray sweep {name}`, or wait for it with --wait MINUTES."
            )

        time.sleep(min(POLL, 0.1 + wait))

    return None


def _check_reach(name: str, head: dict[str, Any]) -> None:
    ip = head["address"].rpartition(":")[0]

    if ip.startswith("127.") and head["host"] != socket.gethostname():
        raise UserError(
            f"sweep '{name}' runs on {head['host']}, whose Ray listens on {ip} alone: it found no "
            "network when it started. Stop the sweep and resume it once there is one, or on a "
            "cluster with --address."
        )


def _watch(directory: Path, attempt: int, requested: Reason) -> Reason:
    r"""Returns a function for the reason to leave: a request, or the end or takeover of the sweep."""

    read = seen = time.monotonic()

    def why() -> str:
        nonlocal read, seen

        if (reason := requested()) or (now := time.monotonic()) - read < POLL:
            return reason

        read, head = now, read_head(directory)

        if head is None:  # or the file system is away for a while
            return "the sweep has ended, or stopped" if now - seen > PATIENCE else ""

        seen = now

        return "" if head["attempt"] == attempt else "the sweep has another driver"

    return why
