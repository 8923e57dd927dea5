r"""The contents of run directories, read without trusting them and without waiting.

A run may be in use, half written, damaged, or from a stranger. Reading it never raises: its
faults are in :attr:`Entry.faults`. Nothing here writes.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core import CONFIG, STALE, Config, UserError, holder_alive, load_config, read_holder
from .metrics import MEASURED, best, last_metrics, read_metrics
from .path import RESUMED, RunPath
from .record import read_record

# Files that a run of upstream lacks
OURS = {*RESUMED, "checkpoint.decay.pth"} - {"config.json", "run.json"}


NUMBERS = ("loss_valid", *MEASURED, "sample_std")  # of an entry


@dataclass(frozen=True)
class Entry:
    r"""A run at a glance.

    Its status is that of `run.json`, but `interrupted` for a run whose process is gone, `damaged`
    for one that cannot be read, and `unknown` for one without a record.
    """

    path: RunPath
    status: str
    created: float  # in seconds since 1970
    epoch: int | None = None  # the last one in `metrics.jsonl`
    epochs: int | None = None
    loss_valid: float | None = None  # of the last epoch
    denoising: float | None = None  # likewise, as the others where it is measured
    skill: float | None = None
    sample_std: float | None = None  # relative to the data
    sweep: str | None = None
    config: Config | None = None  # if it can be read
    faults: tuple[str, ...] = ()  # one sentence each
    record: dict[str, Any] = field(default_factory=dict)  # `run.json`, empty if that is damaged
    size: int | None = None  # bytes in its directory, see :func:`measured`

    @property
    def objective(self) -> str:
        r"""What the run is compared by with others of its sweep."""

        objective = str(self.record.get("objective"))

        return objective if objective in MEASURED else "loss_valid"

    @property
    def judged(self) -> set[int | None]:
        r"""The epochs whose validation loss is a mean of several draws: the rungs and the end."""

        return {*self.record.get("rungs", ()), self.epochs}

    @property
    def age(self) -> float:
        return max(0.0, time.time() - self.created)


def entries(runs: Path) -> Iterator[Entry]:
    r"""Yields the runs in a directory; other directories are skipped."""

    for path in RunPath.all(runs):
        if (entry := read_entry(path)) is not None:
            yield entry


def read_entry(path: RunPath) -> Entry | None:
    r"""Returns a run at a glance, or None if the directory holds no run, or has vanished."""

    try:
        names = set(os.listdir(path.directory))
    except FileNotFoundError:
        return None
    except OSError as error:
        fault = f"{path.directory} cannot be read: {error.strerror}."
        return Entry(path, "damaged", _modified(path.directory), faults=(fault,))

    if not names & {"config.json", "run.json", "state.pth", "lease.json", *OURS}:
        return None

    faults: list[str] = []
    record: dict[str, Any] = {}
    config: Config | None = None
    line: dict[str, Any] = {}

    with _collecting(faults):
        record = _record(path) if "run.json" in names else {}

    with _collecting(faults):
        if names & {"config.json", "run.json"} or "lease.json" not in names:  # else it begins
            config = load_config(path.config)

    with _collecting(faults):
        if "metrics.jsonl" in names:
            line = last_metrics(path.metrics)

    status = record.get("status") or _status_without_record(path, names, faults)

    if status == "running" and record and not is_held(path):
        with _collecting(faults):  # again: it may have ended meanwhile
            record = _record(path)
            status = "interrupted" if record["status"] == "running" else record["status"]

    return Entry(
        path,
        "damaged" if faults else status,
        _created(path, record),
        epochs=config["epochs"] if config else None,
        sweep=record.get("sweep"),
        config=config,
        faults=tuple(faults),
        record=record,
        **{key: line.get(key) for key in ("epoch", *NUMBERS)},
    )


@contextlib.contextmanager
def _collecting(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        faults.extend(str(error).splitlines())
    except OSError as error:  # gone or forbidden since it was looked at
        faults.append(f"{error.filename} cannot be read: {error.strerror}.")


def _record(path: RunPath) -> dict[str, Any]:
    record = read_record(path)

    if "status" not in record:
        raise UserError(f"{path.record} is damaged: it has no status.")

    return record


def _status_without_record(path: RunPath, names: set[str], faults: list[str]) -> str:
    if is_held(path):  # it has just started
        return "running"

    if "run.json" not in names and names & OURS:
        faults.append(f"{path.record} is missing.")

    if "lease.json" in names:
        return "interrupted"

    return "finished" if "state.pth" in names else "unknown"


def is_held(path: RunPath, quiet: float = STALE) -> bool:
    r"""Returns at once whether a process seems to use a run.

    Watching the heartbeat of a holder on another host would take a minute: instead, the time of
    its file is compared with this clock, which is wrong if the two differ by more than `quiet`
    seconds.
    """

    with contextlib.suppress(OSError, UserError):
        if (owner := read_holder(path.lease)) is None:
            return False

        if (alive := holder_alive(owner)) is not None:
            return alive

        return time.time() - path.lease.stat().st_mtime < quiet

    return False


def _created(path: RunPath, record: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(record["created"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return _modified(path.config) or _modified(path.directory)


def _modified(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except OSError:
        return 0.0


def measured(entry: Entry) -> Entry:
    r"""Returns an entry with the bytes in its directory. Links are not followed."""

    size = 0

    for directory, _, names in os.walk(entry.path.directory):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(directory, name)).st_size

    return replace(entry, size=size)


def _rank(x: float | None, sign: int = 1) -> float:
    return math.inf if x is None or math.isnan(x) else sign * x


# Keys to sort by, beside those of CONFIG. The best, newest, largest or first comes first.
SORTS: dict[str, Any] = {
    "age": lambda entry: -entry.created,
    "name": lambda entry: entry.path.directory.name,
    "status": lambda entry: entry.status,
    "epoch": lambda entry: _rank(entry.epoch, -1),
    "loss_valid": lambda entry: _rank(entry.loss_valid),
    "denoising": lambda entry: _rank(entry.denoising),
    "skill": lambda entry: _rank(entry.skill),
    "sweep": lambda entry: (entry.sweep is None, entry.sweep or ""),
    "size": lambda entry: _rank(entry.size, -1),
}


def select(
    runs: Iterable[Entry],
    sweep: str | None = None,
    status: str | None = None,
    settings: Config | None = None,
    sort: str = "age",
    limit: int | None = None,
) -> list[Entry]:
    r"""Returns the entries of a sweep, a status and values of the config, with their sizes.

    They are sorted by a key of :data:`SORTS` or of CONFIG, and at most `limit`.
    """

    wanted = (settings or {}).items()
    chosen = [
        measured(entry)
        for entry in runs
        if sweep in (None, entry.sweep)
        and status in (None, entry.status)
        and all(entry.config is not None and entry.config[k] == x for k, x in wanted)
    ]

    def by_config(entry: Entry) -> Any:
        return (entry.config is None, entry.config[sort] if entry.config else 0)

    chosen.sort(key=SORTS["age"])
    chosen.sort(key=SORTS.get(sort, by_config))

    return chosen[:limit]


# Runs in full


def row(entry: Entry) -> dict[str, Any]:
    r"""Returns an entry as the object that JSON shows."""

    path = entry.path
    keys = ("status", "epoch", "epochs", *NUMBERS, "sweep", "size", "faults")
    shown = {"name": path.name, "id": path.id, "directory": path.directory}
    shown |= {key: getattr(entry, key) for key in (*keys, "config")}

    return shown | {"age": round(entry.age)}


def as_json(obj: Any) -> str:
    r"""Returns an object as JSON that every program can read: with null in place of NaN."""

    finite = json.loads(json.dumps(obj, default=str), parse_constant=lambda _: None)

    return json.dumps(finite, indent=2)


def in_full(entry: Entry) -> tuple[Entry, list[dict[str, Any]]]:
    r"""Returns a run with its size, and its metrics; damaged ones add faults."""

    entry = measured(entry)

    try:
        return entry, read_metrics(entry.path.metrics)
    except (UserError, OSError) as error:
        faults = dict.fromkeys((*entry.faults, *str(error).splitlines()))
        return replace(entry, status="damaged", faults=tuple(faults)), []


def source(entry: Entry, runs: Path) -> dict[str, Any]:
    r"""Returns where a run comes from, by label."""

    record, path = entry.record, entry.path
    attempts = record.get("attempts", [])
    last = attempts[-1] if attempts else {}
    parent = RunPath.of_id(runs, record["parent"]) if "parent" in record else None
    copied = record.get("origin")
    exact = {True: "yes", False: "no: it resumed elsewhere, or a repeated epoch differs"}
    labels = {
        "directory": path.directory,
        "started": record.get("created"),
        "sweep": entry.sweep,
        "trial": record.get("trial"),
        "parent": parent.directory.name if parent else record.get("parent"),
        "attempts": len(attempts) or None,
        "exact": exact.get(record.get("exact")),  # type: ignore[arg-type]
        "commit": last.get("commit")
        and last["commit"] + " with changes" * bool(last.get("dirty")),
        "data": record.get("data"),
        "reason": record.get("reason"),
        "weights": path.state if path.state.is_file() else None,
        "from": None if record else "a training without records, as by upstream SDA",
        "copy of": copied.get("path") if isinstance(copied, dict) else None,
    }

    return {label: value for label, value in labels.items() if value is not None}


def changed_settings(config: Config) -> Config:
    r"""Returns the values of a config that differ from CONFIG."""

    return {key: value for key, value in config.items() if CONFIG.get(key) != value}


def compare(runs: Sequence[Entry], lines: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    r"""Compares the configs and the metrics of runs.

    Returns:
        `metrics` and `config`, each a list of values by key; `equal`, the keys of the config that
        all have in common; `notes`, reasons why their losses are not comparable.
    """

    rows = {key: [(entry.config or {}).get(key) for entry in runs] for key in CONFIG}
    differ = {key: row for key, row in rows.items() if len({x for x in row if x is not None}) > 1}
    tops = [best(x, entry.judged) or {} for entry, x in zip(runs, lines, strict=True)]
    metrics = {
        key: row
        for key in ("status", "epoch", "epochs", *NUMBERS)
        if (row := [getattr(entry, key) for entry in runs]) != [None] * len(runs)
        or key not in MEASURED
    }
    metrics["loss_valid_best"] = [top.get("loss_valid") for top in tops]
    metrics["epoch_best"] = [top.get("epoch") for top in tops]

    tables = [{line["epoch"]: line.get("loss_valid") for line in x} for x in lines]
    common = set.intersection(*(set(table) for table in tables)) if tables else set()

    if common and len({max(table) for table in tables}) > 1:
        last = max(common)
        metrics[f"loss_valid_at_{last}"] = [table[last] for table in tables]

    seconds = ([line["seconds"] for line in x if "seconds" in line] for x in lines)
    metrics["seconds"] = [statistics.median(x) if x else None for x in seconds]
    data = {str(entry.record["data"]) for entry in runs if entry.record.get("data")}
    unread = [entry.path.directory.name for entry in runs if entry.config is None]
    notes = [f"the config of {name} cannot be read." for name in unread]

    if "window" in differ:
        notes.append(
            "the windows differ: losses of different windows are not comparable, but denoising "
            "and skill are, within a sweep."
        )

    if len(data) > 1:
        notes.append("the runs were trained and validated on different data.")

    equal = [key for key in CONFIG if key not in differ]

    return {"metrics": metrics, "config": differ, "equal": equal, "notes": notes}
