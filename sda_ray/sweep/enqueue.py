r"""Known configurations and finished runs as parameters of a sweep.

A configuration, given as text or by a run, becomes parameters in the names and the encoding of the
sweep's SPACE, as an Optuna trial has them. A queued configuration may give some of them only: the
others are drawn.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import (
    KEYS,
    Choice,
    Config,
    Domain,
    UserError,
    check_config,
    check_value,
    decode_params,
    did_you_mean,
    domain_of,
    encode_option,
    format_value,
    load_config,
    parse_value,
    short_repr,
    split_group,
)
from ..runs import RunPath
from ..search import CallbackTrial, Study, TrialRecord
from .definition import Sweep

__all__ = [
    "Answers",
    "Fit",
    "bring_all",
    "bring_in",
    "fit",
    "parse_item",
    "try_draw",
    "words",
]


@dataclass(frozen=True)
class Fit:
    r"""A configuration as parameters of a sweep.

    Arguments:
        params: The parameters of SPACE that stand for it.
        distributions: Their distributions.
        values: The values of CONFIG's keys that they stand for.
        faults: The reasons why SPACE does not contain it.
        differences: The keys outside SPACE that differ from the sweep's CONFIG, described.
    """

    params: dict[str, Any] = field(default_factory=dict)
    distributions: dict[str, Any] = field(default_factory=dict)
    values: Config = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)


def fit(sweep: Sweep, config: Config, known: Mapping[str, Any] | None = None) -> Fit:
    r"""Finds the parameters of a configuration in the SPACE of a sweep.

    Arguments:
        sweep: The sweep, checked.
        config: The configuration, checked.
        known: The parameters that it was drawn with, if any. A SPACE that is a function may
            suggest names that are no keys of CONFIG.
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

    inside = (
        set(values) if callable(sweep.space) else {k for n in sweep.space for k in split_group(n)}
    )
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
        if _value(name, config) not in domain
    ]


def _encoded(sweep: Sweep, config: Config) -> dict[str, Any]:
    assert not callable(sweep.space)

    return {name: encode_option(name, _value(name, config)) for name in sweep.space}


def _value(name: str, config: Config) -> Any:
    keys = split_group(name)

    return tuple(config[key] for key in keys) if len(keys) > 1 else config[name]


def words(name: str, config: Config) -> str:
    r"""Returns the values of a key of SPACE, or of a group of keys, as text."""

    return " ".join(
        f"{key}={format_value(config[key])}" for key in split_group(name) if key in config
    )


def try_draw(sweep: Sweep, trial: CallbackTrial) -> tuple[Config, list[str]]:
    r"""Returns the values that a trial draws from the SPACE of a sweep, and what is wrong."""

    try:
        return sweep.draw(trial), []
    except UserError as error:
        return {}, str(error).split("\n")
    except Exception as error:  # of the user's own function
        return {}, [f"SPACE cannot be drawn from: {type(error).__name__}: {error}"]


class Answers:
    r"""Answers a :class:`sda_ray.search.sampler.CallbackTrial` with given values, or texts of them.

    Afterwards `faults` has what is wrong with given values, by name, and `free` the names of what
    was asked for but not given.

    Arguments:
        given: Values by name.
        rng: Draws the other values; if None, they are the first options or the lower bounds.
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

            if value in domain_of(distribution):
                return value
        except (KeyError, TypeError, ValueError, OverflowError):
            pass

        text = format_value(given)
        self.faults[name] = f"{name}={text} is not in SPACE, which has {domain_of(distribution)}"

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


def _plain(option: Any) -> str:
    r"""Returns an option as text, for comparison: tuples without brackets and spaces."""

    text = format_value(option).replace(" ", "").strip("()[]").rstrip(",")

    try:
        return repr(float(text))
    except ValueError:
        return text


DRAWS = 100  # of a SPACE that is a function, to learn what it suggests


def parse_item(
    text: str, sweep: Sweep, runs: Path, notice: Callable[[str], None] = print
) -> dict[str, Any]:
    r"""Returns the parameters of a configuration to be queued.

    Arguments:
        text: `key=value,key=value,…`, where values may have commas, of all keys of SPACE or some;
            or a run, by path, name or id, whose values of all keys of SPACE are taken.
        sweep: The sweep, checked.
        runs: The directory of all runs.
        notice: Called with a line about values of a run that are not used.

    Raises:
        UserError: If SPACE does not contain it. The message has one line for each fault.
    """

    if "=" not in text or (Path(text) / "config.json").is_file():
        found = fit(sweep, load_config(RunPath.find(runs, text).config))
        params, faults = found.params, found.faults

        if found.differences and not faults:
            notice(
                f"--enqueue {text}: only the keys of SPACE are taken. The run has "
                f"{'; '.join(found.differences.values())}."
            )
    else:
        given, faults = _split(text)
        params, more = (_drawn if callable(sweep.space) else _parsed)(sweep, given)
        faults += more

    if not faults and not callable(sweep.space) and params.keys() == sweep.space.keys():
        faults = _conflicts(sweep.config | decode_params(params))

    if faults:
        raise UserError("\n".join(f"--enqueue {text}: {_sentence(fault)}" for fault in faults))

    return params


def _sentence(fault: str) -> str:
    return fault if fault.endswith((".", "?")) else f"{fault}."


def _conflicts(config: Config) -> list[str]:
    try:
        check_config(config)
    except UserError as error:
        return str(error).split("\n")

    return []


def _split(text: str) -> tuple[dict[str, str], list[str]]:
    r"""Returns the texts of keys. A comma without `key=` after it is part of a value."""

    given: dict[str, str] = {}
    faults: list[str] = []
    name = ""

    for piece in text.split(","):
        key, equals, value = piece.partition("=")
        key = key.strip()

        if equals and key in given:
            faults.append(f"{key} is given twice")
        elif equals:
            name, given[key] = key, value.strip()
        elif name:
            given[name] += f",{piece.strip()}"
        else:
            faults.append(f"'{piece}' is not of the form key=value, as batch_size=32")

    return given, faults


def _parsed(sweep: Sweep, given: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    r"""Returns parameters of a SPACE that is a dict, and what is wrong."""

    assert not callable(sweep.space)
    known = [key for name in sweep.space for key in split_group(name)]
    faults = [_unknown(key, known, sweep) for key in given if key not in known]
    values: Config = {}
    params = {}

    for key in (key for key in given if key in known):
        try:
            values[key] = check_value(key, parse_value(key, given[key]))
        except UserError as error:
            faults.append(str(error))

    for name, domain in sweep.space.items():
        asked = [key for key in split_group(name) if key in given]

        if not asked or any(key not in values for key in asked):
            continue

        found = _matching(name, domain, values)

        if len(found) == 1:
            params[name] = encode_option(name, found[0])
        elif found:
            others = ", ".join(key for key in split_group(name) if key not in given)
            faults.append(f"{words(name, values)} is of several options. Give {others} as well")
        else:
            faults.append(f"{words(name, values)} is not in SPACE, which has {domain}")

    return params, faults


def _matching(name: str, domain: Domain, values: Config) -> list[Any]:
    r"""Returns the options of a key, or of a group of keys, that have the given values."""

    keys = split_group(name)

    if len(keys) == 1:
        return [values[name]] if values[name] in domain else []

    assert isinstance(domain, Choice)

    return [
        option
        for option in domain.options
        if all(values.get(key, x) == x for key, x in zip(keys, option, strict=True))
    ]


def _unknown(key: str, known: Iterable[str], sweep: Sweep) -> str:
    names = ", ".join(known)

    if key in KEYS:
        value = format_value(sweep.config[key])
        return f"{key} is not in SPACE, which has {names}. All trials have {key}={value}"

    return f"SPACE has no key {short_repr(key)}, but {names}.{did_you_mean(key, known)}"


def _drawn(sweep: Sweep, given: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    r"""Returns parameters of a SPACE that is a function, as found by draws."""

    seen: dict[str, None] = {}
    wrong: dict[str, str] = {}
    best: dict[str, Any] = {}

    for i in range(DRAWS):
        answers = Answers(given, random.Random(i))
        trial = CallbackTrial(answers)
        _, faults = try_draw(sweep, trial)
        seen |= dict.fromkeys(trial.params)
        wrong |= answers.faults
        taken = {
            name: x for name, x in trial.params.items() if name in given.keys() - answers.faults
        }

        if not faults and len(taken) > len(best):
            best = taken

    faults = [_unknown(name, seen, sweep) for name in given if name not in seen]
    faults += [fault for name, fault in wrong.items() if name not in best]

    if not faults and best.keys() != given.keys():
        faults = [f"SPACE never suggests {' and '.join(given)} at once"]

    return best, faults


def bring_in(study: Study, item: Mapping[str, Any]) -> bool:
    r"""Adds a run to a study as a complete one, in one line of the journal.

    Arguments:
        study: The study, whose lease is held.
        item: What :attr:`Prior.item` returns.

    Returns:
        Whether it was not there before.

    Raises:
        UserError: If the item is something else.
    """

    from optuna.distributions import json_to_distribution
    from optuna.trial import TrialState, create_trial

    records = study.records()

    try:
        record = TrialRecord(
            1 + len(records),
            str(item["run_id"]),
            "complete",
            until=int(item["epochs"]),
            epochs=int(item["epochs"]),
            values={int(epoch): float(value) for epoch, value in item["values"]},
            config=dict(item["config"]),
            source=str(item["source"]),
            finals=tuple(map(float, item["finals"])),
        )
        spans = {k: json_to_distribution(text) for k, text in item["distributions"].items()}
        params = dict(item["params"])
        drawn = create_trial(state=TrialState.PRUNED, params=params, distributions=spans)

        if record.last != record.epochs or len(record.finals) != len(study.objectives):
            raise ValueError("its values are not those of a run that is complete")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{short_repr(item)} is no finished run: {error}.") from error

    if new := all(record.run_id != other.run_id for other in records):
        study.add(record, drawn)

    return new


def bring_all(study: Study, items: Iterable[Mapping[str, Any]]) -> str:
    r"""Adds runs to a study, see :func:`bring_in`, and returns a sentence about it."""

    brought = [bring_in(study, item) for item in items]
    new, before = sum(brought), len(brought) - sum(brought)
    text = f"{new} run{'s' * (new != 1)} brought in, for the sampler to learn from"

    return text + f"; {before} had been before" * (before > 0)
