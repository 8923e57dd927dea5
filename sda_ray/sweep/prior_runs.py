r"""Finished runs that a sweep learns from: `sda-ray adopt`, `--warm-start` and `--fork`.

A run can be brought in if it could be one of the sweep's own: its config is CONFIG with values of
SPACE, and only the seed may differ. Its loss is taken from its curve if that is the same validation
loss (a function of the data and the window alone), and is otherwise measured with its weights. Its
directory may come from a stranger: it is read with care and never written to.

Config and metrics of each run are copied into a directory of the sweep, as a whole or not at all;
then a line of the study records it. If it is killed in between, the next call completes it. In the
study it is a complete run with a source: the sampler learns from it and rungs compare with it, but
it does not count as a trial.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import (
    Config,
    Lease,
    UserError,
    locked,
    remove_leftovers,
    save_config,
    say,
    sync_directory,
    write_atomic,
    write_json,
)
from ..data import check_data, fingerprint
from ..runs import (
    Entry,
    RunPath,
    entries,
    finals,
    new_name,
    read_entry,
    read_metrics,
    sweep_directory,
    timestamp,
)
from ..search import Study
from .definition import Sweep
from .enqueue import Fit, bring_all, fit, restore_runs
from .record import (
    Changes,
    Options,
    check_changes,
    compare,
    read_sweep,
    record_of,
    with_recorded_rungs,
    write_sweep,
)
from .requests import NotRunning, ask_all

if TYPE_CHECKING:
    from ..training import Measure, Validation

LONGEST = 100_000  # epochs of a curve, which enters the study in one line
FINISHED = ("finished", "adopted")
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"

Item = dict[str, Any]  # a run as the study records it, see `Prior.item`


@dataclass(frozen=True)
class Prior:
    r"""A finished run that a sweep can learn from."""

    path: RunPath
    origin: dict[str, str]  # `path` and `id` of the original run: it may be a copy
    run_id: str  # of its copy in the sweep, always the same
    config: Config
    fit: Fit
    lines: tuple[dict[str, Any], ...] = ()  # its metrics
    finals: tuple[float, ...] = ()  # the values of all objectives of the sweep
    objective: str = "loss_valid"  # the first of these
    notes: tuple[str, ...] = ()  # for the user

    @property
    def item(self) -> dict[str, Any]:
        r"""The argument of :func:`sda_ray.sweep.enqueue.bring_in`, as JSON."""

        from optuna.distributions import distribution_to_json

        spans, name = self.fit.distributions, self.objective

        return {
            "run_id": self.run_id,
            "source": self.origin["path"],
            "epochs": self.config["epochs"],
            "config": self.fit.values,
            "params": self.fit.params,
            "distributions": {k: distribution_to_json(d) for k, d in spans.items()},
            "values": [[x["epoch"], x[name]] for x in self.lines if name in x],
            "finals": self.finals,
        }


def place(prior: Prior, sweep: Sweep, runs: Path, digest: str) -> Path:
    r"""Copies config and metrics of a run into a directory of a sweep, unless that exists."""

    file = sweep_directory(runs, sweep.name) / "priors.lock"
    file.parent.mkdir(parents=True, exist_ok=True)

    with locked(file):  # one process at a time copies runs for a sweep
        if (copy := RunPath.of_id(runs, prior.run_id)) is not None:
            return copy.directory

        number = re.search(r"-(\d{1,6})_", prior.path.directory.name)
        new = new_name(prior.run_id, int(number[1]) if number else 1)
        aside = RunPath(runs / f".{prior.run_id}.prior")
        shutil.rmtree(aside.directory, ignore_errors=True)  # of a process that was killed
        aside.directory.mkdir()

        save_config(prior.config, aside.config)
        write_atomic(aside.metrics, "".join(json.dumps(x) + "\n" for x in prior.lines).encode())
        write_json(
            aside.record,
            {
                "id": prior.run_id,
                "name": new,
                "created": timestamp(),
                "status": "adopted",
                "sweep": sweep.name,
                "data": digest,
                "origin": prior.origin | {"notes": prior.notes},
                "params": prior.fit.params,
                "wandb": {"mode": "disabled"},
                **sweep.judged,
            },
        )

        directory = runs / f"{new}_{prior.run_id}"
        aside.directory.rename(directory)
        sync_directory(runs)

        return directory


@dataclass(frozen=True)
class Refusal:
    r"""A run that is not brought in, and the reason."""

    path: Path
    reason: str


def collect(
    sources: Iterable[Path], sweep: Sweep, runs: Path, data: Path
) -> Iterator[Prior | Refusal]:
    r"""Yields finished runs, of this package or of SDA, that a sweep can learn from.

    Each comes as soon as its loss is known, or with the reason against it.
    """

    digest = fingerprint(data)
    copies = {path.id: path for path in RunPath.all(runs)}
    seen: dict[str, Path] = {}

    @cache
    def validation(window: int) -> tuple[Validation, dict[str, Measure]]:
        from ..data import TrajectoryDataset
        from ..runs import default_device, make_measures
        from ..training import Validation

        validset, device = TrajectoryDataset(data / "valid.h5", window), default_device()
        seed = sweep.config["valid_seed"]
        measures = make_measures(sweep.measured, validset, device, seed)

        return Validation(validset, device, seed=seed), measures

    for source in sources:
        try:
            prior = _covered(RunPath(source.resolve()), sweep, runs)

            if prior.run_id in seen:
                raise UserError(f"it is the same run as {seen[prior.run_id]}")

            prior = _with_curve(prior, sweep, digest, copies)
            seen[prior.run_id] = source

            if not prior.lines:
                note = "its loss is that of its state.pth on this data"
                line = _measure(prior, *validation(prior.config["window"]))
                prior = _judged(prior, [line], sweep, note)

            yield prior
        except (UserError, OSError) as error:
            yield Refusal(source, "; ".join(str(error).rstrip(".").split("\n")))


def _measure(
    prior: Prior, validation: Validation, measures: Mapping[str, Measure]
) -> dict[str, Any]:
    r"""Returns the metrics of the last epoch of a run, by its weights.

    Raises:
        UserError: If its files do not belong together, or its network does not fit the data.
    """

    from ..nn import VPSDE, load_network
    from ..training import DRAWS

    score, config = load_network(prior.path.directory, validation.device)
    kernel: Any = score.kernel
    shape = validation.validset.shape

    if config != prior.config:
        raise UserError("its config.json changes while it is read")

    if (size := kernel.forcing.shape[-1]) != (wanted := shape[-1]):
        raise UserError(
            f"its network is for fields of {size}x{size}, but the data has {wanted}x{wanted}"
        )

    loss, error = validation(VPSDE(kernel, shape, config["alpha"]).to(validation.device), DRAWS)
    line = {"epoch": config["epochs"], "loss_valid": loss, "loss_valid_se": error}

    for name, measure in measures.items():
        line[name], line[f"{name}_se"] = measure(score, config["alpha"])

    return line


def _covered(path: RunPath, sweep: Sweep, runs: Path) -> Prior:
    r"""Returns a run without its metrics, if the sweep covers it."""

    entry = read_entry(path) if path.directory.is_dir() else None

    if entry is None:
        raise UserError("it is not the directory of a run")
    elif entry.faults:
        raise UserError(entry.faults[0])
    elif entry.status not in FINISHED or entry.config is None:
        raise UserError(f"it is {entry.status}, and only finished runs are brought in")
    elif entry.sweep == sweep.name and path.directory.parent == runs.resolve():
        raise UserError("it is a run of this very sweep")

    match = fit(sweep, entry.config, entry.record.get("params"))
    notes = {key: f"it has {text}" for key, text in match.differences.items()}

    if faults := match.faults + [text for key, text in notes.items() if key != "seed"]:
        raise UserError("\n".join(faults))

    origin = _origin(entry)
    text = json.dumps([sweep.name, origin["id"], entry.config], sort_keys=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    digits = (ALPHABET[number // 36**i % 36] for i in range(8))

    return Prior(path, origin, "".join(digits), entry.config, match, notes=tuple(notes.values()))


def _origin(entry: Entry) -> dict[str, str]:
    r"""Returns path and id of the original of a run, which may be a copy."""

    origin, directory = entry.record.get("origin"), entry.path.directory

    if isinstance(origin, dict) and all(type(origin.get(key)) is str for key in ("path", "id")):
        return {key: origin[key][:1000] for key in ("path", "id")}

    own = re.fullmatch(r".+_[a-z0-9]{8}", directory.name)

    return {"path": str(directory), "id": entry.path.id if own else directory.name}


def _with_curve(prior: Prior, sweep: Sweep, digest: str, copies: dict[str, RunPath]) -> Prior:
    r"""Returns a run with its metrics, if they have the validation loss of the sweep.

    A copy that an earlier call has left has it in any case.
    """

    path = copies.get(prior.run_id, prior.path)
    record = entry.record if (entry := read_entry(path)) is not None else {}
    lines = [x for x in read_metrics(path.metrics) if math.isfinite(x.get("loss_valid", math.nan))]
    ended = bool(lines) and lines[-1]["epoch"] == prior.config["epochs"]
    measured = record.get("measured", {})
    alike = (measured | sweep.measured) == measured

    if ended and alike and record.get("data") == digest:
        return _judged(prior, lines, sweep)

    if record.get("status") == "adopted":
        other = "of other data" if alike else "judged otherwise"
        raise UserError(f"it is a copy without weights, and {other}: give {prior.origin['path']}")

    if record.get("data", digest) != digest:
        return replace(prior, notes=(*prior.notes, "it was trained on other data"))

    return prior


def _judged(prior: Prior, lines: Sequence[dict[str, Any]], sweep: Sweep, *notes: str) -> Prior:
    r"""Returns a run with metrics, after a check of their epochs and losses."""

    last, epochs = lines[-1], [line["epoch"] for line in lines]

    if len(set(epochs)) < len(epochs) or epochs[0] < 1 or len(epochs) > LONGEST:
        raise UserError(f"its metrics.jsonl has {len(epochs)} lines from epoch {epochs[0]} on")

    if not 0 <= min(line["loss_valid"] for line in lines) < math.inf:
        raise UserError(f"its loss_valid is {last['loss_valid']}")

    return replace(
        prior,
        lines=tuple(lines),
        finals=tuple(_final(name, prior, lines) for name in sweep.objectives),
        objective=sweep.objectives[0],
        notes=(*prior.notes, *notes),
    )


def _final(name: str, prior: Prior, lines: Sequence[dict[str, Any]]) -> float:
    value: Any = lines[-1].get(name)

    if name == "parameters":
        (value,) = finals(prior.path, [name])
    elif name == "seconds":
        known = [line["seconds"] for line in lines if "seconds" in line]
        value = sum(known) if len(known) == prior.config["epochs"] else None

    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"it has no {name}, which is an objective of the sweep")

    return float(value)


def adopt(words: Sequence[str], sweep: Sweep, options: Options) -> None:
    r"""Brings finished runs into a sweep that is running, was running, or was never started.

    The words are directories of runs, directories of such directories, or runs by name or id. The
    options are recorded of a sweep that was never started.

    Raises:
        UserError: If another sweep of the name is recorded, or it covers none of the runs.
    """

    runs, data, start = options.runs, options.data, timestamp()
    sources = [path for word in words for path in _expand(word, runs)]
    info = check_data(data)
    sweep = with_recorded_rungs(sweep, runs).check(info)
    directory = sweep_directory(runs, sweep.name)
    record = record_of(sweep, replace(options, gpus=options.gpus or 0), info)
    check_changes(runs, record, sweep)
    items = gather(sources, sweep, runs, data)

    if not items:
        raise UserError(f"sweep '{sweep.name}' covers none of the {len(sources)} runs.")

    with suppress(NotRunning):
        ask_all(directory, priors=items)
        return

    lease = Lease(directory / "lease.json", f"sweep '{sweep.name}'")

    try:
        if (directory / "sweep.json").exists():
            record |= {"trials": read_sweep(runs, sweep.name)["trials"]}
        else:  # copies that are older than the sweep would be those of another one of the name
            record |= {"created": start}

        remove_leftovers(directory)
        since = write_sweep(directory, record, sweep.script)
        study = Study(directory / "study.journal", sweep.name, lease, sweep.objectives)

        pending = {str(item["run_id"]) for item in items}

        for line in restore_runs(study, sweep, runs, info.fingerprint, since, pending):
            say(line)

        say(f"{bring_all(study, items)}.")
    finally:
        lease.release()


def _expand(word: str, runs: Path) -> list[Path]:
    r"""Returns the directories of runs that an argument names."""

    directory = Path(word)

    if not directory.is_dir() or (directory / "config.json").is_file():
        return [RunPath.find(runs, word).directory]

    if found := sorted(file.parent for file in directory.glob("*/config.json")):
        return found

    raise UserError(f"{directory} is not the directory of a run, nor has it any.")


def warm_start(other: str, sweep: Sweep, runs: Path, data: Path) -> list[Item]:
    r"""Copies the finished runs of another sweep, and returns them for the study.

    Raises:
        UserError: If there is no such other sweep.
    """

    read_sweep(runs, other)

    if other == sweep.name:
        raise UserError(f"sweep '{other}' has its own runs already: give another.")

    own = [e for e in entries(runs) if e.sweep == other]
    mine = [e.path for e in own if e.status in FINISHED]

    say(f"sweep '{other}' has {len(mine)} finished runs")

    if paused := sum(e.status == "paused" for e in own):
        say(f"  left out: {paused} paused runs, whose loss at a rung is not their last one")

    return gather([path.directory for path in mine], sweep, runs, data)


def fork(sweep: Sweep, runs: Path, data: Path) -> Sweep:
    r"""Returns a sweep under the first free name NAME-2, NAME-3, …, or the one it has already."""

    now = {"definition": sweep.check().definition(), "fingerprint": fingerprint(data)}

    for name in (f"{sweep.name}-{number}" for number in count(2)):
        recorded = (sweep_directory(runs, name) / "sweep.json").exists()

        if not recorded or compare(read_sweep(runs, name), now) == Changes():
            break  # a free name, or a fork that was killed

    return replace(sweep, name=name)


def gather(sources: Iterable[Path], sweep: Sweep, runs: Path, data: Path) -> list[Item]:
    r"""Copies the runs that a sweep covers, prints the others and returns the items to bring in."""

    digest = fingerprint(data)
    items = []

    for prior in collect(sources, sweep, runs, data):
        if isinstance(prior, Refusal):
            say(f"  left out: {prior.path.name}: {prior.reason}")
            continue

        name, value = prior.path.directory.name, f"{prior.objective} {prior.finals[0]:.4f}"

        try:
            copy = place(prior, sweep, runs, digest)
        except OSError as error:
            raise UserError(
                f"{prior.path.directory} cannot be copied to {runs}: {error}."
            ) from error

        notes = "".join(f"; {note}" for note in prior.notes)
        say(f"  covered: {name}: {value}{notes} ({copy.name})")
        items.append(prior.item)

    return items
