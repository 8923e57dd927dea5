r"""The study of a sweep: Optuna's record of what was tried, which is the truth about it.

It is an append-only journal with one writer, the driver of the sweep. A run enters it with one
line, complete, before it starts; every epoch's value is appended; and what is not yet told when a
driver dies is worked out by the next one, see :func:`sda_ray.pruner.decide`.
"""

import itertools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from .checkpoint import RunPath
from .files import cut_torn_line, read_lines, write_atomic
from .lease import Lease
from .pruner import Record
from .runs import read_record

__all__ = ["Study", "reconcile", "sample"]

logger = logging.getLogger(__name__)

REDRAWS = 100  # draws without a new configuration after which the space counts as exhausted


class _Lock:
    r"""Creates Optuna's lock on a journal from our lease, and undoes torn appends."""

    def __init__(self, file: Path, lease: Lease) -> None:
        self.file = file
        self.lease = lease

    def acquire(self) -> bool:
        self.held = self.lease.hold()
        self.held.__enter__()
        self.end = self.file.stat().st_size

        return True

    def release(self) -> None:
        try:
            _cut(self.file, self.end)
        finally:
            self.held.__exit__(None, None, None)


def _cut(file: Path, end: int) -> None:
    r"""Cuts what was appended after `end` if its last line is torn, as by a full disk."""

    with open(file, "r+b") as stream:
        if stream.seek(0, os.SEEK_END) > end:
            stream.seek(-1, os.SEEK_END)

            if stream.read(1) != b"\n":
                stream.truncate(end)


def _open(file: Path, lease: Lease) -> JournalStorage:
    r"""Opens a journal, repairing what a dead writer left."""

    with lease.hold():
        if torn := cut_torn_line(file):
            logger.warning("%s: a torn last record was cut off.", file)
            write_atomic(file.with_suffix(".journal.torn"), torn)

        for lock in file.parent.glob(f"{file.name}.lock*"):
            lock.unlink(missing_ok=True)

    return JournalStorage(JournalFileBackend(str(file), lock_obj=_Lock(file, lease)))  # type: ignore[arg-type]


@contextmanager
def _quiet() -> Iterator[None]:
    r"""Silences what Optuna says of its own experiments, and of its every step."""

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield

    optuna.logging.set_verbosity(level)


class Study:
    r"""Creates the study of a sweep, or opens it.

    Arguments:
        file: The journal.
        name: The name of the sweep.
        lease: The lease of the sweep: without it nothing is written.
        seed: The seed of all draws.
        sampler: `tpe`, `random` or `grid`.
    """

    def __init__(
        self, file: Path, name: str, lease: Lease, seed: int = 0, sampler: str = "tpe"
    ) -> None:
        self.seed = seed
        self.sampler = sampler

        with _quiet():
            self.storage = _open(file, lease)
            self.study = optuna.create_study(
                storage=self.storage, study_name=name, direction="minimize", load_if_exists=True
            )

    # Reading

    def records(self) -> list[Record]:
        r"""Returns what the study says of each run, from the newest record of each."""

        newest: dict[str, FrozenTrial] = {}

        for trial in self.study.get_trials(deepcopy=False):
            newest[trial.user_attrs["run_id"]] = trial

        records = [_record(trial) for trial in newest.values()]

        return sorted(records, key=lambda record: record.index)

    # Drawing

    def draw(
        self, space: Callable[[Any], dict[str, Any]], records: Sequence[Record]
    ) -> tuple[dict[str, Any], FrozenTrial] | None:
        r"""Draws a configuration that no run of the sweep has.

        The draw is a function of the seed, the number of runs and what they have shown so far.

        Arguments:
            space: Gives the values of the keys that vary, for an Optuna trial.
            records: All runs of the sweep.

        Returns:
            The values and Optuna's trial, which is not part of the study yet; or None if the
            space is exhausted.
        """

        seen = {_fingerprint(record.config) for record in records}

        with _quiet():
            for attempt in itertools.count() if self.sampler == "grid" else range(REDRAWS):
                entropy = (self.seed, len(records), attempt)
                seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
                sampler = self._sampler(seed, attempt)
                view = optuna.create_study(sampler=sampler, direction="minimize")

                if self.sampler == "tpe":
                    view.add_trials([_seen(record) for record in records])

                trial = view.ask()
                values = space(trial)

                if _fingerprint(values) not in seen:
                    return values, trial._cached_frozen_trial

                if isinstance(sampler, _Grid) and sampler.finished:
                    break

        return None

    def _sampler(self, seed: int, attempt: int) -> optuna.samplers.BaseSampler:
        if self.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
        elif self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        else:
            return _Grid(attempt)

    # Writing

    def add(self, record: Record, drawn: FrozenTrial, supersedes: int | None = None) -> Record:
        r"""Adds the record of a run that is about to start, in one line of the journal."""

        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=drawn.params,
                distributions=drawn.distributions,
                intermediate_values=record.values,
                user_attrs={
                    "run": record.index,
                    "run_id": record.run_id,
                    "until": record.until,
                    "epochs": record.epochs,
                    "attempt": record.attempt,
                    "shown": record.shown,
                    "config": record.config,
                    "supersedes": supersedes,
                },
            )
        )

        return _record(self.study.get_trials(deepcopy=False)[-1])

    def start(self, record: Record, until: int, shown: int | None) -> Record:
        r"""Records that a run goes on, as a new attempt, up to an epoch.

        A run whose record is closed gets a new record that supersedes the closed one.
        """

        trial = record.trial
        attrs = {"until": until, "shown": shown, "attempt": record.attempt + 1}

        if trial.state.is_finished():
            revived = replace(record, state="running", **attrs)
            return self.add(revived, trial, supersedes=trial.number)

        for key, value in attrs.items():
            if trial.user_attrs.get(key) != value:
                self.storage.set_trial_user_attr(trial._trial_id, key, value)

        return self._again(record)

    def extend(self, record: Record, until: int) -> None:
        r"""Records that a run in flight may go up to an epoch."""

        self.storage.set_trial_user_attr(record.trial._trial_id, "until", until)

    def report(self, record: Record, values: dict[int, float]) -> Record:
        r"""Records the values of epochs that the study has not got."""

        for epoch in sorted(values.keys() - record.values.keys()):
            self.storage.set_trial_intermediate_value(
                record.trial._trial_id, epoch, values[epoch]
            )

        return self._again(record)

    def tell(self, record: Record, state: str, error: str = "") -> None:
        r"""Closes the record of a run: `complete`, `pruned`, `diverged` or `failed`."""

        if error:
            self.storage.set_trial_user_attr(record.trial._trial_id, "error", error[:2000])

        if state == "diverged":
            self.storage.set_trial_user_attr(record.trial._trial_id, "status", "diverged")

        final = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        value = record.values[record.last] if state == "complete" else None

        with _quiet():
            self.study.tell(
                record.trial.number, value, state=final.get(state, TrialState.PRUNED)
            )

    def _again(self, record: Record) -> Record:
        return _record(self.study.get_trials(deepcopy=False)[record.trial.number])


def reconcile(study: Study, runs: Path) -> None:
    r"""Tells the study what the run directories know and a dead driver never told."""

    for record in study.records():
        if record.state != "running" or (path := RunPath.of_id(runs, record.run_id)) is None:
            continue

        lines = read_lines(path.metrics)
        known = {line["epoch"]: line["loss_valid"] for line in lines}
        record = study.report(record, {e: x for e, x in known.items() if e <= record.until})
        found = read_record(path)

        if found.get("status") == "finished" and record.last == record.epochs:
            study.tell(record, "complete")
        elif found.get("status") == "diverged":
            study.tell(record, "diverged", found.get("reason", ""))


def sample(space: Callable[[Any], dict[str, Any]], count: int) -> list[dict[str, Any]]:
    r"""Draws configurations at random, for checks. They are part of no study."""

    with _quiet():
        view = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

        return [space(view.ask()) for _ in range(count)]


class _Grid(optuna.samplers.BaseSampler):
    r"""Creates a sampler that takes the `index`-th of all combinations of choices."""

    def __init__(self, index: int) -> None:
        self.rest = index

    @property
    def finished(self) -> bool:
        return self.rest > 0

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Any, trial: Any, param_name: str, param_distribution: Any
    ) -> Any:
        options = _options(param_name, param_distribution)
        self.rest, i = divmod(self.rest, len(options))

        return options[i]


def _options(name: str, distribution: Any) -> Sequence[Any]:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return distribution.choices
    elif isinstance(distribution, optuna.distributions.IntDistribution) and not distribution.log:
        return range(distribution.low, distribution.high + 1, distribution.step or 1)

    raise ValueError(f"{name} has no finite set of options, which sampler='grid' needs")


def _record(trial: FrozenTrial) -> Record:
    attrs = trial.user_attrs
    states = {
        TrialState.RUNNING: "running",
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }

    return Record(
        attrs["run"],
        attrs["run_id"],
        attrs.get("status") or states[trial.state],
        attrs["until"],
        attrs["epochs"],
        dict(trial.intermediate_values),
        attrs["shown"],
        attrs["attempt"],
        attrs["config"],
        trial,
        attrs.get("error", ""),
    )


def _fingerprint(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _seen(record: Record) -> FrozenTrial:
    r"""Returns a run as the sampler shall see it.

    Finished runs are complete, paused ones pruned with their curve, those in flight running, and
    diverged ones infeasible.
    """

    curve = record.visible
    params, distributions = record.trial.params, record.trial.distributions

    if record.state == "failed":
        return optuna.trial.create_trial(state=TrialState.FAIL)

    state, value = TrialState.PRUNED, None

    if record.state == "diverged":
        curve = {}
    elif record.state == "complete" and record.last in curve:
        state, value = TrialState.COMPLETE, curve[record.last]
    elif record.state == "running" and not record.paused and record.shown is None:
        state = TrialState.RUNNING

    if state == TrialState.PRUNED and curve:
        value = curve[max(curve)]

    return optuna.trial.create_trial(
        state=state,
        value=value,
        params=params,
        distributions=distributions,
        intermediate_values={e: x for e, x in curve.items() if math.isfinite(x)},
        constraints={"diverged": float(record.state == "diverged")},
    )
