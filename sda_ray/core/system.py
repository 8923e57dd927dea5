r"""What the operating system and Slurm offer: memory that a process keeps, and deadlines."""

import ctypes
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping

from .errors import UserError

__all__ = ["deadline", "give_memory_back", "keep_memory", "lacks_memory", "margin"]

logger = logging.getLogger(__name__)

SWITCH = "SDA_RAY_KEEP_MEMORY"

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # parameters of mallopt, in malloc.h
NEVER = -1
PAD = 64 * 2**20  # bytes by which the heap grows at least

# What torch's allocator for the CPU says, CUDA itself, and cuBLAS and cuDNN
SHORT = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def keep_memory() -> bool:
    r"""Keeps freed memory in this process for what is asked for next, from now on.

    It does so with glibc alone, and not if the environment variable `SDA_RAY_KEEP_MEMORY` is 0.
    The process then holds as much as it ever used, until :func:`give_memory_back`. That grows for
    the first few steps: what alignment leaves over behind a piece may keep it from being reused,
    until the cache of such left-overs is full (7 of each size).

    Returns:
        Whether it does.
    """

    libc = _glibc()

    if libc is None or os.environ.get(SWITCH) == "0":
        return False

    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, NEVER), (TOP_PAD, PAD))
    taken = [libc.mallopt(parameter, value) for parameter, value in settings]

    return all(taken)


def give_memory_back() -> None:
    r"""Returns the memory that is free to the system, as when a process goes on to something else.

    What it needs next, it will have to ask for again.
    """

    libc = _glibc()

    if libc is not None:
        libc.malloc_trim(0)


def lacks_memory(error: BaseException) -> bool:
    r"""Tells whether an error says that there is too little memory, for which torch has several."""

    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)

    return known or any(words in str(error) for words in SHORT)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None

    libc = ctypes.CDLL(None)

    return libc if hasattr(libc, "gnu_get_libc_version") else None


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
