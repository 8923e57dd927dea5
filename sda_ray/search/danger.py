r"""Which configurations are likely to diverge, going by the runs next to them.

A sampler of Optuna keeps away from runs that diverged; but where the best configurations lie next
to those that diverge, as with learning rates, half of what it draws lies beyond the edge.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from .promotion import Record

__all__ = ["danger"]

NEIGHBOURS = 4

Danger = Callable[[Mapping[str, Any], Mapping[str, BaseDistribution]], float]


def danger(records: Sequence[Record]) -> Danger:
    r"""Returns what tells, from its parameters, how likely a configuration is to diverge: 0 to 1.

    It is the part of the runs next to it that have, each counted by the inverse of its distance.
    In the distance of two runs a parameter counts by how well it tells runs that diverged from
    others: the square of the difference of their means over the sum of their variances.
    """

    if not any(record.state == "diverged" for record in records):
        return lambda params, distributions: 0.0

    known = [r for r in records if r.outcome == "diverged" or r.visible]
    gone = np.array([r.outcome == "diverged" for r in known], dtype=bool)

    def likely(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> float:
        square = np.zeros(len(known))

        for name, distribution in distributions.items():
            values = [r.trial.params.get(name) for r in known]
            gap = _gap(distribution, params[name], values)
            square += _weight(gap, gone) * gap**2

        nearest = np.argsort(square, kind="stable")[:NEIGHBOURS]
        near = 1 / (np.sqrt(square[nearest]) + 1e-9)

        return float(near @ gone[nearest] / near.sum())

    if gone.all() or not gone.any():
        return lambda params, distributions: 0.0

    return likely


def _gap(distribution: Any, here: Any, values: Sequence[Any]) -> np.ndarray:
    r"""Returns how far values, which may be None, are from one of them: 1 is the whole range."""

    if isinstance(distribution, CategoricalDistribution):
        return np.array([value != here for value in values], dtype=float)

    low, high = distribution.low, distribution.high
    places = np.array([here, *values], dtype=float)

    if distribution.log:
        low, high, places = np.log(low), np.log(high), np.log(places)

    gap = (places[1:] - places[0]) / max(high - low, 1e-12)

    return np.where(np.isnan(gap), 1.0, gap)


def _weight(gap: np.ndarray, gone: np.ndarray) -> float:
    a, b = gap[gone], gap[~gone]

    return float((a.mean() - b.mean()) ** 2 / (a.var() + b.var() + 1e-2))
