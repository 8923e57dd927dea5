r"""The commands about sweeps: `sda-ray plan | sweep | stop | adopt`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .chosen import adjusted, chosen_sweep

__all__ = [
    "adopt_command",
    "launch_options",
    "plan_command",
    "stop_command",
    "sweep_command",
    "wandb_options",
]


def wandb_options(args: argparse.Namespace) -> Any:
    r"""Returns how to log to W&B."""

    from ..runs.tracking import Wandb

    return Wandb.from_options(args.wandb, args.project, args.entity, args.tags)


def launch_options(args: argparse.Namespace) -> Any:
    r"""Returns how the trials of a sweep, or replicas, are carried out."""

    from ..sweep.launch import Options

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


def sweep_command(args: argparse.Namespace, sweep: Any) -> None:
    r"""Starts a sweep, carries it on, extends it, or steers the one that runs."""

    args = _again(args)

    if sweep is None and _taken_up(args):
        return

    if not args.bucket:
        return _sweep(args, sweep, None)

    from ..storage.bucket import replicated

    with replicated(args.bucket, args.runs, _name(args, sweep)) as replica:
        if not args.detach:
            _sweep(args, sweep, replica)
            return

    _sweep(args, sweep, None)  # what is detached takes the copy over itself


def _name(args: argparse.Namespace, sweep: Any) -> str:
    r"""Returns the name of the sweep that is meant, before anything of it need be there."""

    from ..sweep.definition import load_script

    if args.fork and not args.name:
        raise UserError("--fork with runs in a bucket goes with --name: what to call the sweep.")

    if args.name or (sweep is None and not args.sweep.endswith(".py")):
        return str(args.name or args.sweep)

    return str((sweep or load_script(Path(args.sweep))).name)


def _sweep(args: argparse.Namespace, sweep: Any, replica: Any) -> None:
    from ..sweep.definition import load_script
    from ..sweep.launch import LaunchRequests, launch
    from ..sweep.prior_runs import fork
    from ..sweep.retention import parse_size
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
        from ..sweep.launch import count_gpus
        from .detach import detach

        detach(sweep, options, args.argv, count_gpus())
        return

    requests = LaunchRequests(
        tuple(args.enqueue), warm, args.retry_failed, args.trials is not None
    )
    launch(sweep, options, table, requests)


def _again(args: argparse.Namespace) -> argparse.Namespace:
    r"""Returns what is asked of the sweep of a Slurm job that has started again: to be carried on.

    What was asked beside that has been done, and may have been undone by others since.
    """

    from ..cluster.join import is_requeued
    from ..runs.path import sweep_directory

    if args.job is None:
        return args

    if not is_requeued(sweep_directory(args.runs, args.job), os.environ.get("SLURM_JOB_ID")):
        return args

    lists: dict[str, Any] = {key: [] for key in ("settings", "fix", "enqueue", "warm_start")}
    rest = {"name": None, "trials": None, "fork": False, "retry_failed": False}

    return argparse.Namespace(**vars(args) | lists | rest | {"sweep": args.job})


def _taken_up(args: argparse.Namespace) -> bool:
    r"""Asks a running sweep for what needs no checks here, and tells whether that was all."""

    from ..runs.path import sweep_directory
    from ..sweep.requests import NotRunning, ask_all

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


def stop_command(args: argparse.Namespace, _: Any) -> None:
    r"""Stops a sweep that runs somewhere, or one of its trials."""

    from ..sweep.requests import stop_sweep

    stop_sweep(args.runs, args.sweep, args.trial)


def plan_command(args: argparse.Namespace, _: Any) -> None:
    r"""Says what a sweep would take, and what is wrong with it."""

    from ..plan.plan import plan_sweep
    from ..plan.report import plan_to_json, print_plan

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
    r"""Yields what shows on standard error what goes on, for as long as the block lasts."""

    from rich.console import Console

    console = Console(stderr=True, quiet=silent)

    with console.status("") as status:
        yield status.update


def adopt_command(args: argparse.Namespace, _: Any) -> None:
    r"""Brings finished runs into a sweep."""

    from ..sweep.launch import record_of
    from ..sweep.prior_runs import adopt

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
