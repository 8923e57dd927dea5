r"""Confirmation of a sweep: its best configurations, trained again with other seeds.

The first of a leaderboard is the best of N numbers, each of one seed and one validation. Part of
what made it the best is luck: its number is too good on average. A confirmation is a sweep that
trains each of the best configurations with the same few seeds, none of which the first sweep has
used, and validates all of them on other windows, times and noise. The selection knew nothing of
these, so it does not flatter the means over seeds.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from ..core import CONFIG, Config, UserError, check_config, choice
from ..search import average_seeds, rank_key
from .definition import Sweep
from .record import load_record, read_study, read_sweep

SEEDS = ("seed", "valid_seed")  # the keys by which a confirmation differs from its sweep


def estimate(values: Sequence[float]) -> tuple[float, float]:
    r"""Returns the mean of values and its standard error :math:`s / \sqrt{n}`, NaN if unknown.

    Example:
        >>> estimate([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
    """

    count = len(values)
    mean = statistics.fmean(values) if count else math.nan

    return mean, statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan


def kendall(ranks: Sequence[int]) -> float:
    r"""Returns Kendall's :math:`\tau` between different ranks and their order, NaN for fewer than two.

    Example:
        >>> kendall([1, 2, 3]), kendall([3, 2, 1])
        (1.0, -1.0)
    """

    signs = [1 if a < b else -1 for a, b in combinations(ranks, 2)]

    return statistics.fmean(signs) if signs else math.nan


@dataclass(frozen=True)
class Configuration:
    r"""A configuration of a sweep: its rank, run, value and epochs there, and how it does since.

    Arguments:
        config: Its settings, without seeds.
        values: The values of its complete runs, by fresh seed.
        runs: The ids of these runs.
        diverged: The seeds whose runs diverged. It ranks behind all that have fewer of them.
    """

    rank: int
    run: str
    value: float
    epochs: int
    config: Config
    values: dict[int, float] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    diverged: tuple[int, ...] = ()

    @cached_property
    def mean(self) -> tuple[float, float]:
        r"""The mean over fresh seeds, and its standard error."""

        return estimate([*self.values.values()])


@dataclass(frozen=True)
class Confirmation:
    r"""The outcome of a confirmation, as far as its runs have ended.

    Arguments:
        sweep: The name of the confirmed sweep.
        objective: What is compared.
        seeds: The fresh seeds.
        configurations: The best of the sweep, in its order.
        comparable: Whether the sweep's values were measured alike, after as many epochs.
    """

    sweep: str
    objective: str
    seeds: tuple[int, ...]
    configurations: tuple[Configuration, ...]
    comparable: bool = True

    @cached_property
    def order(self) -> list[Configuration]:
        r"""The configurations from best to worst over fresh seeds."""

        return sorted(
            self.configurations,
            key=lambda x: (len(x.diverged), x.mean[0] if x.values else math.inf, x.rank),
        )

    @property
    def tau(self) -> float:
        r"""Kendall's :math:`\tau` between the order of the sweep and that over fresh seeds."""

        return kendall([x.rank for x in self.order])

    def flattery(self, x: Configuration) -> tuple[float, float]:
        r"""Returns by how much a mean exceeds the value in the sweep, and the standard error.

        What the seed and the validation of the sweep did to all of its runs is a part of it.
        """

        return (x.mean[0] - x.value, x.mean[1]) if self.comparable else estimate([])

    def behind(self, x: Configuration) -> tuple[float, float]:
        r"""Returns the mean difference to the first, seed by seed, and its standard error."""

        first = self.order[0].values

        return estimate([value - first[s] for s, value in x.values.items() if s in first])

    @property
    def recommended(self) -> Configuration:
        r"""The winner, unless it is more than a standard error behind the first: then the first."""

        winner, first = self.configurations[0], self.order[0]
        difference, error = self.behind(winner)
        close = len(winner.diverged) == len(first.diverged) and difference <= error

        return winner if close else first

    def as_json(self) -> dict[str, Any]:
        rows = [
            vars(x) | {"mean": x.mean, "behind": self.behind(x), "flattery": self.flattery(x)}
            for x in self.configurations
        ]
        content = vars(self) | {"configurations": rows, "order": [x.rank for x in self.order]}
        content |= {"tau": self.tau, "recommended": self.recommended.rank}

        return json.loads(json.dumps(content), parse_constant=lambda text: None)  # as NaN


def make_confirmation(
    runs: Path, parent: str, name: str, top: int, repeats: int, epochs: int | None
) -> tuple[Sweep, dict[str, Any]]:
    r"""Returns a sweep that confirms another one, and what its record says about that.

    Its trials are the configurations of the best complete runs, each with all seeds.

    Raises:
        UserError: If there is no such sweep, it has not begun, or no run in it is complete.
    """

    record, records = read_sweep(runs, parent), read_study(runs, parent).records()
    definition = record["definition"]
    base, more = CONFIG | definition["config"], {} if epochs is None else {"epochs": epochs}
    best: list[dict[str, Any]] = []

    for r in sorted(average_seeds(records), key=rank_key):
        if r.state != "complete":
            break

        config = _without_seeds(base | r.config | more)

        if all(config != x["config"] for x in best):
            best.append({"run": r.run_id, "value": r.value, "epochs": r.last, "config": config})

    if not best:
        raise UserError(f"sweep '{parent}' has no complete run to confirm: sda-ray sweep {parent}")

    best = best[:top]
    configs = [x["config"] for x in best]
    keys = [key for key, x in configs[0].items() if any(c[key] != x for c in configs)]
    options = [
        tuple(c[key] for key in keys) if len(keys) > 1 else c[keys[0]] for c in configs if keys
    ]
    used = {base["seed"], *(r.config["seed"] for r in records if "seed" in r.config)}
    sweep = Sweep(
        name,
        base | configs[0] | {"valid_seed": _following(base["valid_seed"], 1)[0]},
        ({",".join(keys): choice(*options)} if keys else {})
        | {"seed": choice(*_following(max(used), repeats))},
        len(best) * repeats,
        sampler="grid",
        pruner="none",
        objectives=definition["objectives"],
    )
    confirms = {"sweep": parent, "fingerprint": record["fingerprint"], "top": top, "runs": best}

    return sweep, confirms | {"measured": definition.get("measured")}


def resume_confirmation(
    runs: Path, parent: str, name: str, top: int | None, repeats: int | None, epochs: int | None
) -> Sweep:
    r"""Returns a recorded confirmation, with more seeds if more are wanted.

    Raises:
        UserError: If it confirms another sweep, or anything but the number of seeds differs.
    """

    confirms = read_sweep(runs, name).get("confirms") or {"sweep": None, "top": 0, "runs": []}
    best = confirms["runs"]
    given = {"SWEEP": parent, "--top": top, "epochs": epochs, "--seeds": repeats}
    kept = {"SWEEP": {confirms["sweep"]}, "--top": {confirms["top"], len(best)}}
    kept["epochs"] = {x["config"]["epochs"] for x in best}
    differ = [f"{key} {given[key]}" for key, x in kept.items() if given[key] not in {None, *x}]

    if differ:
        raise UserError(
            f"sweep '{name}' exists, and was not started with {' and '.join(differ)}. Give --name "
            "for another confirmation."
        )

    sweep, _ = load_record(runs, name)
    assert not callable(sweep.space)
    seeds = sweep.space["seed"].options
    seeds += tuple(_following(seeds[-1], (repeats or 0) - len(seeds)))

    return replace(
        sweep, space={**sweep.space, "seed": choice(*seeds)}, trials=len(best) * len(seeds)
    )


def read_confirmation(runs: Path, name: str) -> Confirmation:
    r"""Returns the outcome of a confirmation, as its study has it now."""

    record, records = read_sweep(runs, name), read_study(runs, name).records()
    confirms, definition = record["confirms"], record["definition"]
    base, found = CONFIG | definition["config"], []

    for rank, best in enumerate(confirms["runs"], 1):
        config = _without_seeds(CONFIG | best["config"])
        own = [r for r in records if _without_seeds(base | r.config) == config]
        ended = sorted((r for r in own if r.state == "complete"), key=lambda r: r.config["seed"])
        found.append(
            Configuration(
                rank,
                best["run"],
                best["value"],
                best["epochs"],
                config,
                {r.config["seed"]: r.value for r in ended if r.value is not None},
                tuple(r.run_id for r in ended),
                tuple(r.config["seed"] for r in own if r.state == "diverged"),
            )
        )

    same = definition.get("measured") == confirms["measured"]

    return Confirmation(
        confirms["sweep"],
        definition["objectives"][0],
        tuple(definition["space"]["seed"]["choice"]),
        tuple(found),
        same and all(x.epochs == x.config["epochs"] for x in found),
    )


def _without_seeds(config: Config) -> Config:
    return {key: x for key, x in check_config(config).items() if key not in SEEDS}


def _following(seed: int, count: int) -> list[int]:
    return [(seed + 1 + i) % 2**63 for i in range(count)]
