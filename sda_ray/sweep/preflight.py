r"""Checks before a sweep starts: everything that is wrong with it, its data and this machine.

Each check returns what it finds, so that all faults are listed at once. Checking the data takes
time; its result is kept in `runs/sweeps/{name}/plan.json` until the files change.
"""

import configparser
import math
import netrc
import os
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..cluster import Slots, local_cpus
from ..core import (
    Choice,
    Config,
    UserError,
    check_config,
    format_value,
    is_alive,
    read_json,
    write_json,
)
from ..data import DataInfo, check_data, check_file
from ..runs import Wandb, sweep_directory
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

DRAWS = 32  # configurations that are drawn before a start
FILES = 8  # that Ray opens for each CPU, beside the first 64, or fewer
HIGH = 0.1  # a learning rate above which hardly a run does not diverge


@dataclass(frozen=True)
class Start:
    r"""A sweep that may start.

    Arguments:
        sweep: The sweep in its normal form.
        info: The data.
        warnings: Whatever is allowed and probably not intended.
        first: Whether the sweep starts for the first time.
    """

    sweep: Sweep
    info: DataInfo
    warnings: tuple[str, ...] = ()
    first: bool = True


@dataclass
class Findings:
    r"""What the checks have found.

    Arguments:
        faults: Whatever keeps the sweep from running, a text for each.
        warnings: Whatever is allowed and probably not intended.
        sweep: The sweep in its normal form, if nothing is wrong.
        info: The data, if they can be used.
        draws: Configurations that were drawn at random from the sweep.
    """

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sweep: Sweep | None = None
    info: DataInfo | None = None
    draws: list[Config] = field(default_factory=list)


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
        UserError: If anything is wrong. The message lists all of it.
    """

    directory = sweep_directory(runs, str(sweep.name))
    cache, stamps = directory / "plan.json", _stamps(data)
    known = _cached(cache, stamps)
    findings = find_faults(sweep, runs, data, slots, wandb, address is None, known, DRAWS)

    if findings.sweep is None or findings.info is None:
        raise UserError("\n".join(findings.faults))

    if known is None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(cache, {"files": stamps, "info": asdict(findings.info)})
        except OSError as error:
            raise UserError(f"{cache} cannot be written: {error}.") from error

    first = not (directory / "sweep.json").exists()

    return Start(findings.sweep, findings.info, tuple(findings.warnings), first)


def _stamps(data: Path) -> dict[str, list[int]]:
    r"""Returns size, time and inode of the files of data, or nothing if any is missing."""

    stamps = {}

    for name in ("train.h5", "valid.h5"):
        try:
            status = (data / name).stat()
        except OSError:
            return {}

        stamps[str(data / name)] = [status.st_size, status.st_mtime_ns, status.st_ino]

    return stamps


def _cached(cache: Path, stamps: dict[str, list[int]]) -> DataInfo | None:
    r"""Returns the summary of the data if they were checked and have not changed since."""

    try:
        content = read_json(cache)

        return DataInfo(**content["info"]) if stamps and content["files"] == stamps else None
    except (UserError, KeyError, TypeError):
        return None


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
    r"""Finds everything that is wrong with a sweep and this machine. Leaves nothing on disk.

    Arguments:
        sweep: The sweep that its script defines, or None if the script has an error.
        runs: The directory of all runs.
        data: The directory of the data.
        slots: The resources of a trial.
        wandb: How trials log to W&B.
        local: Whether the trials run on this machine.
        info: The data, if they were checked before.
        count: The number of configurations to draw.
    """

    faults: list[str] = []
    findings = Findings(faults, info=info)

    if info is None:
        findings.info, wrong = _examine_data(data)
        faults += wrong

    if sweep is not None:
        checked, wrong = sweep.examine(findings.info)
        faults += wrong

        if not wrong:
            findings.draws, wrong = _examine_draws(checked, findings.info, count)
            faults += wrong
            findings.warnings += _warnings(checked, findings.info, slots)

            if findings.info is not None:
                faults += _faults_of(lambda: _check_record(checked, findings, runs))

            findings.sweep = checked

    faults += _faults_of(lambda: check_runs(runs))
    faults += _faults_of(check_machine)
    faults += _faults_of(lambda: check_wandb(wandb))
    faults += _faults_of(slots.check_local) if local else []
    findings.faults = list(dict.fromkeys(faults))

    if findings.faults:
        findings.sweep = None

    return findings


def _faults_of(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]

    return []


def _examine_data(data: Path) -> tuple[DataInfo | None, list[str]]:
    r"""Returns a summary of the data and what is wrong with them, with each file by itself."""

    try:
        return check_data(data), []
    except UserError as error:
        faults = [str(error)]

    for split in ("train", "valid"):
        faults += _faults_of(lambda: check_file(data / f"{split}.h5"))  # noqa: B023

    return None, faults


def _examine_draws(
    sweep: Sweep, info: DataInfo | None, count: int
) -> tuple[list[Config], list[str]]:
    r"""Returns configurations drawn from a sweep, and what is wrong with draws, and how often."""

    from ..search import check_kinds, sample

    counts: Counter[str] = Counter()
    cases: dict[str, str] = {}
    draws: list[Config] = []
    size, length = (info.size, info.length) if info is not None else (None, None)

    def attempt(trial: Any) -> Config:
        try:
            values = sweep.draw(trial)
            draws.append(check_config({**sweep.config, **values}, size, length))
            return values
        except UserError as error:
            lines = str(error).split("\n")
        except Exception as error:  # of the user's own function
            lines = [f"{type(error).__name__}: {error}"]

        for line in lines:
            counts[line] += 1
            cases.setdefault(
                line, " ".join(f"{key}={format_value(x)}" for key, x in trial.params.items())
            )

        return {}

    trials = [trial for _, trial in sample(attempt, count)]
    faults = []

    for line, n in counts.most_common(8):
        case = f", as {cases[line]}" if cases[line] else ""
        faults.append(f"SPACE: {line} ({n} of {count} draws{case})")

    if sweep.sampler == "tpe":
        faults += _faults_of(lambda: check_kinds(trials))

    return draws, faults


def _warnings(sweep: Sweep, info: DataInfo | None, slots: Slots) -> Iterator[str]:
    r"""Yields what is allowed and probably not intended."""

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

    if highest > HIGH:
        yield f"learning_rate goes up to {highest:g}: above {HIGH} hardly a run does not diverge."

    if config["precision"] == "tf32" and "GPU" not in slots.wanted:
        yield "precision is tf32, which means nothing without a GPU."


def _check_record(sweep: Sweep, findings: Findings, runs: Path) -> None:
    r"""Raises a UserError if another sweep of the same name is recorded."""

    assert findings.info is not None
    definition = sweep.definition()
    directory = sweep_directory(runs, sweep.name)

    if (directory / "sweep.json").exists():
        now = {"definition": definition, "fingerprint": findings.info.fingerprint}
        compare(read_sweep(runs, sweep.name), now).check(sweep.name, sweep.script)

    if is_alive(directory / "lease.json"):
        findings.warnings.append(f"sweep '{sweep.name}' is being run by another process now.")


def check_runs(runs: Path) -> None:
    r"""Raises a UserError if the directory of all runs cannot be written to."""

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
    r"""Returns the free bytes of the disk that has, or will have, a directory."""

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
    r"""Returns the address of W&B's server: $WANDB_BASE_URL, or that of `wandb login --host`."""

    directory = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)

    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(directory / "settings")

    noted = settings.get("default", "base_url", fallback="https://api.wandb.ai")

    return os.environ.get("WANDB_BASE_URL") or noted
