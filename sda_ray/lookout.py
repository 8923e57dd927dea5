r"""What is done in Tune's loop beside trials: requests, the clock, and processes that are lost."""

import time
from pathlib import Path
from typing import Any

import ray
from ray.tune import Callback

from .desk import Desk
from .driver import Driver
from .losses import cause_of
from .vigil import Vigil, end
from .watchdog import STACKS, STALL, take_stacks

__all__ = ["Lookout"]

TICK = 0.25  # seconds between two looks at the clock and the mailbox
LOOK = 5.0  # seconds between two looks at whether processes are frozen
DOUBT = 60.0  # seconds in which Ray notices that a node is dead


class Lookout(Callback):
    r"""Creates what is done in Tune's loop beside trials: requests, the clock, lost processes."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.desk = Desk(driver)
        self.vigil = Vigil(Path(driver.spec["runs"]), driver.spec.get("stall") or STALL)
        self.actors: dict[int, Any] = {}  # index of a run -> its actor, the newest
        self.nodes: dict[str, str] = {}  # a trial's name -> the node it was seen on
        self.reasons: dict[str, str] = {}  # a trial's name -> why its process was ended
        self.doubts: dict[str, tuple[str, float]] = {}  # … -> what Ray said, until when to wait
        self.ticked = self.looked = 0.0
        self.stopping = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.tick()

        if (now := time.monotonic()) - self.looked > LOOK:
            self.looked = now

            try:
                self._look(trials)
            except Exception as error:
                self.driver.guard(error)

    def tick(self) -> None:
        r"""Lets the driver look at its mailbox and the clock, unless it has done so just now."""

        if (now := time.monotonic()) - self.ticked < TICK:
            return

        self.ticked = now
        self.desk()
        self.driver.tick()

        if self.driver.stopping and not self.stopping and self.driver.why:
            print(f"\nStopping, since {self.driver.why}: every trial saves a checkpoint first.")

        self.stopping = self.driver.stopping

    def _look(self, trials: list[Any]) -> None:
        r"""Ends processes that are frozen, and settles doubts."""

        live = self.driver.live
        at_work = {
            live[t.trial_id]: t for t in trials if t.status == "RUNNING" and t.trial_id in live
        }
        open_ = {index for index, closed in self.driver.closing.items() if not closed()}
        records = [r for r in self.driver.study.records() if r.index in {*at_work, *open_}]

        for index, trial in at_work.items():
            self.actors[index] = trial.temporary_state.ray_actor or self.actors.get(index)

        for record, silent in self.vigil.look(records):
            if (path := self.vigil.path(record)) is not None:
                reason = end(path, record, silent)

                if record.index in at_work:
                    self.reasons[at_work[record.index].trial_id] = reason

            if (actor := self.actors.get(record.index)) is not None:
                ray.kill(actor)

        for name, (reason, until) in list(self.doubts.items()):
            dead = self.nodes.get(name) in {n["NodeID"] for n in ray.nodes() if not n["Alive"]}

            if dead or time.monotonic() > until:
                del self.doubts[name]
                self.driver.lose(name, reason, "node" if dead else "worker")

    def lose(self, trial: Any) -> None:
        r"""Finds out what a trial was lost to, and lets the driver know."""

        name = trial.trial_id

        if (index := self.driver.live.get(name)) is None:
            return

        file = Path(trial.error_file or "")
        cause, reason = cause_of(file.read_text() if file.is_file() else "")
        record = next(r for r in self.driver.study.records() if r.index == index)
        path = self.vigil.path(record)
        early = self.driver.request.with_name(f"stacks.{index}.txt")

        for stacks in (early, *([path.directory / STACKS] if path else [])):
            if take_stacks(stacks, record.attempt):
                self.reasons.setdefault(name, f"its process hung: {stacks} says where")

        if name in self.reasons:
            cause, reason = "worker", self.reasons.pop(name)

        if cause == "unclear":
            self.doubts[name] = reason, time.monotonic() + DOUBT
        else:
            self.driver.lose(name, reason, cause)
