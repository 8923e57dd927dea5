r"""The commands about sweeps: `sda-ray plan | sweep | confirm | stop | adopt`."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..core import (
    Config,
    Hold,
    UserError,
    format_value,
    parse_overrides,
    python_command,
    read_holder,
    say,
)
from .options import (
    COUNT,
    DEFINITION,
    JSON,
    LAUNCH,
    NAME,
    RESOURCES,
    SETTINGS,
    SWEEP,
    WANDB,
    Args,
    command,
    option,
)

LOOK = 0.2  # seconds between two looks at whether a detached sweep runs
PATIENCE = 180.0  # seconds for that
LINES = 20  # of what it printed, if it ends at once
TOP, SEEDS = 5, 3  # of a confirmation


def wandb_options(args: Args) -> Any:
    r"""Returns how to log to W&B."""

    from ..runs import Wandb

    return Wandb.from_options(args.wandb, args.project, args.entity, args.tags)


def wandb_given(args: Args) -> bool:
    r"""Tells whether any option about W&B is given."""

    return bool(args.wandb or args.project or args.entity or args.tags)


def launch_options(args: Args) -> Any:
    r"""Returns how the trials of a sweep, or replicas, are run."""

    from ..sweep import Options

    return Options(
        args.root,
        args.runs,
        args.data,
        wandb_options(args),
        args.address,
        1 if args.cpus_per_trial is None else args.cpus_per_trial,
        args.gpus_per_trial,
        args.parallel,
    )


@command("sweep")
@LAUNCH
def sweep_command(args: Args) -> None:
    r"""Runs a sweep: many trials in parallel, each a training in its own run directory.

    SWEEP is a script, such as sweeps/demo.py, or the name of a sweep that was started before. The
    same command starts a sweep, resumes it after a crash, and, with a larger --trials, extends it.
    A running sweep takes up --trials, --enqueue, --warm-start and --retry-failed from elsewhere.

      sda-ray sweep sweeps/demo.py                      start, or resume
      sda-ray sweep demo --trials 64                    extend, running or finished
      sda-ray sweep demo --enqueue learning_rate=1e-3   try this next; other keys are drawn
      sda-ray sweep demo --enqueue RUN                  the settings of a run
      sda-ray sweep sweeps/demo.py seed=1 --fork        another sweep, with what it shares with this
      sda-ray sweep demo --detach                       in the background; see sda-ray attach demo

    With --runs s3://BUCKET/PREFIX, the runs are in ROOT/runs/s3/BUCKET/PREFIX, and a copy of them in
    the bucket follows within 5 s: if this machine and its disk are lost, the same command on another
    one resumes from the copy. One driver at a time. Requires `pip install 'sda-ray[cluster]'`.
    """

    from ..cluster import is_requeued
    from ..runs import sweep_directory

    job = args.job and os.environ.get("SLURM_JOB_ID")

    # A job resumes its sweep; its first start made the changes
    if args.job and is_requeued(sweep_directory(args.runs, args.job), job):
        changes = dict.fromkeys(("settings", "fix", "enqueue", "warm_start"), ())
        flags = {
            "name": None,
            "trials": None,
            "finalists": None,
            "seeds": None,
            "fork": False,
            "retry_failed": False,
        }
        args = Args(**vars(args) | changes | flags | {"sweep": args.job})

    if _passed_on(args):
        return

    if not args.bucket:
        _sweep(args)
        return

    from ..storage import replicated

    with replicated(args.bucket, args.runs, _name(args)) as replica:
        if not args.detach:
            _sweep(args, replica)
            return

    _sweep(args)  # the process in the background takes the copy over


def _passed_on(args: Args) -> bool:
    r"""Asks a running sweep for what needs no checks here, and tells whether that was all."""

    from ..runs import sweep_directory
    from ..sweep import NotRunning, ask_all

    others = (args.enqueue, args.warm_start, args.settings, args.fix, args.name, args.fork)
    checked = any(others) or args.finalists is not None or args.seeds is not None

    if args.script_sweep is not None or args.sweep.endswith(".py") or checked:
        return False

    if args.trials is None and not args.retry_failed:
        return False

    try:
        ask_all(sweep_directory(args.runs, args.sweep), args.trials, args.retry_failed)
    except NotRunning:
        return False

    return True


def _name(args: Args) -> str:
    r"""Returns the name of a sweep of which nothing need be on disk."""

    from ..sweep import load_script

    if args.fork and not args.name:
        raise UserError("--fork with runs in a bucket goes with --name: what to call the sweep.")

    if args.name or (args.script_sweep is None and not args.sweep.endswith(".py")):
        return str(args.name or args.sweep)

    return str((args.script_sweep or load_script(Path(args.sweep))).name)


def _sweep(args: Args, replica: Any = None) -> None:
    from ..sweep import LaunchRequests, fork, launch_sweep, load_script, parse_size
    from . import table

    options = replace(
        launch_options(args),
        hours=args.hours,
        stall=args.stall,
        job=args.job and os.environ.get("SLURM_JOB_ID"),
        code=args.code,
        bucket=args.bucket,
        replica=replica,
    )
    sweep, options = chosen_sweep(args, options)

    if args.keep_checkpoints is not None:
        options = replace(options, keep=args.keep_checkpoints)

    if args.disk is not None:
        options = replace(options, limit=parse_size(args.disk))

    warm = tuple(args.warm_start)

    if args.fork:
        script = args.script_sweep or load_script(Path(args.sweep))
        parent = sweep.name if args.name is None else script.name
        sweep = sweep if args.name else fork(sweep, options.runs, options.data)
        warm += (parent,)

    if args.detach:
        _detach(sweep, options, args.argv)
        return

    requests = LaunchRequests(
        tuple(args.enqueue), warm, args.retry_failed, args.trials is not None
    )

    def finish(hold: Hold) -> str:
        from .results import report_end

        return "" if args.no_report else report_end(options.runs, sweep.name, hold)

    launch_sweep(sweep, options, table, requests, finish)


def _detach(sweep: Any, options: Any, words: Sequence[str]) -> None:
    r"""Runs a command without a terminal, after a check, and returns once the sweep runs."""

    from ..runs import sweep_directory
    from ..sweep import check_start, recorded_code

    check_start(sweep, options)
    name = sweep.name
    directory = sweep_directory(options.runs, name)
    directory.mkdir(parents=True, exist_ok=True)
    file, deadline = directory / "detached.log", time.monotonic() + PATIENCE

    with open(file, "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            python_command("sda-ray", *(x for x in words if x != "--detach")),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives the terminal
        )

    # Once the code is recorded, edits of the package change nothing
    while (read_holder(directory / "lease.json") or {}).get("pid") != process.pid or (
        recorded_code(directory) is None
    ):
        if process.poll() is not None:
            lines = file.read_bytes()[begin:].decode(errors="replace").splitlines()
            say("\n".join(lines[-LINES:]))
            sys.exit(process.returncode)

        if time.monotonic() > deadline:
            print(f"The process has not begun within {PATIENCE:.0f} s, but it has not ended.")
            break

        time.sleep(LOOK)

    print(
        f"sweep '{name}' runs in the background, as process {process.pid}; its output goes to "
        f"{file}.\n"
        f"  sda-ray attach {name}   # its live view\n"
        f"  sda-ray stop {name}     # every trial saves a checkpoint first"
    )


@command("confirm")
@SWEEP
@SETTINGS
@option("--top", f"How many of the best configurations. Default: {TOP}.", COUNT)
@option("--seeds", f"How many seeds for each. Default: {SEEDS}.", click.IntRange(1, 1000))
@option("--name", "Default: SWEEP-confirm.")
@JSON
@RESOURCES
@WANDB
def confirm_command(args: Args) -> None:
    r"""Trains the best of a sweep again: is its winner real, or luck?

    The first of a leaderboard is the best of many numbers with noise, so its own is too good. Here
    the best configurations are trained again: all with the same seeds, which SWEEP has not used,
    and validated on other windows, times and noise. A table then has means and standard errors, and
    says whether the order survives, by how much the winner was flattered, and which configuration
    to use. Nothing is pruned: it takes as many whole trainings as --top times --seeds.

    The same command resumes it, as does `sda-ray sweep SWEEP-confirm`; with more --seeds it trains
    these too. Once it has ended, it prints the table again.

      sda-ray confirm width
      sda-ray confirm width --top 3 --seeds 5 epochs=1024
    """

    from ..sweep import read_confirmation

    name = args.name or f"{args.sweep}-confirm"

    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        _confirm(args, args.sweep, name)

    if args.json:
        print(json.dumps(read_confirmation(args.runs, name).as_json(), indent=2))


def _confirm(args: Args, parent: str, name: str) -> None:
    from ..data import fingerprint
    from ..runs import sweep_directory
    from ..sweep import launch_sweep, make_confirmation, read_sweep, resume_confirmation
    from . import table
    from .results import report_end

    settings, confirms = parse_overrides(args.settings), None
    epochs = settings.pop("epochs", None)

    if settings:
        raise UserError(f"{next(iter(settings))} is that of the sweep. Only epochs may differ.")

    if (sweep_directory(args.runs, name) / "sweep.json").exists():
        sweep = resume_confirmation(args.runs, parent, name, args.top, args.seeds, epochs)
        record = read_sweep(args.runs, name)
    else:
        top, seeds = args.top or TOP, args.seeds or SEEDS
        sweep, confirms = make_confirmation(args.runs, parent, name, top, seeds, epochs)
        record = read_sweep(args.runs, parent)

        if (count := len(confirms["runs"])) < top:
            more = f" `sda-ray sweep {parent} --finalists {top}` completes more."
            paused = record["definition"]["pruner"] == "promotion"
            say(
                f"Note: sweep '{parent}' has {count} complete configurations, all of which are "
                f"confirmed.{more * paused}"
            )

    options = recorded_options(args, launch_options(args), record["options"])
    options = replace(options, confirms=confirms, job_type="confirmation")

    if fingerprint(options.data) != record["fingerprint"]:
        raise UserError(f"{options.data} has other data than sweep '{parent}'. Give its --data.")

    launch_sweep(sweep, options, table, finish=lambda hold: report_end(args.runs, name, hold))


@command("stop")
@SWEEP
@option("--trial", "End this trial only.", int)
def stop_command(args: Args) -> None:
    r"""Stops a running sweep, here or on another machine that sees the directory of runs.

    Every trial saves a checkpoint first, and the sweep can be resumed. A trial that is ended by its
    number is not resumed.

      sda-ray stop width
      sda-ray stop width --trial 7
    """

    from ..sweep import stop_sweep

    stop_sweep(args.runs, args.sweep, args.trial)


@command("plan")
@DEFINITION
@JSON
@RESOURCES
@WANDB
def plan_command(args: Args) -> None:
    r"""Says what a sweep would cost, and what is wrong with it, before anything starts.

    Parameters, memory and seconds of its networks, trials at a time, hours, disk. A probe of some
    seconds on each kind of node measures speed and memory. Exits with 2 if anything is wrong,
    and lists all of it.

      sda-ray plan sweeps/demo.py
      sda-ray plan width.py --parallel 4 --gpus-per-trial 0.5
    """

    from rich.console import Console

    from ..plan import plan_sweep, plan_to_json, print_plan

    options = launch_options(args)
    source: Any = Path(args.sweep)
    prints = redirect_stdout(sys.stderr) if args.json else nullcontext()  # those of the script

    with prints, Console(stderr=True, quiet=args.json).status("") as status:
        if not args.sweep.endswith(".py"):
            source, options = chosen_sweep(args, options)

        adjust = functools.partial(_adjusted, args=args)
        plan = plan_sweep(source, options, adjust, status.update)

    if args.json:
        print(json.dumps(plan_to_json(plan), indent=2))
    else:
        print_plan(plan)

    if plan.faults:
        sys.exit(2)


@command("adopt")
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY...")
@option("--sweep", "A script, or the name of a sweep.", metavar="SWEEP", required=True)
@NAME
@RESOURCES
@WANDB
def adopt_command(args: Args) -> None:
    r"""Brings finished runs into a sweep as prior trials: the sampler learns from them.

    They do not count as trials of the sweep. Runs of SDA's own code work too. Settings and metrics
    are copied; nothing is written to or deleted from DIRECTORY. Runs that the sweep does not cover
    are left out, with the reason.

      sda-ray adopt --sweep width.py OLD/runs/*
    """

    from ..sweep import adopt

    sweep, options = chosen_sweep(args, launch_options(args))
    adopt(args.directories, sweep, options)


def chosen_sweep(args: Args, options: Any) -> tuple[Any, Any]:
    r"""Returns the sweep that the arguments name, and its options: those given, then recorded ones."""

    from ..sweep import load_record, load_script

    if args.script_sweep is not None or args.sweep.endswith(".py"):
        return _adjusted(args.script_sweep or load_script(Path(args.sweep)), args), options

    if args.fork:
        raise UserError("--fork goes with a script, which says what the new sweep is.")

    if args.settings or args.fix or args.name:
        raise UserError(
            f"sweep '{args.sweep}' resumes as it was started: key=value, --fix and "
            "--name go with a script, for a new sweep."
        )

    sweep, before = load_record(args.runs, args.sweep)

    return _adjusted(sweep, args), recorded_options(args, options, before)


def recorded_options(args: Args, options: Any, before: Mapping[str, Any]) -> Any:
    r"""Returns options of which those that are not given are the recorded ones."""

    from ..runs import Wandb

    logged = Wandb(**before["wandb"] | {"tags": tuple(before["wandb"]["tags"])})

    return replace(
        options,
        data=args.data if args.data_given else args.root / before["data"],
        cpus=before["cpus"] if args.cpus_per_trial is None else options.cpus,
        gpus=before["gpus"] if args.gpus_per_trial is None else options.gpus,
        wandb=options.wandb if wandb_given(args) else logged,
        job_type=before["wandb"]["job_type"],
        keep=before.get("keep"),
        limit=before.get("limit"),
    )


def _adjusted(sweep: Any, args: Args) -> Any:
    r"""Applies key=value, --fix, --name and --trials to a sweep."""

    settings, fixed = parse_overrides(args.settings), parse_overrides(args.fix)

    if not isinstance(sweep.config, Mapping) or not isinstance(sweep.space, Mapping | Callable):
        return sweep  # its own check says what is wrong

    return replace(
        sweep,
        name=args.name or sweep.name,
        config={**sweep.config, **settings, **fixed},
        space=_without(sweep.name, sweep.space, settings, fixed),
        trials=sweep.trials if args.trials is None else args.trials,
        finalists=sweep.finalists if args.finalists is None else args.finalists,
        seeds=sweep.seeds if args.seeds is None else args.seeds,
    )


def _without(name: str, space: Any, settings: Config, fixed: Config) -> Any:
    r"""Returns a space without the keys that are fixed."""

    if callable(space):
        if fixed:
            raise UserError("--fix goes with a SPACE that is a dict; this one is a function.")

        return space

    groups = {key.strip(): group for group in space for key in str(group).split(",")}

    for key in settings:
        if key in groups:
            raise UserError(
                f"{key} is in SPACE of sweep '{name}': every trial has its own. To take it out of "
                f"SPACE, give --fix {key}={format_value(settings[key])}"
            )

    for key in fixed:
        if key not in space:
            joined = f" alone: it is joined in '{groups[key]}'" if key in groups else ""
            raise UserError(f"--fix {key}: SPACE has no key {key}{joined}.")

    return {key: domain for key, domain in space.items() if key not in fixed}
