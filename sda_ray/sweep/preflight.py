r"""Everything that is wrong with a sweep, or with where it shall run: all of it, not the first.

What other modules check by raising an error is checked here again and again: what an error is
about is replaced by something harmless, until there are no more.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cluster.slots import Slots
from ..core.config import CONFIG, Config, check_config, check_value, format_value
from ..core.errors import UserError
from ..core.keys import KEYS
from ..core.lease import is_alive
from ..core.space import Choice, loguniform
from ..data.dataset import DataInfo, check_data, check_file
from ..runs.path import sweep_directory
from ..runs.tracking import Wandb
from .definition import Sweep
from .places import check_machine, check_runs, check_wandb
from .record import compare, read_sweep

__all__ = ["Findings", "find_faults"]

HARMLESS = {"learning_rate": loguniform(1e-4, 1e-3)}

# How faults begin that are about values of CONFIG together. They say nothing once it was changed.
CONFLICTS = (*(f"{key} " for key in KEYS), "The network would", "Options of two", "and ")


@dataclass
class Findings:
    r"""Creates what was found before anything is started.

    Arguments:
        faults: Whatever keeps the sweep from running, a text for each.
        warnings: Whatever is probably not meant.
        sweep: The sweep in its normal form, if it has one.
        info: The data, if they can be used.
        draws: Configurations that were drawn at random from the sweep.
    """

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sweep: Sweep | None = None
    info: DataInfo | None = None
    draws: list[Config] = field(default_factory=list)

    def add(self, error: UserError, whole: bool = False) -> None:
        r"""Adds an error: one fault for each line of its message, unless that is a whole."""

        for fault in [str(error)] if whole else str(error).split("\n"):
            if fault not in self.faults:
                self.faults.append(fault)


def find_faults(
    sweep: Sweep | None,
    runs: Path,
    data: Path,
    slots: Slots,
    wandb: Wandb,
    local: bool = True,
    info: DataInfo | None = None,
    count: int = 1000,
) -> Findings:
    r"""Finds everything that is wrong with a sweep and this machine. Nothing is left on disk.

    Arguments:
        sweep: The sweep, as its script says, or None if the script says nothing.
        runs: The directory of all runs.
        data: The directory of the data.
        slots: The resources of a trial.
        wandb: How trials log to W&B.
        local: Whether the trials run on this machine.
        info: The data, if they were checked before.
        count: The number of configurations to draw.
    """

    found = Findings(info=info)

    if info is None:
        _check_data(found, data)

    if sweep is not None:
        _check_sweep(found, sweep)

    if found.sweep is not None:
        _draw(found, found.sweep, count)
        found.warnings += _oddities(found.sweep, found.info, slots)

        if found.info is not None:
            _check_record(found, found.sweep, runs)

    for check in (lambda: check_runs(runs), check_machine, lambda: check_wandb(wandb)):
        try:
            check()
        except UserError as error:
            found.add(error)

    try:
        if local:
            slots.check_local()
    except UserError as error:
        found.add(error)

    if found.faults:
        found.sweep = None

    return found


def _check_data(found: Findings, data: Path) -> None:
    r"""Checks the data. If anything is wrong, each file is looked at by itself, too."""

    try:
        found.info = check_data(data)
        return
    except UserError as error:
        found.add(error, whole=True)

    for split in ("train", "valid"):
        try:
            check_file(data / f"{split}.h5")
        except UserError as error:
            found.add(error, whole=True)


def _check_sweep(found: Findings, sweep: Sweep) -> None:
    r"""Checks a sweep, and what is left of it without what is wrong with it."""

    asked, whole = sweep, True

    while True:
        try:
            checked = sweep.check(found.info)
            found.sweep = checked if sweep is asked else None
            return
        except UserError as error:
            message = str(error)

        for fault in message.split("\n"):
            if whole or not fault.startswith(CONFLICTS):
                found.add(UserError(fault))

        for name, value in _harmless(sweep):
            other = replace(sweep, **{name: value})

            if _message(other, found.info) != message:
                whole, sweep = whole and name != "config", other
                break
        else:
            return


def _message(sweep: Sweep, info: DataInfo | None) -> str | None:
    try:
        sweep.check(info)
    except UserError as error:
        return str(error)

    return None


def _harmless(sweep: Sweep) -> Iterator[tuple[str, Any]]:
    r"""Yields what could replace a part of a sweep that is wrong."""

    default = Sweep("sweep", CONFIG, HARMLESS)

    for name in vars(default):
        if name not in ("config", "space", "script"):
            yield name, getattr(default, name)

    mended = _mend(sweep.config)
    small = mended | {"window": 3, "hidden_channels": (8,), "hidden_blocks": (1,)}

    for config in (mended, small | {"kernel_size": 3, "warmup": 0}):
        yield "config", config

    yield "space", HARMLESS


def _mend(config: Any) -> Config:
    r"""Returns a configuration with the default wherever a value is not accepted."""

    mended = dict(CONFIG)

    for key in mended.keys() & (config.keys() if isinstance(config, dict) else ()):
        with suppress(UserError):
            mended[key] = check_value(key, config[key])

    return mended


def _draw(found: Findings, sweep: Sweep, count: int) -> None:
    r"""Draws configurations, and counts what goes wrong in that."""

    from ..search.sampler import check_kinds, sample

    faults: Counter[str] = Counter()
    cases: dict[str, str] = {}
    info = found.info
    size, length = (info.size, info.length) if info is not None else (None, None)

    def attempt(trial: Any) -> Config:
        try:
            values = sweep.draw(trial)
            found.draws.append(check_config({**sweep.config, **values}, size, length))
            return values
        except UserError as error:
            told = str(error).split("\n")
        except Exception as error:
            told = [f"{type(error).__name__}: {error}"]

        for fault in told:
            faults[fault] += 1
            cases.setdefault(
                fault, " ".join(f"{key}={format_value(x)}" for key, x in trial.params.items())
            )

        return {}

    trials = [trial for _, trial in sample(attempt, count)]

    for fault, n in faults.most_common(8):
        case = f", as {cases[fault]}" if cases[fault] else ""
        found.add(UserError(f"SPACE: {fault} ({n} of {count} draws{case})"))

    try:
        if sweep.sampler == "tpe":
            check_kinds(trials)
    except UserError as error:
        found.add(error)


def _oddities(sweep: Sweep, info: DataInfo | None, slots: Slots) -> Iterator[str]:
    r"""Yields what is allowed and probably not meant."""

    config, space = sweep.config, {} if callable(sweep.space) else sweep.space
    keys = {key.strip() for name in space for key in name.split(",")}

    trajectories = math.inf if info is None else info.trajectories["train"]

    if config["batch_size"] > trajectories and "batch_size" not in keys:
        yield (
            f"batch_size is {config['batch_size']}, but there are {trajectories} trajectories to "
            "train with: an epoch is one step."
        )

    yield from sweep.warnings()

    sizes = [
        len(d.options) if isinstance(d, Choice) else (d.high - d.low) // d.step + 1
        for d in space.values()
        if isinstance(d, Choice) or d.step is not None
    ]

    if space and len(sizes) == len(space) and math.prod(sizes) < sweep.trials:
        yield (
            f"SPACE has {math.prod(sizes)} configurations, fewer than the {sweep.trials} trials: "
            "the sweep ends with those."
        )

    rate = space.get("learning_rate")
    highest = rate.high if rate is not None and not isinstance(rate, Choice) else 0

    if highest > 0.1:
        yield f"learning_rate goes up to {highest:g}: above 0.1 hardly a run does not diverge."

    if config["precision"] == "tf32" and "GPU" not in slots.wanted:
        yield "precision is tf32, which means nothing without a GPU."


def _check_record(found: Findings, sweep: Sweep, runs: Path) -> None:
    r"""Checks that a sweep of the name, if there is one, is this sweep."""

    assert found.info is not None

    try:
        definition = sweep.definition()
        directory = sweep_directory(runs, sweep.name)

        if (directory / "sweep.json").exists():
            now = {"definition": definition, "fingerprint": found.info.fingerprint}
            compare(read_sweep(runs, sweep.name), now).check(sweep.name, sweep.script)

        if is_alive(directory / "lease.json"):
            found.warnings.append(f"sweep '{sweep.name}' is being run by another process now.")
    except UserError as error:
        found.add(error, whole=True)
