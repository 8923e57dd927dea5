r"""All combinations of the options of a space, in order, and single parameters of it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from .promotion import Record
from .seen import Asking, Attempt, Distributions

__all__ = ["Endless", "Misfit", "combinations", "first", "take"]


def combinations(
    draw: Attempt,
    records: Sequence[Record],
    fixed: Mapping[str, Any],
    current: Distributions | None,
) -> Iterator[tuple[dict[str, Any] | None, Asking]]:
    r"""Yields all combinations of options; the parameter that is asked for last changes first."""

    tried = {frozenset(record.trial.params.items()) for record in records}

    if current is not None:
        # Those tried before are passed over without a draw
        axes = [_options(name, current[name], fixed) for name in current]

        for options in itertools.product(*axes):
            params = dict(zip(current, options, strict=True))

            if frozenset(params.items()) not in tried:
                trial = Asking(lambda name, _, params=params: params[name])  # type: ignore[misc]
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

        values = draw(trial := Asking(answer))

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
