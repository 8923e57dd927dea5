r"""The command line, `sda-ray COMMAND`: how it starts and ends."""

import errno
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
from ..core import KEYS, UserError, did_you_mean
from ..sweep import OtherCode, execute
from .arguments import Args
from .options import sda_ray

__all__ = ["main"]

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
    r"""Ends the process gracefully: context managers and `finally` blocks run."""

    sys.exit(128 + number)


def _check_bucket(args: Args) -> None:
    r"""Checks that a command can use runs in a bucket, and fetches those that it lists."""

    if args.command not in ("sweep", "plan", "stop", *LISTING):
        raise UserError(
            f"`sda-ray {args.command}` works on a directory, not on {args.bucket}: give it --runs "
            f"{args.runs}, where runs of this machine are, and those fetched by `sda-ray runs`."
        )

    if args.command in LISTING:
        from ..storage import Bucket, fetch_records

        fetch_records(Bucket(args.bucket), args.runs)
