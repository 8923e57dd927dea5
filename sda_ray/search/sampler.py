r"""Draws: which configuration a sweep tries next.

Optuna's samplers never see the study of a sweep but a view of it in memory, which is made anew for
each draw, see :func:`view`. A draw is thus a function of the seed and of the values of the runs so
far, and nothing that a sampler notes in a study outlives the draw.
"""

import copy
import inspect
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from ..core import Range, UserError, format_value
from .promotion import TrialRecord

__all__ = [
    "CallbackTrial",
    "Distributions",
    "Draw",
    "Sampler",
    "check_kinds",
    "distributions",
    "draw_summary",
    "frozen_trial",
    "has_value",
    "importances",
    "memory_study",
    "method_text",
    "propose",
    "quiet_optuna",
    "sample",
    "view",
]

logger = logging.getLogger(__name__)

REDRAWS = 100  # draws without a new configuration, after which the space is searched exhaustively
SEARCHED = 1024  # draws of that search, after which the space counts as exhausted
POPULATION = 20  # runs in a generation of NSGA-II: sweeps have tens to hundreds of runs

Draw = Callable[[Any], dict[str, Any]]  # the values of the keys that vary, for an Optuna trial
Distributions = dict[str, BaseDistribution]
Sampler = str | Callable[[int], BaseSampler]  # a name, or a function of a seed
Attempt = tuple[dict[str, Any] | None, "CallbackTrial"]  # no values if they are not accepted


@contextmanager
def quiet_optuna(level: int = optuna.logging.WARNING) -> Iterator[None]:
    r"""Silences Optuna's messages below a level, and its warnings about experimental features."""

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

    Arguments:
        answer: Returns the value of a parameter, given its name and distribution.
        number: The number of the trial.
    """

    def __init__(self, answer: Callable[[str, BaseDistribution], Any], number: int = 0) -> None:
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

    Arguments:
        trials: The trials.
        objectives: The number of objectives.
        name: The name of the study.
        notes: Is given what is noted in trials, by their numbers.
    """

    storage = _MemoryStorage(trials, {} if notes is None else notes)

    return optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * objectives
    )


def frozen_trial(
    number: int,
    state: TrialState,
    values: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    distributions: Distributions | None = None,
    system_attrs: dict[str, Any] | None = None,
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
        params=dict(params or {}),
        distributions=distributions or {},
        user_attrs={},
        system_attrs=system_attrs or {},
        intermediate_values=curve or {},
    )


def view(
    records: Iterable[TrialRecord], current: Distributions | None = None, objectives: int = 1
) -> list[FrozenTrial]:
    r"""Returns the runs of a sweep as a sampler sees them.

    Complete runs are complete, paused ones pruned with their curve, those in flight running (the
    sampler keeps away from them) and diverged ones infeasible. Failed runs are absent, and so are
    runs with parameters that are not in the space any more, or with too few objectives.

    Arguments:
        records: The runs.
        current: The distributions of the space, if they are the same for all trials. A parameter
            whose distribution differs from trial to trial would leave the joint space.
        objectives: The number of objectives.
    """

    trials = []

    for record in records:
        distributions = record.trial.distributions if current is None else current

        outside = current is not None and not _has_params(current, record.trial.params)

        if record.state == "failed" or outside:
            continue

        if (trial := _seen_by_sampler(record, distributions, objectives)) is not None:
            trials.append(trial)

    return trials


def _seen_by_sampler(
    record: TrialRecord, distributions: Distributions, objectives: int
) -> FrozenTrial | None:
    diverged = record.outcome == "diverged"
    curve = {} if diverged or objectives > 1 else record.visible
    values: tuple[float, ...] | None = (curve[max(curve)],) if curve else None
    state = TrialState.PRUNED

    if record.outcome == "complete":
        state = TrialState.COMPLETE
        values = values if objectives == 1 else record.finals

        if values is None or len(values) != objectives:
            return None
    elif record.outcome == "running" and not record.paused:
        state, values = TrialState.RUNNING, None

    params, notes = record.trial.params, {"constraints": [float(diverged)]}

    return frozen_trial(record.index - 1, state, values, params, distributions, notes, curve)


def has_value(distribution: BaseDistribution, value: Any) -> bool:
    r"""Returns whether a distribution has a value."""

    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices

    assert isinstance(distribution, FloatDistribution | IntDistribution)

    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False

    steps = 0.0 if distribution.step is None else (value - distribution.low) / distribution.step

    return bool(
        distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-8
    )


def _has_params(distributions: Distributions, params: Mapping[str, Any]) -> bool:
    return params.keys() == distributions.keys() and all(
        has_value(distribution, params[name]) for name, distribution in distributions.items()
    )


# Samplers


def _is_infeasible(trial: FrozenTrial) -> bool:
    return any(violation > 0 for violation in trial.system_attrs["constraints"])


def _make_sampler(sampler: Sampler, seed: int) -> BaseSampler:
    r"""Returns a sampler for one draw."""

    constraints: dict[str, Any] = {}

    # Optuna 5 reads the constraints of trials; in Optuna 4 they count if there is a function.
    if not hasattr(FrozenTrial, "constraints"):
        constraints["constraints_func"] = lambda trial: trial.system_attrs["constraints"]

    if callable(sampler):
        method = sampler(seed)

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
    elif sampler == "tpe":
        # The defaults of Optuna 5, given to Optuna 4 too
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, **constraints
        )
    elif sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    elif sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed, **constraints)

    return optuna.samplers.RandomSampler(seed=seed)


def _prepare(method: BaseSampler, trials: list[FrozenTrial], objectives: int) -> list[FrozenTrial]:
    r"""Returns the trials with what a sampler does not work out by itself."""

    if isinstance(method, optuna.samplers.GPSampler):
        return _with_diverged(trials)
    elif isinstance(method, optuna.samplers.NSGAIISampler | optuna.samplers.NSGAIIISampler):
        return _with_generations(method, trials, objectives)

    return trials


def _with_diverged(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    r"""Gives diverged runs the worst values: a Gaussian process learns from complete ones alone."""

    complete = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
    worst = [max(values) for values in zip(*complete, strict=True)]
    known = []

    for trial in trials:
        if worst and _is_infeasible(trial):
            trial = copy.copy(trial)
            trial.state, trial.values = TrialState.COMPLETE, worst

        known.append(trial)

    return known


def _with_generations(
    method: Any, trials: Sequence[FrozenTrial], objectives: int
) -> list[FrozenTrial]:
    r"""Lets a genetic algorithm number the generations of complete runs, in the order of runs."""

    known: list[FrozenTrial] = []
    notes: dict[int, dict[str, Any]] = {}

    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            newest = known[-method.population_size :]
            method.get_trial_generation(memory_study(newest, objectives, notes=notes), trial)
            trial.system_attrs.update(notes.pop(trial.number))
            known.append(trial)

    return list(trials)


def _one_of_each_kind(trials: Sequence[FrozenTrial], objectives: int) -> optuna.Study:
    r"""Returns a study of one trial for each set of parameters: TPE infers the same space."""

    kinds: dict[frozenset[str], FrozenTrial] = {}

    for trial in trials:
        if trial.state.is_finished():
            kinds.setdefault(frozenset(trial.distributions), trial)

    return memory_study(list(kinds.values()), objectives)


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

    The draw is a function of the seed, the number of runs and their values so far.

    Arguments:
        draw: Returns the values of the keys that vary, given an Optuna trial.
        records: All runs of the sweep.
        seed: The seed of all draws of the sweep.
        sampler: `tpe`, `random`, `gp`, `nsga2`, `grid`, or a function of a seed that returns an
            Optuna sampler.
        fixed: Parameters, all or some, that the configuration must have.
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

    attempts = _Attempts(draw, records, seed, sampler, fixed or {}, current, objectives, group)

    with quiet_optuna(logging.ERROR):  # GPSampler warns of packages that would make it faster
        try:
            for values, trial in attempts:
                if values is not None and not any(
                    _alike(values, record.config, config or {}) for record in records
                ):
                    number = len(records)
                    drawn = trial.params, trial.distributions
                    return values, frozen_trial(number, TrialState.RUNNING, None, *drawn)
        except _NotInSpace as error:
            logger.warning("%s", error)

    return None


class _NotInSpace(ValueError):
    r"""Raised if fixed parameters are not in the space."""


class _Infinite(ValueError):
    r"""Raised if a parameter has infinitely many values, in an exhaustive search."""


@dataclass
class _Attempts:
    r"""Creates the draws of one proposal, see :func:`propose` for the arguments.

    First come draws of the sampler, then of the rest of the space if that is finite. Repetitions
    of a sampler say nothing about the space: a model that is sure of itself repeats itself.
    """

    draw: Draw
    records: Sequence[TrialRecord]
    seed: int
    sampler: Sampler
    fixed: Mapping[str, Any]
    current: Distributions | None
    objectives: int
    group: Callable[[int], int] | None
    rejected: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[Attempt]:
        if self.sampler != "grid":
            for attempt in self._sampled():
                yield attempt

                if attempt[1].params.keys() <= self.fixed.keys():
                    return  # another draw would be the same

        try:
            yield from self._exhaustive()
        except _Infinite as error:
            if self.sampler == "grid":
                raise UserError(f"{error}, which sampler='grid' needs") from error

    @property
    def number(self) -> int:
        return len(self.records)

    def _seed(self, i: int) -> int:
        entropy = np.random.SeedSequence((self.seed, self.number, i))

        return int(entropy.generate_state(1)[0])

    def _try(self, ask: Callable[[str, BaseDistribution], Any]) -> Attempt:
        r"""Draws once. The function is asked for parameters that are neither fixed nor single."""

        def answer(name: str, distribution: BaseDistribution) -> Any:
            if name in self.fixed:
                if not has_value(distribution, self.fixed[name]):
                    raise _NotInSpace(
                        f"{name}={self.fixed[name]!r} is not in SPACE: {distribution}."
                    )

                return self.fixed[name]
            elif distribution.single():
                return _first(name, distribution)

            return ask(name, distribution)

        trial = CallbackTrial(answer, self.number)

        try:
            return self.draw(trial), trial
        except UserError as error:
            if trial.params.keys() <= self.fixed.keys():  # another draw would be the same
                raise

            if (why := str(error)) not in self.rejected:
                self.rejected.add(why)
                logger.warning("a configuration that SPACE has drawn is left out: %s", why)

            return None, trial

    def _sampled(self) -> Iterator[Attempt]:
        group, number = self.group, self.number
        kin = [r for r in self.records if group is None or group(r.index - 1) == group(number)]
        trials = [] if self.sampler == "random" else view(kin, self.current, self.objectives)
        named = self.sampler == "tpe"
        study: optuna.Study | None = None
        new = frozen_trial(number, TrialState.RUNNING)

        for i in range(REDRAWS):
            method = _make_sampler(self.sampler if 2 * i < REDRAWS else "random", self._seed(i))

            if study is None:
                trials = _prepare(method, trials, self.objectives)
                study = memory_study([*trials, new], self.objectives)
                kinds = _one_of_each_kind(trials, self.objectives)

            space = method.infer_relative_search_space(kinds if named else study, new)
            joint = method.sample_relative(study, new, space)

            def ask(
                name: str,
                distribution: BaseDistribution,
                method: BaseSampler = method,
                joint: dict[str, Any] = joint,
                study: optuna.Study = study,
            ) -> Any:
                if name in joint and has_value(distribution, joint[name]):
                    return joint[name]

                return method.sample_independent(study, new, name, distribution)

            yield self._try(ask)

    def _exhaustive(self) -> Iterator[Attempt]:
        r"""Yields configurations that were not tried, by :class:`optuna.samplers.BruteForceSampler`.

        The sampler repeats itself once it has tried all of the space.
        """

        tried = {frozenset(record.trial.params.items()) for record in self.records}
        history = [trial for record in self.records if (trial := self._replay(record))]

        for i in range(SEARCHED):
            method = optuna.samplers.BruteForceSampler(seed=self._seed(i))
            suggested: dict[str, Any] = {}

            def ask(
                name: str,
                distribution: BaseDistribution,
                method: BaseSampler = method,
                suggested: dict[str, Any] = suggested,
            ) -> Any:
                _check_finite(name, distribution)
                asked = frozen_trial(self.number, TrialState.RUNNING, None, suggested)
                study = memory_study([*history, asked])
                suggested[name] = method.sample_independent(study, asked, name, distribution)

                return suggested[name]

            values, attempt = self._try(ask)
            key = frozenset(attempt.params.items())

            if key in tried:
                return

            yield values, attempt

            tried.add(key)
            history.append(
                self._searched(1 + self.number + i, attempt.params, attempt.distributions)
            )

    def _replay(self, record: TrialRecord) -> FrozenTrial | None:
        r"""Returns a run in terms of the space as it is now, or None if it is not part of it."""

        params = record.trial.params

        if any(params.get(name, value) != value for name, value in self.fixed.items()):
            return None

        if self.current is not None:
            if not _has_params(self.current, params):
                return None

            return self._searched(record.index - 1, params, self.current)

        def answer(name: str, distribution: BaseDistribution) -> Any:
            if name not in params or not has_value(distribution, params[name]):
                raise _NotInSpace

            return params[name]

        trial = CallbackTrial(answer)

        try:
            self.draw(trial)
        except _NotInSpace:
            return None
        except UserError:  # rejected, but part of the space
            pass

        return self._searched(record.index - 1, trial.params, trial.distributions)

    def _searched(
        self, number: int, params: Mapping[str, Any], distributions: Distributions
    ) -> FrozenTrial:
        free = {
            name: distribution
            for name, distribution in distributions.items()
            if name not in self.fixed and not distribution.single()
        }

        for name, distribution in free.items():
            _check_finite(name, distribution)

        return frozen_trial(
            number, TrialState.PRUNED, None, {name: params[name] for name in free}, free
        )


def _check_finite(name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, FloatDistribution) and distribution.step is None:
        raise _Infinite(f"{name} has no finite set of options")


def _first(name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]

    return distribution.low  # type: ignore[attr-defined]


def sample(draw: Draw, count: int) -> list[tuple[dict[str, Any], CallbackTrial]]:
    r"""Draws configurations at random, for checks, and the trials that they are of, of no study."""

    with quiet_optuna():
        sampler, study = optuna.samplers.RandomSampler(seed=0), memory_study([])
        new = frozen_trial(0, TrialState.RUNNING)

        def answer(name: str, distribution: BaseDistribution) -> Any:
            return sampler.sample_independent(study, new, name, distribution)

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

    trial = CallbackTrial(_first)
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

    target = None if len(study.directions) == 1 else lambda trial: float(trial.values[0])

    try:
        with quiet_optuna(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()

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
