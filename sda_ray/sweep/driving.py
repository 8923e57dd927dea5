r"""A sweep at work: its driver, its table and its disk, on Ray, from here to its end."""

import os
import shlex
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cli.table import LiveTable
from ..cluster.connect import connect, gate, local_cpus
from ..cluster.join import announced
from ..cluster.slots import Slots
from ..cluster.trial import imports
from ..core.errors import UserError
from ..core.system import deadline
from ..data.dataset import DataInfo
from ..runs.path import sweep_directory
from ..runs.tracking import Wandb
from ..search.promotion import decide
from ..search.study import Study
from .definition import Sweep
from .driver import TIME, Driver
from .record import read_sweep, write_sweep
from .requests import attended
from .retention import Keeper

__all__ = ["LATER", "Options", "carry_out"]

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
        ask_above: The GPU-hours above which a first start asks.
        job: The Slurm job that carries it out, see :mod:`sda_ray.cluster.slurm`.
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
    ask_above: float = 1.0
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
