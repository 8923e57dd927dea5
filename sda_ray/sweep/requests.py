r"""The desk of a driver: requests from elsewhere are taken up here, and answered.

What a request changes is recorded before it is answered. No request, whatever it says, can do
harm to the sweep.

A request that was left to a driver which died is taken up by the next one, unless it asks for a
stop: that was meant for the driver that is gone.
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

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.lease import STALE, Lease, LeaseLost, is_alive, is_local, last_heartbeat, read_holder
from ..runs.path import RunPath, sweep_directory
from ..runs.record import read_record
from ..search.promotion import TrialRecord, count_trials
from .record import read_sweep

if TYPE_CHECKING:
    from .driver import Driver

__all__ = [
    "Absent",
    "Answer",
    "Desk",
    "Request",
    "answer",
    "ask",
    "ask_for",
    "attended",
    "live",
    "mailbox_of",
    "pending",
    "post",
    "stop_sweep",
    "take",
    "tidy",
    "wait",
    "watch",
]

ANSWER = ".answer.json"
LOOK = 0.1  # seconds between two looks for an answer
CHECK = 1.0  # seconds between two looks at whether there is anybody to answer
OLD = 3600.0  # seconds after which nobody waits for an answer any more


@dataclass(frozen=True)
class Request:
    r"""Creates a request.

    Arguments:
        id: Names its file. Ids sort by the time of posting.
        kind: What is asked for.
        content: The particulars.
        fault: Why the file is no request, if it is none.
    """

    id: str
    kind: str = ""
    content: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Answer:
    r"""Creates an answer: a sentence, and whether what was asked for is done."""

    text: str
    good: bool = True


def mailbox_of(sweep: Path) -> Path:
    r"""Returns the mailbox in the directory of a sweep."""

    return sweep / "requests"


def post(directory: Path, kind: str, **content: Any) -> str:
    r"""Leaves a request and returns its id.

    Raises:
        OSError: If it cannot be written.
    """

    directory.mkdir(parents=True, exist_ok=True)
    id = f"{time.time_ns():020}-{secrets.token_hex(4)}"
    write_json(directory / f"{id}.json", {"kind": kind, "content": content})

    return id


def pending(directory: Path) -> list[Request]:
    r"""Returns the requests that nobody has taken, the oldest first."""

    try:
        names = sorted(os.listdir(directory))
    except OSError:  # no request yet, or a file system away for a while
        return []

    ids = [name.removesuffix(".json") for name in names if _is_request(name)]

    return [_read(directory, id) for id in ids]


def _is_request(name: str) -> bool:
    return name.endswith(".json") and not name.endswith(ANSWER) and not name.startswith(".")


def _read(directory: Path, id: str) -> Request:
    try:
        found = read_json(directory / f"{id}.json")
    except UserError as error:
        return Request(id, fault=str(error))

    if not isinstance(found, dict):
        return Request(id, fault="a request must be a JSON object.")

    kind, content = found.get("kind"), found.get("content")

    if not isinstance(kind, str) or not isinstance(content, dict):
        return Request(id, fault="a request must have a kind, a text, and a content, an object.")

    return Request(id, kind, content)


def take(directory: Path, id: str) -> bool:
    r"""Deletes a request, and tells whether it was still there: it is then the caller's."""

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
        directory: The mailbox.
        id: The id of the request.
        alive: Tells whether there is anybody to answer. Asked about once a second.
        patience: The most seconds to wait.

    Returns:
        The answer, or None if there is none and nobody to give it, or for too long.
    """

    deadline = time.monotonic() + patience
    check = time.monotonic() + CHECK

    while (found := _collect(directory, id)) is None and time.monotonic() < deadline:
        if time.monotonic() >= check:
            if not alive():
                return _collect(directory, id)  # its last words

            check = time.monotonic() + CHECK

        time.sleep(LOOK)

    return found


def _collect(directory: Path, id: str) -> Answer | None:
    file = directory / f"{id}{ANSWER}"

    try:
        found = read_json(file)
    except UserError:  # not there yet
        return None

    with suppress(OSError):
        file.unlink()

    return Answer(str(found["text"]), bool(found["good"]))


def tidy(directory: Path) -> None:
    r"""Deletes old answers, and requests half written, that nobody waits for any more."""

    with suppress(OSError):
        for entry in list(os.scandir(directory)):
            left = entry.name.endswith(ANSWER) or entry.name.startswith(".")
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime

            if left and entry.is_file(follow_symlinks=False) and age > OLD:
                os.unlink(entry.path)


BATCH = 100  # runs that a driver is told of at a time
PATIENCE = 120.0  # seconds for an answer; a driver that starts Ray answers when that is done


class Absent(UserError):
    r"""Signals that nobody drives a sweep: whatever is wanted of it can be done right here."""


def live(directory: Path) -> dict[str, Any] | None:
    r"""Returns who drives the sweep in a directory (`host`, `pid`, `since`), or None.

    A driver on another host is watched for a sign of life: up to 60 s, 10 s as a rule.
    """

    file = directory / "lease.json"
    found = read_holder(file)

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
    found = read_holder(file)

    if found is None or found["pid"] is None or (is_local(found) and not is_alive(file)):
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
        and read_holder(file) == found
        and (not is_local(found) or is_alive(file))
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


logger = logging.getLogger(__name__)


@contextmanager
def attended(driver: Driver) -> Iterator[None]:
    r"""Answers requests while the block keeps the driver from it, as the start of Ray does.

    The block must not touch the study.
    """

    over, desk = threading.Event(), Desk(driver)

    def attend() -> None:
        while not over.wait(0.25):
            desk()

    thread = threading.Thread(target=attend, name="desk", daemon=True)
    thread.start()

    try:
        yield
    finally:
        over.set()
        thread.join()


class Desk:
    r"""Creates the desk of a driver, in the directory of its sweep.

    Single runs that the last driver was asked to stop, and has not, are stopped.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.directory = driver.request.parent
        self.name = self.directory.name
        self.box = mailbox_of(self.directory)
        self.attempt = (read_holder(self.directory / "lease.json") or {}).get("attempt")
        tidy(self.box)

        for file in self.directory.glob(f"{driver.request.name}.*"):
            known = {str(record.index): record.index for record in driver.study.records()}

            if (index := known.get(file.suffix[1:])) is not None:
                driver.unwanted.add(index)

    def __call__(self) -> None:
        r"""Takes up what was asked for since the last call. Never raises."""

        try:
            for request in pending(self.box):
                if take(self.box, request.id):
                    answer(self.box, request.id, *self._serve(request))

            self._settle()
        except LeaseLost as error:
            self.driver.guard(error)
        except Exception as error:
            logger.warning("a request was not taken up: %s: %s.", type(error).__name__, error)

    def _serve(self, request: Request) -> tuple[str, bool]:
        r"""Does what is asked for, and returns the answer and whether it is done."""

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
                raise UserError(
                    f"sweep '{self.name}' has just ended: nothing is changed any more."
                )

            return serve[request.kind](request.content) + self._later(request.kind), True
        except (UserError, LeaseLost) as error:
            return str(error), False
        except Exception as error:  # nonsense that looks like a request
            return f"the request cannot be carried out: {type(error).__name__}: {error}", False

    def _later(self, kind: str) -> str:
        if kind == "stop" or not self.driver.stopping:
            return ""

        return f". The sweep is stopping: `sda-ray sweep {self.name}` carries it on then"

    def _stop(self, content: dict[str, Any]) -> str:
        driver = self.driver

        if content.get("attempt", self.attempt) != self.attempt:
            raise UserError("that driver is gone, and this one was not asked to stop.")

        if content.get("trial") is not None:
            return self._stop_one(content["trial"])

        driver.stop("`sda-ray stop` asked for it")
        live = len(driver.live)
        what = f"{live} run{'s' * (live != 1)} at work, each saves a checkpoint after its step"

        return f"sweep '{self.name}' stops, with {what}. To carry on: sda-ray sweep {self.name}"

    def _stop_one(self, trial: Any) -> str:
        driver, records = self.driver, self.driver.study.records()
        found = [record for record in records if trial in (record.index, record.run_id)]

        if not found or isinstance(trial, bool):
            raise UserError(
                f"there is no run {trial} in sweep '{self.name}', which has {len(records)} runs."
            )

        record = found[0]
        n = record.index

        if record.state != "running" and not _promotable(driver, record):
            raise UserError(f"run {n} is {record.state} already.")

        driver.request.with_name(f"{driver.request.name}.{n}").touch()
        driver.unwanted.add(n)

        if n in driver.live.values():
            return f"run {n} stops after its step, at epoch {record.last} or later"

        return f"run {n}, which waited at epoch {record.last}, is stopped"

    def _settle(self) -> None:
        r"""Tells what was stopped, once nobody is at it any more."""

        driver = self.driver

        for index in sorted(driver.unwanted - driver.at_work()):
            record = next(r for r in driver.study.records() if r.index == index)

            if record.state == "pruned" and _promotable(driver, record):
                record = driver.study.revive(record)

            if record.state == "running":
                record = driver.study.tell(record, "stopped")
                _note(Path(driver.spec["runs"]), record)
                driver.notify("stopped", record)

            driver.unwanted.discard(index)
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
            return f"sweep '{self.name}' goes on to {target} trials: {more} more"

        return (
            f"sweep '{self.name}' is to have {target} trials and has {target - more}: no new ones "
            "are started"
        )

    def _enqueue(self, content: dict[str, Any]) -> str:
        from ..search.study import queue_warning

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
        said = f"{count} configuration{'s' * (count > 1)} queued, to be tried next"
        more = queue_warning(driver.study, driver.rules.target)

        return f"{said}. {more}" if more else said

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

        return f"tried again, from the last checkpoint: run{'s' * (len(failed) > 1)} {numbers}"


def _promotable(driver: Driver, record: TrialRecord) -> bool:
    return record.state == "pruned" and driver.rules.pruner == "promotion"


def _note(runs: Path, record: TrialRecord) -> None:
    r"""Lets `run.json` of a run that nobody is at say that it was stopped."""

    path = RunPath.of_id(runs, record.run_id)

    if path is None or (found := read_record(path)).get("status") in (None, "stopped"):
        return

    with suppress(UserError, OSError):
        lease = Lease(path.lease, f"run {path.directory.name}", takeover=True)

        try:
            with lease.hold():
                write_json(path.record, found | {"status": "stopped"})
        finally:
            lease.release()
