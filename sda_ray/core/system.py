r"""The operating system and Slurm: signals, deadlines, and memory that a training process keeps.

The C library maps large blocks of memory on request, and unmaps them when they are freed. Each page
of a fresh block costs a page fault, and a training step on a CPU requests and frees the same
gigabytes again and again.
"""

import ctypes
import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

logger = logging.getLogger(__name__)

SWITCH = "SDA_RAY_KEEP_MEMORY"

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # parameters of mallopt, in malloc.h
PAD = 64 * 2**20  # bytes by which the heap grows at least
REPEAT = 1.0  # seconds within which a signal may come twice

# Messages of torch's allocator for the CPU, of CUDA itself, and of cuBLAS and cuDNN
SHORT = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")

PACKAGE = Path(__file__).resolve().parents[1]

# Python looks for modules in the current directory first, where a script may have a library's name
PROGRAM = """\
import sys
_, place, command, *words = sys.argv
paths = [path for path in sys.path if path]
sys.path[:] = paths if place in paths else [place, *paths]
sys.argv = [command, *words]
import os, runpy
if "/" in command:
    sys.path.append(os.path.dirname(command))
    runpy.run_path(command, run_name="__main__")
else:
    runpy.run_module(command.replace("sda-ray", "sda_ray"), run_name="__main__")
"""


def python_command(command: str, *words: str, place: Path = PACKAGE.parent) -> list[str]:
    r"""Returns the words that run `python -m MODULE`, `sda-ray`, or a script of absolute path.

    Arguments:
        command: The module, `sda-ray`, or the path.
        words: Its arguments.
        place: The directory of the package that it imports.
    """

    return [sys.executable, "-c", PROGRAM, str(place), command, *words]


@contextmanager
def on_signals(handle: Callable[[int], None], *more: int) -> Iterator[None]:
    r"""Calls a function on SIGINT, SIGTERM, SIGHUP, SIGQUIT and more, unless ignored, as under nohup.

    What comes within a second of the last one is dropped, but for SIGINT: `timeout`, srun and the
    shell of a closed terminal send a signal twice, to the process and to its group.
    """

    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, *more)
    before = {n: old for n in every if (old := signal.getsignal(n)) is not signal.SIG_IGN}
    last = -REPEAT

    def once(number: int, frame: object) -> None:
        nonlocal last

        if number == signal.SIGINT or time.monotonic() - last > REPEAT:
            last = time.monotonic()
            handle(number)

    for number in before:
        signal.signal(number, once)

    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def try_print(text: str) -> None:
    r"""Prints a line. A stream that is gone, as with a closed terminal, is null from then on."""

    for stream, line in ((sys.stderr, ""), (sys.stdout, text)):
        try:
            print(line, file=stream, flush=True)
        except RuntimeError:
            pass  # called by a signal in the middle of another print
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def keep_memory() -> bool:
    r"""Makes this process keep freed memory for later requests, with glibc, and returns whether.

    The environment variable `SDA_RAY_KEEP_MEMORY=0` prevents it. The process holds as much as it
    ever used until :func:`release_memory`. Its size grows for the first few steps: remainders of
    aligned blocks may keep a block from being reused, until the cache of remainders is full (7 of
    each size).
    """

    libc = _glibc()

    if libc is None or os.environ.get(SWITCH) == "0":
        return False

    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD))  # -1: never trim
    taken = [libc.mallopt(parameter, value) for parameter, value in settings]

    return all(taken)


def release_memory() -> None:
    r"""Returns free memory to the system, for a process that turns to another task."""

    libc = _glibc()

    if libc is not None:
        libc.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    r"""Tells whether an error reports a lack of memory; torch raises several kinds."""

    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)

    return known or any(words in str(error) for words in SHORT)


@contextmanager
def uncollected() -> Iterator[None]:
    r"""Keeps Python from collecting garbage, which takes a quarter of the time of large imports."""

    collecting = gc.isenabled()
    gc.disable()

    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)

    return libc if hasattr(libc, "gnu_get_libc_version") else None


CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cgroup_cpus() -> float:
    r"""Returns the CPUs' worth of time that this process' cgroups allow, or infinity."""

    limits = [math.inf]

    for quota, *period in _cgroup_limits(
        "cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"
    ):
        if quota > 0:  # -1 in version 1: no limit
            limits.append(quota / period[0])

    return min(limits)


def cgroup_memory() -> float:
    r"""Returns the bytes of memory that this process' cgroups allow, or infinity."""

    limits = _cgroup_limits("memory", "memory.max", "memory.limit_in_bytes")

    return min((limit for (limit,) in limits), default=math.inf)


def _cgroup_limits(controller: str, new: str, *old: str) -> Iterator[list[int]]:
    r"""Yields the limits of this process' cgroup and of all above it, which hold together.

    Arguments:
        controller: The controller, for version 1.
        new: The file of the limits in version 2.
        old: The files, each with a number, in version 1.
    """

    groups = CGROUP.read_text().splitlines() if CGROUP.exists() else []

    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and controller not in controllers.split(","):
            continue

        top, files = (CGROUPS / controller, old) if controllers else (CGROUPS, (new,))
        place = top / path.lstrip("/")  # not there in a container that sees its own group as top

        for group in (place, *place.parents):
            with suppress(OSError, ValueError):  # missing, or `max`
                if group.is_relative_to(top):
                    yield [int(x) for file in files for x in (group / file).read_text().split()]


LEAST = 30.0  # seconds between the request to stop and the end
SLURM = 120.0  # the same before Slurm kills a job


def deadline(hours: float | None, environ: Mapping[str, str]) -> float | None:
    r"""Returns the deadline of a sweep on the monotonic clock, or None if there is none.

    It is the end of the hours that the user gives it, or that of the Slurm job, if it is earlier.
    """

    ends = []

    if hours is not None:
        if not (math.isfinite(hours) and hours > 0):
            raise UserError(f"--hours is {hours:g}, but must be a number above 0.")

        ends.append(time.monotonic() + 3600 * hours)

    if end := environ.get("SLURM_JOB_END_TIME"):
        try:
            if (left := float(end) - time.time()) > 0:
                ends.append(time.monotonic() + left - (SLURM - LEAST))
            else:  # as in a tmux that a job has started
                logger.warning(
                    "SLURM_JOB_END_TIME is that of a job that has ended: it is ignored."
                )
        except ValueError:
            logger.warning("SLURM_JOB_END_TIME is %r, which is not a time: it is ignored.", end)

    return min(ends, default=None)


def margin(longest: float, whole: float) -> float:
    r"""Returns how many seconds before its deadline a sweep stops, at most half of its whole time.

    The longest time is that between two looks of a trial for a request to stop, in seconds.
    """

    return min(max(LEAST, 2 * longest), whole / 2)
