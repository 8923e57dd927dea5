r"""The command `sda-ray report`: what sweeps have found, as one file."""

import os
import webbrowser
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ..core import Hold, LeaseLost, UserError, say
from .options import Args, argument, command, option


@command("report")
@argument("sweeps", "SWEEP...", nargs=-1, required=True)
@option("--output", "Default: report.html in the directory of the sweep.", metavar="FILE.html")
@option("--open", "Open it in the browser.", bool)
def report_command(args: Args) -> None:
    r"""Writes the report of a sweep, or compares several: one HTML file that works offline.

    What was found, at what cost, and what is doubtful about it; history, learning curves,
    parallel coordinates, slices, importances, a timeline, samples, all runs and why each stopped.
    The file needs no network and can be mailed. A sweep that runs is shown as it stands; every
    finished one has its report already.

      sda-ray report width --open
      sda-ray report width depth --output both.html
    """

    file = Path(args.output).absolute() if args.output else None

    if file and (file.suffix not in (".html", ".htm") or not file.parent.is_dir()):
        raise UserError(
            f"--output is '{args.output}', but must end with .html, in a directory that exists."
        )

    path = _write(args.runs, args.sweeps, file)
    say(os.path.relpath(path))

    if args.open and not webbrowser.open(path.as_uri()):
        say("There is no browser here: copy the file to a machine that has one.")


def _write(
    runs: Path, names: Sequence[str], file: Path | None = None, hold: Hold = nullcontext
) -> Path:
    from ..report import write_report  # which loads optuna

    try:
        return write_report(runs, list(names), file, hold)
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}.") from error


def report_end(runs: Path, name: str, hold: Hold) -> str:
    r"""Writes the report of a sweep at its end, and returns where it is, or why there is none.

    No fault of a figure may make a sweep fail that has ended well. A driver whose sweep was taken
    over writes nothing.
    """

    try:
        return f"\nReport: {os.path.relpath(_write(runs, [name], hold=hold))}"
    except LeaseLost:
        return ""
    except UserError as error:
        return f"\nNo report: {error}"
    except Exception as error:
        return f"\nNo report: {type(error).__name__}: {error}"
