r"""The record of a run: `run.json`, what a run is beside its configuration and its numbers."""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from typing import Any

from ..core.config import Config
from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.keys import show
from .path import RunPath
from .provenance import differences

__all__ = ["Record", "logged_config", "read_record"]

# What is looked at again, and what it is if it is there
KINDS: dict[str, type] = {
    "id": str,
    "name": str,
    "status": str,
    "created": str,
    "exact": bool,
    "data": str,
    "parent": str,
    "extends": str,
    "sweep": str,
    "wandb": dict,
    "attempts": list,
    "rungs": list,
}

logger = logging.getLogger(__name__)


def read_record(path: RunPath) -> dict[str, Any]:
    r"""Returns the `run.json` of a run, or an empty dict if there is none, as in SDA's runs."""

    record = read_json(path.record) if os.path.lexists(path.record) else {}

    if not isinstance(record, dict):
        raise UserError(f"{path.record} is damaged: it is not a JSON object.")

    for key in KINDS:
        if not isinstance(found := record.get(key), KINDS[key] | None):
            raise UserError(f"{path.record} is damaged: its {key} is {show(found)}.")

    for attempt in record.get("attempts") or []:
        if not isinstance(attempt, dict) or not isinstance(attempt.get("versions", {}), dict):
            raise UserError(f"{path.record} is damaged: an attempt is {show(attempt)}.")

    if any(type(rung) is not int for rung in record.get("rungs") or []):
        raise UserError(f"{path.record} is damaged: its rungs are {show(record['rungs'])}.")

    return {key: x for key, x in record.items() if x is not None or key not in KINDS}


class Record(dict[str, Any]):
    r"""Creates the record of a run, or opens it. It reaches the disk with each new status.

    Arguments:
        path: The run.
        hold: Entered around each write, see :meth:`sda_ray.core.lease.Lease.hold`.
        more: What it shall say beside what is there.
    """

    def __init__(
        self,
        path: RunPath,
        hold: Callable[[], AbstractContextManager[None]],
        more: dict[str, Any],
    ) -> None:
        super().__init__(id=path.id, name=path.name, created=_now(), exact=True)
        self.update(read_record(path))
        self.update(more)
        self.path = path
        self.hold = hold

    def begin(self, attempt: int, provenance: dict[str, Any]) -> None:
        r"""Records the begin of an attempt, and whether bits may change with it."""

        attempts = self.setdefault("attempts", [])

        if attempts and (differs := differences(attempts[0], provenance)):
            self["exact"] = False
            logger.warning(
                "%s goes on with another %s than it began with: its bits may differ from those "
                "of an uninterrupted run.",
                self.path.directory.name,
                " and ".join(differs),
            )

        attempts.append({"number": attempt, "started": _now(), **provenance})
        self.write("running")

    def end(self, status: str, **more: Any) -> None:
        r"""Records the end of an attempt."""

        self["attempts"][-1]["ended"] = _now()
        self.write(status, **more)

    def write(self, status: str, **more: Any) -> None:
        r"""Writes the record, with a new status."""

        self.update(status=status, updated=_now(), **more)

        with self.hold():
            write_json(self.path.record, self)


def logged_config(config: Config, record: dict[str, Any]) -> Config:
    r"""Returns what W&B is told as the config of a run: its own, and where it comes from.

    Arguments:
        config: The config of the run.
        record: What `run.json` says, of which `sweep`, `trial` and `study` are told.
    """

    origin = {key: record.get(key) for key in ("sweep", "trial", "study")}

    return config | {key: x for key, x in origin.items() if isinstance(x, str | int)}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
