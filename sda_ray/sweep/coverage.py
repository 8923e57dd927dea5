r"""Which finished runs from elsewhere a sweep covers, and what they are worth to it.

A run is covered if it might have been one of the sweep's own: its config is CONFIG with values of
SPACE, only the seed may be another. What it is worth is taken from its curve, if that is of the
same validation loss (which is a function of the data and the window alone), and else measured anew
with its weights. Its directory may be a stranger's: it is read with care and never written to.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..core.config import Config
from ..core.errors import UserError
from ..data.dataset import TrajectoryDataset, fingerprint
from ..nn.diffusion import VPSDE
from ..nn.score import load_network, make_score
from ..runs.curves import read_metrics
from ..runs.inventory import Entry, read_entry
from ..runs.path import RunPath
from ..runs.train import default_device
from ..training.validation import DRAWS, Validation
from .definition import Sweep
from .fitting import fit
from .priors import Prior

__all__ = ["Measure", "Refusal", "collect"]

LONGEST = 100_000  # epochs of a curve: it enters the study in one line
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"

Known = Mapping[str, Mapping[str, Any]]  # the parameters that runs were drawn with, by their ids


@dataclass(frozen=True)
class Refusal:
    r"""Creates a run that is not brought in, and why: `known` if it was before."""

    path: Path
    reason: str
    known: bool = False


class Measure:
    r"""Creates what measures the validation loss of networks on the data of a sweep.

    Arguments:
        data: The directory of the data.
        window: The number of snapshots of a window.
        device: Where to compute, by default on a GPU if there is one.
    """

    def __init__(self, data: Path, window: int, device: str | None = None) -> None:
        self.file = data / "valid.h5"
        self.window = window
        self.device = device or default_device()

    @cached_property
    def validset(self) -> TrajectoryDataset:
        return TrajectoryDataset(self.file, self.window)

    @cached_property
    def validation(self) -> Validation:
        return Validation(self.validset, self.device)

    def __call__(self, path: RunPath, config: Config) -> dict[str, Any]:
        r"""Returns the metrics of the last epoch of a run, by its weights.

        Raises:
            UserError: If its files do not belong together, or its network is of no use here.
        """

        score, found = load_network(path.directory, self.device)
        kernel: Any = score.kernel
        size, wanted = kernel.forcing.shape[-1], self.validset.shape[-1]

        if found != config:
            raise UserError("its config.json changes while it is read")

        if size != wanted:
            raise UserError(
                f"its network is for fields of {size}x{size}, but the data has {wanted}x{wanted}"
            )

        sde = VPSDE(kernel, self.validset.shape, config["alpha"]).to(self.device)
        loss, error = self.validation(sde, DRAWS)

        return {"epoch": config["epochs"], "loss_valid": loss, "loss_valid_se": error}


def collect(
    sources: Iterable[Path],
    sweep: Sweep,
    runs: Path,
    data: Path,
    known: Known | None = None,
    progress: Callable[[Sequence[Prior]], Iterable[Prior]] = iter,
) -> Iterator[Prior | Refusal]:
    r"""Finds out which finished runs can be prior trials of a sweep, and what they are worth.

    Arguments:
        sources: The directories of the runs, by SDA or by us.
        sweep: The sweep, checked.
        runs: The directory of all runs of the sweep.
        data: The directory of its data.
        known: The parameters that runs were drawn with.
        progress: Wraps the runs whose loss has to be measured, which takes its time.

    Yields:
        Each run, as soon as its loss is known, or why it is not taken.
    """

    digest, measure = fingerprint(data), Measure(data, sweep.config["window"])
    copies = {path.id: path for path in RunPath.all(runs)}
    seen: dict[str, Path] = {}
    todo: list[Prior] = []

    for source in sources:
        try:
            prior = _covered(RunPath(source.resolve()), sweep, known or {})

            if _is_own(prior.path, runs, sweep.name):
                yield Refusal(source, "it is a run of this very sweep", known=True)
            elif prior.run_id in seen:
                yield Refusal(source, f"it is the same run as {seen[prior.run_id]}", known=True)
            else:
                prior = _with_curve(prior, sweep, digest, copies)
                seen[prior.run_id] = source

                if prior.lines:
                    yield prior
                else:
                    todo.append(prior)
        except (UserError, OSError) as error:
            yield Refusal(source, _line(error))

    for prior in progress(todo):
        try:
            line = measure(prior.path, prior.config)
            yield _judged(prior, [line], sweep, "its loss is that of its state.pth on this data")
        except (UserError, OSError) as error:
            yield Refusal(prior.path.directory, _line(error))


def _line(error: Exception) -> str:
    return "; ".join(str(error).rstrip(".").split("\n"))


def _is_own(path: RunPath, runs: Path, name: str) -> bool:
    entry = read_entry(path)

    return path.directory.parent == runs.resolve() and entry is not None and entry.sweep == name


def _covered(path: RunPath, sweep: Sweep, known: Known) -> Prior:
    r"""Returns a run without its metrics, if the sweep covers it."""

    entry = read_entry(path) if path.directory.is_dir() else None

    if entry is None:
        raise UserError("it is not the directory of a run")
    elif entry.faults:
        raise UserError(entry.faults[0])
    elif entry.status not in ("finished", "adopted") or entry.config is None:
        raise UserError(f"it is {entry.status}, and only finished runs are brought in")

    found = fit(sweep, entry.config, known.get(path.id))
    faults = found.faults + [
        f"it has {text}" for key, text in found.differences.items() if key != "seed"
    ]

    if faults:
        raise UserError("\n".join(faults))

    notes = [f"it has {text}" for text in found.differences.values()]
    origin = _origin(entry)
    text = json.dumps([sweep.name, origin["id"], entry.config], sort_keys=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    digits = (ALPHABET[number // 36**i % 36] for i in range(8))

    return Prior(path, origin, "".join(digits), entry.config, found, notes=tuple(notes))


def _origin(entry: Entry) -> dict[str, str]:
    r"""Returns where a run comes from: the copy of a run is that run."""

    found, path = entry.record.get("origin"), entry.path

    if isinstance(found, dict) and all(type(found.get(key)) is str for key in ("path", "id")):
        return {key: found[key][:1000] for key in ("path", "id")}

    name = path.directory.name
    own = re.fullmatch(r".+_[a-z0-9]{8}", name)

    return {"path": str(path.directory), "id": path.id if own else name}


def _with_curve(prior: Prior, sweep: Sweep, digest: str, copies: dict[str, RunPath]) -> Prior:
    r"""Returns a run with its metrics, if they are of the validation loss of the sweep.

    A copy that is there already, as a try before may have left it, has them in any case.
    """

    path = copies.get(prior.run_id, prior.path)
    record = entry.record if (entry := read_entry(path)) is not None else {}
    lines = [x for x in read_metrics(path) if math.isfinite(x.get("loss_valid", math.nan))]
    ended = bool(lines) and lines[-1]["epoch"] == prior.config["epochs"]

    if ended and record.get("data") == digest:
        return _judged(prior, lines, sweep)

    if record.get("status") == "adopted":
        raise UserError(
            f"it is a copy without weights, and of other data: give {prior.origin['path']}"
        )

    if "data" in record and record["data"] != digest:
        return replace(prior, notes=(*prior.notes, "it was trained on other data"))

    return prior


def _judged(prior: Prior, lines: Sequence[dict[str, Any]], sweep: Sweep, *notes: str) -> Prior:
    r"""Returns a run with metrics, if they are such as a run may have."""

    last, epochs = lines[-1], [line["epoch"] for line in lines]

    if len(set(epochs)) < len(epochs) or epochs[0] < 1 or len(epochs) > LONGEST:
        raise UserError(f"its metrics.jsonl has {len(epochs)} lines from epoch {epochs[0]} on")

    if not 0 <= min(line["loss_valid"] for line in lines) < math.inf:
        raise UserError(f"its loss_valid is {last['loss_valid']}")

    finals = tuple(_final(name, prior, lines) for name in sweep.objectives)

    return replace(prior, lines=tuple(lines), finals=finals, notes=(*prior.notes, *notes))


def _final(name: str, prior: Prior, lines: Sequence[dict[str, Any]]) -> float:
    r"""Returns the value of an objective."""

    value: Any = lines[-1].get(name)

    if name == "parameters":
        with torch.device("meta"):
            value = sum(x.numel() for x in make_score(**prior.config).parameters())
    elif name == "seconds":
        known = [line["seconds"] for line in lines if "seconds" in line]
        value = sum(known) if len(known) == prior.config["epochs"] else None

    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"it does not tell its {name}, which is an objective of the sweep")

    return float(value)
