r"""The processes that a process has started, found by the tree of them and never by their names."""

import os
import signal
from pathlib import Path

__all__ = ["Process", "family", "is_alive", "kill"]

Process = tuple[int, str]  # number and start time: numbers are used again


def processes() -> dict[int, tuple[int, str, str]]:
    r"""Returns all processes: parent, start time and program of each."""

    found = {}

    for directory in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *rest = (directory / "stat").read_text().rpartition(")")[2].split()
            program = os.path.basename(os.readlink(directory / "exe"))
        except (OSError, ValueError):
            continue

        if state != "Z":
            found[int(directory.name)] = int(parent), rest[17], program

    return found


def family(root: int) -> dict[Process, str]:
    r"""Returns the descendants of a process and their programs."""

    every = processes()
    members = {root}

    while new := {pid for pid, (parent, *_) in every.items() if parent in members} - members:
        members |= new

    return {(pid, every[pid][1]): every[pid][2] for pid in members - {root} if pid in every}


def is_alive(process: Process) -> bool:
    now = processes().get(process[0])

    return now is not None and now[1] == process[1]


def kill(process: Process) -> bool:
    if not is_alive(process):
        return False

    os.kill(process[0], signal.SIGKILL)

    return True
