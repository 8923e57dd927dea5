r"""Sweeps, from a definition to a finished study.

To start a sweep, to carry it on after a crash and to extend it is one operation: :func:`launch`.
"""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cli.table import announce, conclude
from ..cluster.connect import local_gpus
from ..cluster.join import is_again
from ..cluster.slots import Slots
from ..core.errors import UserError
from ..core.files import remove_leftovers
from ..core.lease import Lease
from ..data.dataset import DataInfo
from ..runs.path import sweep_directory
from ..search.reconcile import catch_up
from ..search.sampler import importances
from ..search.study import Study, queue_warning
from .code import check_code, keep_code, running
from .definition import SETTINGS, Sweep, load_script
from .driving import Options, carry_out
from .enqueue import parse_item
from .prior_runs import warm_start
from .priors import bring_all
from .record import compare, read_sweep, space_of, write_sweep
from .start import check_start, confirm
from .steering import Absent, ask_for, live

__all__ = [
    "Options",
    "Sweep",
    "Wishes",
    "count_gpus",
    "launch",
    "load_record",
    "record_of",
]


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


NOTHING = Wishes()


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
    settings["objectives"] = tuple(settings["objectives"])
    sweep = Sweep(name, definition["config"], space, found["trials"], **settings)

    return replace(sweep, script=script if script.exists() else None), found["options"]


def launch(sweep: Sweep, options: Options, wishes: Wishes = NOTHING) -> None:
    r"""Starts a sweep, carries it on, or extends it: whatever its record calls for.

    Everything is checked before anything is written and before Ray is started. There is one
    driver to a sweep at a time; a sweep that runs takes up what is wished. A Slurm job that has
    started again takes the sweep over from its former self, wherever that was.

    Arguments:
        sweep: The sweep.
        options: How it is carried out.
        wishes: What is asked of it beside going on.

    Raises:
        UserError: If anything is wrong.
    """

    # Checks
    directory = sweep_directory(options.runs, str(sweep.name))
    check_code(directory, options.code)
    slots = Slots(
        options.cpus, count_gpus() if options.gpus is None else options.gpus, options.parallel
    )
    options = replace(
        options,
        gpus=slots.wanted.get("GPU", 0),
        wandb=replace(options.wandb, group=sweep.name, job_type=options.job_type),
    )
    start = check_start(sweep, options.runs, options.data, slots, options.wandb, options.address)
    sweep = start.sweep
    record = record_of(sweep, options, start.info)
    widened = _widened(sweep, options, record)
    confirm(start, options.ask_above)

    for warning in start.warnings:
        print(f"Note: {warning}")

    queue = [parse_item(text, sweep, options.runs) for text in wishes.enqueue]
    priors = [
        item
        for other in wishes.warm_start
        for item in warm_start(other, sweep, options.runs, options.data)
    ]

    again = is_again(directory, options.job)

    if wishes and not start.first and not again:
        with suppress(Absent):
            trials = sweep.trials if wishes.retarget else None
            ask_for(directory, trials, wishes.retry, queue, priors)
            return

    # Sweep
    directory.mkdir(parents=True, exist_ok=True)
    lease = Lease(directory / "lease.json", f"sweep '{sweep.name}'", takeover=again)

    try:
        if options.bucket and options.replica is None:
            raise UserError(
                f"the driver of sweep '{sweep.name}' has ended just now. The same command carries "
                f"it on, and copies to {options.bucket}."
            )

        remove_leftovers(directory)
        code = keep_code(directory)
        write_sweep(directory, record | {"code": code.hash}, sweep.script)
        study = Study(directory / "study.journal", sweep.name, lease, sweep.objectives)

        if options.replica is not None:
            options.replica.follow(study)

        catch_up(study, options.runs)

        for line in widened:
            print(f"{line}: carried on")

        _grant(study, sweep.trials, wishes, queue, priors)
        announce(sweep.name, sweep.rules, study.records(), directory)

        with running(code):
            carry_out(sweep, study, slots, options, start.info, code.package)
    finally:
        lease.release()

    records, matter = study.records(), importances(study.study)
    target = read_sweep(options.runs, sweep.name)["trials"]  # it may have been changed since
    conclude(sweep.name, target, records, directory, options.runs, matter)


def record_of(sweep: Sweep, options: Options, info: DataInfo) -> dict[str, Any]:
    r"""Returns the record of a sweep, see :func:`sda_ray.sweep.record.write_sweep`."""

    return {
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


def _widened(sweep: Sweep, options: Options, record: dict[str, Any]) -> tuple[str, ...]:
    r"""Returns by what a sweep has grown since it was recorded, if it is the same otherwise."""

    directory = sweep_directory(options.runs, sweep.name)

    if not (directory / "sweep.json").exists():
        return ()

    changes = compare(read_sweep(options.runs, sweep.name), record)
    changes.check(sweep.name, sweep.script)

    if changes.widened and live(directory):
        raise UserError(
            f"sweep '{sweep.name}' is running, with another SPACE: {'; '.join(changes.widened)}. "
            f"Stop it first: sda-ray stop {sweep.name}"
        )

    return changes.widened


def _grant(study: Study, target: int, wishes: Wishes, queue: list[Any], priors: list[Any]) -> None:
    r"""Records what is wished of a sweep that nobody drives."""

    if priors:
        print(bring_all(study, priors))

    if wishes.retry:
        failed = [record for record in study.records() if record.state == "failed"]
        print(f"{len(failed)} failed runs are tried again")

        for record in failed:
            study.revive(record)

    for params in queue:
        if params not in study.queue().values():
            study.enqueue(params)

    if queue and (more := queue_warning(study, target)):
        print(f"{more}.")


def count_gpus() -> int:
    r"""Returns the GPUs that a trial gets if nothing else is said."""

    return int(local_gpus() > 0)
