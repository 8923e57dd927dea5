r"""The options of `sda-ray slurm` and `sda-ray join`."""

import argparse
from collections.abc import Callable, Sequence

__all__ = ["add_job_parsers", "split_words"]

SLURM = """
Writes the script of a Slurm job that carries out a sweep, and shows it. Options are those of `sda-ray
sweep`; after -- come those of sbatch. The job starts Ray on its nodes for itself alone. Two minutes
before its time is up every trial saves a checkpoint, and the job goes back into the queue; so it does
when a node fails. It is done when the sweep is.

  sda-ray slurm width.py -- --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00
  sda-ray slurm width --submit -- --cpus-per-task=8        carry on, on CPUs, and submit at once
"""

JOIN = """
Adds this machine, or the allocation that it is run in, to a sweep that runs anywhere on machines
that see the same directory of runs. Ctrl-C, SIGTERM or the end of a Slurm job take it away again:
the trials here save a checkpoint first, and go on elsewhere.

  sda-ray join width                          from a terminal on another machine
  srun --cpus-per-task=8 sda-ray join width   8 more CPUs from Slurm, while they are to be had
"""


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    r"""Splits the words of `sda-ray slurm` at `--`, and those of other commands nowhere."""

    words = list(argv)
    at = words.index("--") if words[:1] == ["slurm"] and "--" in words else len(words)

    return words[:at], words[at + 1 :]


def add_job_parsers(
    command: Callable[..., argparse.ArgumentParser],
    add_sweep: Callable[[argparse.ArgumentParser], None],
) -> None:
    r"""Adds both commands.

    Arguments:
        command: Adds a command, given its name, a line of help and a description.
        add_sweep: Adds the options of `sda-ray sweep`.
    """

    slurm = command("slurm", "write the script of a Slurm job for a sweep", SLURM)
    add_sweep(slurm)
    _add_slurm(slurm)
    _add_join(command("join", "add this machine to a sweep that runs", JOIN))


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the job")
    group.add_argument(
        "--output", metavar="FILE", help="default: slurm.sh, with the sweep's record"
    )
    group.add_argument("--submit", action="store_true", help="run sbatch on it")


def _add_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="the name of a sweep")
    parser.add_argument("--cpus", type=int, metavar="N", help="default: all that we may use")
    parser.add_argument("--gpus", type=int, metavar="N", help="default: all that we may use")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="for the sweep to start, or to start again",
    )
