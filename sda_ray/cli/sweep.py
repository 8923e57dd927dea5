r"""The commands about sweeps: `sda-ray plan | sweep | stop | adopt`."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import Config, UserError, format_value, parse_overrides
from .arguments import Args, without

__all__ = [
    "adopt_command",
    "chosen_sweep",
    "launch_options",
    "plan_command",
    "stop_command",
    "sweep_command",
    "wandb_options",
]

LOOK = 0.2  # seconds between two looks at whether a detached sweep runs
PATIENCE = 180.0  # seconds for that
LINES = 20  # of what it printed, if it ends at once


def wandb_options(args: Args) -> Any:
    r"""Returns how to log to W&B."""

    from ..runs import Wandb

    return Wandb.from_options(args.wandb, args.project, args.entity, args.tags)


def launch_options(args: Args) -> Any:
    r"""Returns how the trials of a sweep, or replicas, are carried out."""

    from ..sweep import Options

    for name in ("cpus_per_trial", "gpus_per_trial", "parallel", "hours", "stall"):
        value = getattr(args, name, None)

        if value is not None and not (value > 0 or (value == 0 and name == "gpus_per_trial")):
            raise UserError(f"--{name.replace('_', '-')} is {value:g}, but must be above 0.")

        if value == math.inf and name.endswith("per_trial"):
            raise UserError(f"--{name.replace('_', '-')} is inf, but must be finite.")

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


def sweep_command(args: Args) -> None:
    r"""Starts, resumes or extends a sweep, or passes changes to the driver that runs it."""

    args, sweep = _again(args), args.script_sweep

    if sweep is None and _taken_up(args):
        return

    if not args.bucket:
        return _sweep(args, sweep, None)

    from ..storage import replicated

    with replicated(args.bucket, args.runs, _name(args, sweep)) as replica:
        if not args.detach:
            _sweep(args, sweep, replica)
            return

    _sweep(args, sweep, None)  # what is detached takes the copy over itself


def _name(args: Args, sweep: Any) -> str:
    r"""Returns the name of the sweep that is meant, before anything of it need be there."""

    from ..sweep import load_script

    if args.fork and not args.name:
        raise UserError("--fork with runs in a bucket goes with --name: what to call the sweep.")

    if args.name or (sweep is None and not args.sweep.endswith(".py")):
        return str(args.name or args.sweep)

    return str((sweep or load_script(Path(args.sweep))).name)


def _sweep(args: Args, sweep: Any, replica: Any) -> None:
    from ..sweep import LaunchRequests, fork, launch_sweep, load_script, parse_size
    from . import table

    if args.keep_checkpoints is not None and args.keep_checkpoints < 0:
        raise UserError(f"--keep-checkpoints is {args.keep_checkpoints}, but must be at least 0.")

    options = replace(
        launch_options(args),
        hours=args.hours,
        stall=args.stall,
        job=args.job and os.environ.get("SLURM_JOB_ID"),
        code=args.code,
        bucket=args.bucket,
        replica=replica,
    )
    sweep, options = chosen_sweep(args, sweep, options)

    if args.keep_checkpoints is not None:
        options = replace(options, keep=args.keep_checkpoints)

    if args.disk is not None:
        options = replace(options, limit=parse_size(args.disk))

    warm = tuple(args.warm_start)

    if args.fork:
        parent = sweep.name if args.name is None else load_script(Path(args.sweep)).name
        sweep = sweep if args.name else fork(sweep, options.runs, options.data)
        warm += (parent,)

    if args.detach:
        _detach(sweep, options, args.argv)
        return

    requests = LaunchRequests(
        tuple(args.enqueue), warm, args.retry_failed, args.trials is not None
    )
    launch_sweep(sweep, options, table, requests)


def _detach(sweep: Any, options: Any, words: Sequence[str]) -> None:
    r"""Starts or resumes a sweep in a process without a terminal, and returns once it runs.

    The sweep is checked here first.

    Raises:
        UserError: If anything is wrong with the sweep.
    """

    from ..cluster import Slots
    from ..core import read_holder
    from ..runs import sweep_directory
    from ..sweep import check_start, count_gpus, recorded_code

    gpus = count_gpus() if options.gpus is None else options.gpus
    slots = Slots(options.cpus, gpus, options.parallel)
    start = check_start(sweep, options.runs, options.data, slots, options.wandb, options.address)
    name = start.sweep.name
    directory = sweep_directory(options.runs, name)
    directory.mkdir(parents=True, exist_ok=True)
    file, deadline = directory / "detached.log", time.monotonic() + PATIENCE

    with open(file, "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "sda_ray", *without(words, "--detach", flag=True)],
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
            print("\n".join(["…", *lines[-LINES:]] if len(lines) > LINES else lines), flush=True)
            sys.exit(process.returncode)

        if time.monotonic() > deadline:
            print(f"The process has not begun within {PATIENCE:.0f} s, but it has not ended.")
            break

        time.sleep(LOOK)

    print(
        f"sweep '{name}' runs in the background, as process {process.pid}; its output goes to "
        f"{file}.\n"
        f"  sda-ray attach {name}   # its live table\n"
        f"  sda-ray stop {name}     # every trial saves a checkpoint first"
    )


def _again(args: Args) -> Args:
    r"""Returns the arguments of a requeued Slurm job: it only resumes its sweep.

    What was asked beside that has been done, and may have been undone by others since.
    """

    from ..cluster import is_requeued
    from ..runs import sweep_directory

    if args.job is None:
        return args

    if not is_requeued(sweep_directory(args.runs, args.job), os.environ.get("SLURM_JOB_ID")):
        return args

    lists: dict[str, Any] = dict.fromkeys(("settings", "fix", "enqueue", "warm_start"), ())
    rest = {"name": None, "trials": None, "fork": False, "retry_failed": False}

    return Args(**vars(args) | lists | rest | {"sweep": args.job})


def _taken_up(args: Args) -> bool:
    r"""Asks a running sweep for what needs no checks here, and tells whether that was all."""

    from ..runs import sweep_directory
    from ..sweep import NotRunning, ask_all

    if args.sweep.endswith(".py") or args.enqueue or args.warm_start:
        return False

    if args.settings or args.fix or args.name or args.fork:
        return False

    if args.trials is None and not args.retry_failed:
        return False

    with suppress(NotRunning):
        ask_all(sweep_directory(args.runs, args.sweep), args.trials, args.retry_failed)
        return True

    return False


def stop_command(args: Args) -> None:
    r"""Stops a sweep that runs somewhere, or one of its trials."""

    from ..sweep import stop_sweep

    stop_sweep(args.runs, args.sweep, args.trial)


def plan_command(args: Args) -> None:
    r"""Says what a sweep would take, and what is wrong with it."""

    from ..plan import plan_sweep, plan_to_json, print_plan

    options = launch_options(args)
    source: Any = Path(args.sweep)

    if not args.sweep.endswith(".py"):
        source, options = chosen_sweep(args, None, options)

    with _status(args.json) as say:
        made = plan_sweep(
            source,
            options.runs,
            options.data,
            options.cpus,
            options.gpus,
            options.parallel,
            options.address,
            options.wandb,
            lambda sweep: adjusted(sweep, args),
            say,
        )

    if args.json:
        print(json.dumps(plan_to_json(made), indent=2))
    else:
        print_plan(made)

    if made.faults:
        sys.exit(2)


@contextmanager
def _status(silent: bool) -> Iterator[Callable[[str], None]]:
    r"""Yields a function that shows the current step on standard error."""

    from rich.console import Console

    console = Console(stderr=True, quiet=silent)

    with console.status("") as status:
        yield status.update


def adopt_command(args: Args) -> None:
    r"""Brings finished runs into a sweep."""

    from ..sweep import adopt, record_of

    sweep, options = chosen_sweep(args, None, launch_options(args))

    if options.gpus is None:
        options = replace(options, gpus=0)

    adopt(
        args.directories,
        sweep,
        options.runs,
        options.data,
        lambda sweep, info: record_of(sweep, options, info),
    )


def chosen_sweep(args: Args, sweep: Any, options: Any) -> tuple[Any, Any]:
    r"""Returns the sweep that is meant by the arguments, and the options that it gets."""

    from ..sweep import load_record, load_script

    if sweep is None and not args.sweep.endswith(".py"):
        if getattr(args, "fork", False):
            raise UserError("--fork goes with a script, which says what the new sweep is.")

        if args.settings or args.fix or args.name:
            raise UserError(
                f"sweep '{args.sweep}' resumes as it was started: key=value, --fix and "
                "--name go with a script, for a new sweep."
            )

        sweep, before = load_record(args.runs, args.sweep)
        options = _recorded(args, options, before)
    elif sweep is None:
        sweep = load_script(Path(args.sweep))

    return adjusted(sweep, args), options


def _recorded(args: Args, options: Any, before: dict[str, Any]) -> Any:
    r"""Returns options with those that a sweep was last run with, where none are given now."""

    from ..runs import Wandb

    options = replace(
        options,
        job_type=before["wandb"]["job_type"],
        keep=before.get("keep"),
        limit=before.get("limit"),
    )

    if not args.data_given:
        options = replace(options, data=args.root / before["data"])

    for name in ("cpus", "gpus"):
        if getattr(args, f"{name}_per_trial") is None:
            options = replace(options, **{name: before[name]})

    if not (args.wandb or args.project or args.entity or args.tags):
        wandb = Wandb(**before["wandb"] | {"tags": tuple(before["wandb"]["tags"])})
        options = replace(options, wandb=wandb)

    return options


def adjusted(sweep: Any, args: Args) -> Any:
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
