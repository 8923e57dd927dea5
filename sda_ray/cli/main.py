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

from ..core import ALIASES, KEYS, LeaseGone, UserError, did_you_mean, plain, say
from ..sweep import OtherCode, execute
from .options import sda_ray

__all__ = ["main"]


def main(sweep: Any = None, argv: Sequence[str] | None = None) -> None:
    r"""Runs the command line.

    Arguments:
        sweep: A sweep to run, for scripts: the command is then `sda-ray sweep SCRIPT`.
        argv: The arguments, by default those of the process.
    """

    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
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
        say(f"sda-ray: {_explain(error)}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        if started and isinstance(error, OtherCode):
            say(error)
            what = "sda-ray" if sweep is None else str(sweep.script)
            execute(error.place, what, sys.argv[1:])

        say(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except click.Abort:  # no answer to a question
        sys.exit(1)
    except KeyboardInterrupt:
        say("Interrupted. The same command resumes.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        gone = isinstance(error, LeaseGone)

        if not gone and error.errno not in (errno.ENAMETOOLONG, errno.ENOSPC):
            raise

        full = error.errno == errno.ENOSPC

        if started and full:  # Python would write the rest at its end, again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        say(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(1 if full or gone else 2)
    finally:
        # Once SIGINT has met code that is run from a string, as dataclasses do, Python (3.11) ends
        # by that signal, though it was caught, until other such code has run.
        exec("")


class _Plain(logging.Formatter):
    r"""Formats messages, which may quote files of others, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _run(argv: list[str], sweep: Any) -> None:
    r"""Parses a command and runs it. Words after `--` are those of sbatch, for `slurm`."""

    split = argv.index("--") if argv[:1] == ["slurm"] and "--" in argv else len(argv)
    words, sbatch = argv[:split], argv[split + 1 :]
    given = {"argv": argv, "words": words[1:], "sbatch": sbatch, "script_sweep": sweep}

    with sda_ray.make_context("sda-ray", words or ["--help"], obj=given) as context:
        sda_ray.invoke(context)


def _explain(error: click.UsageError) -> str:
    r"""Returns what is wrong with a command's words, and how settings are given."""

    text = f"{error.format_message().removesuffix('.')}."

    if isinstance(error, click.NoSuchOption):
        name = error.option_name
        key = name.strip("-").replace("-", "_")
        key = ALIASES.get(key, key)
        hint = did_you_mean(name, error.possibilities or ())
        text = f"there is no option {name}."
        text += f" Settings are given as {key}=…" if key in KEYS else hint

    return text + (f" `{error.ctx.command_path} --help` says more." if error.ctx else "")


def _terminate(number: int, frame: FrameType | None) -> None:
    r"""Ends the process gracefully: context managers and `finally` blocks run."""

    sys.exit(128 + number)
