r"""Errors for the user's eyes: those that the user can mend, and those of the user's own code."""

import traceback
from pathlib import Path

PACKAGE = str(Path(__file__).parents[1])


class UserError(ValueError):
    r"""Signals a mistake that the user can mend: bad input, missing data, a directory in use.

    Its message says what was given, what is accepted and what to do. The command line prints the
    message alone, without a traceback, and exits with code 2.
    """


def script_error(error: BaseException) -> str:
    r"""Returns an error that the user's own code raised, with its line there."""

    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(PACKAGE)]
    lines = [frame.lineno for frame in theirs if frame.filename == theirs[0].filename]
    place = f" ({Path(theirs[0].filename).name}, line {lines[-1]})" if theirs else ""

    return f"{type(error).__name__}: {error}{place}"
