r"""The metrics of a run: `metrics.jsonl`, one line per epoch, appended once and never changed.

Lines are checked when they are read, since a directory may come from a stranger.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from ..core import (
    Hold,
    LeaseGone,
    UserError,
    append_line,
    cut_torn_lines,
    load_config,
    open_regular,
    read_lines,
)
from .path import RunPath
from .record import read_record

if TYPE_CHECKING:
    from ..training import Metrics

logger = logging.getLogger(__name__)

# Objectives that are measured where a run is judged, if its sweep has them
MEASURED: tuple[str, ...] = ("denoising", "skill")
COSTS = ("seconds", "memory")  # of an epoch, which differ when it is repeated
RECENT = 5  # epochs whose pace is that of a run
TAIL = 2**16  # bytes at the end of metrics.jsonl that surely hold its last line


class Line(msgspec.Struct):
    r"""The keys of a line of `metrics.jsonl` that are checked. It may have more."""

    epoch: Annotated[int, msgspec.Meta(ge=0, le=10**8)]
    loss_train: float | None = None
    loss_valid: float | None = None
    loss_valid_raw: float | None = None
    loss_valid_se: float | None = None
    denoising: float | None = None
    denoising_se: float | None = None
    skill: float | None = None
    skill_se: float | None = None
    lr: float | None = None
    sample_std: float | None = None
    sample_spectrum: float | None = None
    sample_divergence: float | None = None
    seconds: float | None = None
    memory: float | None = None


def read_metrics(file: Path) -> list[Metrics]:
    r"""Returns the lines of `metrics.jsonl` by epoch, see :func:`sda_ray.core.files.read_lines`."""

    lines = [_check(line, file, f"line {n}") for n, line in enumerate(read_lines(file), start=1)]

    return sorted(lines, key=lambda line: line["epoch"])


def read_history(file: Path) -> dict[int, Metrics]:
    r"""Returns the metrics of a run by epoch, see :func:`read_metrics`."""

    return {line["epoch"]: line for line in read_metrics(file)}


def last_metrics(file: Path) -> Metrics:
    r"""Returns the last line of `metrics.jsonl`, or an empty dict if there is none.

    Only the end of the file is read. A last line that was cut off by a crash is ignored.

    Raises:
        UserError: If the end of the file is damaged.
    """

    with os.fdopen(open_regular(file), "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - TAIL))
        lines = f.read(TAIL).split(b"\n")[:-1]  # what follows the last line end is torn

    if size > TAIL:
        lines = lines[1:]

    for line in reversed(lines[-2:]):  # a power cut may leave a line its end but not its middle
        with suppress(ValueError, RecursionError):
            if isinstance(metrics := json.loads(line), dict):
                return _check(metrics, file, "its last line")

    if size <= TAIL and len(lines) < 2:
        return {}

    raise UserError(f"{file} is damaged: its last line is not a JSON object.")


def _check(line: dict[str, Any], file: Path, where: str) -> Metrics:
    try:
        msgspec.convert(line, Line)
    except (msgspec.ValidationError, OverflowError) as error:
        raise UserError(f"{file} is damaged: {where}: {error}.") from error

    return {key: x for key, x in line.items() if x is not None} if None in line.values() else line


def best(
    lines: Sequence[Metrics], judged: Collection[Any] = (), objective: str = "loss_valid"
) -> Metrics | None:
    r"""Returns the line with the lowest value of an objective, or None if none is finite.

    Some epochs are judged by more draws than others: only those like the last one are compared.
    """

    finite = [line for line in lines if math.isfinite(line.get(objective, math.nan))]
    alike = [x for x in finite if (x["epoch"] in judged) == (finite[-1]["epoch"] in judged)]

    return min(alike, key=lambda line: line[objective], default=None)


def is_off(sample_std: float | None) -> bool:
    r"""Tells whether samples, if there are any, are off the data by more than a factor of two."""

    return sample_std is not None and not 0.5 <= sample_std <= 2


class Cost(NamedTuple):
    r"""The cost of the epochs of a run."""

    seconds: float = 0.0  # of all of them
    pace: float | None = None  # seconds of an epoch, of late
    memory: float | None = None  # GB, of late
    at: float = 0.0  # when the newest metrics were written


@cache
def cost_of(path: RunPath | None, last: int) -> Cost:
    r"""Returns the cost of the epochs of a run, as far as its directory can be read."""

    with suppress(UserError, OSError):
        lines = [x for x in read_metrics(path.metrics) if x["epoch"] <= last] if path else []

        if path and lines:
            seconds = [line["seconds"] for line in lines if "seconds" in line]
            pace = statistics.median(seconds[-RECENT:]) if seconds else None
            at = path.metrics.stat().st_mtime
            return Cost(sum(seconds), pace, lines[-1].get("memory"), at)

    return Cost()


def finals(path: RunPath, objectives: Sequence[str]) -> list[float]:
    r"""Returns the values of objectives of a complete run, from its files.

    They are numbers of the last line of its metrics or of `run.json`; or `parameters`, their
    number, and `seconds`, the time that its epochs took. Anything else is a UserError.
    """

    lines = read_metrics(path.metrics)
    last = {**(lines[-1] if lines else {}), "seconds": sum(x.get("seconds", 0.0) for x in lines)}
    known = {**read_record(path), **last}

    if "parameters" in objectives:
        known.setdefault("parameters", _parameters(path))

    for name in objectives:
        if type(known.get(name)) not in (int, float):
            numbers = [key for key, x in last.items() if type(x) in (int, float)]
            raise UserError(
                f"{path.directory.name} has no number '{name}'. Objectives may be "
                f"{', '.join(numbers)} and parameters."
            )

    return [float(known[name]) for name in objectives]


def _parameters(path: RunPath) -> int:
    import torch

    from ..nn import make_score, network_settings

    with torch.device("meta"):
        score = make_score(**network_settings(load_config(path.config)))

    return sum(p.numel() for p in score.parameters())


class History:
    r"""The metrics of an open run, written under `hold`. A torn last line is cut off."""

    def __init__(self, file: Path, hold: Hold = nullcontext) -> None:
        self.file, self.hold = file, hold
        self._unwritten: list[Metrics] = []

        with hold():
            cut_torn_lines(file)

        self.lines = read_history(file)

    def add(self, metrics: Metrics) -> None:
        r"""Appends an epoch. If the disk is full, the line is kept for the next :meth:`write`."""

        self.lines[metrics["epoch"]] = metrics
        self._unwritten.append(metrics)

        try:
            self.write()
        except LeaseGone:
            raise
        except OSError as error:
            if self._unwritten == [metrics]:  # warn once, not at each epoch
                logger.warning("%s cannot be written: %s.", self.file, error)

    def write(self) -> None:
        r"""Writes the lines that could not be written before, or raises an OSError."""

        while self._unwritten:
            with self.hold():
                append_line(self.file, self._unwritten[0])

            del self._unwritten[0]

    def differences(self, metrics: Metrics) -> str:
        r"""Compares a repeated epoch with its recorded line, apart from its cost."""

        before = self.lines[metrics["epoch"]]

        return ", ".join(
            f"{key} {before[key]} before, {now} now"
            for key, now in metrics.items()
            if key not in COSTS and key in before and before[key] != now
        )
