r"""Draws: which configuration a sweep tries next.

Optuna's samplers never see the study itself but a view of it, made anew for each draw: its states
are those that a sampler makes the right thing of, see :func:`sda_ray.search.seen.view`.
"""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from ..core.config import format_value
from ..core.domain import Range
from ..core.errors import UserError
from .danger import danger
from .grid import Misfit, combinations, first
from .methods import draws, new
from .promotion import Record
from .seen import Asking, Distributions, Draw, quiet, study_of, view

__all__ = [
    "check_kinds",
    "distributions",
    "importances",
    "outline",
    "propose",
    "quiet",
    "sample",
    "view",
]

logger = logging.getLogger(__name__)

CAUTION = 30  # draws that will probably diverge, after which the best of them is taken

Drawn = tuple[dict[str, Any], FrozenTrial]


def propose(
    draw: Draw,
    records: Sequence[Record],
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

    def attempt(trial: Asking) -> dict[str, Any] | None:
        try:
            return draw(trial)
        except UserError as error:
            if trial.params.keys() <= fixed.keys():  # another draw would be the same
                raise

            if (why := str(error)) not in left_out:
                left_out.add(why)
                logger.warning("a configuration that SPACE has drawn is left out: %s", why)

            return None

    with quiet(logging.ERROR):  # it misses packages that would make a Gaussian process faster
        found = (
            combinations(attempt, records, fixed, current)
            if sampler == "grid"
            else draws(attempt, records, seed, sampler, fixed, current, objectives, group)
        )

        careful = sampler == "tpe" and not fixed
        likely = danger(records if careful else ())
        risky: list[tuple[float, int, Drawn]] = []

        try:
            for values, trial in found:
                if values is None or any(
                    _alike(values, record.config, config or {}) for record in records
                ):
                    continue

                drawn = values, new(len(records), trial.params, trial.distributions)
                risk = likely(trial.params, trial.distributions)

                if risk < 0.5:
                    return drawn

                risky.append((risk, len(risky), drawn))

                if len(risky) == CAUTION:
                    break
        except Misfit as misfit:
            logger.warning("%s", misfit)

    return min(risky)[2] if risky else None


def sample(draw: Draw, count: int) -> list[tuple[dict[str, Any], Asking]]:
    r"""Draws configurations at random, for checks, and the trials that they are of, of no study."""

    with quiet():
        sampler, study = optuna.samplers.RandomSampler(seed=0), study_of([])

        def answer(name: str, distribution: BaseDistribution) -> Any:
            return sampler.sample_independent(study, new(0), name, distribution)

        trials = [Asking(answer, number) for number in range(count)]

        return [(draw(trial), trial) for trial in trials]


def check_kinds(trials: Iterable[Asking]) -> None:
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


def outline(draw: Draw, count: int = 32) -> list[str]:
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

    trial = Asking(first)
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
        with quiet(), warnings.catch_warnings():
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
