r"""Whether the SPACE of a sweep has a configuration, and by which parameters."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.config import Config, format_value
from ..core.errors import UserError
from ..core.space import Choice, Range, encode, split
from ..search.sampler import CallbackTrial
from .definition import Sweep

__all__ = ["Answers", "Fit", "fit", "has", "try_draw", "words"]


@dataclass(frozen=True)
class Fit:
    r"""Creates what a configuration is in the eyes of a sweep.

    Arguments:
        params: The parameters of SPACE that stand for it.
        distributions: Their distributions.
        values: The values of CONFIG's keys that they stand for.
        faults: Why SPACE does not have it, a line for each reason.
        differences: In what it differs from the sweep's CONFIG, by the keys outside SPACE.
    """

    params: dict[str, Any] = field(default_factory=dict)
    distributions: dict[str, Any] = field(default_factory=dict)
    values: Config = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)


def fit(sweep: Sweep, config: Config, known: Mapping[str, Any] | None = None) -> Fit:
    r"""Looks for a configuration in the SPACE of a sweep.

    Arguments:
        sweep: The sweep, checked.
        config: The configuration, checked.
        known: The parameters that it was drawn with, if there are any. A SPACE that is a function
            may suggest what is no key of CONFIG.
    """

    faults = _lacking(sweep, config)
    given = {**config, **(known or {})} if callable(sweep.space) else _encoded(sweep, config)
    answers = Answers(given)
    trial = CallbackTrial(answers)
    values: Config = {}

    if not faults:
        values, faults = try_draw(sweep, trial)
        faults += answers.faults.values()
        faults += [
            f"SPACE suggests '{name}', which is no key of CONFIG: what it was cannot be told"
            for name in answers.free
        ]

    if not faults:
        faults = [
            f"{key}={format_value(config[key])} is not what SPACE makes of it, {format_value(x)}"
            for key, x in values.items()
            if config[key] != x
        ]

    inside = set(values) if callable(sweep.space) else {k for n in sweep.space for k in split(n)}
    differences = {
        key: f"{key}={format_value(x)} where the sweep has {format_value(sweep.config[key])}"
        for key, x in config.items()
        if key not in inside and x != sweep.config[key]
    }

    return Fit(trial.params, trial.distributions, values, faults, differences)


def _lacking(sweep: Sweep, config: Config) -> list[str]:
    if callable(sweep.space):
        return []

    return [
        f"{words(name, config)} is not in SPACE, which has {domain}"
        for name, domain in sweep.space.items()
        if not has(domain, _value(name, config))
    ]


def _encoded(sweep: Sweep, config: Config) -> dict[str, Any]:
    assert not callable(sweep.space)

    return {name: encode(name, _value(name, config)) for name in sweep.space}


def _value(name: str, config: Config) -> Any:
    keys = split(name)

    return tuple(config[key] for key in keys) if len(keys) > 1 else config[name]


def words(name: str, config: Config) -> str:
    r"""Returns the values of a key of SPACE, or of a group of keys, as words."""

    return " ".join(f"{key}={format_value(config[key])}" for key in split(name) if key in config)


def has(domain: Choice | Range, value: Any) -> bool:
    r"""Tells whether a value is in a domain."""

    if isinstance(domain, Choice):
        return value in domain.options

    aligned = domain.step is None or (value - domain.low) % domain.step == 0

    return bool(domain.low <= value <= domain.high and aligned)


def try_draw(sweep: Sweep, trial: CallbackTrial) -> tuple[Config, list[str]]:
    r"""Returns the values that a trial draws from the SPACE of a sweep, and what is wrong."""

    try:
        return sweep.draw(trial), []
    except UserError as error:
        return {}, str(error).split("\n")
    except Exception as error:  # of the user's own function
        return {}, [f"SPACE cannot be drawn from: {type(error).__name__}: {error}"]


class Answers:
    r"""Creates what answers an :class:`sda_ray.search.sampler.CallbackTrial` with given values, or texts of them.

    Afterwards `faults` has what is wrong with given values, by name, and `free` the names of what
    was asked for but not given.

    Arguments:
        given: Values by name.
        rng: What draws the rest; if None, they are the first options or the lower bounds.
    """

    def __init__(self, given: Mapping[str, Any], rng: random.Random | None = None) -> None:
        self.given = given
        self.rng = rng
        self.faults: dict[str, str] = {}
        self.free: list[str] = []

    def __call__(self, name: str, distribution: Any) -> Any:
        if name not in self.given:
            self.free.append(name)
            return self._any(distribution)

        given = self.given[name]

        try:
            value = _parse(given, distribution)

            if distribution._contains(distribution.to_internal_repr(value)):
                return value
        except (KeyError, TypeError, ValueError, OverflowError):
            pass

        text = format_value(given)
        self.faults[name] = f"{name}={text} is not in SPACE, which has {_span(distribution)}"

        return self._any(distribution)

    def _any(self, distribution: Any) -> Any:
        rng = self.rng

        if hasattr(distribution, "choices"):
            return rng.choice(distribution.choices) if rng else distribution.choices[0]

        low, high, step = distribution.low, distribution.high, distribution.step

        if rng is None:
            return low
        elif step is None:
            return rng.uniform(low, high)

        return low + step * rng.randint(0, round((high - low) / step))


def _parse(value: Any, distribution: Any) -> Any:
    if hasattr(distribution, "choices"):
        return {_plain(option): option for option in distribution.choices}[_plain(value)]

    number = float(value)

    if isinstance(distribution.low, float):
        return number

    return int(number) if number.is_integer() else int("not an integer")


def _span(distribution: Any) -> str:
    if hasattr(distribution, "choices"):
        return ", ".join(map(str, distribution.choices))

    return str(Range(distribution.low, distribution.high, distribution.log, distribution.step))


def _plain(option: Any) -> str:
    r"""Returns an option as text, for comparison: tuples without brackets and spaces."""

    text = format_value(option).replace(" ", "").strip("()[]").rstrip(",")

    try:
        return repr(float(text))
    except ValueError:
        return text
