r"""The checks at the start of a sweep, and the one question that may be asked there.

What takes time is remembered in `runs/sweeps/{name}/plan.json`: that the data are whole, and what
a plan has measured. Both are looked up by what they depend on, and are found again or made anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.connect import local_cpus
from ..cluster.slots import Slots
from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..data.dataset import DataInfo
from ..runs.path import sweep_directory
from ..runs.tracking import Wandb
from .definition import Sweep
from .preflight import find_faults

if TYPE_CHECKING:
    from ..plan.plan import Plan

__all__ = ["ASK_ABOVE", "CPUS_PER_GPU", "Start", "check_start", "confirm", "remember"]

ASK_ABOVE = 1.0  # GPU-hours
CPUS_PER_GPU = 16  # CPU-hours that count as a GPU-hour, about what machines cost to rent
DRAWS = 32


@dataclass(frozen=True)
class Start:
    r"""Creates what a sweep may start with.

    Arguments:
        sweep: The sweep in its normal form.
        info: The data.
        warnings: Whatever is probably not meant.
        first: Whether the sweep starts for the first time.
        hours: The hours of GPUs, or CPUs, that it is expected to take; None if that is unknown.
        finish: The seconds until it is done.
        unit: `GPU` or `CPU`.
    """

    sweep: Sweep
    info: DataInfo
    warnings: tuple[str, ...] = ()
    first: bool = True
    hours: float | None = None
    finish: float | None = None
    unit: str = "CPU"


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

    key = _key(found.sweep, found.info, slots.wanted, address)
    unit = "GPU" if "GPU" in slots.wanted else "CPU"
    hours = finish = None

    if known.get("key") == key and known.get("seconds"):
        from ..plan.plan import forecast  # and with it torch, which a start does without

        rules = found.sweep.rules
        n = min(known["slots"], slots.most or known["slots"])
        expected = forecast(rules, n, known["seconds"], known["end"], found.sweep.stops())
        hours = expected.busy * slots.wanted[unit] / 3600
        finish = expected.finish

    if info is None:
        _write(file, {"files": files, "info": asdict(found.info)})

    first = not (file.parent / "sweep.json").exists()

    return Start(found.sweep, found.info, tuple(found.warnings), first, hours, finish, unit)


def remember(made: Plan, runs: Path, data: Path, address: str | None = None) -> None:
    r"""Keeps what a plan has found for the start of the sweep, unless anything is wrong."""

    if made.sweep is None or made.info is None or made.faults:
        return

    from ..plan.plan import times_of

    seconds, end = times_of(made)
    content: dict[str, Any] = {"files": _files(data), "info": asdict(made.info)}

    if made.known:
        key = _key(made.sweep, made.info, made.wanted, address)
        content |= {"key": key, "slots": made.slots, "seconds": seconds, "end": end}

    _write(sweep_directory(runs, made.sweep.name) / "plan.json", content)


def confirm(start: Start, ask_above: float = ASK_ABOVE) -> None:
    r"""Asks whether a sweep shall start, if it is a long one, a new one, and there is a terminal.

    A GPU-hour counts as 16 CPU-hours. What is not known is not asked about.

    Arguments:
        start: What :func:`check_start` found.
        ask_above: The GPU-hours above which to ask.

    Raises:
        UserError: If the answer is no.
    """

    if not start.first or start.hours is None or start.finish is None:
        return

    if start.hours / (1 if start.unit == "GPU" else CPUS_PER_GPU) <= ask_above:
        return

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return

    from ..plan.report import show_time

    takes = f"{start.hours:.3g} {start.unit}-hours and be done in {show_time(start.finish)}"
    answer = input(f"Sweep '{start.sweep.name}' is expected to take {takes}. Start it? [y/N] ")

    if answer.strip().lower() not in ("y", "yes"):
        raise UserError(
            f"sweep '{start.sweep.name}' was not started. `sda-ray plan` tells what takes so long; "
            "--ask-above HOURS sets when to ask."
        )


def _key(sweep: Sweep, info: DataInfo, wanted: dict[str, float], address: str | None) -> str:
    r"""Returns what an estimate depends on: CONFIG, SPACE, data and nodes, but not `trials`."""

    here = {"cpus": local_cpus()} if address is None else {"address": address}
    what = [sweep.definition(), info.fingerprint, wanted, here]

    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


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
        assert isinstance(known["files"], dict) and isinstance(known.get("slots", 1), int)
        assert all(x >= 0 for x in [*known.get("seconds", []), *known.get("end", [])])

        return dict(known)
    except (UserError, KeyError, TypeError, AttributeError, AssertionError):
        return {}


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}.") from error
