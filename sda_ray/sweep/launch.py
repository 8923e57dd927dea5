r"""Sweeps, from a definition to a finished study.

Starting a sweep, resuming it after a crash and extending it are one operation: :func:`launch_sweep`.
"""

import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..cluster import (
    Slots,
    announced,
    check_ray_init,
    connected,
    cpus_left,
    is_requeued,
    note_cpus,
    ray_endpoint,
)
from ..core import (
    Hold,
    Lease,
    UserError,
    deadline,
    on_signals,
    read_json,
    say,
    try_print,
    write_json,
)
from ..data import DataInfo, check_data, check_file
from ..runs import sweep_directory, wandb_faults
from ..search import Study, catch_up, decide
from .code import Code, check_code, keep_code, running
from .definition import DRAWS, Sweep, caught
from .driver import TIME, Driver
from .enqueue import bring_all, parse_item, restore_runs
from .prior_runs import warm_start
from .record import Options, check_changes, read_sweep, record_of, with_recorded_rungs, write_sweep
from .requests import (
    NotRunning,
    RequestServer,
    ask_all,
    enqueue_all,
    is_driven,
    retry_failed,
    wait_for_driver,
)
from .retention import Retention

JOIN = 60.0  # seconds in which nodes of a cluster that was just started may join
OVERLAP = 120.0  # seconds that a job waits for another driver of its sweep to end


@dataclass(frozen=True)
class LaunchRequests:
    r"""The requests of a launch. A sweep that is running serves them, too."""

    enqueue: tuple[str, ...] = ()  # configurations to try before others: `key=value,…`, or runs
    warm_start: tuple[str, ...] = ()  # sweeps whose finished runs are brought in
    retry: bool = False  # failed runs
    retarget: bool = False  # the number of trials was given


NOTHING = LaunchRequests()


class View(Protocol):
    r"""Shows a sweep to the user, as the module :mod:`sda_ray.cli.table` does."""

    def announce(self, *args: Any, **more: Any) -> None: ...
    def LiveTable(self, *args: Any, **more: Any) -> Any: ...
    def show_end(self, *args: Any, **more: Any) -> None: ...


@dataclass
class Findings:
    r"""The findings of all checks."""

    faults: list[str] = field(default_factory=list)  # why the sweep cannot run
    warnings: list[str] = field(default_factory=list)  # probable mistakes
    widened: tuple[str, ...] = ()  # domains that have grown since the sweep was recorded
    sweep: Sweep | None = None  # in its normal form, if nothing is wrong
    info: DataInfo | None = None  # the data, if they can be used


def check_start(sweep: Sweep, options: Options) -> Findings:
    r"""Checks a sweep before its start, within 2 s if the data were checked before.

    What is known of the data is kept in `runs/sweeps/{name}/plan.json` until their files change.

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

    There is no sweep if its script has an error. The data are checked unless their `info` is
    given; of a SPACE that is a function, some `draws` are.
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


def launch_sweep(
    sweep: Sweep,
    options: Options,
    view: View,
    requests: LaunchRequests = NOTHING,
    finish: Callable[[Hold], str] = lambda hold: "",
) -> None:
    r"""Starts, resumes or extends a sweep, as its record calls for.

    Everything is checked before anything is written and before Ray starts. A sweep has one driver
    at a time; the driver of a running sweep serves the requests. A Slurm job that has been
    requeued takes the sweep over from its previous execution. `finish` writes about a sweep that
    has ended here, holding its lease for each write, and returns what to print at last.

    Raises:
        UserError: If anything is wrong.
    """

    # Checks
    directory = sweep_directory(options.runs, str(sweep.name))
    check_code(directory, options.code)
    start = check_start(sweep, options)
    assert start.sweep is not None and start.info is not None
    sweep, info = start.sweep, start.info
    queue = [parse_item(text, sweep, options.runs) for text in requests.enqueue]
    requeued = is_requeued(directory, options.job)

    for line in start.warnings:
        say(f"Note: {line}")

    # Requests to a running sweep. One that is only about to start for the first time takes none.
    recorded = (directory / "sweep.json").exists()

    if requests != NOTHING and recorded and not requeued and is_driven(directory):
        with suppress(NotRunning):
            trials = sweep.trials if requests.retarget else None
            ask_all(directory, trials, requests.retry, queue, _priors(sweep, options, requests))
            return

    if options.job and not requeued:
        wait_for_driver(directory, sweep.name, OVERLAP)

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

        code = keep_code(directory)
        wandb = replace(options.wandb, group=sweep.name, job_type=options.job_type)
        slots = options.slots()
        options = replace(options, gpus=slots.wanted.get("GPU", 0), wandb=wandb)
        record = record_of(sweep, options, info) | {"code": code.hash}
        since = write_sweep(directory, record, sweep.script)
        study = Study(directory / "study.journal", sweep.name, lease, sweep.objectives)

        if options.replica is not None:
            options.replica.follow(study)

        runs, data = options.runs, info.fingerprint
        lost = restore_runs(study, sweep, runs, data, since) if recorded else []
        catch_up(study, options.runs, sweep.rules.rungs)

        for line in (*lost, *start.widened):
            say(line)

        if priors := _priors(sweep, options, requests):
            say(f"{bring_all(study, priors)}.")

        if requests.retry:
            say(f"{retry_failed(study)}.")

        if queue:
            say(f"{enqueue_all(study, queue, sweep.trials)}.")

        # Trials
        parallel = slots.local() if options.address is None else slots.most
        records = study.records()
        view.announce(sweep.name, sweep.rules, records, directory, slots.wanted, parallel)

        with running(code):
            spec = _spec(sweep, options, info, directory / "stop")
            _run(sweep, study, slots, options, spec, code, view, parallel)

        closing = finish(lease.hold)
    finally:
        lease.release()

    view.show_end(options.runs, sweep.name, study)

    if closing:
        say(closing)


def _priors(sweep: Sweep, options: Options, requests: LaunchRequests) -> list[dict[str, Any]]:
    return [
        item
        for other in requests.warm_start
        for item in warm_start(other, sweep, options.runs, options.data)
    ]


def _spec(sweep: Sweep, options: Options, info: DataInfo, stop: Path) -> dict[str, Any]:
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
            **sweep.judged,
        },
        "request": str(stop),
        "stall": 60 * options.stall,
    }


def _run(
    sweep: Sweep,
    study: Study,
    slots: Slots,
    options: Options,
    spec: dict[str, Any],
    code: Code,
    view: View,
    parallel: int | None,
) -> None:
    r"""Runs trials until nothing is left to do, or exits and prints how to resume."""

    records, stops = study.records(), sweep.stops()
    rules = replace(sweep.rules, excused=sum(record.state == "failed" for record in records))
    stop, objective = Path(spec["request"]), study.objectives[0]
    log = stop.with_name("ray.log")
    table = view.LiveTable(
        sweep.name, rules, options.runs, study.records, objective, parallel, log
    )
    retention = Retention(
        options.runs,
        sweep.name,
        study.records,
        options.keep,
        options.limit,
        say,
        stops is not None,
    )
    table.size = lambda: retention.size

    def look() -> None:
        retention()
        table.remind()

    def retarget(target: int) -> None:
        table.rules = replace(rules, target=target)
        write_sweep(stop.parent, read_sweep(options.runs, sweep.name) | {"trials": target}, None)

    limits = {
        "the time that --hours gives is up": deadline(options.hours, {}),
        "the time of the Slurm job is up": deadline(None, os.environ),
    }
    end = min((x for x in limits.values() if x is not None), default=None)

    try:
        if decide(records, (), rules, stops=stops).kind != "stop":
            driver = Driver(
                study, rules, sweep.propose, spec, slots, table.notify, stop, stops, end, retarget
            )
            study.journal.give_up = lambda: driver.stopping
            slots.avoided, slots.forgive = driver.losses.avoided, driver.losses.forgive

            command = _resume_command(sweep.name, options)

            def interrupt(number: int) -> None:  # while Ray starts or ends
                driver.signal = number
                driver.stop()  # Python ignores exceptions in some places, such as __del__
                try_print("")
                raise KeyboardInterrupt

            with suppress(KeyboardInterrupt), on_signals(interrupt), table:
                _drive(driver, slots, options, look, code, command)

            _end(driver, command, next((why for why, x in limits.items() if x == end), ""))

        study.close()
    finally:
        retention.finish()


def _drive(
    driver: Driver,
    slots: Slots,
    options: Options,
    look: Callable[[], None],
    code: Code,
    command: str,
) -> None:
    r"""Starts Ray, or connects to it, and runs trials there."""

    alone = options.address is None
    hint = f"Runs in progress resume from their last checkpoint with `{command}`"

    with ExitStack() as stack:
        started = connected(
            options.address, package=code.package, modules=["sda_ray.cluster.executor"], hint=hint
        )
        scratch = stack.enter_context(started)

        from ..cluster import execute  # imports Ray, which must be set up by then
        from ..storage import serve_files

        if not alone:  # its nodes may not see our files
            server = serve_files(options.runs, options.data, driver.request)
            driver.spec = driver.spec | {"server": stack.enter_context(server)}

        slots.grows = options.parallel is not None and not alone and not options.job
        slots.check(patience=0 if alone else JOIN)

        if alone:
            slots.left = partial(cpus_left, scratch)

        lease = driver.study.journal.lease
        assert lease is not None
        endpoint = ray_endpoint(alone or bool(options.job))
        stack.enter_context(announced(driver.request.parent, lease, *endpoint))

        def house() -> None:
            look()

            if options.replica is not None:
                options.replica.check()

            if alone:
                note_cpus(scratch, len(driver.live) * options.cpus)

        driver.house = house
        resources = {"cpu": options.cpus, "gpu": slots.wanted.get("GPU", 0)}
        execute(driver, resources, scratch, own=alone, requests=RequestServer(driver))


def _end(driver: Driver, command: str, limit: str) -> None:
    r"""Exits and prints how to resume, unless nothing is left to do."""

    if driver.done:
        return

    if driver.hopeless:
        raise UserError(
            f"the first {len(driver.errors)} runs failed alike, so the sweep stops: "
            f"{driver.errors[0]}. Fix the cause, then resume with `{command}`; with --code "
            "current if it was in the package."
        )

    in_time = driver.why == TIME
    why = f", since {limit if in_time else driver.why}" if driver.why else ""
    unsaved = driver.unsaved | {*driver.live.values()}

    if unsaved:
        runs = ", ".join(str(index) for index in sorted(unsaved))
        saved = f"Runs {runs} could not save a checkpoint and resume from their last one"
    else:
        saved = "Nothing is lost"

    say(f"Stopped{why}. {saved}: resume with `{command}`.")
    sys.exit(os.EX_TEMPFAIL if in_time else 128 + (driver.signal or signal.SIGINT))


def _resume_command(name: str, options: Options) -> str:
    r"""Returns the command that resumes a sweep from the current directory."""

    words = ["sda-ray", "sweep", name]

    if options.root != Path.cwd():
        words += ["--root", str(options.root)]

    if options.bucket or options.runs != options.root / "runs":
        words += ["--runs", options.bucket or str(options.runs)]

    if options.address is not None and not options.job:  # a job's Ray ends with it
        words += ["--address", options.address]

    return shlex.join(words)
