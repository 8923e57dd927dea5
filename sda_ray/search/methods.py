r"""Optuna's samplers, each given what it can make the right thing of."""

import copy
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from .grid import Endless, combinations, first, take
from .promotion import Record
from .seen import Asking, Attempt, Distributions, frozen, study_of, view

__all__ = ["REDRAWS", "draws", "new"]

REDRAWS = 100  # draws without a new configuration, after which combinations are gone through
REST = 4096  # of these, if their number is finite, after which the space counts as exhausted
CROWD = 1000  # runs above which TPE sees the best and the newest alone, so that draws stay quick
ELITE = 100  # of these, the best: TPE takes 25 of them for good
POPULATION = 20  # runs in a generation of NSGA-II: sweeps have tens to hundreds of runs


def new(number: int, *params: Any) -> FrozenTrial:
    return frozen(number, TrialState.RUNNING, None, *params)


def draws(
    draw: Attempt,
    records: Sequence[Record],
    seed: int,
    sampler: str,
    fixed: Mapping[str, Any],
    current: Distributions | None,
    objectives: int,
    group: Callable[[int], int] | None,
) -> Iterator[tuple[dict[str, Any] | None, Asking]]:
    r"""Yields draws, each by a sampler with a seed of its own, up to a few; then what is left."""

    number = len(records)
    kin = [r for r in records if group is None or group(r.index - 1) == group(number)]
    trials = [] if sampler == "random" else view(kin, current, objectives)

    if sampler == "tpe" and len(trials) > CROWD:
        newest = trials[ELITE - CROWD :]
        trials = [*_best(trials[: -len(newest)]), *newest]
    elif sampler == "gp":
        trials = _with_diverged(trials)
    elif sampler == "nsga2":
        trials = _with_generations(trials)

    study, kinds = study_of(trials, objectives), _kinds(trials, objectives)

    for i in range(REDRAWS):
        # A model that is sure of itself repeats itself: that says nothing about the space
        method = _sampler(sampler if i < REDRAWS // 2 else "random", (seed, number, i), kinds)
        space = method.infer_relative_search_space(study, new(number))
        joint = method.sample_relative(study, new(number), space)

        def answer(name: str, distribution: BaseDistribution, at: Any = (method, joint)) -> Any:
            method, joint = at

            if name in fixed:
                return take(fixed, name, distribution)
            elif distribution.single():
                return first(name, distribution)
            elif name in joint and distribution._contains(
                distribution.to_internal_repr(joint[name])
            ):
                return joint[name]

            return method.sample_independent(study, new(number), name, distribution)

        trial = Asking(answer, number)

        yield draw(trial), trial

        if trial.params.keys() <= fixed.keys():
            return  # it would be the same again

    with suppress(Endless):
        yield from islice(combinations(draw, records, fixed, current), REST)


def _kinds(trials: Sequence[FrozenTrial], objectives: int) -> optuna.Study:
    r"""Returns a study with a trial for each set of parameters, in the order of their first."""

    finished = (trial for trial in trials if trial.state.is_finished())
    kinds: dict[frozenset[str], FrozenTrial] = {}

    for trial in finished:
        kinds.setdefault(frozenset(trial.distributions), trial)

    return study_of(list(kinds.values()), objectives)


class _TPE(optuna.samplers.TPESampler):
    r"""Creates Optuna's sampler, for a space that needs not be looked for in every trial."""

    def __init__(self, seed: int, kinds: optuna.Study) -> None:
        super().__init__(seed=seed, multivariate=True, group=True)
        self.kinds = kinds

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return super().infer_relative_search_space(self.kinds, trial)


def _sampler(
    name: str, entropy: tuple[int, int, int], kinds: optuna.Study
) -> optuna.samplers.BaseSampler:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])

    if name == "tpe":
        return _TPE(seed, kinds)
    elif name == "gp":
        return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    elif name == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)

    return optuna.samplers.RandomSampler(seed=seed)


def _best(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    r"""Returns the best trials, in the order of TPE: complete ones first, then the furthest."""

    def key(trial: FrozenTrial) -> tuple[bool, bool, int, float]:
        step = max(trial.intermediate_values, default=0)
        value = trial.values[0] if trial.values else math.inf

        return (
            trial.constraints["diverged"] > 0,
            trial.state != TrialState.COMPLETE,
            0 if trial.state == TrialState.COMPLETE else -step,
            value,
        )

    best = heapq.nsmallest(ELITE, trials, key)

    return sorted(best, key=lambda trial: trial.number)


def _with_diverged(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    r"""Lets a Gaussian process, which passes over pruned trials, know of those that diverged."""

    complete = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
    worst = [max(values) for values in zip(*complete, strict=True)]
    known = []

    for trial in trials:
        if trial.constraints["diverged"] > 0 and worst:
            trial = copy.copy(trial)
            trial.state, trial.values = TrialState.COMPLETE, worst

        known.append(trial)

    return known


def _with_generations(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    r"""Numbers the generations of NSGA-II, in which Optuna leaves a note of its own."""

    key = optuna.samplers.NSGAIISampler._get_generation_key()
    complete = (trial for trial in trials if trial.state == TrialState.COMPLETE)

    for i, trial in enumerate(complete):
        trial.system_attrs[key] = i // POPULATION

    return list(trials)
