r"""Known configurations and finished runs as parameters of a sweep.

A configuration, given as text or by a run, becomes parameters in the names and the encoding of the
sweep's SPACE, as an Optuna trial has them. A queued configuration may give some of them only: the
others are drawn.
"""

import math
import re
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import (
    KEYS,
    Choice,
    Config,
    Domain,
    UserError,
    check_value,
    decode_params,
    did_you_mean,
    domain_of,
    encode_option,
    format_value,
    load_config,
    parse_value,
    say,
    script_error,
    short_repr,
    split_group,
)
from ..runs import RunPath, finals, read_history, read_record
from ..search import CallbackTrial, Study, TrialRecord, distributions, random_answer
from .definition import Sweep

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

DRAWS = 100  # of a SPACE that is a function, to learn what it suggests


@dataclass(frozen=True)
class Fit:
    r"""A configuration as parameters of a sweep."""

    params: dict[str, Any]  # of SPACE, which stand for it
    distributions: dict[str, Any]
    values: Config  # of the keys that the parameters stand for
    faults: list[str]  # why SPACE does not contain it
    differences: dict[
        str, str
    ]  # keys outside SPACE that differ from the sweep's CONFIG, described


def fit(sweep: Sweep, config: Config, known: Any = None) -> Fit:
    r"""Finds the parameters of a configuration in the SPACE of a sweep; both are checked.

    A SPACE that is a function may suggest names that are no keys of CONFIG. They are `known` by the
    record of a run that was drawn with them, which may hold anything.
    """

    if callable(sweep.space):
        drawn = known if isinstance(known, dict) else {}
        trial, values, faults = _replay(sweep, config | drawn)
        params, spans = trial.params, trial.distributions
        faults = faults or [
            f"{key}={format_value(config[key])} is not what SPACE makes of it, {format_value(x)}"
            for key, x in values.items()
            if config[key] != x
        ]
        inside = {*values}
    else:
        params, faults = _options(sweep.space, config)
        values, spans = decode_params(params), distributions(sweep.draw)
        inside = {key for name in sweep.space for key in split_group(name)}

    differences = {
        key: f"{key}={format_value(x)} where the sweep has {format_value(sweep.config[key])}"
        for key, x in config.items()
        if key not in inside and x != sweep.config[key]
    }

    return Fit(params, spans, values, faults, differences)


def parse_item(text: str, sweep: Sweep, runs: Path) -> dict[str, Any]:
    r"""Returns the parameters of a configuration to be queued.

    The text is `key=value,key=value,…`, where values may have commas, of all keys of SPACE or some;
    or a run, by path, name or id, whose values of all keys of SPACE are taken, and the others are
    printed.

    Raises:
        UserError: If SPACE does not contain it. The message has one line for each fault.
    """

    if "=" not in text or (Path(text) / "config.json").is_file():
        match = fit(sweep, load_config(RunPath.find(runs, text).config))
        params, faults = match.params, match.faults

        if match.differences and not faults:
            say(
                f"--enqueue {text}: only the keys of SPACE are taken. The run has "
                f"{'; '.join(match.differences.values())}."
            )
    else:
        given, faults = _split(text)
        params, more = (_drawn if callable(sweep.space) else _parsed)(sweep, given)
        faults += more

    if faults:
        ends = (fault if fault.endswith((".", "?")) else f"{fault}." for fault in faults)
        raise UserError("\n".join(f"--enqueue {text}: {fault}" for fault in ends))

    return params


def _split(text: str) -> tuple[dict[str, str], list[str]]:
    r"""Returns the texts of keys, and faults. A comma without `key=` after it is part of a value."""

    given: dict[str, str] = {}
    faults: list[str] = []

    for piece in re.split(r",(?=[^,]*=)", text):
        key, equals, value = piece.partition("=")
        key = key.strip()

        if not equals:
            faults.append(f"'{piece}' is not of the form key=value, as batch_size=32")
        elif key in given:
            faults.append(f"{key} is given twice")
        elif re.search(r"\s\S+=", value):
            joined = re.sub(r",?\s+", ",", text.strip())
            faults.append(f"settings are separated by commas, as {joined}")
        else:
            given[key] = value.strip()

    return given, faults


def _unknown(key: str, known: Iterable[str], sweep: Sweep) -> str:
    names = ", ".join(known)

    if key in KEYS:
        value = format_value(sweep.config[key])
        return f"{key} is not in SPACE, which has {names}. All trials have {key}={value}"

    return f"SPACE has no key {short_repr(key)}, but {names}.{did_you_mean(key, known)}"


# A SPACE that is a dict


def _parsed(sweep: Sweep, given: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    assert not callable(sweep.space)
    known = [key for name in sweep.space for key in split_group(name)]
    faults = [_unknown(key, known, sweep) for key in given if key not in known]
    values: Config = {}

    for key in (key for key in given if key in known):
        try:
            values[key] = check_value(key, parse_value(key, given[key]))
        except UserError as error:
            faults.append(str(error))

    params, more = _options(sweep.space, values)

    return params, faults + more


def _options(space: Mapping[str, Domain], values: Config) -> tuple[dict[str, Any], list[str]]:
    r"""Returns the parameters that stand for values of keys, of all keys or some, and faults."""

    params, faults = {}, []

    for name, domain in space.items():
        keys = split_group(name)
        given = {key: values[key] for key in keys if key in values}
        text = " ".join(f"{key}={format_value(x)}" for key, x in given.items())

        if len(keys) == 1:
            options = [x for x in given.values() if x in domain]
        else:
            assert isinstance(domain, Choice)
            grouped = (dict(zip(keys, option, strict=True)) for option in domain.options)
            options = [tuple(x.values()) for x in grouped if given.items() <= x.items()]

        if not given:
            continue

        if len(options) == 1:
            params[name] = encode_option(name, options[0])
        elif options:
            others = ", ".join(key for key in keys if key not in given)
            faults.append(f"{text} is of several options. Give {others} as well")
        else:
            faults.append(f"{text} is not in SPACE, which has {domain}")

    return params, faults


# A SPACE that is a function


def _replay(
    sweep: Sweep, given: Mapping[str, Any], seed: int | None = None
) -> tuple[CallbackTrial, Config, list[str]]:
    r"""Draws from a function once with given parameters, or texts of them.

    Returns the trial, the values of keys and faults. Other parameters are drawn at random; without
    a seed they are faults.
    """

    faults: list[str] = []
    draw = random_answer(seed or 0)

    def answer(name: str, distribution: Any) -> Any:
        if name in given:
            try:
                return _parse(given[name], distribution)
            except (TypeError, ValueError):
                text, domain = format_value(given[name]), domain_of(distribution)
                faults.append(f"{name}={text} is not in SPACE, which has {domain}")
        elif seed is None:
            faults.append(
                f"SPACE suggests '{name}', which is no key of CONFIG: its value is unknown"
            )

        return draw(name, distribution)

    trial = CallbackTrial(answer)

    try:
        return trial, sweep.draw(trial), faults
    except UserError as error:
        return trial, {}, faults + str(error).split("\n")
    except (Exception, SystemExit) as error:  # of the user's own function
        return trial, {}, [*faults, f"SPACE cannot be drawn from: {script_error(error)}"]


def _drawn(sweep: Sweep, given: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    r"""Returns the parameters with which a function is drawn from, or faults.

    The first of many draws counts that suggests all of the given names.
    """

    seen: dict[str, Any] = {}
    wrong: list[str] = []

    for i in range(DRAWS):
        trial, _, faults = _replay(sweep, given, i)
        taken = {name: x for name, x in trial.params.items() if name in given}
        seen |= trial.params
        wrong = wrong or faults

        if not faults and taken.keys() == given.keys():
            return taken, []

    unknown = [_unknown(name, seen, sweep) for name in given if name not in seen]

    return {}, unknown or wrong or [f"SPACE never suggests {' and '.join(given)} at once"]


def _parse(value: Any, distribution: Any) -> Any:
    r"""Returns a value of a distribution, given as such or as text, or raises an error."""

    if hasattr(distribution, "choices"):
        texts = [_plain(option) for option in distribution.choices]
        return distribution.choices[texts.index(_plain(value))]

    number: float = float(value)

    if isinstance(distribution.low, int) and number.is_integer():
        number = int(number)

    if number not in domain_of(distribution):
        raise ValueError

    return number


def _plain(option: Any) -> str:
    r"""Returns an option as text, for comparison: tuples without brackets and spaces."""

    text = format_value(option).replace(" ", "").strip("()[]").rstrip(",")

    try:
        return repr(float(text))
    except ValueError:
        return text


# Finished runs


def bring_in(study: Study, item: Mapping[str, Any]) -> bool:
    r"""Adds a run to a study as a complete one, and returns whether it was not there before.

    One whose configuration was brought in before is a further seed of it.

    Raises:
        UserError: If the item is not one of :attr:`sda_ray.sweep.prior_runs.Prior.item`.
    """

    from optuna.distributions import json_to_distribution
    from optuna.trial import TrialState, create_trial

    records = study.records()

    try:
        record = TrialRecord(
            study.next_index(),
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
        _add_prior(study, record, drawn)

    return new


def _add_prior(study: Study, record: TrialRecord, drawn: "FrozenTrial") -> None:
    priors = [r for r in study.records() if r.source and not r.replica_of]
    first = next((r.index for r in priors if r.trial.params == drawn.params), 0)
    study.add(replace(record, replica_of=first), drawn)


def restore_runs(
    study: Study, sweep: Sweep, runs: Path, data: str, since: str, pending: Container[str] = ()
) -> list[str]:
    r"""Adds the runs of a sweep that its study has lost, and returns lines about it.

    The journal may be gone, or an older copy. Settings and parameters are in the directories of the
    runs, also of those that were brought in; :func:`sda_ray.search.reconcile.catch_up` reads values
    and ends of the others from there. The queue is nowhere else. Runs before the first start of the
    sweep, `since`, are those of another one of the name, and those in `pending` are about to be
    brought in.

    Raises:
        UserError: If the study is empty, and none of its runs can be restored.
    """

    records = study.records()
    known, numbers = {r.run_id for r in records}, {r.index for r in records}
    found: list[tuple[RunPath, dict[str, Any]]] = []
    restored, refused = 0, []

    for path in RunPath.all(runs):
        if path.id not in known and path.id not in pending:
            with suppress(UserError, OSError):
                run = read_record(path)

                if run.get("sweep") == sweep.name and run.get("created", "") >= since:
                    found.append((path, run))

    found.sort(key=lambda item: item[1].get("created", ""))
    newest = {run["trial"]: (path, run) for path, run in found if type(run.get("trial")) is int}
    copies = [(path, run) for path, run in found if run.get("status") == "adopted"]

    for path, run in (*(newest[n] for n in sorted(newest.keys() - numbers)), *copies):
        try:
            _restore(study, sweep, path, run, data)
            restored += 1
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            refused.append(f"  {path.directory.name}: {'; '.join(str(error).splitlines())}")

    if refused and not (records or restored):
        what = f"{study.journal.file} has lost its runs, which cannot be restored:"
        directory = study.journal.file.parent
        do = f"Restore a copy of the file, or remove {directory} to begin the sweep anew."
        raise UserError("\n".join([what, *refused, do]))

    lines, file = list[str](), study.journal.file.name

    if restored:
        lines.append(
            f"{file} had lost {restored} runs: they are restored from their directories. What was "
            "queued is not: give it by --enqueue again."
        )

    if refused:
        lines += [f"{file} lacks these runs, which cannot be restored:", *refused]

    return lines


def _restore(study: Study, sweep: Sweep, path: RunPath, run: Mapping[str, Any], data: str) -> None:
    r"""Adds a run to a study: as one that is in flight no more, or as it was brought in."""

    from optuna.trial import TrialState, create_trial

    if run.get("data") != data:
        raise UserError("it was trained on other data")

    config = load_config(path.config)
    match = fit(sweep, config, run.get("params"))
    adopted, history = run.get("status") == "adopted", read_history(path.metrics)
    replica_of = int(run.get("replica_of", 0))
    seeded = replica_of or adopted
    differences = [x for key, x in match.differences.items() if not (seeded and key == "seed")]

    if faults := [*match.faults, *differences]:
        raise UserError("\n".join(faults))

    epochs, rules = config["epochs"], sweep.rules
    drawn = create_trial(
        state=TrialState.PRUNED, params=match.params, distributions=match.distributions
    )

    if adopted:
        curve = {epoch: x.get(study.objectives[0], math.nan) for epoch, x in history.items()}
        record = TrialRecord(study.next_index(), path.id, "complete", epochs, epochs, curve)
        ends, origin = tuple(finals(path, sweep.objectives)), str(run["origin"]["path"])
        record = replace(record, config=match.values, source=origin, finals=ends)
        _add_prior(study, record, drawn)
        return

    last = max(history, default=0)
    until = min(rules.after(last - 1), epochs) if rules.min_epochs and not replica_of else epochs
    values = match.values | ({"seed": config["seed"]} if replica_of else {})
    record = TrialRecord(run["trial"], path.id, "running", until, epochs, config=values)
    record = replace(record, replica_of=replica_of)
    record = study.add(record, drawn)

    if run.get("status") == "failed":
        study.tell(record, "failed", "see error.txt in its directory")


def bring_all(study: Study, items: Iterable[Mapping[str, Any]]) -> str:
    r"""Adds runs to a study, see :func:`bring_in`, and returns a sentence about it."""

    brought = [bring_in(study, item) for item in items]
    new, before = sum(brought), len(brought) - sum(brought)
    text = f"{new} run{'s' * (new != 1)} brought in, for the sampler to learn from"

    return text + f"; {before} had been before" * (before > 0)
