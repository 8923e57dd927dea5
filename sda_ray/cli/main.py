r"""The command line, `sda-ray COMMAND`: how it starts and ends, and simulations and trainings."""

import errno
import functools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any

import click

from .. import __version__
from ..core.config import CONFIG, Config, check_config, load_config, parse_overrides
from ..core.errors import UserError
from ..core.keys import KEYS, did_you_mean
from ..sweep.code import OtherCode, execute
from .options import Args, sda_ray
from .sweep import launch_options, wandb_options

__all__ = ["main", "simulate_command", "train_command"]

THREADS = 4096  # torch takes any number, and fails later on what it cannot start
LISTING = ("list", "show", "compare")  # the commands that look at runs, of a bucket too


def main(sweep: Any = None, argv: Sequence[str] | None = None) -> None:
    r"""Runs the command line.

    Arguments:
        sweep: A sweep to run, for scripts: the command is then `sda-ray sweep SCRIPT`.
        argv: The arguments, by default those of the process.
    """

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    started = argv is None

    if started and isinstance(sys.stdout, TextIOWrapper):
        # A log or pipe gets each line at once, and what it cannot show is no error
        sys.stdout.reconfigure(line_buffering=True, errors="replace")

    argv = list(sys.argv[1:] if argv is None else argv)

    if sweep is not None:
        script = Path(sys.modules["__main__"].__file__ or "").resolve()
        sweep = replace(sweep, script=script)
        argv = ["sweep", str(script), *argv]

    try:
        _run(argv, sweep)
    except click.exceptions.Exit as end:  # of --help and --version
        sys.exit(end.exit_code)
    except click.UsageError as error:
        print(f"sda-ray: {_explain(error)}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        if started and isinstance(error, OtherCode):
            print(error, flush=True)
            what = "sda-ray" if sweep is None else str(sweep.script)
            execute(error.place, what, sys.argv[1:])

        print(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command resumes.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOSPC):
            raise

        if (
            started and error.errno == errno.ENOSPC
        ):  # Python would write the rest at its end, again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        print(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(1 if error.errno == errno.ENOSPC else 2)
    finally:
        # Once SIGINT has met code that is run from a string, as dataclasses do, Python (3.11) ends
        # by that signal, though it was caught, until other such code has run.
        exec("")


def _run(argv: list[str], sweep: Any) -> None:
    r"""Parses a command and runs it. Words after `--` are those of sbatch, for `slurm`."""

    split = argv.index("--") if argv[:1] == ["slurm"] and "--" in argv else len(argv)
    words, sbatch = argv[:split], argv[split + 1 :]
    invocation = Args(argv=argv, words=words[1:], sbatch=sbatch, script_sweep=sweep, begin=_begin)

    with sda_ray.make_context("sda-ray", words or ["--help"], obj=invocation) as context:
        sda_ray.invoke(context)


def _explain(error: click.UsageError) -> str:
    r"""Returns what is wrong with a command's words, and how settings are given."""

    text = f"{error.format_message().removesuffix('.')}."

    if isinstance(error, click.NoSuchOption):
        name = error.option_name
        key = name.strip("-").replace("-", "_")
        hint = did_you_mean(name, error.possibilities or ())
        text = f"there is no option {name}."
        text += f" Settings are given as {key}=…" if key in KEYS else hint

    return text + (f" `{error.ctx.command_path} --help` says more." if error.ctx else "")


def _begin(args: Args) -> None:
    r"""Prints where files are, and checks that they can be there."""

    places = f"data {args.data}" + ("" if args.command == "simulate" else f", runs {args.runs}")
    places += f", a copy of which is in {args.bucket}" if args.bucket else ""
    out = sys.stderr if getattr(args, "json", False) else sys.stdout
    print(f"sda-ray {__version__}: root {args.root}, {places}", file=out, flush=True)

    for place in (args.root, args.data, args.runs):
        existing = next(part for part in (place, *place.parents) if part.exists())

        if not existing.is_dir():
            raise UserError(f"{place} cannot be used: {existing} is a file, no directory.")

    if args.bucket:
        _check_bucket(args)


def _terminate(number: int, frame: FrameType | None) -> None:
    r"""Ends the process in good order: everything that was begun is closed."""

    sys.exit(128 + number)


def _check_bucket(args: Args) -> None:
    r"""Checks that a command can use runs in a bucket, and fetches those that it lists."""

    if args.command not in ("sweep", "plan", "stop", *LISTING):
        raise UserError(
            f"`sda-ray {args.command}` works on a directory, not on {args.bucket}: give it --runs "
            f"{args.runs}, where runs of this machine are, and those fetched by `sda-ray runs`."
        )

    if args.command in LISTING:
        from ..storage.bucket import fetch_records
        from ..storage.store import Bucket, Unreachable

        bucket = Bucket(args.bucket)
        bucket.check()

        try:
            fetch_records(bucket, args.runs)
        except Unreachable as error:
            raise UserError(f"{args.bucket} does not answer: {error}. Try again.") from error


def simulate_command(args: Args) -> None:
    r"""Makes a data set."""

    from ..cluster.connect import map_on_ray
    from ..data.simulate import PRESETS, simulate

    preset = PRESETS[args.preset]
    simulate(
        args.data,
        preset["trajectories"] if args.trajectories is None else args.trajectories,
        preset["size"] if args.size is None else args.size,
        args.seed,
        functools.partial(map_on_ray, workers=args.workers, address=args.address),
    )


def train_command(args: Args) -> None:
    r"""Trains a run, resumes or extends one, or trains replicas."""

    from .train import extend_run, resume_run, start_replicas, start_run

    if sum(bool(given) for given in (args.resume, args.init, args.extend)) > 1:
        raise UserError("--resume, --init and --extend exclude each other.")

    if args.takeover and not args.resume:
        raise UserError("--takeover goes with --resume RUN.")

    if args.replicas is not None:
        if args.init or args.resume or args.extend or args.device or args.threads:
            raise UserError(
                "--replicas goes with none of --init, --resume, --extend, --device and --threads."
            )

        start_replicas(_config(args), args.replicas, launch_options(args))
        return

    for name in ("address", "cpus_per_trial", "gpus_per_trial", "parallel"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --replicas N.")

    if args.threads is not None:
        _set_threads(args.threads)

    if args.extend:
        if args.config:
            raise UserError("--extend takes the settings of RUN, and so goes without --config.")

        changes = parse_overrides(args.settings)
        extend_run(args.runs, args.data, args.extend, changes, args.device, wandb_options(args))
    elif args.resume:
        if args.settings or args.config:
            raise UserError(
                "--resume continues a run as it is. For other settings start a run from its "
                f"weights: sda-ray train --init {args.resume} key=value"
            )

        given = args.wandb or args.project or args.entity or args.tags
        wandb = wandb_options(args) if given else None
        resume_run(args.runs, args.data, args.resume, args.device, wandb, args.takeover)
    else:
        start_run(args.runs, args.data, _config(args), args.init, args.device, wandb_options(args))


def _set_threads(threads: int) -> None:
    import torch

    if not 1 <= threads <= THREADS:
        raise UserError(f"--threads is {threads}, but must be from 1 to {THREADS}.")

    torch.set_num_threads(threads)


def _config(args: Args) -> Config:
    r"""Returns the settings of a training: key=value, before --config or --init, before CONFIG."""

    from ..runs.path import RunPath

    base = dict(CONFIG)

    if args.config and Path(args.config).is_file():
        base = load_config(Path(args.config).resolve())
    elif args.config or args.init:
        base = load_config(RunPath.find(args.runs, args.config or args.init).config)

    return check_config(base | parse_overrides(args.settings))
