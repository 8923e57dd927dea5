r"""Runs in full: their metrics, where they came from, and how they compare."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.config import CONFIG, Config
from ..core.errors import UserError
from .curves import best, pace, read_metrics
from .inventory import Entry, measured
from .path import RunPath

__all__ = ["as_json", "attempts", "compare", "differences", "in_full", "origin", "row"]


def row(entry: Entry) -> dict[str, Any]:
    r"""Returns an entry as JSON has it."""

    return {
        "name": entry.path.name,
        "id": entry.path.id,
        "directory": entry.path.directory,
        "status": entry.status,
        "epoch": entry.epoch,
        "epochs": entry.epochs,
        "loss_valid": entry.loss_valid,
        "sweep": entry.sweep,
        "size": entry.size,
        "age": round(entry.age),
        "faults": entry.faults,
        "config": entry.config,
    }


def as_json(found: Any) -> str:
    r"""Returns anything as JSON that every program can read, whatever was in a stranger's file."""

    return json.dumps(_plain(found), indent=2, allow_nan=False)


def _plain(x: Any, depth: int = 16) -> Any:
    r"""Returns an object as JSON has it: no NaN (None instead), paths as text, bounded depth."""

    if isinstance(x, float):
        return x if math.isfinite(x) else None
    elif isinstance(x, str | int | None):
        return x
    elif depth == 0:
        return "…"
    elif isinstance(x, dict):
        return {str(key): _plain(value, depth - 1) for key, value in x.items()}
    elif isinstance(x, list | tuple):
        return [_plain(value, depth - 1) for value in x]

    return str(x)


def in_full(entry: Entry) -> tuple[Entry, list[dict[str, Any]]]:
    r"""Returns a run with its size, and its metrics; if those are damaged, says so."""

    entry = measured(entry)

    try:
        return entry, read_metrics(entry.path)
    except (UserError, OSError) as error:
        faults = dict.fromkeys((*entry.faults, *str(error).splitlines()))
        return replace(entry, status="damaged", faults=tuple(faults)), []


def attempts(record: dict[str, Any]) -> list[dict[str, Any]]:
    r"""Returns the attempts in a record, as far as they are such."""

    found = record.get("attempts")

    return [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []


def origin(entry: Entry, runs: Path) -> dict[str, Any]:
    r"""Returns where a run came from, by label."""

    record, path = entry.record, entry.path
    tries = attempts(record)
    last = tries[-1] if tries else {}
    parent = RunPath.of_id(runs, str(record["parent"])) if record.get("parent") else None
    number = path.name.rpartition("-")[2]
    mine = entry.sweep and entry.status != "adopted"
    copied = record.get("origin")
    exact = {True: "yes", False: "no: it went on elsewhere, or an epoch came out different"}
    commit = f"{last.get('commit')}{' with changes' if last.get('dirty') else ''}"
    found = {
        "directory": path.directory,
        "began": record.get("created"),
        "sweep": entry.sweep,
        "trial": record.get("trial", int(number) if mine and number.isdecimal() else None),
        "parent": parent.directory.name if parent else record.get("parent"),
        "attempts": len(tries) or None,
        "exact": exact.get(record["exact"]) if isinstance(record.get("exact"), bool) else None,
        "commit": commit if last.get("commit") else None,
        "data": record.get("data"),
        "reason": record.get("reason"),
        "weights": path.state if path.state.is_file() else None,
        "from": None if record else "a training without records, as by upstream SDA",
        "copy of": copied.get("path") if isinstance(copied, dict) else None,
    }

    return {label: value for label, value in found.items() if value is not None}


def differences(config: Config) -> Config:
    r"""Returns the values of a config that are not those of CONFIG."""

    return {key: value for key, value in config.items() if CONFIG.get(key) != value}


def compare(found: Sequence[Entry], lines: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    r"""Compares runs: where their configs differ, and what came of it.

    Arguments:
        found: The runs.
        lines: Their metrics.

    Returns:
        `metrics` and `config`, each a list of values by key; `equal`, the keys of the config that
        all have in common; `notes`, what forbids a comparison of the losses.
    """

    rows = {key: [(entry.config or {}).get(key) for entry in found] for key in CONFIG}
    differ = {key: row for key, row in rows.items() if len({x for x in row if x is not None}) > 1}
    tops = [best(x) or {} for x in lines]
    metrics: dict[str, list[Any]] = {
        "status": [entry.status for entry in found],
        "epoch": [entry.epoch for entry in found],
        "epochs": [entry.epochs for entry in found],
        "loss_valid": [entry.loss_valid for entry in found],
        "loss_valid_best": [top.get("loss_valid") for top in tops],
        "epoch_best": [top.get("epoch") for top in tops],
    }

    tables = [{line["epoch"]: line.get("loss_valid") for line in x} for x in lines]
    common = set.intersection(*(set(table) for table in tables)) if tables else set()

    if common and len({max(table) for table in tables}) > 1:
        last = max(common)
        metrics[f"loss_valid_at_{last}"] = [table[last] for table in tables]

    metrics["seconds"] = [pace(x) for x in lines]
    data = {str(entry.record["data"]) for entry in found if entry.record.get("data")}
    unread = [entry.path.directory.name for entry in found if entry.config is None]
    notes = [f"the config of {name} cannot be read." for name in unread]

    if "window" in differ:
        notes.append("the windows differ: losses of different windows are not comparable.")

    if len(data) > 1:
        notes.append("the runs were trained and validated on different data.")

    equal = [key for key in CONFIG if key not in differ]

    return {"metrics": metrics, "config": differ, "equal": equal, "notes": notes}
