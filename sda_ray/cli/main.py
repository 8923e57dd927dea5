r"""The command line, `sda-ray COMMAND`: how it starts and ends."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from io import TextIOWrapper
from types import FrameType
from typing import Any

import click

from ..core import ALIASES, KEYS, LeaseGone, UserError, did_you_mean, log_warnings, say
from ..sweep import OtherCode, execute, hand_over, look_beside
from .options import COMPLETE, sda_ray


def main(sweep: Any = None, argv: Sequence[str] | None = None) -> None:
    r"""Runs the command line.

    Arguments:
        sweep: A sweep to run, for scripts: the command is then `sda-ray sweep SCRIPT`, with the
            script that made it.
        argv: The arguments, by default those of the process.
    """

    if sweep is not None:
        hand_over(sweep)

    if threading.current_thread() is not threading.main_thread():  # signals go to that one
        say("sda-ray: main() must be called in the main thread of a process.", file=sys.stderr)
        sys.exit(2)

    _open_streams()
    log_warnings()
    signal.signal(signal.SIGTERM, _terminate)

    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, _terminate)

    started = argv is None

    if started and isinstance(sys.stdout, TextIOWrapper):
        # A log or pipe gets each line at once, and what it cannot show is no error
        sys.stdout.reconfigure(line_buffering=True, errors="replace")

    argv = list(sys.argv[1:] if argv is None else argv)

    try:
        if sweep is not None:
            sweep = _with_script(sweep)
            argv = ["sweep", str(sweep.script), *argv]

        _run(argv, sweep)
    except click.exceptions.Exit as end:  # of --help and --version
        sys.exit(end.exit_code)
    except click.UsageError as error:
        say(f"sda-ray: {_explain(error)}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        if started and isinstance(error, OtherCode):
            say(error, file=sys.stderr if "--json" in argv else None)
            program = sweep and getattr(sys.modules["__main__"], "__file__", None)

            if program:
                execute(error.place, os.path.abspath(program), sys.argv[1:])

            execute(error.place, "sda-ray", argv)

        say(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except click.Abort:  # no answer to a question
        sys.exit(1)
    except KeyboardInterrupt:
        say("Interrupted. The same command resumes.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        full, broken = error.errno == errno.ENOSPC, isinstance(error, BrokenPipeError)
        gone = isinstance(error, LeaseGone)

        if started and (full or broken):  # Python would write the rest at its end, again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        if broken:
            sys.exit(141)
        elif not (full or gone or error.errno == errno.ENAMETOOLONG):
            raise

        say(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(1 if full or gone else 2)
    finally:
        # Once SIGINT has met code that is run from a string, as dataclasses do, Python (3.11) ends
        # by that signal, though it was caught, until other such code has run.
        exec("")


def _open_streams() -> None:
    r"""Opens standard streams that were closed, so that no file takes their place."""

    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(null, True)

        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _run(argv: list[str], sweep: Any) -> None:
    r"""Parses a command and runs it. Words after `--` are those of sbatch, for `slurm`."""

    if os.environ.get(COMPLETE):  # a shell asks what may come next
        sda_ray.main(prog_name="sda-ray", complete_var=COMPLETE)

    split = argv.index("--") if argv[:1] == ["slurm"] and "--" in argv else len(argv)
    words, sbatch = argv[:split], argv[split + 1 :]
    given = {"argv": argv, "words": words[1:], "sbatch": sbatch, "script_sweep": sweep}

    with sda_ray.make_context("sda-ray", words or ["--help"], obj=given) as context:
        sda_ray.invoke(context)


def _with_script(sweep: Any) -> Any:
    r"""Returns a sweep with the file of the module that made it, beside which others may be."""

    if sweep.module is None:
        raise UserError(
            f"sweep '{sweep.name}' was not made in a file, from which it can be resumed. Save the "
            "code as a script, and run that: sda-ray sweep SCRIPT"
        )

    look_beside(sweep.module.parent)

    return replace(sweep, script=sweep.module)


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

        if error.ctx and error.ctx.info_name == "slurm":
            text += f" Options of sbatch come after --, as in: -- {name} …"

    return text + (f" `{error.ctx.command_path} --help` says more." if error.ctx else "")


def _terminate(number: int, frame: FrameType | None) -> None:
    r"""Ends the process gracefully: context managers and `finally` blocks run."""

    sys.exit(128 + number)
