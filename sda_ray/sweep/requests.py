r"""The desk of a driver: requests from elsewhere are taken up here, and answered.

What a request changes is recorded before it is answered. No request, whatever it says, can do
harm to the sweep.

A request that was left to a driver which died is taken up by the next one, unless it asks for a
stop: that was meant for the driver that is gone.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import write_json
from ..core.lease import Lease, LeaseLost, holder
from ..runs.path import RunPath
from ..runs.record import read_record
from ..search.promotion import TrialRecord, count_trials
from ..search.study import queue_warning
from .driver import Driver
from .mailbox import Request, answer, mailbox_of, pending, take, tidy

__all__ = ["Desk", "attended"]

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
        self.attempt = (holder(self.directory / "lease.json") or {}).get("attempt")
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
        from .priors import bring_all

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
