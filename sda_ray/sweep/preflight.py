r"""Everything that is wrong with a sweep, or with where it shall run: all of it, not the first.

What other modules check by raising an error is checked here again and again: what an error is
about is replaced by something harmless, until there are no more.
"""

import configparser
import math
import netrc
import os
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..cluster.connect import local_cpus
from ..cluster.slots import Slots
from ..core.config import CONFIG, Config, check_config, check_value, format_value
from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.keys import KEYS
from ..core.lease import is_alive
from ..core.space import Choice, loguniform
from ..data.dataset import DataInfo, check_data, check_file
from ..runs.path import sweep_directory
from ..runs.tracking import Wandb
from .definition import Sweep
from .record import compare, read_sweep

__all__ = [
    "Findings",
    "Start",
    "check_machine",
    "check_runs",
    "check_start",
    "check_wandb",
    "find_faults",
    "free_disk",
    "wandb_server",
]

FILES = 8  # that Ray opens for each CPU, beside the first 64, or fewer


def check_runs(runs: Path) -> None:
    r"""Raises a UserError if nothing can be written where the runs will be."""

    place = next(part for part in (runs, *runs.parents) if os.path.lexists(part))

    try:
        with tempfile.NamedTemporaryFile(prefix=".sda-ray-", dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"runs cannot be written to {runs}: {error.strerror or error}. Make room, or give "
            "another directory with --runs."
        ) from error


def free_disk(place: Path) -> int:
    r"""Returns the bytes that are free where a directory is, or will be."""

    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.is_dir())).free


def check_machine() -> None:
    r"""Raises a UserError if Ray cannot run on this machine."""

    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray goes up to the hard limit itself
    least = 64 + FILES * local_cpus()

    if limit != resource.RLIM_INFINITY and limit < least:
        raise UserError(
            f"processes may open {limit} files here, but Ray on {local_cpus()} CPUs needs about "
            f"{least}. Raise the hard limit (`ulimit -Hn`)."
        )

    temporary = tempfile.gettempdir()

    if not os.access(temporary, os.W_OK):
        raise UserError(f"{temporary} cannot be written, but Ray keeps its files there.")


def check_wandb(wandb: Wandb) -> None:
    r"""Raises a UserError if W&B needs a key and there is none."""

    if wandb.mode != "online":
        return

    if any(os.environ.get(f"WANDB_{x}") for x in ("API_KEY", "IDENTITY_TOKEN_FILE")):
        return

    host = urlparse(wandb_server()).netloc  # with the port, as `wandb login` writes it
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()

    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(str(file)).authenticators(host):
            return

    raise UserError(
        f"W&B is to be used online, but there is no key for {host}, neither in WANDB_API_KEY nor "
        f"in {file}. Do `wandb login`, or leave --wandb online out and `sda-ray sync` later."
    )


def wandb_server() -> str:
    r"""Returns the address of W&B's server: $WANDB_BASE_URL, or what `wandb login --host` noted."""

    directory = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)

    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(directory / "settings")

    noted = settings.get("default", "base_url", fallback="https://api.wandb.ai")

    return os.environ.get("WANDB_BASE_URL") or noted


DRAWS = 32


@dataclass(frozen=True)
class Start:
    r"""Creates what a sweep may start with.

    Arguments:
        sweep: The sweep in its normal form.
        info: The data.
        warnings: Whatever is probably not meant.
        first: Whether the sweep starts for the first time.
    """

    sweep: Sweep
    info: DataInfo
    warnings: tuple[str, ...] = ()
    first: bool = True


def check_start(
    sweep: Sweep,
    runs: Path,
    data: Path,
    slots: Slots,
    wandb: Wandb,
    address: str | None = None,
) -> Start:
    r"""Checks a sweep before its start, within 2 s if the data were checked before.

    Arguments:
        sweep: The sweep.
        runs: The directory of all runs.
        data: The directory of the data.
        slots: The resources of a trial.
        wandb: How trials log to W&B.
        address: The address of a Ray cluster, or None for this machine.

    Raises:
        UserError: If anything is wrong. The message has all of it.
    """

    file = sweep_directory(runs, str(sweep.name)) / "plan.json"
    known = _read(file)
    files = _files(data)
    info = None

    if known.get("files") == files and files:
        info = DataInfo(**known["info"])

    found = find_faults(sweep, runs, data, slots, wandb, address is None, info, DRAWS)

    if found.sweep is None or found.info is None:
        raise UserError("\n".join(found.faults))

    if info is None:
        _write(file, {"files": files, "info": asdict(found.info)})

    first = not (file.parent / "sweep.json").exists()

    return Start(found.sweep, found.info, tuple(found.warnings), first)


def _files(data: Path) -> dict[str, list[int]]:
    r"""Returns what tells that files of data have not changed, or nothing if there are none."""

    found = {}

    for name in ("train.h5", "valid.h5"):
        try:
            status = (data / name).stat()
        except OSError:
            return {}

        found[str(data / name)] = [status.st_size, status.st_mtime_ns, status.st_ino]

    return found


def _read(file: Path) -> dict[str, Any]:
    r"""Returns what was remembered; nothing, if it cannot be made out."""

    try:
        known = read_json(file)
        DataInfo(**known["info"])
        assert isinstance(known["files"], dict)

        return dict(known)
    except (UserError, KeyError, TypeError, AttributeError, AssertionError):
        return {}


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}.") from error


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
