r"""Failures outside the trials: lost workers and bad nodes."""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence

from ..search import Study, TrialRecord

logger = logging.getLogger(__name__)

ALIKE = 3  # runs that fail alike, before any is complete, after which a sweep stops
LOST = 5  # times that a worker may die under a run
STRIKES = 3  # workers in a row that may die on a node, before it is avoided
SHORT = 1  # times that a run may be short of memory


def alike(errors: Sequence[str]) -> bool:
    r"""Returns whether runs fail for one reason: the same error but for paths and numbers."""

    kinds = {re.sub(r"\S*[/\d]\S*", "", error) for error in errors}

    return len(errors) >= ALIKE and len(kinds) == 1


class Losses:
    r"""Counts the workers lost under each run and on each node.

    The losses of a run are counted in the study, across drivers; those of a node by this driver,
    for this sweep.
    """

    def __init__(self) -> None:
        self.places: dict[int, tuple[str, str]] = {}  # index of a run -> id and name of its node
        self.strikes: dict[str, list[int]] = defaultdict(list)  # id of a node -> runs lost there
        self.blamed: set[int] = set()  # runs that kill their workers on any node
        self.avoided: dict[str, str] = {}  # id of a node where no trial starts -> why

    def count(self, study: Study, record: TrialRecord, cause: str, reason: str) -> str:
        r"""Counts a loss, and returns why the run fails, or an empty text.

        For causes see :func:`sda_ray.cluster.executor.cause_of`. A lost node is never held against
        a run. A worker that does not start lacks memory as a rule.
        """

        if cause in ("memory", "start"):
            what = "out of memory" if cause == "memory" else "its worker could not be started"
            short = study.record_memory_error(record).memory_errors

            return f"{what} {short} times, last of: {reason}" if short > SHORT else ""

        if cause == "node":
            return ""

        self._strike(record, reason)

        if (lost := study.record_worker_death(record).worker_deaths) > LOST:
            self._blame({record.index})
            return f"its worker died {lost} times, last of: {reason}"

        return ""

    def _strike(self, record: TrialRecord, reason: str) -> None:
        id, name = self.places.get(record.index, ("", ""))
        leaving = id in self.avoided and id not in self.strikes

        if not id or leaving or record.index in self.blamed:
            return

        self.strikes[id].append(record.index)

        if (deaths := len(self.strikes[id])) >= STRIKES and id not in self.avoided:
            why = f"node {name}: {deaths} workers in a row died there, last of: {reason}"
            self.avoided[id] = why
            logger.warning("%s. No trial of this sweep starts there any more.", why)

    def acquit(self, index: int) -> None:
        r"""Records that an attempt has ended by itself, so that its node is fine.

        An avoided node stays avoided, unless all deaths there belong to one other run.
        """

        id, _ = self.places.get(index, ("", ""))

        if id not in self.avoided:
            self.strikes.pop(id, None)
        elif index not in (died := {*self.strikes.get(id, ())}) and len(died) == 1:
            self._blame(died)

    def forgive(self) -> bool:
        r"""Allows the nodes again that are avoided for the deaths of one run, and blames the run.

        Called when no other node is left. Returns whether there was such a node.
        """

        sole = [{*died} for id, died in self.strikes.items() if id in self.avoided]
        runs = {run for died in sole if len(died) == 1 for run in died}
        self._blame(runs)

        return bool(runs)

    def _blame(self, runs: set[int]) -> None:
        r"""Blames runs for their deaths, and allows the nodes again where only they died."""

        self.blamed |= runs

        for id, died in list(self.strikes.items()):
            if runs and {*died} <= self.blamed:
                del self.strikes[id]

                if why := self.avoided.pop(id, ""):
                    who = " and ".join(f"run {index}" for index in sorted({*died}))
                    node = why.partition(":")[0]
                    logger.warning("Trials may start on %s again: only %s died.", node, who)

    def leave(self, index: int) -> None:
        r"""Records that the node of a run leaves the cluster, so that no trial starts there."""

        id, name = self.places.get(index, ("", ""))

        if id and self.avoided.get(id) != (why := f"{name} is leaving"):
            self.strikes.pop(id, None)  # it stays avoided
            self.avoided[id] = why
            logger.warning("Node %s leaves the cluster: its trials resume elsewhere.", name)
