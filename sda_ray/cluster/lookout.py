r"""What is done in Tune's loop beside trials: requests, the clock, and processes that are lost."""

import time
from pathlib import Path
from typing import Any

import ray
from ray.tune import Callback

from ..core.errors import UserError
from ..sweep.driver import Driver
from ..sweep.failures import cause_of
from ..sweep.requests import Desk
from ..training.watchdog import STACKS, STALL, take_stacks
from .vigil import Vigil, end

__all__ = ["Lookout"]

TICK = 0.25  # seconds between two looks at the clock and the mailbox
LOOK = 5.0  # seconds between two looks at whether processes are frozen
GONE = 10.0  # seconds without a node after which Ray is given up
DOUBT = 60.0  # seconds in which Ray notices that a node is dead


class RayGone(UserError):
    r"""Signals that nothing is left of Ray that could carry out a trial."""


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
        self.trials: list[Any] = []  # all of Tune's
        self.ticked = self.looked = 0.0
        self.seen = time.monotonic()  # when there was a node alive
        self.stopping = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials
        self.tick()

        if isinstance(self.driver.fault, RayGone):  # with it, what Tune waits for
            raise self.driver.fault

    def tick(self) -> None:
        r"""Does what is due. To be called as often as Tune does anything at all."""

        now = time.monotonic()

        if now - self.ticked > TICK:
            self.ticked = now
            self.desk()
            self.driver.tick()
            self._announce()

        if now - self.looked > LOOK:
            self.looked = now

            try:
                self._see_nodes()
                self._end_frozen()
                self._settle_doubts()
            except Exception as error:
                self.driver.guard(error)

    def _see_nodes(self) -> None:
        r"""Notes that there is a node. Tune waits for ever where there is none any more."""

        if any(node["Alive"] for node in ray.nodes()):
            self.seen = self.looked
        elif self.looked - self.seen > GONE and self.driver.fault is None:
            raise RayGone(
                f"Ray is gone: for {self.looked - self.seen:.0f} s it has had no node. Nothing is "
                "lost: the same command carries on."
            )

    def _announce(self) -> None:
        driver = self.driver

        if driver.stopping and not self.stopping and driver.why:
            print(
                f"\nStopping, since {driver.why}: every trial saves a checkpoint first.",
                flush=True,
            )

        self.stopping = driver.stopping

    def _end_frozen(self) -> None:
        r"""Ends processes that have given no sign of life for long: their runs are lost then."""

        live, closing = self.driver.live, self.driver.closing
        running = [t for t in self.trials if t.status == "RUNNING" and t.trial_id in live]
        at_work = {live[trial.trial_id]: trial for trial in running}
        open_ = {index for index, closed in closing.items() if not closed()}

        if not (watched := {*at_work, *open_}):
            return

        for index, trial in at_work.items():
            self.actors[index] = trial.temporary_state.ray_actor or self.actors.get(index)

        records = [r for r in self.driver.study.records() if r.index in watched]

        for record, silent in self.vigil.look(records):
            if (path := self.vigil.path(record)) is not None:
                reason = end(path, record, silent)

                if record.index in at_work:
                    self.reasons[at_work[record.index].trial_id] = reason

            if (actor := self.actors.get(record.index)) is not None:
                ray.kill(actor)

    def _settle_doubts(self) -> None:
        r"""Takes trials for lost that Ray cannot reach, once it is known what is dead."""

        if not self.doubts:
            return

        dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}

        for name, (reason, until) in list(self.doubts.items()):
            if (gone := self._node(name) in dead) or time.monotonic() > until:
                del self.doubts[name]
                self.driver.lose(name, reason, "node" if gone else "worker")

    def _node(self, name: str) -> str:
        r"""Returns the node of a trial: where it has reported from, or else was started."""

        started = self.driver.losses.places.get(self.driver.live.get(name, 0), ("", ""))

        return self.nodes.get(name, started[0])

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
