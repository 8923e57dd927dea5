r"""What run directories hold, read without trusting them and without waiting.

A run may be in use, half written, damaged, or from a stranger. Reading it never raises: what is
wrong stands in :attr:`Entry.faults`. Nothing here writes.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..core.config import Config, load_config
from ..core.errors import UserError
from ..core.files import read_json
from ..core.lease import STALE, holder, verdict
from .curves import check_regular, last_metrics
from .path import RunPath

__all__ = [
    "SORTS",
    "Entry",
    "entries",
    "is_held",
    "measured",
    "read_entry",
    "select",
]

OURS = (
    "metrics.jsonl",
    "checkpoint.pth",
    "checkpoint.prev.pth",
    "checkpoint.decay.pth",
)  # no upstream run has them


@dataclass(frozen=True)
class Entry:
    r"""Creates what is known of a run at a glance.

    Arguments:
        path: The run.
        status: What `run.json` says, but `interrupted` for a run whose process is gone, `damaged`
            for one that cannot be read, and `unknown` for one that never told.
        created: When it began, in seconds since 1970.
        epoch: The last epoch in `metrics.jsonl`.
        epochs: The epochs that it is meant to have.
        loss_valid: The loss of the last epoch.
        sweep: The sweep that it belongs to.
        config: Its config, if that can be read.
        faults: What is wrong, in words.
        record: Its `run.json`, or an empty dict if that is missing or damaged.
        size: The bytes in its directory, see :func:`measured`.
    """

    path: RunPath
    status: str
    created: float
    epoch: int | None = None
    epochs: int | None = None
    loss_valid: float | None = None
    sweep: str | None = None
    config: Config | None = None
    faults: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    size: int | None = None

    @property
    def age(self) -> float:
        return max(0.0, time.time() - self.created)


def entries(runs: Path) -> Iterator[Entry]:
    r"""Yields the runs in a directory; directories that hold nothing of a run are passed over."""

    for path in RunPath.all(runs):
        if (entry := read_entry(path)) is not None:
            yield entry


def read_entry(path: RunPath) -> Entry | None:
    r"""Reads a run at a glance: two small files and the end of a long one.

    Returns:
        The entry, or None if the directory holds no run, or has vanished.
    """

    faults: list[str] = []

    try:
        names = set(os.listdir(path.directory))
    except FileNotFoundError:
        return None
    except OSError as error:
        faults.append(f"{path.directory} cannot be read: {error.strerror}.")
        return Entry(path, "damaged", _modified(path.directory), faults=tuple(faults))

    if not names & {"config.json", "run.json", "state.pth", "lease.json", *OURS}:
        return None

    record: dict[str, Any] = {}
    config: Config | None = None
    line: dict[str, Any] = {}

    with _noting(faults):
        record = _record(path) if "run.json" in names else {}

    with _noting(faults):
        if names & {"config.json", "run.json"} or "lease.json" not in names:  # else it begins
            config = load_config(check_regular(path.config))

    with _noting(faults):
        if "metrics.jsonl" in names:
            line = last_metrics(path)

    status = record.get("status") or _status_without_record(path, names, faults)

    if status == "running" and record and not is_held(path):
        with _noting(faults):  # once more: it may have ended since it was read
            record = _record(path)
            status = "interrupted" if record["status"] == "running" else record["status"]

    return Entry(
        path,
        "damaged" if faults else status,
        _created(path, record),
        line.get("epoch"),
        config["epochs"] if config else None,
        line.get("loss_valid"),
        record.get("sweep"),
        config,
        tuple(faults),
        record,
    )


@contextlib.contextmanager
def _noting(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        faults.extend(str(error).splitlines())
    except OSError as error:  # gone or forbidden since it was looked at
        faults.append(f"{error.filename} cannot be read: {error.strerror}.")


def _record(path: RunPath) -> dict[str, Any]:
    record = read_json(check_regular(path.record))

    if not isinstance(record, dict):
        raise UserError(f"{path.record} is damaged: it is not a JSON object.")

    if not isinstance(record.get("status"), str):
        raise UserError(f"{path.record} is damaged: it has no status.")

    if not isinstance(record.get("sweep"), str | None):
        raise UserError(f"{path.record} is damaged: its sweep is not a name.")

    return record


def _status_without_record(path: RunPath, names: set[str], faults: list[str]) -> str:
    if is_held(path):  # it has only just begun
        return "running"

    if "run.json" not in names and names & {*OURS}:
        faults.append(f"{path.record} is missing.")

    if "lease.json" in names:
        return "interrupted"

    return "finished" if "state.pth" in names else "unknown"


def is_held(path: RunPath, quiet: float = STALE) -> bool:
    r"""Tells at once whether a process seems to be at a run.

    Watching the heartbeat of a holder on another host would take a minute: the time of its file
    is compared with our clock instead, which errs where clocks differ by more than `quiet`
    seconds.
    """

    with contextlib.suppress(OSError, UserError):
        if (found := holder(check_regular(path.lease))) is None:
            return False

        if (known := verdict(found)) is not None:
            return known

        return time.time() - path.lease.stat().st_mtime < quiet

    return False


def _created(path: RunPath, record: dict[str, Any]) -> float:
    try:
        when = datetime.fromisoformat(record["created"])
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return _modified(path.config) or _modified(path.directory)


def _modified(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except OSError:
        return 0.0


def measured(entry: Entry) -> Entry:
    r"""Returns an entry with the bytes in its directory. Links are not followed."""

    size, todo = 0, [str(entry.path.directory)]

    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    todo.append(item.path)
                else:
                    size += item.stat(follow_symlinks=False).st_size

    return replace(entry, size=size)


def _rank(x: float | None, sign: int = 1) -> float:
    return math.inf if x is None or math.isnan(x) else sign * x


# What `sort` accepts beside the keys of CONFIG: best, newest, largest or first comes first.
SORTS: dict[str, Any] = {
    "age": lambda entry: -entry.created,
    "name": lambda entry: entry.path.directory.name,
    "status": lambda entry: entry.status,
    "epoch": lambda entry: _rank(entry.epoch, -1),
    "loss_valid": lambda entry: _rank(entry.loss_valid),
    "sweep": lambda entry: (entry.sweep is None, entry.sweep or ""),
    "size": lambda entry: _rank(entry.size, -1),
}


def select(
    found: Iterable[Entry],
    sweep: str | None = None,
    status: str | None = None,
    settings: Config | None = None,
    sort: str = "age",
    limit: int | None = None,
) -> list[Entry]:
    r"""Returns the entries asked for, with their sizes.

    Arguments:
        found: The entries.
        sweep: Only the runs of this sweep.
        status: Only the runs of this status.
        settings: Only the runs whose config has these values.
        sort: A key of :data:`SORTS` or of CONFIG.
        limit: At most so many.
    """

    wanted = (settings or {}).items()
    chosen = [
        entry
        for entry in found
        if sweep in (None, entry.sweep)
        and status in (None, entry.status)
        and all(entry.config is not None and entry.config[k] == x for k, x in wanted)
    ]

    if sort == "size":
        chosen = [measured(entry) for entry in chosen]

    def by_config(entry: Entry) -> Any:
        return (entry.config is None, entry.config[sort] if entry.config else 0)

    chosen.sort(key=SORTS["age"])
    chosen.sort(key=SORTS.get(sort, by_config))

    return [entry if entry.size is not None else measured(entry) for entry in chosen[:limit]]
