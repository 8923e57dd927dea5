r"""Checks before a sweep starts: everything that is wrong with it, its data and this machine.

Each check returns its faults, so that all are listed at once. Checking the data takes time; its
result is kept in `runs/sweeps/{name}/plan.json` until the files change.
"""

import configparser
import netrc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlparse

from ..cluster import Slots, check_ray_init
from ..core import UserError, read_json, write_json
from ..data import DataInfo, check_data, check_file
from ..runs import Wandb, sweep_directory
from .definition import DRAWS, Sweep, caught
from .record import Options, check_changes, record_of, with_recorded_rungs


@dataclass
class Findings:
    r"""The findings of all checks.

    Arguments:
        faults: The reasons why the sweep cannot run.
        warnings: Probable mistakes.
        widened: The domains of SPACE that have grown since the sweep was recorded.
        sweep: The sweep in its normal form, if nothing is wrong.
        info: The data, if they can be used.
    """

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    widened: tuple[str, ...] = ()
    sweep: Sweep | None = None
    info: DataInfo | None = None


def check_start(sweep: Sweep, options: Options) -> Findings:
    r"""Checks a sweep before its start, within 2 s if the data were checked before.

    Raises:
        UserError: If anything is wrong. The message lists all of it.
    """

    cache = sweep_directory(options.runs, str(sweep.name)) / "plan.json"
    stamps, known = {}, None

    with suppress(OSError, UserError, KeyError, TypeError):
        for file in (options.data / "train.h5", options.data / "valid.h5"):
            status = file.stat()
            stamps[str(file)] = [status.st_size, status.st_mtime_ns, status.st_ino]

        content = read_json(cache)
        known = DataInfo(**content["info"]) if content["files"] == stamps else None

    findings = find_faults(sweep, options, options.slots(), known, DRAWS)

    if findings.faults:
        raise UserError("\n".join(findings.faults))

    if known is None:
        assert findings.info is not None

        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, {"files": stamps, "info": asdict(findings.info)})
        except OSError as error:
            raise UserError(f"{cache} cannot be written: {error}.") from error

    return findings


def find_faults(
    sweep: Sweep | None,
    options: Options,
    slots: Slots,
    info: DataInfo | None = None,
    draws: int = 1000,
) -> Findings:
    r"""Finds everything that is wrong with a sweep and this machine. Leaves nothing on disk.

    Arguments:
        sweep: The sweep that its script defines, or None if the script has an error.
        options: How it would be run.
        slots: The resources of a trial.
        info: The data, if they were checked before.
        draws: The number of draws to check of a SPACE that is a function.
    """

    faults: list[str] = []
    runs, data = options.runs, options.data
    findings = Findings(info=info or caught(faults, lambda: check_data(data)))

    if findings.info is None:  # of several files, check_data names the first that is damaged
        for file in (data / "train.h5", data / "valid.h5"):
            caught(faults, lambda: check_file(file))  # noqa: B023

    if sweep is not None:
        known = sweep
        sweep = caught(faults, lambda: with_recorded_rungs(known, runs)) or sweep
        checked, wrong = sweep.examine(findings.info, draws)
        faults += wrong

        if not wrong:
            findings.sweep, findings.warnings = checked, checked.warnings(findings.info)

        if not wrong and findings.info is not None:
            record = record_of(checked, options, findings.info)
            widened = caught(faults, lambda: check_changes(runs, record, checked))
            findings.widened = widened or ()

    faults += [*runs_faults(runs), *wandb_faults(options.wandb)]
    caught(faults, check_ray_init)

    if options.address is None:
        caught(faults, slots.check_local)

    if faults:
        findings.faults, findings.sweep = list(dict.fromkeys(faults)), None

    return findings


def runs_faults(runs: Path) -> Iterator[str]:
    r"""Yields why the directory of all runs cannot be written to, if so."""

    place = next(part for part in (runs, *runs.parents) if os.path.lexists(part))

    try:
        with tempfile.NamedTemporaryFile(prefix=".sda-ray-", dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield (
            f"runs cannot be written to {runs}: {error.strerror or error}. Make room, or give "
            "another directory with --runs."
        )


def free_disk(place: Path) -> int:
    r"""Returns the free bytes of the disk that has, or will have, a directory."""

    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.is_dir())).free


def wandb_faults(wandb: Wandb) -> Iterator[str]:
    r"""Yields that W&B needs a key, or a token, and there is none, if so."""

    host = urlparse(wandb_server()).netloc  # with the port, as `wandb login` writes it
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    given = any(os.environ.get(f"WANDB_{x}") for x in ("API_KEY", "IDENTITY_TOKEN_FILE"))

    if wandb.mode != "online":
        return

    if (token := os.environ.get("WANDB_IDENTITY_TOKEN_FILE")) and not Path(token).is_file():
        yield f"WANDB_IDENTITY_TOKEN_FILE is '{token}', but there is no such file."

    if given:
        return

    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(str(file)).authenticators(host):
            return

    yield (
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
