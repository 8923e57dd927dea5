r"""Steering a sweep from another process than its driver's, on this machine or another one."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.lease import STALE, holder, is_alive, is_here, pulse
from ..runs.path import sweep_directory
from .mailbox import mailbox_of, post, take, wait
from .record import read_sweep

__all__ = ["Absent", "ask", "ask_for", "live", "stop_sweep", "watch"]

BATCH = 100  # runs that a driver is told of at a time
PATIENCE = 120.0  # seconds for an answer; a driver that starts Ray answers when that is done


class Absent(UserError):
    r"""Signals that nobody drives a sweep: whatever is wanted of it can be done right here."""


def live(directory: Path) -> dict[str, Any] | None:
    r"""Returns who drives the sweep in a directory (`host`, `pid`, `since`), or None.

    A driver on another host is watched for a sign of life: up to 60 s, 10 s as a rule.
    """

    file = directory / "lease.json"
    found = holder(file)

    return found if found is not None and is_alive(file) else None


def ask(directory: Path, kind: str, **content: Any) -> str:
    r"""Asks the driver of a sweep for something, prints its answer and returns it.

    Arguments:
        directory: The directory of the sweep.
        kind: `stop` (of `trial`, or the whole sweep), `trials`, `enqueue` (`items`), `prior`
            (`runs`) or `retry`.
        content: What goes with it.

    Raises:
        Absent: If nobody drives the sweep. Nothing is left behind then.
        UserError: If the driver refuses, or ends before it has answered.
    """

    file, box, name = directory / "lease.json", mailbox_of(directory), directory.name
    found = holder(file)

    if found is None or found["pid"] is None or (is_here(found) and not is_alive(file)):
        raise Absent(
            f"nobody is at sweep '{name}' now. `sda-ray sweep {name}` carries it on, and takes "
            "what is wanted of it as options."
        )

    try:
        id = post(box, kind, attempt=found["attempt"], **content)
    except OSError as error:
        raise UserError(f"sweep '{name}' cannot be asked: {error}.") from error

    untouched = False

    try:
        answer = wait(box, id, watch(file, found), PATIENCE)
    finally:
        untouched = take(box, id)  # nobody shall find it later

    driver = f"process {found['pid']} on {found['host']}, which drives sweep '{name}',"

    if (
        answer is None
        and untouched
        and holder(file) == found
        and (not is_here(found) or is_alive(file))
    ):
        raise UserError(
            f"{driver} gives no answer. Nothing was changed. Is it frozen, or its disk? If it is "
            f"gone for good, `sda-ray sweep {name}` takes over."
        )

    if answer is None and untouched:
        raise Absent(
            f"{driver} ended before it took the request up. Nothing was changed. "
            f"`sda-ray sweep {name}` carries the sweep on, and takes what is wanted as options."
        )

    if answer is None:
        raise UserError(
            f"{driver} ended while it was at the request: it may be done or not. "
            f"`sda-ray sweep {name}` carries the sweep on and shows how it stands."
        )

    if not answer.good:
        raise UserError(answer.text)

    print(answer.text + "." * (not answer.text.endswith(".")), flush=True)

    return answer.text


def ask_for(
    directory: Path,
    trials: int | None = None,
    retry: bool = False,
    queue: Sequence[Any] = (),
    priors: Sequence[Any] = (),
) -> None:
    r"""Asks the driver of a sweep for several things, and prints its answers, see :func:`ask`.

    Arguments:
        directory: The directory of the sweep.
        trials: Another number of trials.
        retry: Whether failed runs shall be tried again.
        queue: Parameters to be tried before others.
        priors: Runs that were brought in.
    """

    for i in range(0, len(priors), BATCH):
        ask(directory, "prior", runs=list(priors[i : i + BATCH]))

    if retry:
        ask(directory, "retry")

    if trials is not None:
        ask(directory, "trials", trials=trials)

    if queue:
        ask(directory, "enqueue", items=list(queue))


def watch(file: Path, found: dict[str, Any]) -> Callable[[], bool]:
    r"""Returns what tells whether the holder of a lease seems to live, without waiting for it."""

    last, since = pulse(file), time.monotonic()

    def alive() -> bool:
        nonlocal last, since

        if holder(file) != found:
            return False

        if is_here(found):
            return is_alive(file)

        if (now := pulse(file)) != last:
            last, since = now, time.monotonic()

        return time.monotonic() - since < STALE

    return alive


def stop_sweep(runs: Path, name: str, trial: int | None = None) -> str:
    r"""Asks the driver of a sweep to stop, or to stop one run for good.

    Raises:
        UserError: If there is no such sweep, nobody drives it, or the driver refuses.
    """

    read_sweep(runs, name)

    try:
        return ask(sweep_directory(runs, name), "stop", trial=trial)
    except Absent as error:
        what = "it stands still" if trial is None else f"run {trial} is not at work"
        raise Absent(f"nothing to stop: {what}, since {error}") from error
