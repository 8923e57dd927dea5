r"""Whether the directory of a run is still there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .lease import Lease

__all__ = ["Vanished", "check_present", "held", "is_present"]


class Vanished(RuntimeError):
    r"""Signals that the directory of a run was deleted, or unmounted, while the run was open."""


def is_present(lease: Path) -> bool:
    r"""Tells whether a run that is open has its lease file, and so its directory.

    A file system that is only out of reach for now counts as present.
    """

    try:
        os.stat(lease)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass

    return True


def check_present(lease: Path) -> None:
    r"""Checks that a run that is open has its directory, given its lease file.

    Raises:
        Vanished: If not.
    """

    if not is_present(lease):
        raise Vanished(
            f"{lease.parent} was deleted or unmounted while it was in use: the training stops, "
            "and nothing more is written there."
        )


@contextmanager
def held(lease: Lease) -> Iterator[None]:
    r"""Holds the lease of a run for one write, as :meth:`sda_ray.core.lease.Lease.hold` does.

    Raises:
        Vanished: If the write fails because the directory is gone.
    """

    try:
        with lease.hold():
            yield
    except OSError:
        check_present(lease.file)
        raise
