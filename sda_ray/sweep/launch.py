r"""Sweeps, from a definition to a finished study.

Starting a sweep, resuming it after a crash and extending it are one operation: :func:`launch`.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..cluster import Slots, announced, connected, is_requeued, local_gpus, ray_endpoint
from ..core import Lease, UserError, deadline, remove_leftovers
from ..data import DataInfo
from ..runs import Wandb, sweep_directory
from ..search import Rules, Study, TrialRecord, catch_up, decide, importances
from .code import check_code, keep_code, running
from .definition import PRUNERS, SAMPLERS, SETTINGS, Sweep, load_script
from .driver import TIME, Driver
from .enqueue import bring_all, parse_item
from .preflight import check_start
from .prior_runs import warm_start
from .record import check_changes, read_sweep, space_of, write_sweep
from .requests import (
    NotRunning,
    RequestServer,
    ask_all,
    enqueue_all,
    is_driven,
    retry_failed,
    serving,
)
from .retention import Retention

__all__ = [
    "LATER",
    "LaunchRequests",
    "Options",
    "Table",
    "View",
    "count_gpus",
    "launch_sweep",
    "load_record",
    "record_of",
]

OFFLINE = Wandb()
JOIN = 60.0  # seconds in which nodes of a cluster that was just started may join
LATER = 75  # the exit code of a sweep whose time is up (EX_TEMPFAIL)


@dataclass(frozen=True)
class Options:
    r"""How a sweep is run. The options may differ from start to start.

    Arguments:
        root: The directory that recorded paths are relative to.
        runs: The directory of all runs.
        data: The directory of the data.
        wandb: How trials log to W&B.
        address: The address of a Ray cluster, or None to start Ray on this machine.
        cpus: The CPUs of a trial.
        gpus: The GPUs of a trial. By default 1 if this machine has any.
        parallel: The most trials at a time. By default as many as fit.
        job_type: The type of the runs, for W&B.
        hours: The hours after which the sweep stops, to be resumed later.
        stall: The minutes without a step after which a trial is killed and resumed.
        keep: The number of best runs that keep their checkpoints, beside running and paused ones.
        limit: The bytes that all checkpoints of the sweep may take together.
        job: The Slurm job that runs the sweep, see :mod:`sda_ray.cluster.slurm`.
        code: `recorded`, or `current` to resume the sweep with other code than recorded.
        bucket: The bucket with a copy of the runs, `s3://bucket/prefix`, if any.
        replica: Keeps that copy, see :mod:`sda_ray.storage.bucket`.
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


@dataclass(frozen=True)
class LaunchRequests:
    r"""The requests of a launch. A sweep that is running serves them, too.

    Arguments:
        enqueue: Configurations to try before others: `key=value,…`, or runs.
        warm_start: The names of sweeps whose finished runs are brought in.
        retry: Whether failed runs are retried.
        retarget: Whether the number of trials was given.
    """

    enqueue: tuple[str, ...] = ()
    warm_start: tuple[str, ...] = ()
    retry: bool = False
    retarget: bool = False

    def __bool__(self) -> bool:
        return bool(self.enqueue or self.warm_start or self.retry or self.retarget)


NOTHING = LaunchRequests()


class Table(Protocol):
    r"""A live table of a sweep, see :class:`sda_ray.cli.table.LiveTable`."""

    target: int
    size: Callable[[], int]

    def __enter__(self) -> Any: ...
    def __exit__(self, *_: object) -> None: ...
    def say(self, text: str) -> None: ...
    def notify(self, event: str, record: TrialRecord) -> None: ...


class View(Protocol):
    r"""Shows a sweep to the user, as the module :mod:`sda_ray.cli.table` does."""

    def announce(
        self,
        title: str,
        rules: Rules,
        records: Sequence[TrialRecord],
        directory: Path,
        wanted: dict[str, float],
        parallel: int | None,
    ) -> None: ...

    def LiveTable(
        self, title: str, target: int, runs: Path, records: Callable[[], list[TrialRecord]]
    ) -> Table: ...

    def conclude(
        self,
        title: str,
        target: int,
        records: Sequence[TrialRecord],
        directory: Path,
        runs: Path,
        importances: Mapping[str, float],
    ) -> None: ...


def launch_sweep(
    sweep: Sweep, options: Options, view: View, requests: LaunchRequests = NOTHING
) -> None:
    r"""Starts, resumes or extends a sweep, as its record calls for.

    Everything is checked before anything is written and before Ray starts. A sweep has one driver
    at a time; the driver of a running sweep serves the requests. A Slurm job that has been
    requeued takes the sweep over from its previous execution.

    Arguments:
        sweep: The sweep.
        options: How it is run.
        view: Shows it to the user.
        requests: The requests of this launch.

    Raises:
        UserError: If anything is wrong.
    """

    # Checks
    directory = sweep_directory(options.runs, str(sweep.name))
    check_code(directory, options.code)
    gpus = count_gpus() if options.gpus is None else options.gpus
    slots = Slots(options.cpus, gpus, options.parallel)
    wandb = replace(options.wandb, group=sweep.name, job_type=options.job_type)
    options = replace(options, gpus=slots.wanted.get("GPU", 0), wandb=wandb)
    start = check_start(sweep, options.runs, options.data, slots, wandb, options.address)
    sweep = start.sweep
    record = record_of(sweep, options, start.info)
    widened = check_changes(options.runs, record, sweep.script)
    queue = [parse_item(text, sweep, options.runs) for text in requests.enqueue]
    requeued = is_requeued(directory, options.job)

    for warning in start.warnings:
        print(f"Note: {warning}")

    # Requests to a running sweep
    if requests and not start.first and not requeued and is_driven(directory):
        with suppress(NotRunning):
            trials = sweep.trials if requests.retarget else None
            ask_all(directory, trials, requests.retry, queue, _priors(sweep, options, requests))
            return

    # Record and study
    directory.mkdir(parents=True, exist_ok=True)
    lease = Lease(directory / "lease.json", f"sweep '{sweep.name}'", takeover=requeued)

    try:
        lease.note(job=options.job)

        if options.bucket and options.replica is None:
            raise UserError(
                f"the driver of sweep '{sweep.name}' has just ended. The same command resumes "
                f"the sweep, with a copy in {options.bucket}."
            )

        remove_leftovers(directory)
        code = keep_code(directory)
        write_sweep(directory, record | {"code": code.hash}, sweep.script)
        study = Study(directory / "study.journal", sweep.name, lease, sweep.objectives)

        if options.replica is not None:
            options.replica.follow(study)

        catch_up(study, options.runs)

        for line in widened:
            print(line)

        _serve(study, sweep.trials, requests, queue, _priors(sweep, options, requests))

        # Trials
        parallel = slots.local() if options.address is None else slots.most
        records = study.records()
        view.announce(sweep.name, sweep.rules, records, directory, slots.wanted, parallel)

        with running(code):
            _run(sweep, study, slots, options, start.info, code.package, view)
    finally:
        lease.release()

    # Results
    target = read_sweep(options.runs, sweep.name)["trials"]  # it may have been changed since
    matter = importances(study.study)
    view.conclude(sweep.name, target, study.records(), directory, options.runs, matter)


def _priors(sweep: Sweep, options: Options, requests: LaunchRequests) -> list[dict[str, Any]]:
    return [
        item
        for other in requests.warm_start
        for item in warm_start(other, sweep, options.runs, options.data)
    ]


def _serve(
    study: Study, target: int, requests: LaunchRequests, queue: list[Any], priors: list[Any]
) -> None:
    r"""Serves the requests of a launch before trials start."""

    if priors:
        print(f"{bring_all(study, priors)}.")

    if requests.retry:
        print(f"{retry_failed(study)}.")

    if queue:
        print(f"{enqueue_all(study, queue, target)}.")


def _run(
    sweep: Sweep,
    study: Study,
    slots: Slots,
    options: Options,
    info: DataInfo,
    package: Path,
    view: View,
) -> None:
    r"""Runs trials until nothing is left to do, or exits and prints how to resume."""

    records, stops = study.records(), sweep.stops()
    failed = sum(record.state == "failed" for record in records)
    rules = replace(sweep.rules, excused=failed)
    directory = sweep_directory(options.runs, sweep.name)
    table = view.LiveTable(sweep.name, sweep.trials, options.runs, study.records)
    retention = Retention(
        options.runs,
        sweep.name,
        study.records,
        options.keep,
        options.limit,
        table.say,
        final=stops is not None,
    )
    table.size = lambda: retention.size

    def retarget(target: int) -> None:
        table.target = target
        write_sweep(directory, read_sweep(options.runs, sweep.name) | {"trials": target}, None)

    def house() -> None:
        retention()

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
            study.journal.give_up = lambda: driver.stopping
            slots.avoided, slots.forgive = driver.losses.avoided, driver.losses.forgive
            _drive(driver, slots, options, table, package)
            runs = options.bucket or options.runs
            address = None if options.job else options.address  # a job's Ray ends with it
            _end(driver, _resume_command(sweep.name, options.root, runs, address))

        study.close()
    finally:
        retention.finish()


def _spec(sweep: Sweep, options: Options, info: DataInfo) -> dict[str, Any]:
    r"""Returns the arguments that all trials share."""

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


def _drive(driver: Driver, slots: Slots, options: Options, table: Table, package: Path) -> None:
    r"""Starts Ray, or connects to it, and runs trials there."""

    with suppress(KeyboardInterrupt), table, ExitStack() as stack:
        with serving(driver):
            modules = ["sda_ray.cluster.executor"]
            started = connected(options.address, package=package, modules=modules)
            scratch = stack.enter_context(started)

        from ..cluster import execute  # imports Ray, which must be set up by then
        from ..storage import serve_files

        if options.address is not None:  # whose nodes may not see our files
            server = serve_files(options.runs, options.data, driver.request)
            driver.spec = driver.spec | {"server": stack.enter_context(server)}

        alone = options.address is None
        slots.grows = options.parallel is not None and not alone and not options.job
        slots.check(patience=0 if alone else JOIN)
        lease, own = driver.study.journal.lease, alone or bool(options.job)
        assert lease is not None
        tell = stack.enter_context(announced(driver.request.parent, lease, *ray_endpoint(own)))
        house = driver.house

        def also_tell() -> None:
            house()
            tell(driver.losses.avoided)

        driver.house = also_tell
        resources = {"cpu": options.cpus, "gpu": slots.wanted.get("GPU", 0)}
        execute(driver, resources, scratch, own=alone, requests=RequestServer(driver))


def _end(driver: Driver, command: str) -> None:
    r"""Exits and prints how to resume, unless nothing is left to do."""

    if driver.done:
        return

    if driver.hopeless:
        raise UserError(
            f"the first {len(driver.errors)} runs failed alike, so the sweep stops: "
            f"{driver.errors[0]}. Fix the cause, then resume with `{command}`; with --code "
            "current if it was in the package."
        )

    why = f", since {driver.why}" if driver.why else ""
    unsaved = driver.unsaved | {*driver.live.values()}

    if unsaved:
        runs = ", ".join(str(index) for index in sorted(unsaved))
        saved = f"Runs {runs} could not save a checkpoint and resume from their last one"
    else:
        saved = "Nothing is lost"

    print(f"Stopped{why}. {saved}: resume with `{command}`.")
    sys.exit(LATER if driver.why == TIME else 128 + (driver.signal or signal.SIGINT))


def _resume_command(name: str, root: Path, runs: Path | str, address: str | None) -> str:
    r"""Returns the command that resumes a sweep from the current directory."""

    command = f"sda-ray sweep {name}"

    if root != Path.cwd():
        command += f" --root {shlex.quote(str(root))}"

    if runs != root / "runs":
        command += f" --runs {shlex.quote(str(runs))}"

    if address is not None:
        command += f" --address {shlex.quote(address)}"

    return command


def load_record(runs: Path, name: str) -> tuple[Sweep, dict[str, Any]]:
    r"""Returns a recorded sweep, and the options of its last start.

    Raises:
        UserError: If there is no such sweep, or its record is damaged.
    """

    content = read_sweep(runs, name)
    definition = content["definition"]
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

    sweep = Sweep(name, definition["config"], space, content["trials"], **settings)

    return replace(sweep, script=script if script.exists() else None), content["options"]


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


def count_gpus() -> int:
    r"""Returns the GPUs that a trial gets by default."""

    return int(local_gpus() > 0)
