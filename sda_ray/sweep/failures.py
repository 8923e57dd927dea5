r"""What is lost in a sweep without any fault of its own, and how often it may be."""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..search.promotion import TrialRecord
from ..search.study import Study

__all__ = ["Losses", "Outage", "alike", "cause_of"]

logger = logging.getLogger(__name__)

ALIKE = 3  # runs that fail alike, before any is complete, after which a sweep stops
LOST = 5  # times that a worker may die under a run
STRIKES = 3  # workers in a row that may die on a node, before it is avoided
SHORT = 1  # times that a run may be short of memory
UNREACHED = 2  # attempts that W&B's server fails, after which new ones start offline

# What Ray 2.60 says; everything else is the death of a worker on a node that lives
SAYINGS = {
    "memory": r"[^\n]*node running low on memory[^\n]*|[^\n]*\bOutOfMemory[^\n]*",
    "node": r"[^\n]*(?:node has died|node was terminated|preempted|was drained|draining"
    r"|was cut off from the head)[^\n]*",
    "unclear": r"[^\n]*is unavailable: [^\n]*",  # its node may be dead without Ray knowing it yet
}


def cause_of(text: str) -> tuple[str, str]:
    r"""Returns what has ended a worker, and one line about it, from what Ray says.

    Returns:
        `memory`, `node`, `unclear` or `worker`; and the line.
    """

    # Ray names a lack of memory among the possible causes of any death
    said = "\n".join(line.partition(". Some common causes")[0] for line in text.splitlines())

    for cause, pattern in SAYINGS.items():
        if found := re.search(pattern, said):
            return cause, found[0].strip()[:300]

    lines = [line.strip() for line in said.splitlines() if line.strip()]

    return "worker", lines[-1][:300] if lines else "unknown"


def alike(errors: Sequence[str]) -> bool:
    r"""Tells whether runs fail for one reason: the same error, paths and numbers apart."""

    kinds = {re.sub(r"\S*[/\d]\S*", "", error) for error in errors}

    return len(errors) >= ALIKE and len(kinds) == 1


class Losses:
    r"""Creates the count of the workers that were lost under runs, and of those lost on nodes.

    What is held against a run is counted in the study, by all drivers together; what is held
    against a node, for this sweep, by this driver.
    """

    def __init__(self) -> None:
        self.places: dict[int, tuple[str, str]] = {}  # index of a run -> id and name of its node
        self.strikes: dict[str, list[int]] = defaultdict(list)  # id of a node -> runs lost there
        self.blamed: set[int] = set()  # runs that are the reason themselves, wherever they are
        self.avoided: dict[str, str] = {}  # ids of nodes where no trial may start -> why

    def count(self, study: Study, record: TrialRecord, cause: str, reason: str) -> str:
        r"""Counts a loss, and returns why the run is given up, or nothing.

        Arguments:
            study: The study.
            record: The run.
            cause: See :func:`cause_of`. A lost node is never held against a run.
            reason: What is known of it.
        """

        if cause == "memory":
            short = study.record_memory_error(record).memory_errors

            return f"out of memory {short} times, last of: {reason}" if short > SHORT else ""

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
        r"""Takes in that an attempt at a run has come to its own end: its node is fine.

        If it is avoided, then for good, unless all that died there was one other run.
        """

        id, _ = self.places.get(index, ("", ""))

        if id not in self.avoided:
            self.strikes.pop(id, None)
        elif index not in (died := {*self.strikes.get(id, ())}) and len(died) == 1:
            self._blame(died)

    def forgive(self) -> bool:
        r"""Gives back the nodes that are avoided for the deaths of one run alone, if there are any.

        To be called when no other node is left: from now on, the run is held to be the reason.
        """

        sole = [{*died} for id, died in self.strikes.items() if id in self.avoided]
        runs = {run for died in sole if len(died) == 1 for run in died}
        self._blame(runs)

        return bool(runs)

    def _blame(self, runs: set[int]) -> None:
        r"""Takes runs for the reason of their deaths, and no longer the nodes where only they died."""

        self.blamed |= runs

        for id, died in list(self.strikes.items()):
            if runs and {*died} <= self.blamed:
                del self.strikes[id]

                if why := self.avoided.pop(id, ""):
                    who = " and ".join(f"run {index}" for index in sorted({*died}))
                    node = why.partition(":")[0]
                    logger.warning("Trials may start on %s again: only %s died.", node, who)

    def leave(self, index: int) -> None:
        r"""Takes in that the node of a run is about to go: no trial starts there any more."""

        id, name = self.places.get(index, ("", ""))

        if id and self.avoided.get(id) != (why := f"{name} is leaving"):
            self.strikes.pop(id, None)  # nothing gives it back
            self.avoided[id] = why
            logger.warning("Node %s is leaving the cluster: its trials go on elsewhere.", name)


class Outage:
    r"""Creates the count of the attempts that could not use W&B's server."""

    def __init__(self) -> None:
        self.attempts: set[tuple[int, int]] = set()

    def note(self, spec: dict[str, Any], record: TrialRecord, why: str) -> dict[str, Any]:
        r"""Returns what trials are given from now on: if it fails again and again, to be offline."""

        self.attempts.add((record.index, record.attempt))

        if len(self.attempts) < UNREACHED or spec["wandb"]["mode"] != "online":
            return spec

        logger.warning(
            "%d runs could not use W&B's server: the rest of the sweep starts offline, and "
            "`sda-ray sync --all` uploads it later. The last one was told: %s",
            len(self.attempts),
            why,
        )

        return spec | {"wandb": spec["wandb"] | {"mode": "offline"}}
