r"""Verdicts by name: Optuna's own pruners, with explicit resources.

A run that such a rule stops never goes on, unless a sweep has no finished model without it. The
rules are asked at rungs, for the runs that wait there, see :func:`sda_ray.search.promotion.decide`. Whatever
Optuna would remember of earlier verdicts is worked out from the values of the runs.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    PatientPruner,
    PercentilePruner,
)
from optuna.trial import FrozenTrial, TrialState

from .promotion import PruneRule, Rules, TrialRecord
from .sampler import frozen, memory_study, quiet_optuna

__all__ = ["hyperband_brackets", "prune_rule"]

STARTUP = 5  # complete runs before any is compared with them

STATES = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}


def prune_rule(
    rules: Rules, name: str, percentile: float = 25.0, patience: int | None = None
) -> PruneRule:
    r"""Returns the verdicts of the rule that `rules.pruner` names.

    They are functions of the runs alone.

    Arguments:
        rules: The rules of the sweep.
        name: The name of the sweep, which decides on the brackets of `hyperband`.
        percentile: The share of runs that `percentile` lets go on, in percent.
        patience: The epochs without a new best value after which `patience` stops a run. By
            default three times `rules.min_epochs`.
    """

    first = rules.min_epochs or rules.epochs
    steady = {"n_startup_trials": STARTUP, "n_warmup_steps": first, "interval_steps": first}
    make: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: MedianPruner(**steady),
        "percentile": lambda: PercentilePruner(percentile, **steady),
        "patience": lambda: PatientPruner(None, patience or 3 * first),
        "hyperband": lambda: _hyperband(rules),
    }

    with quiet_optuna():
        pruner = make[rules.pruner]()

    marks = _marks(rules, name) if rules.pruner == "hyperband" else _no_marks

    def stops(record: TrialRecord, records: Sequence[TrialRecord]) -> bool:
        others = [_trial(r, dict(marks(r, False))) for r in records if r.index != record.index]
        asked = _trial(record, dict(marks(record, True)), asked=True)

        with quiet_optuna():
            return pruner.prune(memory_study([*others, asked], name=name), asked)

    return stops


def hyperband_brackets(rules: Rules, name: str) -> Callable[[int], int]:
    r"""Returns what tells the bracket of `hyperband` that a run is in, by its index from 0.

    Runs are compared within their bracket alone, and so a sampler shall see them. That of
    Optuna 5.0 is meant to, and sees all of them.
    """

    with quiet_optuna():
        pruner, study = _hyperband(rules), memory_study([], name=name)
        pruner.prune(study, frozen(0, TrialState.RUNNING))

    return lambda number: pruner._get_bracket_id(study, frozen(number, TrialState.RUNNING))


def _hyperband(rules: Rules) -> HyperbandPruner:
    return HyperbandPruner(rules.min_epochs or rules.epochs, rules.epochs, rules.eta)


def _trial(record: TrialRecord, marks: dict[str, float], asked: bool = False) -> FrozenTrial:
    r"""Returns a run as a pruner shall see it: what is hidden is hidden from it too."""

    state = TrialState.RUNNING if asked else STATES.get(record.outcome, TrialState.PRUNED)
    curve = {} if record.outcome == "diverged" else record.visible
    values = [curve[max(curve)]] if curve and state == TrialState.COMPLETE else None

    return frozen(record.index - 1, state, values, system_attrs=marks, curve=curve)


def _no_marks(record: TrialRecord, asked: bool) -> Iterator[tuple[str, float]]:
    return iter(())


def _marks(rules: Rules, name: str) -> Callable[[TrialRecord, bool], Iterator[tuple[str, float]]]:
    r"""Returns what gives the notes that Optuna makes when a run passes a rung of its bracket.

    A run that is asked for has no note yet of the rung where it waits. One that diverged has the
    worst value at every rung that it was bound for.
    """

    bracket = hyperband_brackets(rules, name)
    first = rules.min_epochs or rules.epochs

    def marks(record: TrialRecord, asked: bool) -> Iterator[tuple[str, float]]:
        gone = record.outcome == "diverged"
        until = rules.after(record.last) if gone else record.last - asked
        rung = first * rules.eta ** bracket(record.index - 1)

        for k in range(len(rules.rungs)):
            value = math.inf if gone else record.visible.get(rung, math.nan)

            if rung <= until and not math.isnan(value):
                yield f"completed_rung_{k}", value

            rung *= rules.eta

    return marks
