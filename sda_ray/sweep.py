r"""Sweeps, from a definition to a finished study.

To start a sweep, to carry it on after a crash and to extend it is one operation: :func:`launch`.
"""

import os
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .archive import check_unchanged, read_sweep, space_of, sweep_directory, write_sweep
from .cluster import Slots, connect
from .data import DataInfo, check_data
from .definition import SETTINGS, Sweep, load_script
from .errors import UserError
from .files import remove_leftovers
from .lease import Lease
from .pruner import decide
from .tracking import Wandb

__all__ = ["Options", "Sweep", "Wishes", "launch", "load_record", "sweep_directory"]

OFFLINE = Wandb()


@dataclass(frozen=True)
class Options:
    r"""Creates what says how a sweep is carried out. It may differ from start to start.

    Arguments:
        root: What recorded paths are relative to.
        runs: The directory of all runs.
        data: The directory of the data.
        wandb: How trials log to W&B.
        address: The address of a Ray cluster, or None for a Ray of our own on this machine.
        cpus: The CPUs of a trial.
        gpus: The GPUs of a trial. By default 1 if this machine has any.
        parallel: The most trials at a time. By default as many as fit.
        job_type: What the runs are, for W&B.
        hours: After how many hours the sweep stops, to be carried on later.
        stall: The minutes without a step after which a trial is killed and resumed.
        keep: The number of best runs that keep their checkpoints, beside those under way.
        limit: The bytes that all checkpoints of the sweep may take together.
        ask_above: The GPU-hours above which a first start asks.
    """

    root: Path
    runs: Path
    data: Path
    wandb: Wandb = OFFLINE
    address: str | None = None
    cpus: float = 1
    gpus: float | None = None
    parallel: int | None = None
    job_type: str = "trial"
    hours: float | None = None
    stall: float = 10.0
    keep: int | None = None
    limit: int | None = None
    ask_above: float = 1.0


@dataclass(frozen=True)
class Wishes:
    r"""Creates what is asked of a sweep beside going on. A running one takes it up, too.

    Arguments:
        enqueue: What to try before others: `key=value,…`, or runs.
        warm_start: The names of sweeps whose finished runs are brought in.
        retry: Whether failed runs are tried again.
        retarget: Whether the number of trials was given.
    """

    enqueue: tuple[str, ...] = ()
    warm_start: tuple[str, ...] = ()
    retry: bool = False
    retarget: bool = False

    def __bool__(self) -> bool:
        return bool(self.enqueue or self.warm_start or self.retry or self.retarget)


def load_record(runs: Path, name: str) -> tuple[Sweep, dict[str, Any]]:
    r"""Returns a recorded sweep, and the options that it was last run with.

    Raises:
        UserError: If there is no such sweep, or its record is damaged.
    """

    found = read_sweep(runs, name)
    definition = found["definition"]
    script = sweep_directory(runs, name) / "script.py"
    space = space_of(definition)

    if space is None:
        space = load_script(script).space

    settings = {key: definition[key] for key in SETTINGS if key in definition}
    sweep = Sweep(name, definition["config"], space, found["trials"], **settings)

    return replace(sweep, script=script if script.exists() else None), found["options"]


def launch(sweep: Sweep, options: Options, wishes: Wishes = Wishes()) -> None:
    r"""Starts a sweep, carries it on, or extends it: whatever its record calls for.

    Everything is checked before anything is written and before Ray is started. There is one
    driver to a sweep at a time.

    Arguments:
        sweep: The sweep.
        options: How it is carried out.
        wishes: What is asked of it beside going on.

    Raises:
        UserError: If anything is wrong.
    """

    from .table import announce, conclude

    # Checks
    info = check_data(options.data)
    sweep = sweep.check(info)
    slots = Slots(
        options.cpus, _gpus() if options.gpus is None else options.gpus, options.parallel
    )
    options = replace(
        options,
        gpus=slots.wanted.get("GPU", 0),
        wandb=replace(options.wandb, group=sweep.name, job_type=options.job_type),
    )
    directory = sweep_directory(options.runs, sweep.name)
    record = _record(sweep, options, info)

    if (directory / "sweep.json").exists():
        check_unchanged(sweep.name, read_sweep(options.runs, sweep.name), record)

    if options.address is None:
        slots.check_local()

    # Sweep
    directory.mkdir(parents=True, exist_ok=True)
    lease = Lease(directory / "lease.json", f"sweep '{sweep.name}'")

    try:
        remove_leftovers(directory)
        write_sweep(directory, record, sweep.script)
        study = _open_study(directory, sweep.name, lease, options.runs)
        announce(sweep.name, sweep.rules, study.records(), directory)
        _drive(sweep, study, slots, options, info)
        study.close()
    finally:
        lease.release()

    conclude(sweep.name, sweep.trials, study.records(), directory, options.runs)


def _record(sweep: Sweep, options: Options, info: DataInfo) -> dict[str, Any]:
    return {
        "name": sweep.name,
        "trials": sweep.trials,
        "definition": sweep.definition(),
        "fingerprint": info.fingerprint,
        "options": {
            "data": os.path.relpath(options.data, options.root),
            "cpus": options.cpus,
            "gpus": options.gpus,
            "wandb": asdict(options.wandb),
        },
    }


def _open_study(directory: Path, name: str, lease: Lease, runs: Path) -> Any:
    from .reconcile import catch_up
    from .study import Study

    study = Study(directory / "study.journal", name, lease)
    catch_up(study, runs)

    return study


def _spec(sweep: Sweep, options: Options, info: DataInfo) -> dict[str, Any]:
    r"""Returns what all trials are given."""

    return {
        "runs": str(options.runs),
        "data": str(options.data),
        "config": sweep.config,
        "rungs": sweep.rules.rungs,
        "cpus": options.cpus,
        "wandb": asdict(options.wandb),
        "record": {
            "sweep": sweep.name,
            "study": f"sweeps/{sweep.name}/study.journal",
            "data": info.fingerprint,
            "wandb": asdict(options.wandb),
        },
        "request": str(sweep_directory(options.runs, sweep.name) / "stop"),
        "stall": 60 * options.stall,
    }


def _drive(sweep: Sweep, study: Any, slots: Slots, options: Options, info: DataInfo) -> None:
    r"""Runs trials until there is nothing left to do, or exits and says how to carry on."""

    from .driver import Driver
    from .sampler import propose
    from .table import LiveTable

    records = study.records()
    failed = sum(record.state == "failed" for record in records)
    rules = replace(sweep.rules, excused=failed)

    if decide(records, (), rules).kind == "stop":
        return

    table = LiveTable(sweep.name, sweep.trials, options.runs, study.records)
    spec = _spec(sweep, options, info)
    again = _again(sweep.name, options.root, options.runs)
    driver = Driver(
        study,
        rules,
        lambda seen, fixed: propose(sweep.draw, seen, sweep.seed, sweep.sampler, fixed),
        spec,
        slots,
        table.notify,
        Path(spec["request"]),
    )

    try:
        with table, connect(options.address) as scratch:
            from .executor import execute  # imports Ray, which must be set up by then

            slots.check()
            resources = {"cpu": options.cpus, "gpu": slots.wanted.get("GPU", 0)}
            execute(driver, resources, scratch)
    except KeyboardInterrupt:
        pass  # the second Ctrl-C, or one while Ray starts

    if driver.done:
        return

    if driver.hopeless:
        raise UserError(
            f"the first {len(driver.errors)} runs failed alike, so the sweep stops: "
            f"{driver.errors[0]}. Mend it, then carry on with `{again}`."
        )

    print(f"Stopped. Nothing is lost: carry on with `{again}`.")
    sys.exit(130)


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())


def _again(name: str, root: Path, runs: Path) -> str:
    r"""Returns the command that carries a sweep on from the current directory."""

    command = f"sda-ray sweep {name}"

    if root != Path.cwd():
        command += f" --root {shlex.quote(str(root))}"

    if runs != root / "runs":
        command += f" --runs {shlex.quote(str(runs))}"

    return command
