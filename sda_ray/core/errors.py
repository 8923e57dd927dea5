r"""The one kind of error that is meant for the user's eyes."""

__all__ = ["UserError"]


class UserError(ValueError):
    r"""Signals a mistake that the user can mend: bad input, missing data, a directory in use.

    Its message says what was given, what is accepted and what to do. The command line prints the
    message alone, without a traceback, and exits with code 2.
    """
