r"""The time that a sweep has: until when it may run, and how early it has to stop."""

import logging
import math
import re
import subprocess
import time
from collections.abc import Mapping

from .errors import UserError

__all__ = ["deadline", "margin"]

logger = logging.getLogger(__name__)

LEAST = 30.0  # seconds between the wish to stop and the end
SLURM = 120.0  # the same for the end of a Slurm job, which kills


def deadline(hours: float | None, environ: Mapping[str, str]) -> float | None:
    r"""Returns the end of a sweep's time on the monotonic clock, or None if it has no end.

    Arguments:
        hours: The hours that the user gives it from now.
        environ: The variables of the process. Slurm tells the end of its job there.

    Raises:
        UserError: If the number of hours is none.
    """

    ends = []

    if hours is not None:
        if not (math.isfinite(hours) and hours > 0):
            raise UserError(f"--hours is {hours:g}, but must be a number above 0.")

        ends.append(time.monotonic() + 3600 * hours)

    if end := environ.get("SLURM_JOB_END_TIME") or _ask_slurm(environ.get("SLURM_JOB_ID")):
        try:
            left = float(end) - time.time()
            ends.append(time.monotonic() + left - (SLURM - LEAST))
        except ValueError:
            logger.warning("SLURM_JOB_END_TIME is %r, which is no time: it is ignored.", end)

    return min(ends, default=None)


def _ask_slurm(job: str | None) -> str:
    r"""Returns the end of a Slurm job as Slurm before 23.02 does not tell it, or nothing."""

    if job is None:
        return ""

    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]

    try:
        left = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""

    if not (parts := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)):
        return ""  # UNLIMITED, or nothing of use

    days, hours, minutes, seconds = (int(x or 0) for x in parts.groups())

    return str(time.time() + ((24 * days + hours) * 60 + minutes) * 60 + seconds)


def margin(longest: float, whole: float) -> float:
    r"""Returns how many seconds before its end a sweep has to stop.

    Arguments:
        longest: The longest that a trial went without looking for the wish to stop, in seconds.
        whole: The time that the sweep has in all. Half of it is worked in any case.
    """

    return min(max(LEAST, 2 * longest), whole / 2)
