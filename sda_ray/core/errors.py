r"""Errors for the user's eyes: those that the user can mend, and those of the user's own code."""

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parents[1])

# Names that other tools have for our keys, and that are not like them
ALIASES = {
    "amp": "precision",
    "blocks": "hidden_blocks",
    "bs": "batch_size",
    "channels": "hidden_channels",
    "decay": "weight_decay",
    "depth": "hidden_blocks",
    "dtype": "precision",
    "lr": "learning_rate",
    "max_norm": "grad_clip",
    "nonlinearity": "activation",
    "opt": "optimizer",
    "random_state": "seed",
    "wd": "weight_decay",
    "width": "hidden_channels",
}


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


def did_you_mean(word: Any, words: Iterable[str]) -> str:
    r"""Returns ` Did you mean 'x'?` for the word that is closest, nothing if there is none, or the word
    itself is one of them.
    """

    lower, text = {w.lower(): w for w in words}, str(word).lower()[:64]
    alias = ALIASES.get(text.strip("-"))
    close = [alias] if alias in lower else difflib.get_close_matches(text, lower, n=1)

    return f" Did you mean '{lower[close[0]]}'?" if close and lower[close[0]] != word else ""


def short_repr(value: Any) -> str:
    r"""Returns a value for messages, shortened to a line."""

    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
