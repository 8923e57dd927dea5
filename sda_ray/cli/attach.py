r"""The live table of a sweep that another process drives, on this machine or another one."""

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.lease import read_holder
from ..runs.path import RunPath, sweep_directory
from ..search.sampler import importances
from ..search.study import Study
from ..sweep.record import read_sweep
from ..sweep.requests import watch
from .table import LiveTable, conclude, leaderboard

__all__ = ["attach"]

LOOK = 1.0  # seconds between two looks
WEIGH = 10.0  # seconds between two looks at how large the checkpoints are


def attach(runs: Path, name: str) -> None:
    r"""Shows how a sweep goes on until it ends, then its leaderboard. It is only looked at.

    Ctrl-C ends the look, and leaves the sweep running.

    Arguments:
        runs: The directory of all runs.
        name: The name of the sweep.

    Raises:
        UserError: If there is no such sweep, or it has nothing to show.
    """

    read_sweep(runs, name)
    directory = sweep_directory(runs, name)
    file = directory / "lease.json"
    found = read_holder(file)
    runs_now = found is not None and found["pid"] is not None
    alive = watch(file, found) if found is not None and runs_now else lambda: False

    try:
        while alive() and not (directory / "study.journal").exists():
            time.sleep(LOOK)

        if not (directory / "study.journal").exists():
            raise UserError(f"sweep '{name}' has not begun: sda-ray sweep {name}")

        objectives = read_sweep(runs, name)["definition"]["objectives"]
        study = Study(directory / "study.journal", name, None, objectives)

        if found is not None and alive():
            print(
                f"sweep '{name}' is driven by process {found['pid']} on {found['host']}. Ctrl-C "
                f"leaves it running; `sda-ray stop {name}` stops it.",
                flush=True,
            )
            _follow(runs, name, study, alive, _seconds(found))
        else:
            print(f"sweep '{name}' does not run. This is how it stands:")
    except KeyboardInterrupt:
        print(f"\nSweep '{name}' goes on. Look again with `sda-ray attach {name}`.", flush=True)
        return

    _conclude(runs, name, study)


def _follow(runs: Path, name: str, study: Study, alive: Any, seconds: float) -> None:
    directory = sweep_directory(runs, name)
    table = LiveTable(name, read_sweep(runs, name)["trials"], runs, study.records)
    table.start -= seconds
    size, weighed = 0, float("-inf")
    table.size = lambda: size

    if not table.console.is_terminal:
        table.show()

    with table:
        while alive():
            time.sleep(LOOK)
            table.look()

            if time.monotonic() - weighed > WEIGH:
                size, weighed = _size(runs, table), time.monotonic()
                table.target = read_sweep(runs, directory.name)["trials"]

        table.look()


def _size(runs: Path, table: LiveTable) -> int:
    r"""Returns the bytes of all checkpoints of the runs in a table."""

    ids, size = {record.run_id for record in table.now}, 0

    for path in RunPath.all(runs):
        if path.id in ids:
            for file in path.directory.glob("checkpoint*.pth"):
                try:
                    size += file.lstat().st_size
                except OSError:  # replaced just now
                    continue

    return size


def _seconds(found: dict[str, Any]) -> float:
    r"""Returns for how long a lease has been held, as far as clocks agree."""

    try:
        since = datetime.fromisoformat(found["since"])
        return max(0.0, (datetime.now(timezone.utc) - since).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _conclude(runs: Path, name: str, study: Study) -> None:
    r"""Prints the leaderboard, and what can be done next."""

    records, directory = study.records(), sweep_directory(runs, name)
    target = read_sweep(runs, name)["trials"]
    under_way = sum(record.state == "running" for record in records)

    if under_way or not records:
        leaderboard(name, records, runs)
        print(
            f"\n{len(records)} of {target} runs so far, {under_way} of them not at their end: "
            f"`sda-ray sweep {name}` carries them on."
        )
    else:
        conclude(name, target, records, directory, runs, importances(study.study))
