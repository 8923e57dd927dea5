r"""Draws: which configuration a sweep tries next.

Optuna's samplers never see the study itself but a view of it, made anew for each draw: its states
are those that a sampler makes the right thing of, see :func:`view`.
"""

import copy
import heapq
import itertools
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages import InMemoryStorage
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from ..core.config import format_value
from ..core.errors import UserError
from ..core.space import Range
from .promotion import TrialRecord

__all__ = [
    "CallbackTrial",
    "Distributions",
    "Draw",
    "check_kinds",
    "distributions",
    "draw_summary",
    "frozen",
    "importances",
    "memory_study",
    "propose",
    "quiet_optuna",
    "sample",
    "view",
]

logger = logging.getLogger(__name__)

Draw = Callable[[Any], dict[str, Any]]  # the values of the keys that vary, for an Optuna trial
Attempt = Callable[[Any], dict[str, Any] | None]  # the same, or None for one that is left out
Distributions = dict[str, BaseDistribution]

FEASIBLE, DIVERGED = {"diverged": 0.0}, {"diverged": 1.0}  # constraints, held if not above 0


@contextmanager
def quiet_optuna(least: int = optuna.logging.WARNING) -> Iterator[None]:
    r"""Silences what Optuna says of its own experiments, and of its every step."""

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(least)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


class CallbackTrial(FixedTrial):
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


def memory_study(
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
    records: Iterable[TrialRecord], current: Distributions | None = None, objectives: int = 1
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


def _seen(
    record: TrialRecord, distributions: Distributions, objectives: int
) -> FrozenTrial | None:
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


def combinations(
    draw: Attempt,
    records: Sequence[TrialRecord],
    fixed: Mapping[str, Any],
    current: Distributions | None,
) -> Iterator[tuple[dict[str, Any] | None, CallbackTrial]]:
    r"""Yields all combinations of options; the parameter that is asked for last changes first."""

    tried = {frozenset(record.trial.params.items()) for record in records}

    if current is not None:
        # Those tried before are passed over without a draw
        axes = [_options(name, current[name], fixed) for name in current]

        for options in itertools.product(*axes):
            params = dict(zip(current, options, strict=True))

            if frozenset(params.items()) not in tried:
                trial = CallbackTrial(lambda name, _, params=params: params[name])  # type: ignore[misc]
                yield draw(trial), trial

        return

    given: list[int] | None = []

    while given is not None:
        done: list[tuple[int, int]] = []

        def answer(name: str, distribution: BaseDistribution, at: Any = (given, done)) -> Any:
            given, done = at
            options = _options(name, distribution, fixed)
            i = given[len(done)] if len(done) < len(given) else 0
            done.append((i, len(options)))

            return options[i]

        values = draw(trial := CallbackTrial(answer))

        if frozenset(trial.params.items()) not in tried:
            yield values, trial

        while done and done[-1][0] + 1 == done[-1][1]:
            done.pop()

        given = [*(i for i, _ in done[:-1]), done[-1][0] + 1] if done else None


def _options(name: str, distribution: BaseDistribution, fixed: Mapping[str, Any]) -> Sequence[Any]:
    if name in fixed:
        return [take(fixed, name, distribution)]
    elif isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    elif isinstance(distribution, IntDistribution) and not distribution.log:
        return range(distribution.low, distribution.high + 1, distribution.step)

    raise Endless(f"{name} has no finite set of options, which sampler='grid' needs")


class Endless(ValueError):
    r"""Signals a parameter with more options than can be gone through."""


class Misfit(ValueError):
    r"""Signals that parameters asked for are none of the space."""


def take(fixed: Mapping[str, Any], name: str, distribution: BaseDistribution) -> Any:
    r"""Returns a parameter that the configuration shall have."""

    try:
        contained = distribution._contains(distribution.to_internal_repr(fixed[name]))
    except (TypeError, ValueError):
        contained = False

    if not contained:
        raise Misfit(f"{name}={fixed[name]!r} is not in SPACE: {distribution}.")

    return fixed[name]


def first(name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]

    return distribution.low  # type: ignore[attr-defined]


REDRAWS = 100  # draws without a new configuration, after which combinations are gone through
REST = 4096  # of these, if their number is finite, after which the space counts as exhausted
CROWD = 1000  # runs above which TPE sees the best and the newest alone, so that draws stay quick
ELITE = 100  # of these, the best: TPE takes 25 of them for good
POPULATION = 20  # runs in a generation of NSGA-II: sweeps have tens to hundreds of runs


def new(number: int, *params: Any) -> FrozenTrial:
    return frozen(number, TrialState.RUNNING, None, *params)


def draws(
    draw: Attempt,
    records: Sequence[TrialRecord],
    seed: int,
    sampler: str,
    fixed: Mapping[str, Any],
    current: Distributions | None,
    objectives: int,
    group: Callable[[int], int] | None,
) -> Iterator[tuple[dict[str, Any] | None, CallbackTrial]]:
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

    study, kinds = memory_study(trials, objectives), _kinds(trials, objectives)

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

        trial = CallbackTrial(answer, number)

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

    return memory_study(list(kinds.values()), objectives)


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


Drawn = tuple[dict[str, Any], FrozenTrial]


def propose(
    draw: Draw,
    records: Sequence[TrialRecord],
    seed: int = 0,
    sampler: str = "tpe",
    fixed: dict[str, Any] | None = None,
    current: Distributions | None = None,
    config: Mapping[str, Any] | None = None,
    objectives: int = 1,
    group: Callable[[int], int] | None = None,
) -> Drawn | None:
    r"""Draws a configuration that no run of a sweep has.

    What is drawn is a function of the seed, the number of runs and what they have shown so far.

    Arguments:
        draw: Gives the values of the keys that vary, for an Optuna trial.
        records: All runs of the sweep.
        seed: The seed of all draws of the sweep.
        sampler: `tpe`, `random`, `gp`, `nsga2` or `grid`.
        fixed: Parameters, all or some, that the configuration shall have.
        current: The distributions of the space, if they are the same for all trials.
        config: The CONFIG that the values vary: two draws that only differ in keys left out are
            one configuration.
        objectives: The number of objectives.
        group: Returns the group of a run by its index from 0: the sampler sees the group of the
            new run alone. By default there is one group.

    Returns:
        The values and Optuna's trial, which is not part of a study yet; or None if there is
        nothing new to draw.
    """

    fixed, left_out = fixed or {}, set[str]()

    def attempt(trial: CallbackTrial) -> dict[str, Any] | None:
        try:
            return draw(trial)
        except UserError as error:
            if trial.params.keys() <= fixed.keys():  # another draw would be the same
                raise

            if (why := str(error)) not in left_out:
                left_out.add(why)
                logger.warning("a configuration that SPACE has drawn is left out: %s", why)

            return None

    with quiet_optuna(
        logging.ERROR
    ):  # it misses packages that would make a Gaussian process faster
        found = (
            combinations(attempt, records, fixed, current)
            if sampler == "grid"
            else draws(attempt, records, seed, sampler, fixed, current, objectives, group)
        )

        try:
            for values, trial in found:
                if values is None or any(
                    _alike(values, record.config, config or {}) for record in records
                ):
                    continue

                return values, new(len(records), trial.params, trial.distributions)
        except Misfit as misfit:
            logger.warning("%s", misfit)

    return None


def sample(draw: Draw, count: int) -> list[tuple[dict[str, Any], CallbackTrial]]:
    r"""Draws configurations at random, for checks, and the trials that they are of, of no study."""

    with quiet_optuna():
        sampler, study = optuna.samplers.RandomSampler(seed=0), memory_study([])

        def answer(name: str, distribution: BaseDistribution) -> Any:
            return sampler.sample_independent(study, new(0), name, distribution)

        trials = [CallbackTrial(answer, number) for number in range(count)]

        return [(draw(trial), trial) for trial in trials]


def check_kinds(trials: Iterable[CallbackTrial]) -> None:
    r"""Checks that a name stands for parameters of one kind, without which TPE goes wrong.

    Bounds may differ from trial to trial.

    Raises:
        UserError: If two trials have a name with options and without, or with other options.
    """

    known: Distributions = {}

    for trial in trials:
        for name, distribution in trial.distributions.items():
            before = known.setdefault(name, distribution)

            if _kind(before) != _kind(distribution):
                raise UserError(
                    f"SPACE suggests {name!r} from {_words(before)} and from "
                    f"{_words(distribution)}, which sampler='tpe' cannot learn from. Give each its "
                    f"own name, as '{name}_a' and '{name}_b': names need not be keys of CONFIG."
                )


def _kind(distribution: BaseDistribution) -> Any:
    return type(distribution), getattr(distribution, "choices", None)


def _words(distribution: Any) -> str:
    if hasattr(distribution, "choices"):
        return ", ".join(map(str, distribution.choices))

    return str(Range(distribution.low, distribution.high, distribution.log, distribution.step))


def draw_summary(draw: Draw, count: int = 32) -> list[str]:
    r"""Returns what draws have in common: bounds and options of two of them, values of all.

    It is the same wherever and by whatever version of Optuna they are drawn, unless the space
    depends on more than what is drawn: bounds that follow from another parameter are left out.
    """

    parameters, values = Counter[str](), Counter[str]()

    for drawn, trial in sample(draw, count):
        values.update(f"{key}={format_value(value)}" for key, value in drawn.items())

        for name, distribution in trial.distributions.items():
            kind, attributes = json.loads(distribution_to_json(distribution)).values()
            parameters.update(f"{name}: {kind} {key} {x}" for key, x in attributes.items())

    common = {text for text, n in parameters.items() if n > 1}

    return sorted(common | {text for text, n in values.items() if n == count})


def distributions(draw: Draw) -> Distributions:
    r"""Returns the distributions that a space draws from, which must be the same for all trials."""

    trial = CallbackTrial(first)
    draw(trial)

    return trial.distributions


def importances(study: optuna.Study) -> dict[str, float]:
    r"""Returns how much each parameter matters for the first objective, from most to least.

    It is what Optuna's dashboard shows; nothing, while fewer than two trials are complete.

    References:
        | PED-ANOVA: Efficiently Quantifying Hyperparameter Importance (Watanabe et al., 2023)
        | https://arxiv.org/abs/2304.10255
    """

    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < 2:
        return {}

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    target = None if len(study.directions) == 1 else lambda trial: float(trial.values[0])

    try:
        with quiet_optuna(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=target
            )
    except (RuntimeError, ValueError):  # none that vary
        return {}


def _alike(a: Mapping[str, Any], b: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    r"""Tells whether two choices of values come to the same; what they lack is CONFIG's."""

    for key, value in a.items():
        if value != _plain(b.get(key, config.get(key))):
            return False

    return all(key in a or _plain(x) == _plain(config.get(key)) for key, x in b.items())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON makes lists of tuples
