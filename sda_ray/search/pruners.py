r"""Final verdicts on runs, by Optuna's pruners.

A run that such a pruner stops does not continue, unless the sweep would end without a finished
model. The pruner is asked at rungs, for the runs that wait there, see
:func:`sda_ray.search.promotion.decide`. It sees a study in memory that is made anew for each
question, with the notes that it would have left in the runs at the rungs that they have passed.
"""

import binascii
import math
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    PatientPruner,
    PercentilePruner,
)
from optuna.trial import FrozenTrial, TrialState

from .promotion import PruneRule, Rules, TrialRecord
from .sampler import frozen_trial, memory_study, quiet_optuna

STARTUP = 5  # complete runs before any is compared with them
STATES = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}


def prune_rule(
    rules: Rules,
    name: str,
    percentile: float = 25.0,
    patience: int | None = None,
    pruner: BasePruner | None = None,
) -> PruneRule:
    r"""Returns the verdicts of a pruner as a function of a run and of all runs.

    The rules name the pruner, unless the user gives one. The name of the sweep decides on the
    brackets of `hyperband`; `percentile` is the share of runs, in percent, that the pruner of that
    name lets continue; `patience` stops a run after as many epochs without a new best value, by
    default three times `rules.min_epochs`.
    """

    with quiet_optuna():
        method = pruner or _named(rules, percentile, patience)

    known: dict[tuple[int, int, float], dict[str, Any]] = {}  # notes by run, rung and value

    def notes(record: TrialRecord, asked: bool = False) -> dict[str, Any]:
        # A run that is asked about has no note of the rung where it waits. One that diverged has
        # the worst value at every rung that it was bound for.
        diverged, total = record.outcome == "diverged", dict[str, Any]()
        last = rules.after(record.last) if diverged else record.last - asked

        for rung in rules.rungs:
            value = math.inf if diverged else record.visible.get(rung, math.nan)

            if rung <= last and not math.isnan(value):
                key = record.index, rung, value

                if key not in known:
                    known[key] = _note(method, name, *key, total)

                total |= known[key]

        return total

    def stops(record: TrialRecord, records: Sequence[TrialRecord]) -> bool:
        with quiet_optuna():
            others = [_trial(r, notes(r)) for r in records if r.index != record.index]
            asked = _trial(record, notes(record, asked=True), asked=True)

            return method.prune(memory_study([*others, asked], name=name), asked)

    return stops


def _named(rules: Rules, percentile: float, patience: int | None) -> BasePruner:
    first = rules.min_epochs or rules.epochs
    steady = {"n_startup_trials": STARTUP, "n_warmup_steps": first, "interval_steps": first}
    pruners: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: MedianPruner(**steady),
        "percentile": lambda: PercentilePruner(percentile, **steady),
        "patience": lambda: PatientPruner(None, patience or 3 * first),
        "hyperband": lambda: HyperbandPruner(_least(rules), rules.epochs, rules.eta),
    }

    return pruners[rules.pruner]()


def _least(rules: Rules) -> int:
    r"""Returns the first rung for `hyperband` by which no rung comes before Optuna's."""

    rungs = enumerate(rules.rungs[:-1])

    return min((max(1, rung // rules.eta**k) for k, rung in rungs), default=rules.epochs)


def _note(
    method: BasePruner, name: str, index: int, rung: int, value: float, before: dict[str, Any]
) -> dict[str, Any]:
    r"""Returns what a pruner notes in a run when it reports its value at a rung, all alone."""

    taken: dict[int, dict[str, Any]] = {}
    trial = frozen_trial(index - 1, TrialState.RUNNING, notes=dict(before), curve={rung: value})
    method.prune(memory_study([trial], name=name, notes=taken), trial)

    return taken.get(index - 1, {})


def _trial(record: TrialRecord, notes: dict[str, Any], asked: bool = False) -> FrozenTrial:
    r"""Returns a run as a pruner sees it. Hidden values are hidden from it, too."""

    state = TrialState.RUNNING if asked else STATES.get(record.outcome, TrialState.PRUNED)
    curve = {} if record.outcome == "diverged" else record.curve
    values = [curve[max(curve)]] if curve and state == TrialState.COMPLETE else None

    return frozen_trial(record.index - 1, state, values, notes=notes, curve=curve)


def hyperband_brackets(rules: Rules, name: str) -> Callable[[int], int]:
    r"""Returns a function from a run's index, from 0, to its bracket in `hyperband`.

    Runs are compared within their bracket, and a sampler sees those of one bracket. The brackets
    are those of :class:`optuna.pruners.HyperbandPruner`, which has no public method for them.

    References:
        | Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization (Li et al., 2018)
        | https://arxiv.org/abs/1603.06560
    """

    first, eta = _least(rules), rules.eta
    count = math.floor(math.log(rules.epochs / first, eta)) + 1
    budgets = [math.ceil(count * eta**s / (s + 1)) for s in reversed(range(count))]
    *ends, total = accumulate(budgets)

    return lambda number: bisect(ends, binascii.crc32(f"{name}_{number}".encode()) % total)
