r"""SPACE: which keys of CONFIG a sweep varies, and the domain of each: a choice or a range."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .config import (
    KEYS,
    Config,
    check_config,
    check_value,
    format_value,
    parse_value,
    to_python,
)
from .errors import UserError, did_you_mean, short_repr

MAX_COMBINATIONS = 4096


# Domains


@dataclass(frozen=True)
class Choice:
    r"""Creates a set of options, see :func:`choice`."""

    options: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(o if isinstance(o, str) else short_repr(o) for o in self.options)

    def __contains__(self, value: Any) -> bool:
        return value in self.options


@dataclass(frozen=True)
class Range:
    r"""Creates an interval, bounds included, see :func:`uniform` and :func:`integer`.

    The step is None for real numbers.

    Example:
        >>> 5 in Range(3, 7, step=2), 4 in Range(3, 7, step=2)
        (True, False)
    """

    low: Any
    high: Any
    log: bool = False
    step: Any = None

    def __str__(self) -> str:
        log = " (log)" if self.log else ""
        step = "" if self.step in (None, 1) else f" in steps of {self.step}"
        return f"{self.low} to {self.high}{step}{log}"

    def __contains__(self, value: Any) -> bool:
        x: Any = value

        if (
            isinstance(value, bool)
            or not isinstance(value, Real)
            or not self.low <= x <= self.high
        ):
            return False

        steps = (x - self.low) / (self.step or math.inf)
        return bool(abs(steps - round(steps)) < 1e-8)


Domain = Choice | Range

# Values are domains; a dict of both kinds would have to be annotated to pass as such.
Space = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


def choice(*options: Any) -> Choice:
    r"""Returns a choice between options without an order, given one by one."""

    return Choice(tuple(_freeze(o) for o in options))


def uniform(low: float, high: float) -> Range:
    r"""Returns the real numbers between two bounds."""

    return Range(low, high)


def loguniform(low: float, high: float) -> Range:
    r"""Returns the real numbers between two positive bounds, drawn by their logarithm."""

    return Range(low, high, log=True)


def integer(low: int, high: int, log: bool = False, step: int = 1) -> Range:
    r"""Returns the integers between two bounds, both included, a step apart."""

    return Range(low, high, log=log, step=to_python(step))


def domain_of(distribution: Any) -> Domain:
    r"""Returns the domain of a distribution of Optuna."""

    if hasattr(distribution, "choices"):
        return Choice(tuple(distribution.choices))

    return Range(distribution.low, distribution.high, distribution.log, distribution.step)


def covers(domain: Domain, other: Domain) -> bool:
    r"""Returns whether a domain is another one with wider bounds or more options."""

    if isinstance(domain, Choice) and isinstance(other, Choice):
        return all(option in domain for option in other.options)
    elif isinstance(domain, Range) and isinstance(other, Range):
        alike = (domain.log, domain.step) == (other.log, other.step)
        return alike and other.low in domain and other.high in domain

    return False


def _freeze(value: Any) -> Any:
    value = to_python(value)
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


# Options as parameters of a trial


def split_group(name: str) -> list[str]:
    r"""Returns the keys in a name of a space: one, or a group joined by commas."""

    return [key.strip() for key in name.split(",")]


def encode_option(name: str, option: Any) -> Any:
    r"""Returns an option as a scalar that :func:`decode_params` turns back: tuples become text.

    Tuples do not survive in a study's storage (Optuna 5.0 compares them with the lists that JSON
    makes of them).
    """

    if "," in name:
        return ";".join(map(format_value, option))

    return format_value(option) if isinstance(option, tuple) else option


def decode_params(params: Mapping[str, Any]) -> Config:
    r"""Returns the values that parameters of a trial stand for, typed by the keys of CONFIG.

    Example:
        >>> decode_params({"hidden_channels,hidden_blocks": "8,16;1,2", "learning_rate": 1e-3})
        {'hidden_channels': (8, 16), 'hidden_blocks': (1, 2), 'learning_rate': 0.001}

    Raises:
        UserError: If a key is unknown or a value not accepted.
    """

    values: Config = {}

    for name, param in params.items():
        keys = split_group(name)
        parts = str(param).split(";") if len(keys) > 1 else [param]

        if len(parts) != len(keys):
            raise UserError(f"{name} is {short_repr(param)}, but must have {len(keys)} parts.")

        for key, part in zip(keys, parts, strict=True):
            value = parse_value(key, part) if isinstance(part, str) else part
            values[key] = check_value(key, value)

    return values


# Spaces


def space_to_json(space: Space) -> dict[str, Any] | None:
    r"""Returns a space as an object for JSON, or `None` if it is a function."""

    if callable(space):
        return None

    return {
        name: {"choice": list(d.options)}
        if isinstance(d, Choice)
        else {"range": [d.low, d.high], "log": d.log, "step": d.step}
        for name, d in space.items()
    }


def domain_from_json(obj: Any) -> Domain:
    r"""Returns the domain in an object that :func:`space_to_json` wrote."""

    if "choice" in obj:
        return choice(*obj["choice"])

    low, high = obj["range"]
    return Range(low, high, log=obj["log"], step=obj["step"])


def space_from_json(obj: dict[str, Any]) -> Space:
    r"""Returns the space that :func:`space_to_json` wrote.

    Raises:
        UserError: If the object is something else.
    """

    try:
        return {name: domain_from_json(domain) for name, domain in obj.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{short_repr(obj)} is not a recorded SPACE.") from e


def check_space(
    space: Any,
    config: Config | None,
    size: int | None = None,
    length: int | None = None,
    pruner: str = "",
    losses: bool = True,
) -> Space:
    r"""Returns a space with values in normal form, if a sweep can draw from all of it.

    Every combination of options (and bounds of ranges) is checked in CONFIG; of more than 4096,
    a random sample. The values that a function returns are checked in :func:`draw_values`.

    It is a dict of keys of CONFIG, or of groups as `"hidden_channels,hidden_blocks"` whose options
    are tuples of one value for each key; or a function of an Optuna trial that returns a dict of
    keys and values. Without `config`, combinations are not tried. `losses` tells whether trials are
    compared by denoising losses, which are those of one window and one `alpha`.

    Raises:
        UserError: If anything is wrong. The message has one line for each error.
    """

    if callable(space):
        return space

    if not isinstance(space, Mapping) or not space:
        raise UserError(
            f"SPACE is {short_repr(space)}, but must be a dict of keys of CONFIG and their ranges, as "
            "{'learning_rate': loguniform(1e-4, 1e-3)}, or a function of a trial."
        )

    checked: dict[str, Domain] = {}
    names = {",".join(split_group(str(name))): domain for name, domain in space.items()}
    keys = [key for name in space for key in split_group(str(name))]
    errors = list(_misplaced(keys, pruner, losses))

    for name, domain in names.items():
        try:
            checked[name] = _check_domain(name, domain)
        except UserError as e:
            errors += str(e).split("\n")

    if not errors and config is not None:
        errors = list(_conflicts(checked, config, size, length))

    if errors:
        raise UserError("\n".join(errors))

    return checked


def draw_values(space: Space, trial: Any, pruner: str = "", losses: bool = True) -> Config:
    r"""Returns values for keys of CONFIG, as a trial suggests them.

    Options that are not scalars are suggested as text, see :func:`encode_option`.

    The trial is one of Optuna, or any object with its `suggest_*` methods.

    Raises:
        UserError: If a function returns anything but keys of CONFIG and accepted values.
    """

    if not callable(space):
        return decode_params(
            {name: _suggest(trial, name, domain) for name, domain in space.items()}
        )

    values = space(_Trial(trial))

    if not isinstance(values, Mapping):
        raise UserError(
            f"SPACE returned {short_repr(values)}, but must return a dict of CONFIG's keys."
        )

    if errors := list(_misplaced(list(values), pruner, losses)):
        raise UserError("\n".join(errors))

    return decode_params(values)


class _Trial:
    r"""A trial from which a function may also suggest options that are not scalars."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        keys = [o if isinstance(o, str | int | float | None) else repr(o) for o in choices]
        options = dict(zip(keys, choices, strict=True))

        if len({(type(key), key) for key in keys}) > len(options):
            raise UserError(
                f"SPACE suggests {name!r} from {short_repr(choices)}, of which some are equal, as 1 "
                "and True are: take texts, and translate them."
            )

        return options[self._trial.suggest_categorical(name, list(options))]


def _suggest(trial: Any, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, [encode_option(name, o) for o in domain.options])

    if domain.step is None:
        return trial.suggest_float(name, domain.low, domain.high, log=domain.log)

    return trial.suggest_int(name, domain.low, domain.high, step=domain.step, log=domain.log)


def _misplaced(keys: list[Any], pruner: str, losses: bool) -> Iterator[str]:
    r"""Yields the errors of the keys of a space, independent of their values."""

    for key in dict.fromkeys(keys):
        if key not in KEYS:
            yield f"SPACE has {short_repr(key)}, which CONFIG has not.{did_you_mean(key, KEYS)}"
        elif keys.count(key) > 1:
            yield f"SPACE has {key!r} {keys.count(key)} times, but may have it once."
        elif losses and key in ("window", "alpha"):
            yield (
                f"SPACE has {key!r}, but the denoising losses of different {key}s are not "
                "comparable. Take objectives=('denoising',) or ('skill',), or set it in CONFIG, and "
                "make a sweep for each."
            )
        elif key == "valid_seed":
            yield (
                "SPACE has 'valid_seed', but runs are compared on the same windows, times and "
                "noise. Set it in CONFIG."
            )
        elif key == "epochs" and pruner != "none":
            yield (
                "SPACE has 'epochs', but pruned trials are compared at equal epochs. Set it in "
                "CONFIG, or take pruner='none'."
            )


def _check_domain(name: str, domain: Any) -> Domain:
    if not isinstance(domain, Choice | Range):
        raise UserError(
            f"SPACE[{name!r}] is {short_repr(domain)}, but must be choice(…), uniform(…), "
            "loguniform(…) or integer(…)."
        )

    keys = split_group(name)

    if any(key not in KEYS for key in keys):
        return domain  # reported by _misplaced

    check: Any = _check_choice if isinstance(domain, Choice) else _check_range

    try:
        return check(keys, domain)
    except UserError as e:
        raise UserError("\n".join(f"SPACE[{name!r}]: {f}" for f in str(e).split("\n")))


def _check_choice(keys: list[str], domain: Choice) -> Choice:
    if not domain.options:
        raise UserError("the choice is empty, but must have at least one option.")

    options: list[Any] = []
    errors = []

    for option in domain.options:
        try:
            options.append(_check_option(keys, option))
        except UserError as e:
            errors.append(str(e))

    if errors and len(domain.options) == 1 and isinstance(domain.options[0], tuple):
        errors.append("choice takes its options one by one, as choice(64, 128).")

    for option, n in Counter(options).items():
        if n > 1:
            errors.append(f"the choice has {short_repr(option)} {n} times, but may have it once.")

    if errors:
        raise UserError("\n".join(errors))

    return Choice(tuple(options))


def _check_option(keys: list[str], option: Any) -> Any:
    if len(keys) == 1:
        return check_value(keys[0], option)

    if not isinstance(option, tuple) or len(option) != len(keys):
        raise UserError(
            f"{short_repr(option)} must be a tuple of {len(keys)} values, one for each key."
        )

    return tuple(check_value(key, value) for key, value in zip(keys, option, strict=True))


def _check_range(keys: list[str], domain: Range) -> Range:
    kind = KEYS[keys[0]].kind if len(keys) == 1 else tuple

    if kind not in (int, float):
        raise UserError("values other than numbers, and groups of keys, take choice(…).")

    if (kind is int) != (domain.step is not None):
        raise UserError(
            f"{keys[0]} is {KEYS[keys[0]].accepts}: take "
            f"{'integer' if kind is int else 'uniform or loguniform'}(…)."
        )

    low, high = (check_value(keys[0], bound) for bound in (domain.low, domain.high))

    if low >= high:
        raise UserError(f"the lower bound {low} must be below the upper bound {high}.")

    if domain.log and low <= 0:
        raise UserError(f"the lower bound is {low}, but must be above 0 for a logarithm.")

    if (step := domain.step) is not None:
        if type(step) is not int or step < 1 or (high - low) % step:
            raise UserError(
                f"step is {short_repr(step)}, but must be a divisor of {high - low}, high - low."
            )

        if domain.log and step != 1:
            raise UserError(f"step is {step}, but must be 1 with log=True.")

        if KEYS[keys[0]].odd and step % 2:
            raise UserError(f"step is {step}, but must be even, since {keys[0]} must be odd.")

    return Range(low, high, domain.log, step)


def _conflicts(
    space: Mapping[str, Domain], config: Config, size: int | None, length: int | None
) -> Iterator[str]:
    r"""Yields the errors of combinations of values that are valid by themselves."""

    combinations = list(_combinations(space))
    found: dict[str, list[Config]] = {}

    for values in combinations:
        try:
            check_config(config | values, size, length)
        except UserError as e:
            for error in str(e).split("\n"):
                found.setdefault(error, []).append(values)

    for error, where in itertools.islice(found.items(), 8):
        if len(where) == len(combinations):
            yield error
        else:
            keys = [key for key in where[0] if key in error] or list(where[0])
            case = " ".join(f"{key}={format_value(where[0][key])}" for key in keys)
            yield f"{error} ({len(where)} of {len(combinations)} combinations, as {case})"

    if len(found) > 8:
        yield f"and {len(found) - 8} errors more."

    if found and {"hidden_channels", "hidden_blocks"} <= space.keys():
        yield (
            "Options of two keys are joined by a key 'hidden_channels,hidden_blocks' with "
            "options as ((64, 128), (3, 3))."
        )


def _combinations(space: Mapping[str, Domain]) -> Iterator[Config]:
    cases = [d.options if isinstance(d, Choice) else (d.low, d.high) for d in space.values()]
    drawn: Any = itertools.product(*cases)

    if math.prod(map(len, cases)) > MAX_COMBINATIONS:
        rng = random.Random(0)
        drawn = ([rng.choice(case) for case in cases] for _ in range(MAX_COMBINATIONS))

    for values in drawn:
        combination: Config = {}

        for name, value in zip(space, values, strict=True):
            keys = split_group(name)
            combination |= zip(keys, value if len(keys) > 1 else (value,), strict=True)

        yield combination
