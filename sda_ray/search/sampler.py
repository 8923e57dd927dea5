r"""Draws: which configuration a sweep tries next.

Optuna's samplers never see the study of a sweep but a view of it in memory, which is made anew for
each draw, see :func:`view`. A draw is thus a function of the seed and of the values of the runs so
far, and nothing that a sampler notes in a study outlives the draw.
"""

import inspect
import json
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from ..core import Domain, UserError, domain_of, format_value, script_error
from .promotion import TrialRecord, average_seeds

logger = logging.getLogger(__name__)

REDRAWS = 100  # draws without a new configuration, after which the space is searched exhaustively
SEARCHED = 1024  # draws of that search, after which the space counts as exhausted
FEASIBLE: dict[str, Any] = {"constraints": [0.0]}
INFEASIBLE: dict[str, Any] = {"constraints": [1.0]}
TELLING = 10  # complete runs from which on it can be told what matters
RESAMPLES = 50  # of these runs, for the intervals
POPULATION = 20  # runs in a generation of NSGA-II: sweeps have tens to hundreds of runs

Draw = Callable[[Any], dict[str, Any]]  # the values of the keys that vary, for an Optuna trial
Distributions = dict[str, BaseDistribution]
Sampler = str | Callable[[int], BaseSampler]  # a name, or a function of a seed
Answer = Callable[[str, BaseDistribution], Any]  # the value of a parameter
Attempt = tuple[dict[str, Any] | None, "CallbackTrial"]  # no values if they are not accepted


@contextmanager
def quiet_optuna(level: int = optuna.logging.WARNING) -> Iterator[None]:
    r"""Silences Optuna's messages below a level and its warnings about experimental features."""

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(level)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


# Views


class CallbackTrial(FixedTrial):
    r"""Creates a trial that asks a function for the value of each parameter.

    Its `params` and `distributions` are those that were suggested so far.
    """

    def __init__(self, answer: Answer, number: int = 0) -> None:
        super().__init__({}, number)
        self.answer = answer
        self.suggested: dict[str, Any] = {}
        self.asked: Distributions = {}

    @property
    def params(self) -> dict[str, Any]:
        return self.suggested

    @property
    def distributions(self) -> Distributions:
        return self.asked

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> Any:
        return self.suggest(name, FloatDistribution(low, high, log=log, step=step))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> Any:
        return self.suggest(name, IntDistribution(low, high, log=log, step=step))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.suggest(name, CategoricalDistribution(choices))

    def suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name in self.asked:
            check_distribution_compatibility(self.asked[name], distribution)
        else:
            self.suggested[name] = self.answer(name, distribution)

        self.asked[name] = distribution

        return self.suggested[name]


class _MemoryStorage(InMemoryStorage):
    r"""Creates a storage of given trials that does not copy them, as Optuna's own does.

    What samplers and pruners note in a trial goes to `notes`, by the trial's number.
    """

    def __init__(self, trials: Sequence[FrozenTrial], notes: dict[int, dict[str, Any]]) -> None:
        super().__init__()
        self.trials = trials
        self.notes = notes

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.notes.setdefault(trial_id, {})[key] = value


def memory_study(
    trials: Sequence[FrozenTrial],
    objectives: int = 1,
    name: str = "view",
    notes: dict[int, dict[str, Any]] | None = None,
) -> optuna.Study:
    r"""Returns a study of trials in memory, for one question to a sampler or pruner.

    What these note in trials goes to `notes`, by the trials' numbers.
    """

    storage = _MemoryStorage(trials, {} if notes is None else notes)

    return optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * objectives
    )


def frozen_trial(
    number: int,
    state: TrialState,
    values: Sequence[float] | None = None,
    params: dict[str, Any] | None = None,
    distributions: Distributions | None = None,
    notes: dict[str, Any] | None = None,
    curve: dict[int, float] | None = None,
) -> FrozenTrial:
    r"""Returns a trial of Optuna, without the checks and copies of `create_trial`."""

    return FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=None,
        values=values,
        datetime_start=None,
        datetime_complete=None,
        params={} if params is None else params,
        distributions=distributions or {},
        user_attrs={},
        system_attrs=notes or {},
        intermediate_values=curve or {},
    )


def view(
    records: Iterable[TrialRecord], current: Distributions | None = None, objectives: int = 1
) -> list[FrozenTrial]:
    r"""Returns the runs of a sweep as a sampler sees them.

    Complete runs are complete, paused ones pruned with their curve, those in flight running (the
    sampler keeps away from them) and diverged ones infeasible. Failed runs are absent, and so are
    runs with parameters that are not in the space any more, or with too few objectives.

    All have the distributions of the space as it is now, if these are the same for all trials: a
    parameter whose distribution differs from trial to trial would leave the joint space.
    """

    trials = []
    domains = None if current is None else _domains(current)

    for record in records:
        params, outcome = record.trial.params, record.outcome

        if outcome == "failed" or (domains is not None and not _has(domains, params)):
            continue

        running = outcome == "running" and not record.paused
        state = TrialState.RUNNING if running else TrialState.PRUNED
        curve = {} if outcome == "diverged" or objectives > 1 else record.curve
        values: Sequence[float] | None = [curve[max(curve)]] if curve and not running else None

        if outcome == "complete":
            state, values = TrialState.COMPLETE, record.finals

            if objectives == 1:
                values = None if record.value is None else [record.value]

            if values is None or len(values) != objectives:
                continue

        distributions = record.trial.distributions if current is None else current
        notes = INFEASIBLE if outcome == "diverged" else FEASIBLE
        trials.append(
            frozen_trial(record.index - 1, state, values, params, distributions, notes, curve)
        )

    return trials


def _domains(distributions: Distributions) -> dict[str, Domain]:
    return {name: domain_of(distribution) for name, distribution in distributions.items()}


def _has(domains: Mapping[str, Domain], params: Mapping[str, Any]) -> bool:
    return params.keys() == domains.keys() and all(
        params[name] in domain for name, domain in domains.items()
    )


# Samplers


# Optuna 5 reads the constraints of trials; in Optuna 4 they count if there is a function.
_CONSTRAINED: dict[str, Any] = (
    {}
    if hasattr(FrozenTrial, "constraints")
    else {"constraints_func": lambda trial: trial.system_attrs["constraints"]}
)

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed: optuna.samplers.BruteForceSampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(
        seed=seed, population_size=POPULATION, **_CONSTRAINED
    ),
    # The defaults of Optuna 5, given to Optuna 4 too
    "tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, constant_liar=True, **_CONSTRAINED
    ),
}


def _make_sampler(sampler: Sampler, seed: int) -> BaseSampler:
    r"""Returns a sampler for one draw."""

    method: Any = SAMPLERS[sampler](seed) if isinstance(sampler, str) else sampler(seed)

    if not isinstance(method, BaseSampler):
        raise UserError(
            f"sampler returned {method!r}, but must return an optuna.samplers.BaseSampler."
        )

    if isinstance(method, optuna.samplers.CmaEsSampler):
        raise UserError(
            "sampler returned a CmaEsSampler, which keeps its state in the study as a pickle "
            "and so cannot learn here. Return another one, such as a TPESampler."
        )

    return method


def _prepare(method: BaseSampler, trials: Sequence[FrozenTrial], objectives: int) -> None:
    r"""Adds to the trials of a view what a sampler does not work out by itself.

    A Gaussian process learns from complete trials alone: diverged ones get the worst values. A
    genetic algorithm numbers the generations of complete trials, in their order.
    """

    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]

    if isinstance(method, optuna.samplers.GPSampler) and complete:
        worst = [max(values) for values in zip(*(t.values for t in complete), strict=True)]

        for trial in trials:
            if trial.system_attrs == INFEASIBLE:
                trial.state, trial.values = TrialState.COMPLETE, worst
    elif isinstance(method, optuna.samplers.NSGAIISampler | optuna.samplers.NSGAIIISampler):
        notes: dict[int, dict[str, Any]] = {}

        for i, trial in enumerate(complete):
            newest = complete[max(0, i - (method.population_size or 0)) : i]
            method.get_trial_generation(memory_study(newest, objectives, notes=notes), trial)
            trial.system_attrs = trial.system_attrs | notes.pop(trial.number, {})


def method_text(method: Any) -> str:
    r"""Returns the class and the parameters of a sampler or pruner, to be recorded.

    Example:
        >>> method_text(optuna.pruners.MedianPruner(n_warmup_steps=2))
        'MedianPruner(n_startup_trials=5, n_warmup_steps=2, interval_steps=1, n_min_trials=1)'
    """

    fields = {name.lstrip("_"): value for name, value in vars(method).items()}
    texts = []

    for name in inspect.signature(type(method)).parameters:
        value = fields.get(name)

        if isinstance(value, str | int | float | tuple):
            texts.append(f"{name}={value!r}")
        elif isinstance(value, BaseSampler | optuna.pruners.BasePruner):
            texts.append(f"{name}={method_text(value)}")

    return f"{type(method).__name__}({', '.join(texts)})"


# Draws


def propose(
    draw: Draw,
    records: Sequence[TrialRecord],
    seed: int = 0,
    sampler: Sampler = "tpe",
    fixed: dict[str, Any] | None = None,
    current: Distributions | None = None,
    config: Mapping[str, Any] | None = None,
    objectives: int = 1,
    group: Callable[[int], int] | None = None,
) -> tuple[dict[str, Any], FrozenTrial] | None:
    r"""Draws a configuration that no run of a sweep has.

    The draw is a function of the seed, the number of configurations and their values so far.

    Arguments:
        draw: Returns the values of the keys that vary, given an Optuna trial.
        records: All runs of the sweep.
        seed: The seed of all draws of the sweep.
        sampler: A name in :data:`SAMPLERS`, or a function of a seed that returns an Optuna sampler.
        fixed: Parameters, all or some, that the configuration must have.
        current: The distributions of the space, if they are the same for all trials.
        config: The CONFIG that the values vary: two draws that only differ in keys left out are
            one configuration.
        objectives: The number of objectives.
        group: Returns the group of a run by its index from 0: the sampler sees the group of the
            new run alone. By default there is one group.

    A draw in which the space raises is left out, with a warning.

    Returns:
        The values and Optuna's trial, which is not part of a study yet; or None if there is
        nothing new to draw.

    Raises:
        UserError: If the space raises in every draw.
    """

    config, fixed, firsts = config or {}, fixed or {}, average_seeds(records)
    number = max((record.index for record in records), default=0)
    proposal = _Proposal(draw, number, (seed, len(firsts)), fixed)
    attempts = proposal.untried(records, current)

    # Repetitions of a sampler say nothing about the space: a model that is sure repeats itself.
    if sampler != "grid":
        kin = [r for r in firsts if group is None or group(r.index - 1) == group(number)]
        trials = [] if sampler == "random" else view(kin, current, objectives)
        attempts = chain(proposal.sampled(sampler, trials, objectives), attempts)

    with quiet_optuna(logging.ERROR):  # GPSampler warns of packages that would make it faster
        try:
            for values, trial in attempts:
                if values is not None and not any(
                    _alike(values, record.config, config) for record in records
                ):
                    drawn = trial.params, trial.distributions
                    return values, frozen_trial(number, TrialState.RUNNING, None, *drawn)

                if trial.params.keys() <= fixed.keys():
                    break  # another draw would be the same
        except _NotInSpace as error:
            logger.warning("%s", error)
        except _Infinite as error:
            if sampler == "grid":
                raise UserError(f"{error}, which sampler='grid' needs") from error
        finally:
            proposal.warn()

    if proposal.attempts and proposal.rejected.total() == proposal.attempts:
        (why, _), *_ = proposal.rejected.most_common(1)
        raise UserError(f"SPACE gave no configuration in {proposal.attempts} draws: {why}")

    return None


class _NotInSpace(ValueError):
    pass


class _Infinite(ValueError):
    pass


class _Proposal:
    r"""The attempts at one new configuration, see :func:`propose` for the arguments."""

    def __init__(
        self, draw: Draw, number: int, seeds: tuple[int, int], fixed: Mapping[str, Any]
    ) -> None:
        self.draw = draw
        self.number = number
        self.seeds = seeds
        self.fixed = fixed
        self.attempts = 0
        self.rejected = Counter[str]()  # attempts by the error that the space raised

    def sampled(
        self, sampler: Sampler, trials: list[FrozenTrial], objectives: int
    ) -> Iterator[Attempt]:
        r"""Yields draws of a sampler that sees some trials, and then draws at random."""

        for i in range(REDRAWS):
            method = _make_sampler(sampler if 2 * i < REDRAWS else "random", self._seed(i))
            _prepare(method, trials, objectives)

            yield self._attempt(method, trials, objectives)

    def untried(
        self, records: Sequence[TrialRecord], current: Distributions | None
    ) -> Iterator[Attempt]:
        r"""Yields what no record has tried, by :class:`optuna.samplers.BruteForceSampler`.

        The sampler repeats itself once it has tried all of the space.
        """

        tried = {frozenset(record.trial.params.items()) for record in records}
        known = [(r.trial.params, current or r.trial.distributions) for r in records]
        trials = [
            self._searched(params, distributions)
            for params, distributions in known
            if _has(_domains(distributions), params)
            and all(params.get(name, value) == value for name, value in self.fixed.items())
        ]

        for i in range(SEARCHED):
            values, attempt = self._attempt(SAMPLERS["grid"](self._seed(i)), trials)
            key = frozenset(attempt.params.items())

            if key in tried:
                return

            yield values, attempt

            tried.add(key)
            trials.append(self._searched(attempt.params, attempt.distributions))

    def _seed(self, i: int) -> int:
        entropy = np.random.SeedSequence((*self.seeds, i))

        return int(entropy.generate_state(1)[0])

    def _attempt(
        self, method: BaseSampler, trials: Sequence[FrozenTrial], objectives: int = 1
    ) -> Attempt:
        r"""Draws once. The sampler is asked for parameters that are neither fixed nor single."""

        def answer(name: str, distribution: BaseDistribution) -> Any:
            domain = domain_of(distribution)

            if name in self.fixed:
                if self.fixed[name] not in domain:
                    raise _NotInSpace(f"{name}={self.fixed[name]!r} is not in SPACE: {domain}.")

                return self.fixed[name]
            elif distribution.single():
                return _first(distribution)
            elif name in joint and joint[name] in domain:
                return joint[name]

            if isinstance(method, optuna.samplers.BruteForceSampler):
                _check_finite(name, distribution)

            try:
                return method.sample_independent(study, new, name, distribution)
            except Exception as error:
                faults.append(error)
                raise

        faults: list[Exception] = []  # of the sampler itself
        trial = CallbackTrial(answer, self.number)
        new = frozen_trial(self.number, TrialState.RUNNING, None, trial.params)
        study = memory_study([*trials, new], objectives)
        joint = method.sample_relative(study, new, method.infer_relative_search_space(study, new))

        self.attempts += 1

        try:
            return self.draw(trial), trial
        except (_NotInSpace, _Infinite):
            raise
        except (Exception, SystemExit) as error:  # of the user's own function
            if error in faults:
                raise

            why = str(error) if isinstance(error, UserError) else script_error(error)

            if trial.params.keys() <= self.fixed.keys():  # another draw would be the same
                raise UserError(why) from error

            self.rejected[why] += 1

            return None, trial

    def warn(self) -> None:
        r"""Says in how many attempts the space raised, and what."""

        for why, n in self.rejected.items():
            logger.warning("left out %d of %d draws of SPACE: %s", n, self.attempts, why)

    def _searched(self, params: dict[str, Any], distributions: Distributions) -> FrozenTrial:
        r"""Returns a trial of the parameters that are searched: neither fixed nor single."""

        free = {
            name: distribution
            for name, distribution in distributions.items()
            if name not in self.fixed and not distribution.single()
        }

        for name, distribution in free.items():
            _check_finite(name, distribution)

        return frozen_trial(-1, TrialState.PRUNED, None, params, free)


def _check_finite(name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, FloatDistribution) and distribution.step is None:
        raise _Infinite(f"{name} has no finite set of options")


def _first(distribution: Any) -> Any:
    return distribution.low if hasattr(distribution, "low") else distribution.choices[0]


def sample(draw: Draw, count: int) -> list[tuple[dict[str, Any], CallbackTrial]]:
    r"""Returns configurations that are drawn at random, for checks, and their trials.

    Draws that the space rejects by :class:`optuna.TrialPruned` are left out.
    """

    drawn, answer = [], random_answer(0)

    for number in range(count):
        with suppress(optuna.TrialPruned):
            trial = CallbackTrial(answer, number)
            drawn.append((draw(trial), trial))

    return drawn


def random_answer(seed: int) -> Answer:
    r"""Returns a function that draws the value of a parameter at random."""

    sampler, new = optuna.samplers.RandomSampler(seed=seed), frozen_trial(0, TrialState.RUNNING)

    return lambda name, x: sampler.sample_independent(_no_study(), new, name, x)


@cache
def _no_study() -> optuna.Study:
    with quiet_optuna():
        return memory_study([])


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

            try:
                check_distribution_compatibility(before, distribution)
            except ValueError as error:
                raise UserError(
                    f"SPACE suggests {name!r} from {domain_of(before)} and from "
                    f"{domain_of(distribution)}, which sampler='tpe' cannot learn from. Give each "
                    f"its own name, as '{name}_a' and '{name}_b': names need not be keys of CONFIG."
                ) from error


def draw_summary(draw: Draw, count: int = 32) -> list[str]:
    r"""Returns what draws have in common: bounds and options of two of them, values of all.

    It is the same wherever and by whatever version of Optuna they are drawn, unless the space
    depends on more than what is drawn: bounds that follow from another parameter are left out.
    """

    parameters, values = Counter[str](), Counter[str]()
    draws = sample(draw, count)

    for drawn, trial in draws:
        values.update(f"{key}={format_value(value)}" for key, value in drawn.items())

        for name, distribution in trial.distributions.items():
            kind, attributes = json.loads(distribution_to_json(distribution)).values()
            parameters.update(f"{name}: {kind} {key} {x}" for key, x in attributes.items())

    common = {text for text, n in parameters.items() if n > 1}

    return sorted(common | {text for text, n in values.items() if n == len(draws)})


def distributions(draw: Draw) -> Distributions:
    r"""Returns the distributions that a space draws from, which must be the same for all trials."""

    trial = CallbackTrial(lambda name, distribution: _first(distribution))
    draw(trial)

    return trial.distributions


def importances(records: Sequence[TrialRecord]) -> dict[str, tuple[float, float, float]]:
    r"""Returns how much each parameter matters for the first objective, from most to least.

    That is its share, as Optuna's dashboard shows it, and the interval that has 90 % of its shares
    over trials that are drawn again with replacement. Nothing is returned while fewer than 10 trials
    are complete: it would be noise.

    References:
        | PED-ANOVA: Efficiently Quantifying Hyperparameter Importance (Watanabe et al., 2023)
        | https://arxiv.org/abs/2304.10255
    """

    whole = (record for record in average_seeds(records) if record.state == "complete")
    complete = [replace(record, shown=None) for record in whole]  # also if that is hidden
    objectives = max((len(record.finals) for record in complete), default=0) or 1
    trials = [t for t in view(complete, None, objectives) if t.state == TrialState.COMPLETE]

    if len(trials) < TELLING:
        return {}

    rng = random.Random(0)
    shares = _shares(trials)
    again = [_shares(rng.choices(trials, k=len(trials)), list(shares)) for _ in range(RESAMPLES)]

    return {
        name: (share, *np.quantile([x.get(name, 0.0) for x in again], (0.05, 0.95)).tolist())
        for name, share in shares.items()
    }


def _shares(trials: Sequence[FrozenTrial], names: list[str] | None = None) -> dict[str, float]:
    r"""Returns the importances of parameters, by default all, or none if no parameter varies."""

    try:
        with quiet_optuna(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            study = memory_study(trials, len(trials[0].values))

            return optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                params=names,
                target=lambda trial: float(trial.values[0]),
            )
    except (RuntimeError, ValueError):
        return {}


def _alike(a: Mapping[str, Any], b: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    r"""Returns whether two choices of values come to the same; CONFIG has what they lack."""

    return all(
        _plain(a.get(key, config.get(key))) == _plain(b.get(key, config.get(key)))
        for key in {**a, **b}
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON makes lists of tuples
