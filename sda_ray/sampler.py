r"""Draws: which configuration a sweep tries next.

Optuna's samplers never see the study itself but a view of it, made anew for each draw: its states
are those that a sampler makes the right thing of, see :func:`view`.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from .pruner import Record

__all__ = ["REDRAWS", "SAMPLERS", "propose", "quiet", "sample", "view"]

SAMPLERS = ("tpe", "random", "grid")
REDRAWS = 100  # draws without a new configuration after which the space counts as exhausted

Draw = Callable[[Any], dict[str, Any]]  # the values of the keys that vary, for an Optuna trial


@contextmanager
def quiet() -> Iterator[None]:
    r"""Silences what Optuna says of its own experiments, and of its every step."""

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def propose(
    draw: Draw,
    records: Sequence[Record],
    seed: int = 0,
    sampler: str = "tpe",
    fixed: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], FrozenTrial] | None:
    r"""Draws a configuration that no run of a sweep has.

    What is drawn is a function of the seed, the number of runs and what they have shown so far.

    Arguments:
        draw: Gives the values of the keys that vary, for an Optuna trial.
        records: All runs of the sweep.
        seed: The seed of all draws of the sweep.
        sampler: `tpe`, `random` or `grid`.
        fixed: Parameters, all or some, that the configuration shall have.

    Returns:
        The values and Optuna's trial, which is not part of a study yet; or None if there is
        nothing new to draw.
    """

    methods: Iterator[optuna.samplers.BaseSampler] = (
        _grid(records)
        if sampler == "grid"
        else (_sampler(sampler, (seed, len(records), i)) for i in range(REDRAWS))
    )
    seen = {_text(record.config) for record in records}

    with quiet():
        trials = view(records) if sampler == "tpe" else []

        for method in methods:
            study = optuna.create_study(sampler=method, direction="minimize")
            study.add_trials(trials)

            if fixed:
                study.enqueue_trial(fixed)

            values = draw(study.ask())

            if _text(values) not in seen:
                return values, study.get_trials(deepcopy=False)[-1]

    return None


def sample(draw: Draw, count: int) -> list[dict[str, Any]]:
    r"""Draws configurations at random, for checks. They are part of no study."""

    with quiet():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

        return [draw(study.ask()) for _ in range(count)]


def view(records: Sequence[Record]) -> list[FrozenTrial]:
    r"""Returns the runs of a sweep as a sampler shall see them.

    Complete runs are complete, paused ones pruned with their curve, those in flight running (it
    keeps away from them), diverged ones infeasible, and failed ones absent.
    """

    return [_seen(record) for record in records if record.state != "failed"]


def _seen(record: Record) -> FrozenTrial:
    curve = {} if record.outcome == "diverged" else record.visible
    state = TrialState.PRUNED

    if record.outcome == "complete":
        state = TrialState.COMPLETE
    elif record.outcome == "running" and not record.paused:
        state = TrialState.RUNNING

    return optuna.trial.create_trial(
        state=state,
        value=curve[max(curve)] if curve and state != TrialState.RUNNING else None,
        params=record.trial.params,
        distributions=record.trial.distributions,
        intermediate_values=curve,
        constraints={"diverged": float(record.outcome == "diverged")},
    )


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _sampler(name: str, entropy: tuple[int, int, int]) -> optuna.samplers.BaseSampler:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])

    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)

    return optuna.samplers.RandomSampler(seed=seed)


def _grid(records: Sequence[Record]) -> Iterator["_Grid"]:
    r"""Yields samplers for the combinations after that of the newest run, in order."""

    done: list[tuple[int, int]] = []

    if records:
        trial = records[-1].trial

        for name, distribution in trial.distributions.items():
            options = _options(name, distribution)
            done.append((options.index(trial.params[name]), len(options)))
    else:
        yield (first := _Grid([]))
        done = first.done

    while done:
        i, count = done.pop()

        if i + 1 < count:
            yield (after := _Grid([*(j for j, _ in done), i + 1]))
            done = after.done


class _Grid(optuna.samplers.BaseSampler):
    r"""Creates a sampler that takes given options, by their numbers, and then the first ones.

    What it took stands in `done`, as pairs of a number and the count of options. The parameters
    may depend on each other: the last one changes first.
    """

    def __init__(self, given: list[int]) -> None:
        self.given = given
        self.done: list[tuple[int, int]] = []

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Any, trial: Any, param_name: str, param_distribution: Any
    ) -> Any:
        options = _options(param_name, param_distribution)
        i = self.given[len(self.done)] if len(self.done) < len(self.given) else 0
        self.done.append((i, len(options)))

        return options[i]


def _options(name: str, distribution: Any) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    elif isinstance(distribution, IntDistribution) and not distribution.log:
        return range(distribution.low, distribution.high + 1, distribution.step)

    raise ValueError(f"{name} has no finite set of options, which sampler='grid' needs")
