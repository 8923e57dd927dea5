r"""Known configurations that a sweep shall try: from words, or from a run.

They become parameters in the names and the encoding of the sweep's SPACE, as a trial of Optuna
has them, all or some: what is not given is drawn.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..core.config import (
    Config,
    check_config,
    did_you_mean,
    format_value,
    load_config,
    parse_value,
)
from ..core.errors import UserError
from ..core.keys import KEYS, check_value, show
from ..core.space import Choice, Range, decode, encode, split
from ..runs.path import RunPath
from ..search.sampler import CallbackTrial
from .definition import Sweep
from .fitting import Answers, fit, has, try_draw, words

__all__ = ["parse_item"]

DRAWS = 100  # of a SPACE that is a function, to learn what it suggests


def parse_item(
    text: str, sweep: Sweep, runs: Path, notice: Callable[[str], None] = print
) -> dict[str, Any]:
    r"""Returns the parameters that a configuration to be queued stands for.

    Arguments:
        text: `key=value,key=value,…`, where values may have commas, of all keys of SPACE or some;
            or a run, by path, name or id, whose values of all keys of SPACE are taken.
        sweep: The sweep, checked.
        runs: The directory of all runs.
        notice: Called with a line on what of a run is not taken.

    Raises:
        UserError: If SPACE does not have it. The message has one line for each fault.
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
        faults = _conflicts(sweep.config | decode(params))

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
    r"""Returns the texts of keys. A comma that no `key=` follows is part of a value."""

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
    known = [key for name in sweep.space for key in split(name)]
    faults = [_unknown(key, known, sweep) for key in given if key not in known]
    values: Config = {}
    params = {}

    for key in (key for key in given if key in known):
        try:
            values[key] = check_value(key, parse_value(key, given[key]))
        except UserError as error:
            faults.append(str(error))

    for name, domain in sweep.space.items():
        asked = [key for key in split(name) if key in given]

        if not asked or any(key not in values for key in asked):
            continue

        found = _matching(name, domain, values)

        if len(found) == 1:
            params[name] = encode(name, found[0])
        elif found:
            others = ", ".join(key for key in split(name) if key not in given)
            faults.append(f"{words(name, values)} is of several options. Give {others} as well")
        else:
            faults.append(f"{words(name, values)} is not in SPACE, which has {domain}")

    return params, faults


def _matching(name: str, domain: Choice | Range, values: Config) -> list[Any]:
    r"""Returns the options of a key, or of a group of keys, that have the given values."""

    keys = split(name)

    if len(keys) == 1:
        return [values[name]] if has(domain, values[name]) else []

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

    return f"SPACE has no key {show(key)}, but {names}.{did_you_mean(key, known)}"


def _drawn(sweep: Sweep, given: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    r"""Returns parameters of a SPACE that is a function, as some of its draws take them."""

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
