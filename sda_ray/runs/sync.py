r"""The command `sda-ray sync`: brings runs that are on this disk to W&B's server.

`metrics.jsonl` is the truth, and the server is asked what it has: nothing is marked in a run's
directory, so that the command may be repeated, interrupted, or used with another server.
"""

import argparse
import fcntl
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError

if TYPE_CHECKING:
    from .inventory import Entry
    from .tracking import Wandb
    from .upload import Server, Target

__all__ = ["add_sync_parser", "sync_command", "target_of"]

SYNC = """
Uploads runs that were trained offline, or whose server was away, to W&B: with --all the finished
ones. RUN is a path, a name, an id or an unambiguous beginning of one. Each run keeps its name, id,
group and steps. What is on the server already is not sent again; a run that is in use is left out.
The server and the account are those of `wandb login`, or of the variables WANDB_BASE_URL and
WANDB_API_KEY.
"""

ENDED = ("finished", "diverged")


def add_sync_parser(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    r"""Adds `sync` to the command line.

    Arguments:
        command: Makes the parser of a command from its name, help and description. It has the
            options --root, --data and --runs.
    """

    parser = command("sync", "upload runs to W&B", SYNC)
    parser.add_argument("run", nargs="*", metavar="RUN", default=[])
    parser.add_argument("--all", action="store_true", help="all finished runs")


def sync_command(args: argparse.Namespace, _: Any = None) -> None:
    r"""Runs `sda-ray sync`, with `args.runs` made absolute. Exits with 1 if a run is missing."""

    from .upload import Server, Unreachable

    if args.all == bool(args.run):
        raise UserError("give the runs to upload, or --all for the finished ones, and not both.")

    chosen = _named(args.runs, args.run) if args.run else _finished(args.runs)
    targets = {entry.path.directory.name: entry for entry in chosen}
    done, failed = 0, 0

    if not targets:
        print("There is nothing to upload.")
        return

    try:
        server = Server()

        for name, entry in targets.items():
            try:
                print(f"{name}: {_sync(server, entry, args.runs)}", flush=True)
                done += 1
            except (UserError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                failed += 1
    except Unreachable as error:
        place = os.environ.get("WANDB_BASE_URL") or "its server"
        print(
            f"sda-ray: W&B at {place} cannot be used: {error}. {done} of {len(targets)} runs are "
            "there. The others are as they were: the same command goes on.",
            file=sys.stderr,
        )
        sys.exit(1)

    print(f"{done} of {len(targets)} runs are at {server.url}.")
    sys.exit(1 if failed else 0)


def _named(runs: Path, names: list[str]) -> "list[Entry]":
    from .inventory import read_entry
    from .path import RunPath

    found = {path: read_entry(path) for path in (RunPath.find(runs, name) for name in names)}
    return [entry for entry in found.values() if entry is not None and _is_free(entry)]


def _finished(runs: Path) -> "list[Entry]":
    r"""Returns the runs that have ended, and says which are left out."""

    from .inventory import entries

    every = list(entries(runs))
    other = (*ENDED, "adopted")  # copies of runs, which W&B knows or does not
    unfinished = Counter(entry.status for entry in every if entry.status not in other)
    mine = [entry for entry in every if entry.status in ENDED and entry.epoch is not None]
    private = [entry for entry in mine if _settings(entry, runs).get("mode") == "disabled"]

    if unfinished:
        statuses = ", ".join(f"{n} {status}" for status, n in sorted(unfinished.items()))
        print(f"Not finished, and left out unless they are named: {statuses}.")

    if private:
        print(f"Trained with --wandb disabled, and left out unless named: {len(private)}.")

    return [entry for entry in mine if entry not in private and _is_free(entry)]


def _is_free(entry: "Entry") -> bool:
    from .inventory import is_held

    if held := is_held(entry.path):
        print(f"{entry.path.directory.name} is left out: a process is at it.")

    return not held


def _sync(server: "Server", entry: "Entry", runs: Path) -> str:
    from .fragments import read_fragments
    from .upload import upload

    target = target_of(entry, runs)

    with _alone(entry.path.directory):
        try:
            fragments = read_fragments(entry.path)
        except (UserError, OSError):  # the metrics hold all that is in them
            fragments = []

        return upload(server, target, fragments)


def target_of(entry: "Entry", runs: Path) -> "Target":
    r"""Returns what a run shall be on the server.

    Raises:
        UserError: If its files do not tell.
    """

    from .curves import check_regular, read_metrics
    from .record import logged_config
    from .upload import Target

    path = entry.path
    lines = {line["epoch"]: line for line in read_metrics(path)}

    if entry.config is None or not lines:
        faults = "; ".join(entry.faults) or f"{path.metrics} has no epochs"
        raise UserError(f"cannot be uploaded: {faults.rstrip('.')}.")

    rows = {
        epoch: {k: x for k, x in line.items() if k != "epoch" and type(x) in (int, float)}
        for epoch, line in lines.items()
    }
    pictured = os.path.lexists(path.samples) and entry.status == "finished"

    return Target(
        path.id,
        path.name,
        _wandb(entry, runs),
        logged_config(entry.config, entry.record),
        rows,
        check_regular(path.samples) if pictured else None,
        entry.status != "failed",
    )


def _settings(entry: "Entry", runs: Path) -> dict[str, Any]:
    r"""Returns how a run was to be logged to W&B: what it says, or what its sweep says."""

    from ..sweep.record import read_sweep

    kept, sweep = entry.record.get("wandb"), entry.record.get("sweep")

    if kept is None and sweep is not None:
        try:
            kept = read_sweep(runs, sweep)["options"]["wandb"]
        except (UserError, KeyError, TypeError):  # moved away from its sweep
            kept = {"group": sweep, "job_type": "trial"}

    return kept if isinstance(kept, dict) else {}


def _wandb(entry: "Entry", runs: Path) -> "Wandb":
    from .tracking import Wandb

    return Wandb.from_record(_settings(entry, runs), entry.path.record)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    r"""Keeps another `sda-ray sync` from the same run; where a file system cannot, goes on."""

    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError("another `sda-ray sync` is at it.")
    except OSError:  # NFS locks no directories
        pass

    try:
        yield
    finally:
        os.close(handle)
