r"""The record of a sweep, `runs/sweeps/{name}/sweep.json`, and what may change in it.

A copy of its script and its study are in the same directory. A sweep whose definition has changed
is another sweep, since its runs could not be compared. Only its SPACE may grow.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..cluster import Slots, local_gpus
from ..core import (
    CONFIG,
    LeaseLost,
    UserError,
    check_config,
    covers,
    did_you_mean,
    domain_from_json,
    is_alive,
    read_json,
    space_from_json,
    split_group,
    write_atomic,
    write_json,
)
from ..runs import Wandb, sweep_directory, sweep_names, timestamp
from ..search import GEOMETRIC, Rules, TrialRecord
from .code import unsafe
from .definition import PRUNERS, SAMPLERS, SETTINGS, Sweep, look_beside, run_script

if TYPE_CHECKING:
    from ..data import DataInfo  # which loads h5py
    from ..search import Study  # which loads optuna

# The settings that older records lack
LATER: dict[str, Any] = {
    "objectives": ["loss_valid"],
    "percentile": 25.0,
    "patience": None,
    "seeds": 1,
}


OFFLINE = Wandb()


class _Config(msgspec.Struct):
    epochs: Annotated[int, msgspec.Meta(ge=1)]


class _Definition(msgspec.Struct):
    config: _Config
    space: dict[str, Any]
    objectives: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("loss_valid",)
    pruner: str = ""
    min_epochs: int | None = None
    eta: int | None = None
    rungs: tuple[int, ...] | None = None
    finalists: int = 1
    seeds: int = 1


class _Record(msgspec.Struct):
    r"""The keys of `sweep.json` that are checked as it is read. It and its parts may have more."""

    name: str
    trials: Annotated[int, msgspec.Meta(ge=1)]
    definition: _Definition
    fingerprint: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Options:
    r"""How a sweep is run. The options may differ from start to start."""

    root: Path  # that recorded paths are relative to
    runs: Path  # of all sweeps
    data: Path
    wandb: Wandb = OFFLINE  # how trials log to W&B
    address: str | None = None  # of a Ray cluster; by default Ray starts on this machine
    cpus: float = 1  # of a trial
    gpus: float | None = None  # of a trial; by default 1 if this machine has any
    parallel: int | None = None  # the most trials at a time; by default as many as fit
    job_type: str = "trial"  # of the runs, for W&B
    hours: float | None = None  # after which the sweep stops, to be resumed later
    stall: float = 10.0  # minutes without a step after which a trial is killed and resumed
    keep: int | None = None  # best runs that keep checkpoints, as running and paused ones do
    limit: int | None = None  # bytes that all checkpoints of the sweep may take together
    job: str | None = None  # the Slurm job that runs the sweep, see :mod:`sda_ray.cluster.slurm`
    code: str = "recorded"  # or `current`, to resume the sweep with other code than recorded
    bucket: str | None = None  # with a copy of the runs, `s3://bucket/prefix`
    replica: Any = None  # keeps that copy, see :mod:`sda_ray.storage.bucket`
    confirms: dict[str, Any] | None = None  # by a new sweep, see :mod:`sda_ray.sweep.confirm`

    def slots(self) -> Slots:
        r"""Returns the count of the trials that fit at a time."""

        gpus = int(local_gpus() > 0) if self.gpus is None else self.gpus

        return Slots(self.cpus, gpus, self.parallel)


def record_of(sweep: Sweep, options: Options, info: "DataInfo") -> dict[str, Any]:
    r"""Returns the record of a sweep and of the options of its start, see :func:`write_sweep`."""

    confirms = {"confirms": options.confirms} if options.confirms else {}

    return confirms | {
        "name": sweep.name,
        "trials": sweep.trials,
        "definition": sweep.definition(),
        "fingerprint": info.fingerprint,
        "options": {
            "data": os.path.relpath(options.data, options.root),
            "cpus": options.cpus,
            "gpus": options.gpus,
            "keep": options.keep,
            "limit": options.limit,
            "wandb": asdict(options.wandb),
        },
    }


def write_sweep(directory: Path, content: dict[str, Any], script: Path | None) -> str:
    r"""Writes the record of a sweep, after a copy of the script that it was defined by.

    Returns the time of the first start.

    `beside` in the record is the directory of the script, whose modules it may import, relative to
    that of the sweep. The content is that of :func:`record_of`, and `code`, the hash of the code,
    unless the recorded one stays. The script is copied unless the recorded definition is the same.
    """

    file, copy = directory / "sweep.json", directory / "script.py"
    before = read_json(file) if file.exists() else {"created": timestamp()}
    same = before.get("definition") == content["definition"]

    kept = {key: before[key] for key in ("code", "created", "beside", "confirms") if key in before}

    if script is not None and script.resolve() != copy.resolve():
        kept["beside"] = os.path.relpath(script.resolve().parent, directory.resolve())

        if not same:
            write_atomic(copy, script.read_bytes(), mode=0o644)

    write_json(file, kept | content)

    return str(kept.get("created", ""))


def read_sweep(runs: Path, name: str) -> dict[str, Any]:
    r"""Returns the record of a sweep, see :func:`write_sweep`, complete with all settings.

    Raises:
        UserError: If there is no such sweep, or its record is damaged.
    """

    file = sweep_directory(runs, name) / "sweep.json"

    if "/" in name or not file.is_file():
        known = sweep_names(runs)
        raise UserError(
            f"there is no sweep '{name}' in {runs / 'sweeps'}, which has "
            f"{', '.join(known) or 'none'}.{did_you_mean(name, known)} Give a script, such as "
            "sweeps/demo.py, to start one."
        )

    content = read_json(file)

    try:
        msgspec.convert(content, _Record)
    except msgspec.ValidationError as error:
        raise UserError(f"{file} is damaged: {error}.") from error

    return content | {"definition": _earlier_rungs(LATER | content["definition"])}


def _earlier_rungs(definition: dict[str, Any]) -> dict[str, Any]:
    r"""Returns a definition with its rungs, which older records lack: they grew from the first."""

    first, epochs = definition.get("min_epochs"), definition.get("config", {}).get("epochs", 0)

    if "rungs" in definition or not first or definition.get("pruner") not in GEOMETRIC:
        return {"rungs": None} | definition

    rungs = [first * definition["eta"] ** k for k in range(64)]

    return definition | {"rungs": [x for x in rungs if x < epochs]}


def recorded_rules(record: Mapping[str, Any]) -> Rules:
    r"""Returns the rules of a sweep by its record, see :func:`read_sweep`. Its script is not run."""

    definition = record["definition"]
    keys = ("pruner", "min_epochs", "eta", "rungs", "finalists", "seeds")
    settings = {key: definition[key] for key in keys if key in definition}

    return Sweep(record["name"], definition["config"], {}, record["trials"], **settings).rules


def read_study(runs: Path, name: str) -> "Study":
    r"""Opens the study of a sweep, of which nothing can be changed. It shows what a driver appends.

    Raises:
        UserError: If there is no such sweep, it has not begun, or it is damaged.
    """

    objectives = read_sweep(runs, name)["definition"]["objectives"]
    journal = sweep_directory(runs, name) / "study.journal"

    if not journal.exists() or not journal.stat().st_size:
        raise UserError(f"sweep '{name}' has not begun: sda-ray sweep {name}")

    from ..search import Study  # which loads optuna

    return Study(journal, name, None, objectives)


def with_recorded_rungs(sweep: Sweep, runs: Path) -> Sweep:
    r"""Returns a sweep with the rungs that it was started with, unless it states others.

    Defaults and layout of the rungs may have changed since.
    """

    if not (sweep_directory(runs, str(sweep.name)) / "sweep.json").exists():
        return sweep

    before = read_sweep(runs, sweep.name)["definition"]
    epochs = sweep.config.get("epochs") if isinstance(sweep.config, Mapping) else None
    rungs = before["rungs"] and tuple(before["rungs"])
    kept = {"min_epochs": before["min_epochs"], "eta": before["eta"], "rungs": rungs}
    states_others = any(getattr(sweep, key) not in (None, x) for key, x in kept.items())

    if states_others or epochs != before["config"]["epochs"]:
        return sweep

    return replace(sweep, **kept)


def load_record(runs: Path, name: str) -> tuple[Sweep, dict[str, Any]]:
    r"""Returns a recorded sweep, and the options of its last start.

    Raises:
        UserError: If there is no such sweep, or its record is damaged.
    """

    content = read_sweep(runs, name)
    definition, script = content["definition"], sweep_directory(runs, name) / "script.py"
    settings = {key: definition[key] for key in SETTINGS if key in definition}
    objects = {"sampler": SAMPLERS, "pruner": PRUNERS}
    in_script = [key for key, names in objects.items() if settings[key] not in names]

    # Functions and objects are in the script alone
    if is_function := "function" in definition["space"]:
        in_script.append("space")

    settings["space"] = {} if is_function else space_from_json(definition["space"])

    if in_script:
        scripted = _recorded_script(script, in_script, content.get("beside"))
        settings |= {key: getattr(scripted, key) for key in in_script}

    config = CONFIG | definition["config"]  # an earlier version lacked some keys
    sweep = Sweep(name, config, trials=content["trials"], **settings)

    return replace(sweep, script=script if script.exists() else None), content["options"]


def _recorded_script(script: Path, parts: list[str], beside: str | None) -> Sweep:
    r"""Runs the script of a record, unless somebody else may have written it."""

    note = ""

    if script.exists() and (fault := "it is a link" * script.is_symlink() or unsafe(script)):
        raise UserError(
            f"{script} defines the {' and '.join(parts)} of the sweep, and is not run: {fault}. "
            "Read it, and give a copy of your own instead of the sweep's name."
        )

    if beside is not None and (place := (script.parent / beside).resolve()).is_dir():
        if fault := unsafe(place):
            note = f" Modules of {place} are left out: {fault}."
        else:
            look_beside(place)

    try:
        return run_script(script)
    except UserError as error:
        raise UserError(f"{error}{note}") from error


@dataclass(frozen=True)
class Changes:
    r"""The changes in the definition of a sweep, a line for each.

    It can be resumed with domains that have grown, and with other `finalists` and `seeds`. All other
    changes make it another sweep.
    """

    widened: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def check(self, name: str, script: Path | None = None) -> None:
        r"""Raises a UserError with all changes and choices if the sweep cannot be resumed."""

        if not self.refused:
            return

        start = f"sda-ray sweep {script or 'SCRIPT'}"
        choices = {
            f"sda-ray sweep {name}": "resumes it as it was",
            f"{start} --name NEW": "starts another sweep",
            f"{start} --fork": "starts another from the finished runs that both have in common",
        }
        width = max(map(len, choices))
        lines = [f"sweep '{name}' exists and differs:", *(f"  {line}" for line in self.refused)]
        lines += ["Choose one of:", *(f"  {x:{width}}  # {what}" for x, what in choices.items())]

        raise UserError("\n".join(lines))


def compare(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    r"""Compares two records of a sweep, see :func:`write_sweep`.

    A SPACE may have grown: ranges of the same kind with wider bounds, choices with more options.
    The place of the data and the number of trials are not part of the definition.
    """

    old, new = before["definition"], now["definition"]
    widened: list[str] = []
    refused: list[str] = []

    # The CONFIG value of a key of SPACE does not matter, except that rungs depend on epochs
    vary = _keys(old["space"]) & _keys(new["space"]) - {"epochs"}
    defaults = json.loads(json.dumps(CONFIG))

    def settings(d: dict[str, Any]) -> dict[str, Any]:
        config = {
            f"CONFIG['{k}']": x for k, x in (defaults | d["config"]).items() if k not in vary
        }

        return config | {k: x for k, x in (LATER | d).items() if k not in ("config", "space")}

    was, value = settings(old), settings(new)

    for key in {**was, **value}:
        if was.get(key) != value.get(key):
            lines = widened if key in ("finalists", "seeds") else refused
            lines.append(f"{key} was {_show(was.get(key))} and is {_show(value.get(key))}")

    for grown, line in _spaces(old["space"], new["space"]):
        (widened if grown else refused).append(line)

    if (was := before["fingerprint"]) != (value := now["fingerprint"]):
        refused.append(
            f"the data was that of fingerprint {was[:12]}… and is that of fingerprint {value[:12]}…"
        )

    return Changes(tuple(widened), tuple(refused))


def check_changes(runs: Path, record: dict[str, Any], sweep: Sweep) -> tuple[str, ...]:
    r"""Returns how the SPACE of a sweep, as it would be recorded now, has grown since it was.

    One that is a function must make the same of the parameters of all runs.

    Raises:
        UserError: If the sweep differs otherwise, or is running with a SPACE that is not as wide.
    """

    name = record["name"]
    directory = sweep_directory(runs, name)

    if not (directory / "sweep.json").exists():
        return ()

    changes = compare(read_sweep(runs, name), record)

    if callable(sweep.space) and not changes.refused:
        changes = replace(changes, refused=tuple(_redrawn(sweep, directory / "study.journal")))

    changes.check(name, sweep.script)

    if changes.widened and is_alive(directory / "lease.json"):
        raise UserError(
            f"sweep '{name}' is running as it was: {'; '.join(changes.widened)}. Stop it first: "
            f"sda-ray stop {name}"
        )

    return changes.widened


def _redrawn(sweep: Sweep, journal: Path) -> Iterator[str]:
    r"""Yields what a SPACE that is a function makes differently of the parameters of runs."""

    from ..search import Study
    from .enqueue import fit

    records: list[TrialRecord] = []

    with suppress(LeaseLost):  # there is no study yet
        records = Study(journal, sweep.name, None, sweep.objectives).records()

    for record in records:
        if record.replica_of:
            continue

        config = check_config(sweep.config | record.config)
        match = fit(sweep, config, record.trial.params)

        for fault in (*match.faults, *match.differences.values()):
            yield f"SPACE is a function that has changed: of run {record.index}, {fault}"


def _keys(space: dict[str, Any]) -> set[str]:
    return {key for name in space for key in split_group(name)}


def _spaces(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    r"""Yields a line for each change between two spaces, and whether a domain has grown."""

    if "function" in old or "function" in new:
        if "function" not in new:
            yield False, "SPACE was a function and is a dict"
        elif "function" not in old:
            yield False, "SPACE was a dict and is a function"
        elif old.get("draws", new["draws"]) != new["draws"]:  # older records have none
            yield False, "SPACE is a function that draws other names, ranges, options or values"

        return

    for name in {**old, **new}:
        was, value = old.get(name), new.get(name)

        if value is None:
            yield False, f"SPACE['{name}'] was {domain_from_json(was)} and is gone"
        elif was is None:
            yield False, f"SPACE['{name}'] was not there and is {domain_from_json(value)}"
        elif was != value:
            before, now = domain_from_json(was), domain_from_json(value)

            if covers(now, before):
                yield True, f"SPACE['{name}'] widened: {before} → {now}"
            else:
                yield False, f"SPACE['{name}'] was {before} and is {now}"


def _show(value: Any) -> str:
    text = json.dumps(value)

    return text if len(text) <= 60 else f"{text[:57]}…"
