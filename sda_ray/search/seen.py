r"""The runs of a sweep as Optuna's samplers and pruners shall see them.

They never see the study itself, but one made anew for each question, in memory: what it answers is
a function of what the runs have shown, and nothing that Optuna notes in it outlives the question.
"""

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import InMemoryStorage
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from .promotion import Record

__all__ = ["Asking", "Attempt", "Distributions", "Draw", "frozen", "quiet", "study_of", "view"]

Draw = Callable[[Any], dict[str, Any]]  # the values of the keys that vary, for an Optuna trial
Attempt = Callable[[Any], dict[str, Any] | None]  # the same, or None for one that is left out
Distributions = dict[str, BaseDistribution]

FEASIBLE, DIVERGED = {"diverged": 0.0}, {"diverged": 1.0}  # constraints, held if not above 0


@contextmanager
def quiet(least: int = optuna.logging.WARNING) -> Iterator[None]:
    r"""Silences what Optuna says of its own experiments, and of its every step."""

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(least)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


class Asking(FixedTrial):
    r"""Creates a trial that asks a function for the value of each parameter.

    It is what a SPACE draws from; its `params` and `distributions` are those asked for so far.

    Arguments:
        answer: Returns the value of a parameter, given its name and distribution.
        number: The number of the trial.
    """

    def __init__(self, answer: Callable[[str, BaseDistribution], Any], number: int = 0) -> None:
        super().__init__({}, number)
        self.answer = answer

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self.params:
            self._params[name] = self.answer(name, distribution)

        return super()._suggest(name, distribution)


class _Memory(InMemoryStorage):
    r"""Creates a storage of given trials, which nobody changes: Optuna's copies each of them."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self.trials = trials

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        r"""Forgets what Optuna notes of the trial in question, for processes that there are not."""


def study_of(
    trials: Sequence[FrozenTrial], objectives: int = 1, name: str = "view"
) -> optuna.Study:
    r"""Returns a study of trials, for one question."""

    return optuna.create_study(
        storage=_Memory(trials), study_name=name, directions=["minimize"] * objectives
    )


def frozen(
    number: int,
    state: TrialState,
    values: Sequence[float] | None = None,
    params: dict[str, Any] | None = None,
    distributions: Distributions | None = None,
    system_attrs: dict[str, Any] | None = None,
    curve: dict[int, float] | None = None,
) -> FrozenTrial:
    r"""Returns a trial of Optuna without the checks and copies of its own constructors."""

    return FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=None,
        values=values,
        datetime_start=None,
        datetime_complete=None,
        params=params or {},
        distributions=distributions or {},
        user_attrs={},
        system_attrs=system_attrs or {},
        intermediate_values=curve or {},
    )


def view(
    records: Iterable[Record], current: Distributions | None = None, objectives: int = 1
) -> list[FrozenTrial]:
    r"""Returns the runs of a sweep as a sampler shall see them.

    Complete runs are complete, paused ones pruned with their curve, those in flight running (it
    keeps away from them), diverged ones infeasible, and failed ones absent. Absent are also those
    with parameters that the space has not got any more, and with too few objectives.

    Arguments:
        records: The runs.
        current: The distributions of the space as it is, if it is the same for all trials. With
            distributions that differ from trial to trial a parameter would leave the joint space.
        objectives: The number of objectives.
    """

    fits = [(name, _fit(d)) for name, d in (current or {}).items()]
    seen = []

    for record in records:
        if record.state == "failed":
            continue

        params = record.trial.params

        if current is None:
            distributions = record.trial.distributions
        elif len(params) == len(fits) and all(n in params and fit(params[n]) for n, fit in fits):
            distributions = current
        else:
            continue

        if (trial := _seen(record, distributions, objectives)) is not None:
            seen.append(trial)

    return seen


class _Seen(FrozenTrial):
    r"""Creates a trial that knows its constraints: Optuna's own looks for them in all its notes."""

    @property
    def constraints(self) -> dict[str, float]:
        return FEASIBLE


class _Diverged(FrozenTrial):
    r"""Creates a trial that no sampler wants to be near to."""

    @property
    def constraints(self) -> dict[str, float]:
        return DIVERGED


def _seen(record: Record, distributions: Distributions, objectives: int) -> FrozenTrial | None:
    outcome = record.outcome
    diverged = outcome == "diverged"
    curve = {} if diverged or objectives > 1 else record.visible
    values: tuple[float, ...] | None = (curve[max(curve)],) if curve else None
    state = TrialState.PRUNED

    if outcome == "complete":
        state = TrialState.COMPLETE
        values = values if objectives == 1 else record.finals

        if values is None or len(values) != objectives:
            return None
    elif outcome == "running" and not record.paused:
        state, values = TrialState.RUNNING, None

    return (_Diverged if diverged else _Seen)(
        number=record.index - 1,
        trial_id=record.index - 1,
        state=state,
        value=None,
        values=values,
        datetime_start=None,
        datetime_complete=None,
        params=record.trial.params,
        distributions=distributions,
        user_attrs={},
        system_attrs={},
        intermediate_values=curve,
    )


def _fit(distribution: BaseDistribution) -> Callable[[Any], bool]:
    r"""Returns what tells whether a distribution has a value; Optuna's own takes its time."""

    if isinstance(distribution, CategoricalDistribution):
        return frozenset(distribution.choices).__contains__

    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step

    if step is None or step == 1:
        return lambda value: low <= value <= high

    return lambda value: low <= value <= high and distribution._contains(value)
