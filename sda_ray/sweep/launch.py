r"""Sweeps, from a definition to a finished study.

To start a sweep, to carry it on after a crash and to extend it is one operation: :func:`launch`.
"""

import os
import shlex
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cli.table import LiveTable, announce, conclude
from ..cluster.connect import connect, gate, local_cpus, local_gpus
from ..cluster.join import announced, is_again
from ..cluster.slots import Slots
from ..cluster.trial import imports
from ..core.errors import UserError
from ..core.files import remove_leftovers
from ..core.lease import Lease
from ..core.system import deadline
from ..data.dataset import DataInfo
from ..runs.path import sweep_directory
from ..runs.tracking import Wandb
from ..search.promotion import decide
from ..search.reconcile import catch_up
from ..search.sampler import importances
from ..search.study import Study, queue_warning
from .code import check_code, keep_code, running
from .definition import PRUNERS, SAMPLERS, SETTINGS, Sweep, load_script
from .driver import TIME, Driver
from .enqueue import bring_all, parse_item
from .preflight import check_start
from .prior_runs import warm_start
from .record import compare, read_sweep, space_of, write_sweep
from .requests import Absent, ask_for, attended, live
from .retention import Keeper

__all__ = [
    "LATER",
    "Options",
    "Sweep",
    "Wishes",
    "carry_out",
    "count_gpus",
    "launch",
    "load_record",
    "record_of",
]

OFFLINE = Wandb()
LATER = 75  # the exit code of a sweep whose time is up (EX_TEMPFAIL)


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
        job: The Slurm job that carries it out, see :mod:`sda_ray.cluster.allocation`.
        code: `recorded`, or `current` if a sweep shall go on with other code than recorded.
        bucket: Where the runs are copied to, `s3://bucket/prefix`, if anywhere.
        replica: What does that, see :mod:`sda_ray.storage.bucket`.
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
    job: str | None = None
    code: str = "recorded"
    bucket: str | None = None
    replica: Any = None


def carry_out(
    sweep: Sweep,
    study: Study,
    slots: Slots,
    options: Options,
    info: DataInfo,
    package: Path | None = None,
) -> None:
    r"""Runs trials until there is nothing left to do, or exits and says how to carry on.

    Arguments:
        sweep: The sweep.
        study: Its study.
        slots: The resources of a trial.
        options: How it is carried out.
        info: The data.
        package: The code that trials run.
    """

    records = study.records()
    failed = sum(record.state == "failed" for record in records)
    rules, stops = replace(sweep.rules, excused=failed), sweep.stops()
    directory = sweep_directory(options.runs, sweep.name)
    table = LiveTable(sweep.name, sweep.trials, options.runs, study.records)
    keeper = Keeper(
        options.runs,
        sweep.name,
        study.records,
        options.keep,
        options.limit,
        table.say,
        final=stops is not None,
    )
    table.size = lambda: keeper.size

    def retarget(target: int) -> None:
        table.target = target
        write_sweep(directory, read_sweep(options.runs, sweep.name) | {"trials": target}, None)

    def house() -> None:
        keeper()

        if options.replica is not None:
            options.replica.check()

    try:
        if decide(records, (), rules, stops=stops).kind != "stop":
            driver = Driver(
                study,
                rules,
                sweep.propose,
                _spec(sweep, options, info),
                slots,
                table.notify,
                directory / "stop",
                stops,
                deadline(options.hours, os.environ),
                retarget,
                house,
            )
            study.journal.stopping = lambda: driver.stopping
            slots.avoided, slots.forgive = driver.losses.avoided, driver.losses.forgive
            _drive(driver, slots, options, table, package)
            runs = options.bucket or options.runs
            address = None if options.job else options.address  # a job's Ray ends with it
            _end(driver, _again(sweep.name, options.root, runs, address))

        study.close()
    finally:
        keeper.finish()


def _spec(sweep: Sweep, options: Options, info: DataInfo) -> dict[str, Any]:
    r"""Returns what all trials are given."""

    return {
        "runs": str(options.runs),
        "data": str(options.data),
        "config": sweep.config,
        "rungs": sweep.rules.rungs,
        "objectives": sweep.objectives,
        "cpus": options.cpus,
        "gpus": options.gpus,
        "wandb": asdict(options.wandb),
        "record": {
            "sweep": sweep.name,
            "study": f"sweeps/{sweep.name}/study.journal",
            "data": info.fingerprint,
            "wandb": asdict(options.wandb),
            "rungs": list(sweep.rules.rungs),
        },
        "request": str(sweep_directory(options.runs, sweep.name) / "stop"),
        "stall": 60 * options.stall,
    }


def _drive(
    driver: Driver, slots: Slots, options: Options, table: LiveTable, package: Path | None
) -> None:
    r"""Starts Ray, or attaches to it, and runs trials there."""

    with suppress(KeyboardInterrupt), table, ExitStack() as stack:
        with attended(driver):
            modules = imports(options.wandb.mode) if slots.local() > local_cpus() / 2 else ()
            started = connect(options.address, package=package, modules=modules)
            scratch = stack.enter_context(started)

        from ..cluster.executor import execute  # imports Ray, which must be set up by then
        from ..storage.server import serve_files

        if options.address is not None:  # whose nodes may not see our files
            server = serve_files(options.runs, options.data, driver.request)
            driver.spec = driver.spec | {"server": stack.enter_context(server)}

        slots.check()
        lease, own = driver.study.journal.lease, options.address is None or bool(options.job)
        assert lease is not None
        tell = stack.enter_context(
            announced(driver.request.parent, lease, *gate(own), options.job)
        )
        house = driver.house

        def also_tell() -> None:
            house()
            tell(driver.losses.avoided)

        driver.house = also_tell
        resources = {"cpu": options.cpus, "gpu": slots.wanted.get("GPU", 0)}
        execute(driver, resources, scratch, own=options.address is None)


def _end(driver: Driver, again: str) -> None:
    r"""Exits and says how to carry on, unless nothing is left to do."""

    if driver.done:
        return

    if driver.hopeless:
        raise UserError(
            f"the first {len(driver.errors)} runs failed alike, so the sweep stops: "
            f"{driver.errors[0]}. Mend it, then carry on with `{again}`; with --code current, "
            "if it was in the package."
        )

    why = f", since {driver.why}" if driver.why else ""
    print(f"Stopped{why}. Nothing is lost: carry on with `{again}`.")
    sys.exit(LATER if driver.why == TIME else 130)


def _again(name: str, root: Path, runs: Path | str, address: str | None) -> str:
    r"""Returns the command that carries a sweep on from the current directory."""

    command = f"sda-ray sweep {name}"

    if root != Path.cwd():
        command += f" --root {shlex.quote(str(root))}"

    if runs != root / "runs":
        command += f" --runs {shlex.quote(str(runs))}"

    if address is not None:
        command += f" --address {shlex.quote(address)}"

    return command


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
    settings = {key: definition[key] for key in SETTINGS if key in definition}
    settings["objectives"] = tuple(settings["objectives"])
    objects = {"sampler": SAMPLERS, "pruner": PRUNERS}
    in_script = [key for key, names in objects.items() if settings[key] not in names]

    # Functions and objects are in the script alone
    if space is None or in_script:
        scripted = load_script(script)
        space = scripted.space if space is None else space
        settings |= {key: getattr(scripted, key) for key in in_script}

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
