r"""Memory that a training process keeps, instead of asking the kernel for it in every step.

The C library maps large pieces of memory when they are asked for, and unmaps them when they are
freed. Each page of a fresh piece costs a fault, and a training step on a CPU frees and asks for
the same gigabytes again and again.
"""

import ctypes
import os
import sys

__all__ = ["give_memory_back", "keep_memory", "lacks_memory"]

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
