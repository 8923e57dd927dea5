r"""Decides what a sweep does next, as a pure function of the progress of its runs.

Runs are pruned by promotion. A run trains up to the first rung and pauses there, unless its value
is among the best :math:`1 / \eta` of all values at that rung. Once it is among them, it is promoted
to the next rung: it resumes in its own directory, from its own checkpoint.

References:
    | A System for Massively Parallel Hyperparameter Tuning (Li et al., 2018)
    | https://arxiv.org/abs/1810.05934

If a sweep has several seeds, a configuration that is promoted to the end is trained again with each
further seed, in a run of its own that is never paused, and is judged there by the mean over seeds.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

GEOMETRIC = ("promotion", "hyperband")  # others compare runs at even distances
FINAL = ("median", "percentile", "patience", "hyperband")  # a run that one of them stops is over


@dataclass(frozen=True)
class TrialRecord:
    r"""The newest record of a run in the study.

    Arguments:
        index: The number of the run in its sweep, from 1.
        run_id: The id of the run.
        state: `running`, `complete`, `pruned`, `diverged`, `stopped` (by the user) or `failed`,
            as recorded.
        until: The epoch up to which the run may go.
        epochs: The full budget of the run.
        values: The value at each epoch, NaN at those where the objective is not measured. It is at
            rungs and at the end.
        shown: The last epoch whose value counts for others, if not all of them do.
        attempt: The number of times the run was started.
        config: The keys of CONFIG that the sweep varies, with their values.
        trial: Optuna's trial.
        error: Why the run failed or diverged.
        source: The origin of a run that was imported from outside this sweep. The sampler knows
            it, and it does not count towards the target.
        queued: The number of the queued configuration that the run was started for, if any.
        worker_deaths: The number of times that the worker of the run died.
        memory_errors: The number of times that it ran out of memory.
        finals: The values of all objectives of a complete run, if there are several.
        replica_of: The number of the run whose configuration it trains with another seed, or 0.
        seeds: The values at the end with each seed, see :func:`average_seeds`.
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
    source: str = ""
    queued: int | None = None
    worker_deaths: int = 0
    memory_errors: int = 0
    finals: tuple[float, ...] = ()
    replica_of: int = 0
    seeds: tuple[float, ...] = ()

    @cached_property
    def last(self) -> int:
        r"""The last epoch with a value, or 0."""

        return max(self.values, default=0)

    @cached_property
    def value(self) -> float | None:
        r"""The newest value that is known, or the mean over seeds."""

        return statistics.fmean(self.seeds) if self.seeds else self.trajectory.get(self.last)

    @cached_property
    def trajectory(self) -> dict[int, float]:
        r"""The newest value at each epoch, also of those that do not count for others."""

        return _filled(self.values)

    @property
    def error_over_seeds(self) -> float | None:
        r"""The standard error of the mean over seeds."""

        n = len(self.seeds)

        return statistics.stdev(self.seeds) / math.sqrt(n) if n > 1 else None

    @cached_property
    def curve(self) -> dict[int, float]:
        r"""The newest value at each epoch, of those that count for others."""

        return _filled(self.visible)

    @cached_property
    def visible(self) -> dict[int, float]:
        r"""The values that count for others at rungs: those of further seeds do not."""

        if self.replica_of:
            return {}

        if self.shown is None:
            return self.values

        return {epoch: x for epoch, x in self.values.items() if epoch <= self.shown}

    @cached_property
    def paused(self) -> bool:
        r"""Whether the run waits at a rung, in an open sweep or a closed one."""

        waits = self.state == "running" and self.until <= self.last and self.until < self.epochs

        return waits or self.state == "pruned"

    @property
    def status(self) -> str:
        r"""The state as people are told it: an open run may be paused."""

        return "paused" if self.paused and self.state == "running" else self.state

    @property
    def outcome(self) -> str:
        r"""The state that other runs see: the end of a run with hidden values is hidden, too."""

        hidden = self.shown is not None or self.replica_of

        return "pruned" if hidden and self.state != "failed" else self.state


def _filled(values: dict[int, float]) -> dict[int, float]:
    r"""Returns the values with the newest one before in place of NaN."""

    if not any(map(math.isnan, values.values())):
        return values

    filled, newest = dict[int, float](), math.nan

    for epoch, x in sorted(values.items()):
        if not math.isnan(newest := newest if math.isnan(x) else x):
            filled[epoch] = newest

    return filled


# Whether a run that waits at a rung is stopped there, given all runs
PruneRule = Callable[[TrialRecord, Sequence[TrialRecord]], bool]


@dataclass(frozen=True)
class Rules:
    r"""The rules of a sweep.

    Arguments:
        target: The number of runs wanted. Failed and imported runs do not count.
        epochs: The full budget of a run.
        min_epochs: The first rung, or None if nothing is pruned.
        eta: One in `eta` runs is promoted at each rung.
        finalists: The least number of runs with a full budget in the end.
        excused: The number of failed runs that do not count towards the limit on failures.
        pruner: `promotion`, `none`, or a pruner whose verdicts are final, see
            :mod:`sda_ray.search.pruners`.
        recorded: The rungs before the last one, if the sweep has recorded them.
        seeds: The number of seeds of a configuration that is promoted to the end.
    """

    target: int
    epochs: int
    min_epochs: int | None = None
    eta: int = 2
    finalists: int = 1
    excused: int = 0
    pruner: str = "promotion"
    recorded: tuple[int, ...] | None = None
    seeds: int = 1

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        r"""The epochs at which runs are compared; the last is the full budget.

        They are those of :func:`geometric_rungs`, or the multiples of the first for most final
        pruners.
        """

        first, rungs = self.min_epochs or self.epochs, self.recorded

        if rungs is None and self.pruner in GEOMETRIC:
            rungs = geometric_rungs(first, self.epochs, self.eta)
        elif rungs is None:
            rungs = tuple(range(first, self.epochs, first))

        return (*rungs, self.epochs)

    def after(self, epoch: int) -> int:
        r"""Returns the first rung after an epoch."""

        return next((rung for rung in self.rungs if rung > epoch), self.epochs)

    @property
    def failures(self) -> int:
        r"""The number of failed runs that are replaced."""

        return self.excused + max(3, self.target // 4)


def geometric_rungs(first: int, epochs: int, eta: int) -> tuple[int, ...]:
    r"""Returns the first rung and, above it, `epochs` over the powers of `eta`.

    One that is less than :math:`\sqrt{\eta}` times as far as the first is left out.

    Example:
        >>> geometric_rungs(16, 256, eta=2), geometric_rungs(9, 256, eta=3)
        ((16, 32, 64, 128), (9, 28, 85))
    """

    if first >= epochs:
        return ()

    rungs, rung = list[int](), epochs // eta

    while rung * rung >= eta * first * first:
        rungs.append(rung)
        rung = epochs // eta ** (len(rungs) + 1)

    return (first, *reversed(rungs))


@dataclass(frozen=True)
class Action:
    r"""A decision: `adopt`, `promote`, `prune`, `draw`, `replicate`, `wait` or `stop`.

    A run is adopted or promoted up to the epoch `until`, and its values count for others up to the
    epoch `shown`, or all of them. One that is replicated is to be trained with another seed.
    """

    kind: str
    record: TrialRecord | None = None
    until: int = 0
    shown: int | None = None


def count_trials(records: Sequence[TrialRecord]) -> int:
    r"""Returns the number of runs that count as trials of the sweep: further seeds do not."""

    return sum(
        not (record.source or record.replica_of) and record.state != "failed" for record in records
    )


def average_seeds(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    r"""Returns the first run of each configuration, as :func:`with_averages` has it."""

    return [record for record in with_averages(records) if not record.replica_of]


def with_averages(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    r"""Returns all runs. The first of a configuration stands for it, and is compared with others.

    If that is complete, its value is the mean over all seeds that are. If a further seed has
    diverged, so has the configuration.
    """

    replicas = defaultdict[int, list[TrialRecord]](list)

    for record in records:
        replicas[record.replica_of].append(record)

    return [_averaged(r, () if r.replica_of else replicas[r.index]) for r in records]


def ranked(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    r"""Returns all runs from best to worst, as :func:`with_averages` has them.

    Further seeds follow the first run of their configuration.
    """

    records = with_averages(records)
    keys = {r.index: rank_key(r) for r in records}

    return sorted(records, key=lambda r: (keys.get(r.replica_of, keys[r.index]), r.index))


def _averaged(first: TrialRecord, replicas: Sequence[TrialRecord]) -> TrialRecord:
    complete = [record for record in (first, *replicas) if record.state == "complete"]
    diverged = next((record for record in replicas if record.state == "diverged"), None)

    if first.state != "complete" or first.seeds or not replicas:
        return first
    elif diverged is not None:
        return replace(first, state="diverged", error=f"run {diverged.index}: {diverged.error}")

    seeds = tuple(record.values[record.last] for record in complete)
    finals = tuple(map(statistics.fmean, zip(*(r.finals for r in complete), strict=True)))

    return replace(first, seeds=seeds, finals=finals)


def lacking_seeds(records: Sequence[TrialRecord], seeds: int) -> Iterator[TrialRecord]:
    r"""Yields the runs that may go to the end and whose configuration lacks a seed."""

    counts = Counter(record.replica_of for record in records)

    for record in records:
        own = not (record.source or record.replica_of)
        promoted = record.until == record.epochs and record.state in ("running", "complete")

        if own and promoted and 1 + counts[record.index] < seeds:
            yield record


def rank_key(record: TrialRecord) -> tuple[int, int, float, int]:
    r"""Returns the sort key from best to worst: complete runs by value, then those furthest on."""

    rank = {"complete": 0, "diverged": 2, "failed": 3}.get(record.state, 1)
    progress = 0 if rank == 0 else -record.last

    return (rank, progress, _finite(record.value), record.index)


def _finite(value: float | None) -> float:
    r"""Returns a value that can be compared: a missing one, or NaN, is the worst."""

    return value if value is not None and math.isfinite(value) else math.inf


def best_at_rung(rung: int, records: Sequence[TrialRecord], rules: Rules) -> list[TrialRecord]:
    r"""Returns the best :math:`1 / \eta` of the runs at a rung, the best one first.

    A run that diverged counts as the worst at every rung that it was bound for.
    """

    def value(record: TrialRecord) -> float | None:
        if record.outcome == "diverged":
            return math.inf if rung <= rules.after(record.last) else None

        return _finite(record.visible[rung]) if rung in record.visible else None

    reached = [(x, r.index, r) for r in records if (x := value(r)) is not None]
    best = sorted(reached, key=lambda item: item[:2])[: len(reached) // rules.eta]

    return [record for x, _, record in best if x < math.inf]


def standing(record: TrialRecord, rung: int, records: Sequence[TrialRecord]) -> tuple[int, int]:
    r"""Returns the rank of a run at a rung that it has reached, and the number of runs there."""

    values = [r.values[rung] for r in records if rung in r.values and not r.replica_of]

    return 1 + sum(x < record.values[rung] for x in values), len(values)


def _promotable(records: Sequence[TrialRecord], rules: Rules) -> Iterator[tuple[int, TrialRecord]]:
    r"""Yields rungs and the runs to promote from there, in the order of promotion."""

    if rules.pruner != "promotion":
        return

    for rung in reversed(rules.rungs[:-1]):
        for record in best_at_rung(rung, records, rules):
            stands = max(record.visible, default=0) == rung

            if stands and (record.paused or record.outcome != record.state):
                yield rung, record


def unhide(records: Sequence[TrialRecord], rules: Rules) -> list[TrialRecord]:
    r"""Unhides values as far as their runs would have been promoted by now.

    Values are unhidden one rung at a time, in the order of promotion, as if the runs were promoted
    only now.
    """

    shown = list(records)

    while any(record.shown is not None for record in shown):
        for rung, record in _promotable(shown, rules):
            after = rules.after(rung)

            if record.paused and after not in record.values:
                return shown

            if after in record.values or record.state == "diverged":
                whole = after == rules.epochs or after not in record.values
                revealed = replace(record, shown=None if whole else after)
                shown = [revealed if r.index == record.index else r for r in shown]
                break
        else:
            break

    return shown


def decide(
    records: Sequence[TrialRecord],
    live: Collection[int],
    rules: Rules,
    exhausted: bool = False,
    stops: PruneRule | None = None,
    queued: bool = False,
) -> Action:
    r"""Returns the next action for a free slot.

    Arguments:
        records: The runs of the sweep.
        live: The indices of the runs in flight.
        rules: The rules of the sweep.
        exhausted: Whether no new configuration is left to draw.
        stops: The final verdict on a run at a rung; None if runs are promoted, or not pruned.
        queued: Whether configurations are queued, which come before promotions and seeds.
    """

    runs = unhide(records, rules)

    # Runs whose driver or worker died
    for record in runs:
        if record.state == "running" and not record.paused and record.index not in live:
            return Action("adopt", record, record.until, record.shown)

    records = [record for record in runs if not record.replica_of]
    idle = [record for record in records if record.index not in live]

    # Runs that wait at a rung for a final verdict
    for record in idle:
        if stops is not None and record.state == "running":
            if stops(record, records):
                return Action("prune", record)

            return Action("promote", record, rules.after(record.last))

    own = [record for record in records if not record.source]
    failed = sum(record.state == "failed" for record in own)
    room = len(own) - failed < rules.target and failed <= rules.failures and not exhausted

    # Runs that are among the best by now, from the top rung down
    if not (room and queued):
        for rung, record in _promotable(records, rules):
            if record.paused and record.index not in live:
                return Action("promote", record, rules.after(rung))

        for record in lacking_seeds(runs, rules.seeds):
            return Action("replicate", record, record.epochs)

    # New runs
    if room:
        return Action("draw", until=rules.rungs[0])

    # A sweep ends with finished models. Runs in flight may still be better.
    if any(record.until < record.epochs for record in records if record.index in live):
        return Action("wait")

    complete = sum(record.state == "complete" for record in own)
    paused = sorted((record for record in idle if record.paused), key=rank_key)

    working = len(records) - len(idle)

    if complete + working < rules.finalists and paused:
        return Action("promote", paused[0], rules.epochs, shown=max(paused[0].visible, default=0))

    return Action("wait" if live else "stop")
