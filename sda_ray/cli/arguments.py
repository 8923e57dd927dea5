r"""The values of a command's options and arguments, and its words."""

from collections.abc import Sequence
from types import SimpleNamespace

__all__ = ["Args", "without"]

Args = SimpleNamespace  # the values of a command's options and arguments, by name


def without(words: Sequence[str], *options: str, flag: bool = False) -> list[str]:
    r"""Returns the words of a command without some options and their values, or without flags."""

    kept: list[str] = []
    rest = iter(words)

    for word in rest:
        if word in options:
            if not flag:
                next(rest, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)

    return kept
