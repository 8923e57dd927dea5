r"""Requests to a running sweep: files in its directory, posted by any process, served by its driver.

A request is a file `requests/{id}.json`, its answer `requests/{id}.answer.json`, both whole or
absent. The driver deletes a request before it serves it: a request is served at most once, whatever
dies meanwhile, and one that still exists was not begun. Its changes are recorded before it is
answered, and no request, whatever its content, can harm the sweep.

A request that a driver left unserved when it died is served by the next driver, unless it asks for
a stop, which was meant for the dead driver.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..core import (
    STALE,
    LeaseLost,
    UserError,
    holder_alive,
    last_heartbeat,
    read_holder,
    read_regular,
    say,
    write_json,
)
from ..runs import RunPath, sweep_directory
from ..search import TrialRecord, count_trials
from .record import read_sweep

if TYPE_CHECKING:  # the caller needs no Optuna
    from ..search import Study
    from .driver import Driver

logger = logging.getLogger(__name__)

REQUESTS, ANSWER = "requests", ".answer.json"
LOOK = 0.2  # seconds between two checks for an answer
BATCH = 100  # finished runs in a request
PATIENCE = 120.0  # seconds for an answer; a driver that starts Ray answers once that is done
OPEN = ("running", "paused", "interrupted", "failed")  # what `run.json` says of a run to stop


class NotRunning(UserError):
    r"""Raised if no driver is running, so the caller may change the sweep itself."""


class Request(msgspec.Struct, frozen=True):
    kind: str
    content: dict[str, Any]


class Answer(msgspec.Struct, frozen=True):
    text: str
    good: bool = True


# Files


class Mailbox:
    r"""Creates a mailbox: a directory of requests and answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def post(self, kind: str, **content: Any) -> str:
        r"""Posts a request and returns its id."""

        self.directory.mkdir(parents=True, exist_ok=True)
        id = f"{time.time_ns():020}-{secrets.token_hex(4)}"
        write_json(self.directory / f"{id}.json", {"kind": kind, "content": content})

        return id

    def pending(self) -> dict[str, bytes]:
        r"""Returns the content of the requests that wait, by their ids, the oldest first."""

        requests = {}

        for file in sorted(self.directory.glob("[!.]*.json")):
            if not file.name.endswith(ANSWER):
                requests[file.stem] = b""

                with suppress(OSError, UserError):  # no regular file
                    requests[file.stem] = read_regular(file)

        return requests

    def take(self, id: str) -> bool:
        r"""Deletes a request and returns whether it existed: it is then the caller's."""

        try:
            (self.directory / f"{id}.json").unlink()
        except OSError:  # withdrawn, or a stranger's directory
            return False

        return True

    def answer(self, id: str, text: str, good: bool = True) -> None:
        write_json(self.directory / f"{id}{ANSWER}", {"text": text, "good": good})

    def wait(
        self, id: str, alive: Callable[[], bool], patience: float = PATIENCE
    ) -> Answer | None:
        r"""Waits for an answer and deletes it; returns None if the driver is dead or silent."""

        file, deadline = self.directory / f"{id}{ANSWER}", time.monotonic() + patience
        lives = True

        while lives and time.monotonic() < deadline:
            lives = alive()  # asked first: it may answer just before its death

            with suppress(FileNotFoundError):
                reply = msgspec.json.decode(read_regular(file), type=Answer)
                file.unlink()
                return reply

            time.sleep(LOOK * lives)

        return None


# The caller


def is_driven(directory: Path) -> bool:
    r"""Returns whether a sweep seems to have a driver, without waiting for a heartbeat."""

    return holder_alive(read_holder(directory / "lease.json") or {}) is not False


def watch(file: Path, holder: dict[str, Any]) -> Callable[[], bool]:
    r"""Returns a function that tells whether the holder of a lease seems alive, without waiting."""

    last, since = last_heartbeat(file), time.monotonic()

    def alive() -> bool:
        nonlocal last, since

        if read_holder(file) != holder:
            return False

        if (known := holder_alive(holder)) is not None:
            return known

        if (now := last_heartbeat(file)) != last:
            last, since = now, time.monotonic()

        return time.monotonic() - since < STALE

    return alive


def wait_for_driver(directory: Path, name: str, seconds: float) -> None:
    r"""Waits until a sweep has no driver, some seconds at most."""

    file, until = directory / "lease.json", time.monotonic() + seconds
    holder = read_holder(file)

    if holder is None or not (alive := watch(file, holder))():
        return

    say(
        f"sweep '{name}' is driven by process {holder['pid']} on {holder['host']}: waiting up to "
        f"{seconds:.0f} s for it to end."
    )

    while alive() and time.monotonic() < until:
        time.sleep(LOOK)


def ask(directory: Path, kind: str, **content: Any) -> str:
    r"""Posts a request to the driver of a sweep, prints its answer and returns it.

    Kinds are `stop` (of `trial`, or the whole sweep), `trials`, `enqueue` (`items`), `prior`
    (`runs`) and `retry`.

    Raises:
        NotRunning: If no driver is running. No request is left behind.
        UserError: If the driver refuses, or ends before it has answered.
    """

    file, name, box = directory / "lease.json", directory.name, Mailbox(directory / REQUESTS)
    resume = f"Resume the sweep with `sda-ray sweep {name}`"
    idle = NotRunning(f"sweep '{name}' is not running. {resume} and pass changes as options.")
    holder = read_holder(file)

    if holder is None or not (alive := watch(file, holder))():
        raise idle

    try:
        id = box.post(kind, attempt=holder["attempt"], **content)
    except OSError as error:
        raise UserError(f"no request can be posted to sweep '{name}': {error}.") from error

    try:
        reply = box.wait(id, alive)
    finally:
        untouched = box.take(id)  # it must not be served later

    if reply is not None:
        if not reply.good:
            raise UserError(reply.text)

        say(reply.text + "." * (not reply.text.endswith(".")))

        return reply.text

    driver = f"process {holder['pid']} on {holder['host']}, the driver of sweep '{name}',"

    if not untouched:
        raise UserError(
            f"{driver} ended while it served the request, which may be done or not. {resume}: "
            "it prints the state of the sweep."
        )

    if alive():
        raise UserError(
            f"{driver} does not answer. Nothing was changed. The process may be frozen, or its "
            f"disk. If it is dead, `sda-ray sweep {name}` takes over."
        )

    raise idle


def ask_all(
    directory: Path,
    trials: int | None = None,
    retry: bool = False,
    queue: Sequence[Any] = (),
    priors: Sequence[Any] = (),
) -> None:
    r"""Posts the requests of a command to the driver of a sweep, see :func:`ask`."""

    for i in range(0, len(priors), BATCH):
        ask(directory, "prior", runs=list(priors[i : i + BATCH]))

    if retry:
        ask(directory, "retry")

    if trials is not None:
        ask(directory, "trials", trials=trials)

    if queue:
        ask(directory, "enqueue", items=list(queue))


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


# The study of a sweep, with a driver or without


def retry_failed(study: Study) -> str:
    r"""Lets the failed runs of a sweep be adopted again, and returns a sentence about it."""

    failed = [record for record in study.records() if record.state == "failed"]

    for record in failed:
        study.start(record, record.until, record.shown)

    if not failed:
        return "no run has failed"

    numbers = ", ".join(str(record.index) for record in failed)

    return f"retried from the last checkpoint: run{'s' * (len(failed) > 1)} {numbers}"


def enqueue_all(study: Study, items: Sequence[Mapping[str, Any]], target: int) -> str:
    r"""Queues configurations, unless they are queued already, and returns a sentence about it."""

    for item in items:
        if item not in study.queue().values():
            study.enqueue(dict(item))

    text = f"{len(items)} configuration{'s' * (len(items) > 1)} queued, to be tried next"
    room, waiting = max(0, target - count_trials(study.records())), len(study.queue())

    if waiting <= room:
        return text

    return (
        f"{text}. The sweep has room for {room} more of its {target} trials and {waiting} are "
        "queued: raise --trials to try them all"
    )


# The driver


class RequestServer:
    r"""Serves the requests to a driver.

    Runs that the previous driver was asked to stop, and did not, are stopped.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.study = driver.study
        self.name = driver.request.parent.name
        self.box = Mailbox(driver.request.parent / REQUESTS)

        for record in self.study.records():
            if self._stop_file(record.index).exists():
                driver.cancelled.add(record.index)

    def _stop_file(self, index: int) -> Path:
        return self.driver.request.with_name(f"{self.driver.request.name}.{index}")

    def __call__(self) -> None:
        r"""Serves the requests posted since the last call. Never raises."""

        try:
            for id, request in self.box.pending().items():
                if self.box.take(id):
                    self.box.answer(id, *self._serve(request))

            self._record_stopped()
        except LeaseLost as error:
            self.driver.guard(error)
        except Exception as error:
            logger.warning("a request was not served: %s: %s.", type(error).__name__, error)

    def _serve(self, data: bytes) -> tuple[str, bool]:
        r"""Serves a request, and returns the answer and whether it is served."""

        serve = {
            "stop": self._stop,
            "trials": self._trials,
            "enqueue": self._enqueue,
            "prior": self._prior,
            "retry": self._retry,
        }

        try:
            request = msgspec.json.decode(data, type=Request)

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
        lease, trial = self.study.journal.lease, content.get("trial")

        if lease is not None and content.get("attempt") not in (None, lease.attempt):
            raise UserError("the request was for a previous driver, which has ended.")

        if trial is not None:
            return self._stop_run(trial)

        self.driver.stop("`sda-ray stop` asked for it")
        live = len(self.driver.live)

        return (
            f"sweep '{self.name}' stops, with {live} run{'s' * (live != 1)} at work: each saves a "
            f"checkpoint after its step. To resume: sda-ray sweep {self.name}"
        )

    def _stop_run(self, trial: Any) -> str:
        driver, records = self.driver, self.study.records()
        record = next((r for r in records if r.index == trial and trial is not True), None)

        if record is None:
            raise UserError(
                f"there is no run {trial} in sweep '{self.name}', which has {len(records)} runs."
            )

        n = record.index

        if record.state != "running" and not self._resumable(record):
            raise UserError(f"run {n} is {record.state} already.")

        for other in records:
            if n in (other.index, other.replica_of * (other.state == "running")):
                self._stop_file(other.index).touch()
                driver.cancelled.add(other.index)

        if n in driver.live.values():
            return f"run {n} stops after its step, at epoch {record.last} or later"

        return f"run {n}, paused at epoch {record.last}, is stopped"

    def _resumable(self, record: TrialRecord) -> bool:
        r"""Returns whether a closed run may be promoted, once the sweep has more trials."""

        return record.state == "pruned" and self.driver.rules.pruner == "promotion"

    def _record_stopped(self) -> None:
        r"""Records the runs that were stopped, once their processes have ended."""

        from ..search import mark_run

        driver = self.driver

        for index in sorted(driver.cancelled - driver.at_work()):
            record = next(r for r in self.study.records() if r.index == index)

            if self._resumable(record):
                record = self.study.start(record, record.until, record.shown)

            if record.state == "running":
                record = self.study.tell(record, "stopped")
                driver.notify("stopped", record)

                if path := RunPath.of_id(Path(driver.spec["runs"]), record.run_id):
                    mark_run(path, "stopped", before=OPEN)

            driver.cancelled.discard(index)
            self._stop_file(index).unlink(missing_ok=True)

    def _prior(self, content: dict[str, Any]) -> str:
        from .enqueue import bring_all

        return bring_all(self.study, content["runs"])

    def _retry(self, content: dict[str, Any]) -> str:
        self.driver.errors.clear()

        return retry_failed(self.study)

    def _trials(self, content: dict[str, Any]) -> str:
        driver, target = self.driver, content.get("trials")

        if type(target) is not int or target < 1:
            raise UserError(f"trials is {target!r}, but must be an integer from 1.")

        driver.retarget(target)
        driver.rules = replace(driver.rules, target=target)
        driver.exhausted = False
        more = target - count_trials(self.study.records())
        new = f"{more} more" if more > 0 else f"it has {target - more}, so no new ones are started"

        return f"sweep '{self.name}' continues to {target} trials: {new}"

    def _enqueue(self, content: dict[str, Any]) -> str:
        driver, items = self.driver, content["items"]

        for item in items:
            if not isinstance(item, dict) or not item:
                raise UserError(f"{item!r} is no configuration.")

            drawn = driver.propose(self.study.records(), item)

            if drawn is None or item.keys() - drawn[1].params.keys():
                raise UserError(
                    f"{item} has a run already, or is not in SPACE: nothing is queued."
                )

        driver.exhausted = False

        return enqueue_all(self.study, items, driver.rules.target)
