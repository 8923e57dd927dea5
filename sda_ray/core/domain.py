r"""Domains: what a key of CONFIG may be in a sweep, as records, as text and as JSON."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import Config, check_value, format_value, parse_value
from .errors import UserError
from .keys import show

__all__ = [
    "Choice",
    "Range",
    "Space",
    "choice",
    "decode",
    "describe",
    "encode",
    "integer",
    "loguniform",
    "space_from_json",
    "space_to_json",
    "split",
    "uniform",
]


@dataclass(frozen=True)
class Choice:
    r"""Creates a set of options, see :func:`choice`."""

    options: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(show(o) for o in self.options)


@dataclass(frozen=True)
class Range:
    r"""Creates an interval, bounds included, see :func:`uniform` and :func:`integer`.

    Arguments:
        low: The lower bound.
        high: The upper bound.
        log: Whether values are drawn uniformly in the logarithm.
        step: The distance of two values; `None` for real numbers.
    """

    low: Any
    high: Any
    log: bool = False
    step: Any = None

    def __str__(self) -> str:
        log = " (log)" if self.log else ""
        step = "" if self.step in (None, 1) else f" in steps of {self.step}"
        return f"{self.low} to {self.high}{step}{log}"


# Values are Choice or Range; a dict of both would have to be annotated to pass as such.
Space = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


def choice(*options: Any) -> Choice:
    r"""Returns the choice between options, given one by one, which have no order."""

    return Choice(tuple(_freeze(o) for o in options))


def uniform(low: float, high: float) -> Range:
    r"""Returns the real numbers between two bounds."""

    return Range(low, high)


def loguniform(low: float, high: float) -> Range:
    r"""Returns the real numbers between two positive bounds, by their logarithm."""

    return Range(low, high, log=True)


def integer(low: int, high: int, log: bool = False, step: int = 1) -> Range:
    r"""Returns the integers between two bounds, both included.

    Arguments:
        low: The lowest integer.
        high: The highest integer.
        log: Whether they are drawn by their logarithm.
        step: The distance of two integers.
    """

    return Range(low, high, log=log, step=step)


def split(name: str) -> list[str]:
    r"""Returns the keys in a name of a space: one, or a group joined by commas."""

    return [key.strip() for key in name.split(",")]


def encode(name: str, option: Any) -> Any:
    r"""Returns an option as a scalar, which :func:`decode` turns back: tuples become text.

    Tuples do not survive in a study's storage (Optuna 5.0 compares them with the lists that JSON
    makes of them).
    """

    if "," in name:
        return ";".join(map(format_value, option))

    return format_value(option) if isinstance(option, tuple) else option


def decode(params: Mapping[str, Any]) -> Config:
    r"""Returns the values that parameters of a trial stand for, typed by the keys of CONFIG.

    Example:
        >>> decode({"hidden_channels,hidden_blocks": "8,16;1,2", "learning_rate": 1e-3})
        {'hidden_channels': (8, 16), 'hidden_blocks': (1, 2), 'learning_rate': 0.001}

    Raises:
        UserError: If a key is unknown or a value not accepted.
    """

    values: Config = {}

    for name, param in params.items():
        keys = split(name)
        parts = str(param).split(";") if len(keys) > 1 else [param]

        if len(parts) != len(keys):
            raise UserError(f"{name} is {show(param)}, but must have {len(keys)} parts.")

        for key, part in zip(keys, parts, strict=True):
            value = parse_value(key, part) if isinstance(part, str) else part
            values[key] = check_value(key, value)

    return values


def describe(space: Space) -> dict[str, str]:
    r"""Returns a short text for each key or group of a space; for a function, its docstring's."""

    if callable(space):
        text = (space.__doc__ or "a function of the trial").strip().split("\n")[0]
        return {getattr(space, "__name__", "SPACE"): text}

    return {name: str(domain) for name, domain in space.items()}


def space_to_json(space: Space) -> dict[str, Any] | None:
    r"""Returns a space as an object of JSON; `None` if it is a function, which JSON cannot hold."""

    if callable(space):
        return None

    return {name: _to_json(domain) for name, domain in space.items()}


def space_from_json(obj: dict[str, Any]) -> Space:
    r"""Returns the space that :func:`space_to_json` wrote.

    Raises:
        UserError: If the object is something else.
    """

    try:
        return {name: _from_json(domain) for name, domain in obj.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{show(obj)} is not a recorded SPACE.") from e


def _to_json(domain: Choice | Range) -> dict[str, Any]:
    if isinstance(domain, Choice):
        return {"choice": list(domain.options)}

    return {"range": [domain.low, domain.high], "log": domain.log, "step": domain.step}


def _from_json(obj: dict[str, Any]) -> Choice | Range:
    if "choice" in obj:
        return choice(*obj["choice"])

    low, high = obj["range"]
    return Range(low, high, log=obj["log"], step=obj["step"])


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value
