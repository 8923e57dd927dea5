r"""Sweeps that are played by hand: each run has its value as soon as it is drawn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sda_ray.core.config import CONFIG
from sda_ray.core.space import choice, loguniform
from sda_ray.search.promotion import TrialRecord
from sda_ray.sweep.definition import Sweep

__all__ = ["SPACE", "finished", "play", "rate", "sweep_of"]

SPACE = {
    "learning_rate": loguniform(1e-6, 1.0),
    "weight_decay": loguniform(1e-6, 1e-1),
    "activation": choice("ELU", "GELU", "SiLU"),
}


def sweep_of(space: Any = SPACE, **settings: Any) -> Sweep:
    return Sweep("name", CONFIG | {"epochs": 9}, space, **settings).check()


def finished(
    index: int, drawn: Any, value: float, state: str = "complete", **more: Any
) -> TrialRecord:
    values = {9: value} if state == "complete" else {1: value}
    known = {} if state == "diverged" else values
    record = TrialRecord(index, f"{index:08}", state, max(values), 9, known)

    return replace(record, config=drawn[0], trial=drawn[1], **more)


def play(
    sweep: Sweep,
    count: int,
    value: Callable[[dict[str, Any]], float | None],
    records: Sequence[TrialRecord] = (),
) -> list[TrialRecord]:
    r"""Returns the runs of a sweep, one after the other; those without a value diverge."""

    records = list(records)

    while len(records) < count and (drawn := sweep.propose(records)) is not None:
        x = value(drawn[0])
        state = "diverged" if x is None else "complete"
        records.append(finished(len(records) + 1, drawn, x or 0.0, state))

    return records


def rate(record: TrialRecord) -> float:
    return math.log10(record.config["learning_rate"])
