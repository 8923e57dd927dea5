r"""New runs: what the user has queued comes first, then what the sampler proposes."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..runs.path import new_id
from .promotion import Record, Rules, counted
from .study import Study

__all__ = ["Propose", "draw_run", "surplus"]

logger = logging.getLogger(__name__)

# A configuration and its trial, or None, given the runs and parameters that it shall have
Propose = Callable[[Sequence[Record], dict[str, Any] | None], Any]


def draw_run(
    study: Study, records: list[Record], rules: Rules, config: dict[str, Any], propose: Propose
) -> Record | None:
    r"""Adds a new run to a study, or returns None, and says so, if there is nothing new.

    A queued configuration that cannot be tried is dropped, with a warning: it has a run already,
    or does not fit the space.
    """

    drawn, queued = None, None

    for number, params in study.queue().items():
        why = "it has a run already"

        try:
            drawn = propose(records, params)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"

        if drawn is not None:
            queued = number
            break

        logger.warning("queued configuration %s is left out: %s.", params, why)
        study.dequeue(number)

    if drawn is None and (drawn := propose(records, None)) is None:
        runs, target = counted(records), rules.target
        logger.warning("SPACE has no more configurations: %s runs of %s trials.", runs, target)
        return None

    values, trial = drawn
    epochs = (config | values)["epochs"]
    until = min(rules.rungs[0], epochs) if rules.min_epochs else epochs
    index = 1 + len(records)
    record = Record(
        index, new_id(), "running", until, epochs, attempt=1, config=values, queued=queued
    )

    return study.add(record, trial)


def surplus(study: Study, target: int) -> str:
    r"""Returns a sentence if more is queued than a sweep of so many trials will try, or nothing."""

    room, waiting = max(0, target - counted(study.records())), len(study.queue())

    if waiting <= room:
        return ""

    return (
        f"The sweep has room for {room} more of its {target} trials and {waiting} are queued: "
        "raise --trials to try them all"
    )
