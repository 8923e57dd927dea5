r"""The history of a run: `metrics.jsonl`, one line per epoch, appended once and never changed."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from .errors import UserError
from .files import append_line, cut_torn_line, read_lines
from .training import Metrics

__all__ = ["History", "read_history"]

logger = logging.getLogger(__name__)

TIMING = ("seconds",)  # what differs when an epoch is done again


def read_history(file: Path) -> dict[int, Metrics]:
    r"""Returns the metrics of a run by epoch.

    Raises:
        UserError: If a line other than the last is damaged.
    """

    lines = read_lines(file)

    for number, line in enumerate(lines, start=1):
        if type(line.get("epoch")) is not int:
            raise UserError(f"{file} is damaged: line {number} has no epoch.")

    return {line["epoch"]: line for line in lines}


class History:
    r"""Creates the history of a run, or opens it; a torn last line is cut off.

    Arguments:
        file: The file, in the run's directory.
        hold: Entered around each write, see :meth:`sda_ray.lease.Lease.hold`.
    """

    def __init__(
        self, file: Path, hold: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.file = file
        self.hold = hold
        self._unwritten: list[Metrics] = []

        with hold():
            cut_torn_line(file)

        self.lines = read_history(file)

    def add(self, metrics: Metrics) -> None:
        r"""Appends an epoch. If the disk is full, it is kept for the next :meth:`write`."""

        self.lines[metrics["epoch"]] = metrics
        self._unwritten.append(metrics)

        try:
            self.write()
        except OSError as error:
            if self._unwritten == [metrics]:  # said once, not for each epoch
                logger.warning("%s cannot be written: %s.", self.file, error)

    def write(self) -> None:
        r"""Writes what could not be written before.

        Raises:
            OSError: If that is still so.
        """

        while self._unwritten:
            with self.hold():
                append_line(self.file, self._unwritten[0])

            del self._unwritten[0]

    def differences(self, metrics: Metrics) -> str:
        r"""Compares an epoch that was done again with its line, timing apart."""

        before = self.lines[metrics["epoch"]]
        keys = (key for key in metrics if key in before and key not in TIMING)

        return ", ".join(
            f"{key} {before[key]} before, {metrics[key]} now"
            for key in keys
            if before[key] != metrics[key]
        )
