r"""A machine that joins a sweep for a while: `sda-ray join`.

It finds the sweep by what the driver keeps in the sweep's directory, adds a node to its Ray, and
takes it away again without loss: nothing new starts there, the trials on it save a checkpoint and
go on elsewhere, and only then its Ray ends.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.system import LEAST, deadline
from ..runs.path import sweep_directory
from ..sweep.record import read_sweep
from .head import find_token, read_head
from .ray_node import DRAIN, END, Member, member, own_cpus, own_gpus, own_ip

__all__ = ["join", "stay"]

LOOK = 2.0  # seconds between two looks at whether the sweep goes on
TWICE = 1.0  # seconds within which the same wish may come twice, as `timeout` and srun send it
GONE = 6.0  # seconds without its notice after which it does not

Why = Callable[[], str]


def join(
    runs: Path, name: str, cpus: int | None = None, gpus: int | None = None, wait: float = 0.0
) -> None:
    r"""Adds this machine to a sweep that runs, until the sweep ends or this process is asked to.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for that, and so does the end of a Slurm job, in time.

    Arguments:
        runs: The directory of all runs.
        name: The name of the sweep.
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

    directory = sweep_directory(runs, name)

    with _asked() as asked:
        last = 0

        while (head := _await_head(runs, name, last, 60 * wait, asked)) is not None:
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


def _await_head(
    runs: Path, name: str, last: int, wait: float, asked: Why
) -> dict[str, Any] | None:
    r"""Returns where a sweep runs, other than before; None once there is no reason to wait."""

    until, silent = time.monotonic() + wait, ""

    while not asked():
        if wait == 0 or sweep_directory(runs, name).is_dir():
            read_sweep(runs, name) if wait == 0 else None
            head = read_head(sweep_directory(runs, name))

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
