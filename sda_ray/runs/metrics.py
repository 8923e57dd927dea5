r"""The history of a run: `metrics.jsonl`, one line per epoch, appended once and never changed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import append_line, cut_torn_line, read_lines

if TYPE_CHECKING:
    from ..training.loop import Metrics

__all__ = ["History", "read_history"]

logger = logging.getLogger(__name__)

NUMBERS = ("loss_train", "loss_valid", "loss_valid_raw", "loss_valid_se", "lr", "seconds")

TIMING = ("seconds",)  # what differs when an epoch is done again


def read_history(file: Path) -> dict[int, Metrics]:
    r"""Returns the metrics of a run by epoch.

    Raises:
        UserError: If a line other than the last is damaged.
    """

    lines = read_lines(file)

    for number, line in enumerate(lines, start=1):
        if type(line.get("epoch")) is not int or not 0 <= line["epoch"] <= 10**8:
            raise UserError(f"{file} is damaged: line {number} has no epoch.")

        for key in NUMBERS:
            if not _is_number(line.get(key, 0.0)):
                raise UserError(f"{file} is damaged: {key} of line {number} is not a number.")

    return {line["epoch"]: line for line in lines}


def _is_number(x: Any) -> bool:
    r"""Tells whether a value is a number; integers beyond all floats are not."""

    return type(x) is float or (type(x) is int and abs(x) <= sys.float_info.max)


class History:
    r"""Creates the history of a run, or opens it; a torn last line is cut off.

    Arguments:
        file: The file, in the run's directory.
        hold: Entered around each write, see :meth:`sda_ray.core.lease.Lease.hold`.
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
