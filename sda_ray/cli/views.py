r"""The options of the commands that look at what runs elsewhere: `attach` and `cluster`."""

import argparse
from collections.abc import Callable

__all__ = ["add_view_parsers"]

ATTACH = """
Shows the live table of a sweep that runs elsewhere: in the background, as a job, or on another
machine that sees the directory of runs. Ctrl-C ends the look and leaves the sweep running. When the
sweep ends, its leaderboard is shown; of one that does not run, how it stands.
"""

CLUSTER = """
Shows what a Ray cluster is at: its nodes, which run is on which, what waits, and why. To be called on
its head, or with --address from a machine in it.

  sda-ray cluster status                                  on the head
  ray exec cluster.yaml 'sda-ray cluster status'          from where the cluster was started
"""


def add_view_parsers(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    r"""Adds `attach` and `cluster` to the command line.

    Arguments:
        command: Makes the parser of a command from its name, help and description. It has the
            options --root, --data and --runs.
    """

    attach = command("attach", "show the live table of a sweep that runs", ATTACH)
    attach.add_argument("sweep", metavar="SWEEP", help="the name of a sweep")

    cluster = command("cluster", "what a cluster is at", CLUSTER)
    cluster.add_argument("action", choices=("status",), metavar="status")
    cluster.add_argument("--address", default="auto", help="default: auto, of this machine")
    cluster.add_argument("--json", action="store_true", help="for programs")
