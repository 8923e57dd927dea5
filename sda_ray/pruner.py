r"""What a sweep does next: a pure function of what its runs have reached.

Runs are pruned by promotion. A run goes to the first rung and is paused there, unless its value is
among the best :math:`1 / \eta` of all values at that rung; when it comes to be among them later,
it goes on to the next rung, in its own directory, from its own checkpoint.

References:
    | A System for Massively Parallel Hyperparameter Tuning (Li et al., 2018)
    | https://arxiv.org/abs/1810.05934
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Action", "Record", "Rules", "decide", "in_top", "order", "reveal"]


@dataclass(frozen=True)
class Record:
    r"""Creates what the study says of a run, in the newest of the run's records.

    Arguments:
        index: The number of the run in its sweep, from 1.
        run_id: The id of the run.
        state: `running`, `complete`, `pruned`, `diverged` or `failed`, as recorded.
        until: The epoch up to which the run may go.
        epochs: The full budget of the run.
        values: The value at each epoch.
        shown: The last epoch whose value counts for others, if not all of them do.
        attempt: The number of times the run was started.
        config: The keys of CONFIG that the sweep varies, with their values.
        trial: Optuna's trial.
        error: Why the run failed or diverged.
    """

    index: int
    run_id: str
    state: str
    until: int
    epochs: int
    values: dict[int, float] = field(default_factory=dict)
    shown: int | None = None
    attempt: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    trial: Any = None
    error: str = ""

    @property
    def last(self) -> int:
        r"""The last epoch with a value, or 0."""

        return max(self.values, default=0)

    @property
    def visible(self) -> dict[int, float]:
        r"""The values that count for rungs and sampler."""

        if self.shown is None:
            return self.values

        return {epoch: x for epoch, x in self.values.items() if epoch <= self.shown}

    @property
    def paused(self) -> bool:
        r"""Whether the run waits at a rung, in an open sweep or a closed one."""

        waits = self.state == "running" and self.until <= self.last and self.until < self.epochs

        return waits or self.state == "pruned"


@dataclass(frozen=True)
class Rules:
    r"""Creates the rules of a sweep.

    Arguments:
        target: The number of runs wanted. Failed runs do not count.
        epochs: The full budget of a run.
        min_epochs: The first rung, or None if nothing is pruned.
        eta: One in `eta` runs goes on at each rung.
        finalists: The least number of runs with a full budget in the end.
    """

    target: int
    epochs: int
    min_epochs: int | None = None
    eta: int = 3
    finalists: int = 1

    @property
    def rungs(self) -> tuple[int, ...]:
        r"""The epochs at which runs are compared; the last is the full budget."""

        rungs, rung = [], self.min_epochs or self.epochs

        while rung < self.epochs:
            rungs.append(rung)
            rung *= self.eta

        return (*rungs, self.epochs)

    def after(self, epoch: int) -> int:
        r"""Returns the first rung after an epoch."""

        return next(rung for rung in self.rungs if rung > epoch)

    @property
    def failures(self) -> int:
        r"""The number of failed runs that are replaced."""

        return max(3, self.target // 4)


@dataclass(frozen=True)
class Action:
    r"""Creates a decision: `adopt`, `promote`, `draw`, `wait` or `stop`.

    A run is adopted or promoted up to the epoch `until`. With `hidden`, the values that come of it
    count for no other run.
    """

    kind: str
    record: Record | None = None
    until: int = 0
    hidden: bool = False


def order(record: Record) -> tuple[float, int]:
    r"""Orders runs from best to worst: the furthest first, then the lowest value."""

    return (-record.last, record.values.get(record.last, math.inf), record.index)


def in_top(record: Record, rung: int, records: Sequence[Record], eta: int) -> bool:
    r"""Tells whether a run is among the best :math:`1 / \eta` at a rung.

    A run that diverged counts as the worst at every rung that it was bound for.
    """

    def value(other: Record) -> float | None:
        if other.state == "diverged":
            return math.inf if rung <= other.until else None

        return other.visible.get(rung)

    here = [(x, other.index) for other in records if (x := value(other)) is not None]
    best = sorted(here)[: len(here) // eta]

    return any(index == record.index and x < math.inf for x, index in best)


def reveal(records: Sequence[Record], rules: Rules) -> list[Record]:
    r"""Lets hidden values count, as far as the rule itself would have let the run go on."""

    while True:
        shown = [
            replace(record, shown=None if after == rules.epochs else after)
            if record.shown in rules.rungs[:-1]
            and (after := rules.after(record.shown)) in record.values
            and in_top(record, record.shown, records, rules.eta)
            else record
            for record in records
        ]

        if shown == list(records):
            return shown

        records = shown


def decide(
    records: Sequence[Record], live: Collection[int], rules: Rules, exhausted: bool
) -> Action:
    r"""Decides what a free slot is used for.

    Arguments:
        records: The runs of the sweep.
        live: The indices of the runs in flight.
        rules: The rules of the sweep.
        exhausted: Whether there is no new configuration left to draw.
    """

    records = reveal(records, rules)
    idle = [record for record in records if record.index not in live]

    # Runs left behind by a dead driver, or by a lost worker
    for record in idle:
        if record.state == "running" and not record.paused:
            return Action("adopt", record, record.until, hidden=record.shown is not None)

    # Runs that have come to be among the best, from the top rung down
    for rung in reversed(rules.rungs[:-1]):
        paused = [r for r in idle if r.paused and max(r.visible, default=0) == rung]

        for record in sorted(paused, key=lambda r: (r.visible[rung], r.index)):
            if in_top(record, rung, records, rules.eta):
                return Action("promote", record, rules.after(rung))

    # New runs
    failed = sum(record.state == "failed" for record in records)

    if len(records) - failed < rules.target and failed <= rules.failures and not exhausted:
        return Action("draw", until=rules.rungs[0])

    if live:
        return Action("wait")

    # The sweep shall end with finished models
    complete = sum(record.state == "complete" for record in records)
    paused = sorted((record for record in idle if record.paused), key=order)

    if complete < rules.finalists and paused:
        return Action("promote", paused[0], rules.epochs, hidden=True)

    return Action("stop")
