r"""Requests to a running sweep: files in its directory, posted by any process, served by its driver.

A request is a file `requests/{id}.json`, its answer `requests/{id}.answer.json`, both whole or
absent. The driver deletes a request before it serves it: a request is served at most once, whatever
dies meanwhile, and one that still exists was not begun. What it changes is recorded before it is
answered, and no request, whatever its content, can harm the sweep.

A request that a driver left unserved when it died is served by the next driver, unless it asks for
a stop, which was meant for the dead driver.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import (
    STALE,
    Lease,
    LeaseLost,
    UserError,
    is_alive,
    is_local,
    last_heartbeat,
    read_holder,
    read_json,
    write_json,
)
from ..runs import RunPath, read_record, sweep_directory
from ..search import TrialRecord, count_trials
from .record import read_sweep

if TYPE_CHECKING:
    from .driver import Driver

__all__ = [
    "Answer",
    "NotRunning",
    "Request",
    "RequestServer",
    "answer",
    "ask",
    "ask_all",
    "is_driven",
    "pending",
    "post",
    "request_directory",
    "running_driver",
    "serving",
    "stop_sweep",
    "take",
    "tidy",
    "wait",
    "watch",
]

logger = logging.getLogger(__name__)

ANSWER = ".answer.json"
LOOK = 0.1  # seconds between two checks for an answer
CHECK = 1.0  # seconds between two checks of whether the driver lives
OLD = 3600.0  # seconds after which nobody waits for an answer
BATCH = 100  # finished runs in a request
PATIENCE = 120.0  # seconds for an answer; a driver that starts Ray answers meanwhile
SERVE = 0.25  # seconds between two checks for requests


class NotRunning(UserError):
    r"""Raised if no driver is running, so the caller may change the sweep itself."""


@dataclass(frozen=True)
class Request:
    r"""A request.

    Arguments:
        id: The name of its file. Ids sort by the time of posting.
        kind: What is asked for.
        content: The particulars.
        fault: Why the file is not a request, if it is none.
    """

    id: str
    kind: str = ""
    content: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Answer:
    r"""An answer: a sentence, and whether the request was served."""

    text: str
    good: bool = True


# Files


def request_directory(sweep: Path) -> Path:
    r"""Returns the directory of requests in the directory of a sweep."""

    return sweep / "requests"


def post(directory: Path, kind: str, **content: Any) -> str:
    r"""Posts a request and returns its id.

    Raises:
        OSError: If it cannot be written.
    """

    directory.mkdir(parents=True, exist_ok=True)
    id = f"{time.time_ns():020}-{secrets.token_hex(4)}"
    write_json(directory / f"{id}.json", {"kind": kind, "content": content})

    return id


def pending(directory: Path) -> list[Request]:
    r"""Returns the requests that wait, the oldest first."""

    try:
        names = sorted(os.listdir(directory))
    except OSError:  # no request yet, or a file system away for a while
        return []

    names = [x for x in names if x.endswith(".json") and not x.endswith(ANSWER) and x[0] != "."]

    return [_read(directory, name.removesuffix(".json")) for name in names]


def _read(directory: Path, id: str) -> Request:
    try:
        request = read_json(directory / f"{id}.json")
    except UserError as error:
        return Request(id, fault=str(error))

    if not isinstance(request, dict):
        return Request(id, fault="a request must be a JSON object.")

    kind, content = request.get("kind"), request.get("content")

    if not isinstance(kind, str) or not isinstance(content, dict):
        return Request(id, fault="a request must have a kind, a text, and a content, an object.")

    return Request(id, kind, content)


def take(directory: Path, id: str) -> bool:
    r"""Deletes a request and returns whether it existed: it is then the caller's."""

    try:
        (directory / f"{id}.json").unlink()
    except OSError:  # withdrawn, or a stranger's directory
        return False

    return True


def answer(directory: Path, id: str, text: str, good: bool = True) -> None:
    r"""Answers a request.

    Raises:
        OSError: If the answer cannot be written.
    """

    write_json(directory / f"{id}{ANSWER}", {"text": text, "good": good})


def wait(
    directory: Path, id: str, alive: Callable[[], bool], patience: float = 60.0
) -> Answer | None:
    r"""Waits for an answer, and deletes it.

    Arguments:
        directory: The directory of requests.
        id: The id of the request.
        alive: Tells whether the driver lives. Called about once a second.
        patience: The most seconds to wait.

    Returns:
        The answer, or None if the driver is dead or silent.
    """

    deadline = time.monotonic() + patience
    check = time.monotonic() + CHECK

    while (found := _collect(directory, id)) is None and time.monotonic() < deadline:
        if time.monotonic() >= check:
            if not alive():
                return _collect(directory, id)  # written just before its death

            check = time.monotonic() + CHECK

        time.sleep(LOOK)

    return found


def _collect(directory: Path, id: str) -> Answer | None:
    file = directory / f"{id}{ANSWER}"

    try:
        content = read_json(file)
    except UserError:  # not there yet
        return None

    with suppress(OSError):
        file.unlink()

    return Answer(str(content["text"]), bool(content["good"]))


def tidy(directory: Path) -> None:
    r"""Deletes answers and half-written requests that nobody waits for any more."""

    with suppress(OSError):
        for entry in list(os.scandir(directory)):
            left = entry.name.endswith(ANSWER) or entry.name.startswith(".")
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime

            if left and entry.is_file(follow_symlinks=False) and age > OLD:
                os.unlink(entry.path)


# The caller


def running_driver(directory: Path) -> dict[str, Any] | None:
    r"""Returns the driver of a sweep (`host`, `pid`, `since`), or None if none is running.

    A driver on another host is watched for a heartbeat: up to 60 s, 10 s as a rule.
    """

    file = directory / "lease.json"
    found = read_holder(file)

    return found if found is not None and is_alive(file) else None


def is_driven(directory: Path) -> bool:
    r"""Returns whether a sweep seems to have a driver, without waiting for a heartbeat."""

    file = directory / "lease.json"

    return _seems_alive(file, read_holder(file))


def _seems_alive(file: Path, found: dict[str, Any] | None) -> bool:
    if found is None or found["pid"] is None:
        return False

    return not is_local(found) or is_alive(file)


def ask(directory: Path, kind: str, **content: Any) -> str:
    r"""Posts a request to the driver of a sweep, prints its answer and returns it.

    Arguments:
        directory: The directory of the sweep.
        kind: `stop` (of `trial`, or the whole sweep), `trials`, `enqueue` (`items`), `prior`
            (`runs`) or `retry`.
        content: The particulars.

    Raises:
        NotRunning: If no driver is running. No request is left behind.
        UserError: If the driver refuses, or ends before it has answered.
    """

    file, box, name = directory / "lease.json", request_directory(directory), directory.name
    resume = f"Resume the sweep with `sda-ray sweep {name}`"
    found = read_holder(file)

    if not _seems_alive(file, found):
        raise NotRunning(f"sweep '{name}' is not running. {resume} and pass changes as options.")

    assert found is not None

    try:
        id = post(box, kind, attempt=found["attempt"], **content)
    except OSError as error:
        raise UserError(f"no request can be posted to sweep '{name}': {error}.") from error

    untouched = False

    try:
        reply = wait(box, id, watch(file, found), PATIENCE)
    finally:
        untouched = take(box, id)  # it must not be served later

    if reply is None:
        driver = f"process {found['pid']} on {found['host']}, the driver of sweep '{name}',"

        if not untouched:
            raise UserError(
                f"{driver} ended while it served the request, which may be done or not. {resume}: "
                "it prints the state of the sweep."
            )

        if read_holder(file) == found and _seems_alive(file, found):
            raise UserError(
                f"{driver} does not answer. Nothing was changed. The process may be frozen, or its "
                f"disk. If it is dead, `sda-ray sweep {name}` takes over."
            )

        raise NotRunning(
            f"{driver} ended before it served the request. Nothing was changed. {resume} and pass "
            "changes as options."
        )

    if not reply.good:
        raise UserError(reply.text)

    print(reply.text + "." * (not reply.text.endswith(".")), flush=True)

    return reply.text


def ask_all(
    directory: Path,
    trials: int | None = None,
    retry: bool = False,
    queue: Sequence[Any] = (),
    priors: Sequence[Any] = (),
) -> None:
    r"""Posts several requests to the driver of a sweep, and prints its answers, see :func:`ask`.

    Arguments:
        directory: The directory of the sweep.
        trials: A new number of trials.
        retry: Whether to retry failed runs.
        queue: Parameters to try before others.
        priors: Finished runs to bring in.
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
    r"""Returns a function that tells whether the holder of a lease seems alive, without waiting."""

    last, since = last_heartbeat(file), time.monotonic()

    def alive() -> bool:
        nonlocal last, since

        if read_holder(file) != found:
            return False

        if is_local(found):
            return is_alive(file)

        if (now := last_heartbeat(file)) != last:
            last, since = now, time.monotonic()

        return time.monotonic() - since < STALE

    return alive


def stop_sweep(runs: Path, name: str, trial: int | None = None) -> str:
    r"""Asks the driver of a sweep to stop, or to end one run.

    Raises:
        UserError: If there is no such sweep, it is not running, or the driver refuses.
    """

    read_sweep(runs, name)

    try:
        return ask(sweep_directory(runs, name), "stop", trial=trial)
    except NotRunning as error:
        raise NotRunning(f"nothing to stop: {error}") from error


# The driver


@contextmanager
def serving(driver: Driver) -> Iterator[None]:
    r"""Serves requests from a thread for as long as the block lasts, as while Ray starts.

    The block must not touch the study.
    """

    over, server = threading.Event(), RequestServer(driver)

    def serve() -> None:
        while not over.wait(SERVE):
            server()

    thread = threading.Thread(target=serve, name="requests", daemon=True)
    thread.start()

    try:
        yield
    finally:
        over.set()
        thread.join()


class RequestServer:
    r"""Serves the requests to a driver.

    Runs that the previous driver was asked to stop, and did not, are stopped.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.directory = driver.request.parent
        self.name = self.directory.name
        self.box = request_directory(self.directory)
        self.attempt = (read_holder(self.directory / "lease.json") or {}).get("attempt")
        tidy(self.box)

        for file in self.directory.glob(f"{driver.request.name}.*"):
            known = {str(record.index): record.index for record in driver.study.records()}

            if (index := known.get(file.suffix[1:])) is not None:
                driver.cancelled.add(index)

    def __call__(self) -> None:
        r"""Serves the requests posted since the last call. Never raises."""

        try:
            for request in pending(self.box):
                if take(self.box, request.id):
                    answer(self.box, request.id, *self._serve(request))

            self._record_stopped()
        except LeaseLost as error:
            self.driver.guard(error)
        except Exception as error:
            logger.warning("a request was not served: %s: %s.", type(error).__name__, error)

    def _serve(self, request: Request) -> tuple[str, bool]:
        r"""Serves a request, and returns the answer and whether it is served."""

        serve = {
            "stop": self._stop,
            "trials": self._trials,
            "enqueue": self._enqueue,
            "prior": self._prior,
            "retry": self._retry,
        }

        try:
            if request.fault:
                raise UserError(request.fault)

            if request.kind not in serve:
                raise UserError(
                    f"'{request.kind}' is no request. Accepted are {', '.join(serve)}."
                )

            if self.driver.done:
                raise UserError(f"sweep '{self.name}' has just ended: nothing changes any more.")

            text = serve[request.kind](request.content)

            if request.kind != "stop" and self.driver.stopping:
                text += f". The sweep is stopping: `sda-ray sweep {self.name}` resumes it"

            return text, True
        except (UserError, LeaseLost) as error:
            return str(error), False
        except Exception as error:  # nonsense that looks like a request
            return f"the request cannot be served: {type(error).__name__}: {error}", False

    def _stop(self, content: dict[str, Any]) -> str:
        if content.get("attempt", self.attempt) != self.attempt:
            raise UserError("the request was for a previous driver, which has ended.")

        if content.get("trial") is not None:
            return self._stop_run(content["trial"])

        self.driver.stop("`sda-ray stop` asked for it")
        live = len(self.driver.live)

        return (
            f"sweep '{self.name}' stops, with {live} run{'s' * (live != 1)} at work: each saves a "
            f"checkpoint after its step. To resume: sda-ray sweep {self.name}"
        )

    def _stop_run(self, trial: Any) -> str:
        driver, records = self.driver, self.driver.study.records()
        matches = [record for record in records if trial in (record.index, record.run_id)]

        if not matches or isinstance(trial, bool):
            raise UserError(
                f"there is no run {trial} in sweep '{self.name}', which has {len(records)} runs."
            )

        record = matches[0]
        n = record.index

        if record.state != "running" and not _promotable(driver, record):
            raise UserError(f"run {n} is {record.state} already.")

        driver.request.with_name(f"{driver.request.name}.{n}").touch()
        driver.cancelled.add(n)

        if n in driver.live.values():
            return f"run {n} stops after its step, at epoch {record.last} or later"

        return f"run {n}, paused at epoch {record.last}, is stopped"

    def _record_stopped(self) -> None:
        r"""Records the runs that were stopped, once their processes have ended."""

        driver = self.driver

        for index in sorted(driver.cancelled - driver.at_work()):
            record = next(r for r in driver.study.records() if r.index == index)

            if record.state == "pruned" and _promotable(driver, record):
                record = driver.study.revive(record)

            if record.state == "running":
                record = driver.study.tell(record, "stopped")
                _write_status(Path(driver.spec["runs"]), record)
                driver.notify("stopped", record)

            driver.cancelled.discard(index)
            driver.request.with_name(f"{driver.request.name}.{index}").unlink(missing_ok=True)

    def _trials(self, content: dict[str, Any]) -> str:
        driver, target = self.driver, content.get("trials")

        if type(target) is not int or target < 1:
            raise UserError(f"trials is {target!r}, but must be an integer from 1.")

        driver.retarget(target)
        driver.rules = replace(driver.rules, target=target)
        driver.exhausted = False
        more = target - count_trials(driver.study.records())

        if more > 0:
            return f"sweep '{self.name}' continues to {target} trials: {more} more"

        return (
            f"sweep '{self.name}' is to have {target} trials and has {target - more}: no new ones "
            "are started"
        )

    def _enqueue(self, content: dict[str, Any]) -> str:
        from ..search import queue_warning

        driver, items = self.driver, content.get("items")

        if not isinstance(items, list) or not items:
            raise UserError("items must be a list of at least one configuration.")

        for item in items:
            if not isinstance(item, dict) or not item:
                raise UserError(f"{item!r} is no configuration.")

            if (drawn := driver.propose(driver.study.records(), item)) is None:
                raise UserError(
                    f"{item} has a run already, or is not in SPACE: nothing is queued."
                )

            if unknown := item.keys() - drawn[1].params.keys():
                raise UserError(f"{', '.join(unknown)} is not in SPACE: nothing is queued.")

        for item in items:
            driver.study.enqueue(item)

        driver.exhausted = False
        count = len(items)
        text = f"{count} configuration{'s' * (count > 1)} queued, to be tried next"
        warning = queue_warning(driver.study, driver.rules.target)

        return f"{text}. {warning}" if warning else text

    def _prior(self, content: dict[str, Any]) -> str:
        from .enqueue import bring_all

        runs = content.get("runs")

        if not isinstance(runs, list) or not runs:
            raise UserError("runs must be a list of at least one run.")

        return bring_all(self.driver.study, runs).rstrip(".")

    def _retry(self, content: dict[str, Any]) -> str:
        driver = self.driver
        failed = [record for record in driver.study.records() if record.state == "failed"]

        if not failed:
            return f"no run of sweep '{self.name}' has failed"

        for record in failed:
            driver.study.revive(record)

        driver.errors.clear()
        numbers = ", ".join(str(record.index) for record in failed)

        return f"retried from the last checkpoint: run{'s' * (len(failed) > 1)} {numbers}"


def _promotable(driver: Driver, record: TrialRecord) -> bool:
    return record.state == "pruned" and driver.rules.pruner == "promotion"


def _write_status(runs: Path, record: TrialRecord) -> None:
    r"""Writes to `run.json` of a run without a process that it was stopped."""

    path = RunPath.of_id(runs, record.run_id)

    if path is None or (content := read_record(path)).get("status") in (None, "stopped"):
        return

    with suppress(UserError, OSError):
        lease = Lease(path.lease, f"run {path.directory.name}", takeover=True)

        try:
            with lease.hold():
                write_json(path.record, content | {"status": "stopped"})
        finally:
            lease.release()
