r"""What a sweep has found so far: the numbers and the sentences of its report.

A sweep is read from its study and its run directories, while it runs or later. Nothing is written.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core import CONFIG, UserError, format_duration, format_value
from ..runs import RunPath, is_off, read_metrics, read_record, sweep_directory
from ..search import (
    FINAL,
    Rules,
    TrialRecord,
    best_at_rung,
    count_trials,
    importances,
    ranked,
    standing,
)
from ..sweep import read_study, read_sweep, recorded_rules

EDGE = 0.05  # of a range: what lies closer to its end is at its boundary
FEW = 10  # complete runs below which little can be said
TELLING = 4  # complete runs from which on a rank correlation is shown


@dataclass(frozen=True)
class Trial:
    r"""A run of a sweep: its record in the study, and its files as far as they can be read."""

    record: TrialRecord
    name: str
    directory: Path | None  # None if it is gone
    metrics: list[dict[str, Any]]
    run: dict[str, Any]  # `run.json`
    why: str  # why it stopped where it did

    @property
    def seconds(self) -> float:
        r"""The time that its epochs took."""

        return sum(line.get("seconds", 0.0) for line in self.metrics)

    @cached_property
    def attempts(self) -> list[tuple[float, float, str]]:
        r"""Begin and end of each attempt, in seconds since 1970, and its host."""

        found = []

        for attempt in self.run.get("attempts", []):
            with suppress(KeyError, TypeError, ValueError):
                ended = attempt.get("ended") or self.run["updated"]
                times = (
                    datetime.fromisoformat(x).timestamp() for x in (attempt["started"], ended)
                )
                begin, end = times
                found.append((begin, max(begin, end), str(attempt.get("host", ""))))

        return found

    @cached_property
    def times(self) -> list[float]:
        r"""When each epoch ended, in seconds since 1970.

        Attempts note their begin and end, epochs how long they took: these are laid one after
        another into the time of all attempts.
        """

        spans = [end - begin for begin, end, _ in self.attempts]
        took = np.cumsum([line.get("seconds", 0.0) for line in self.metrics])

        if not sum(spans) or not len(took) or not took[-1]:
            return []

        at = took * (sum(spans) / took[-1])
        ends = np.cumsum(spans)
        part = np.searchsorted(ends, at - 1e-6).clip(max=len(spans) - 1)
        begins = np.array([begin for begin, *_ in self.attempts])

        return (begins[part] + at - (ends - spans)[part]).tolist()


@dataclass(frozen=True)
class Findings:
    r"""A sweep as it stands.

    Its rules are those of its record, whose script is never run.
    """

    name: str
    directory: Path
    sweep: dict[str, Any]  # `sweep.json`
    rules: Rules
    trials: list[Trial]  # from best to worst
    shares: dict[str, tuple[float, float, float]]  # importance and its 90 % interval, by parameter

    @property
    def objective(self) -> str:
        return str(self.sweep["definition"]["objectives"][0])

    @cached_property
    def complete(self) -> list[Trial]:
        r"""The complete configurations, from best to worst, each by its first run."""

        whole = (t for t in self.trials if t.record.state == "complete")

        return [trial for trial in whole if not trial.record.replica_of]

    @property
    def best(self) -> Trial | None:
        return self.complete[0] if self.complete else None

    @property
    def spent(self) -> int:
        r"""The epochs that the runs of this sweep trained."""

        return sum(t.record.last for t in self.trials if not t.record.source)

    def error(self, trial: Trial) -> float | None:
        r"""Returns the standard error of a run's objective, if it is known."""

        lines = (line for line in reversed(trial.metrics) if self.objective in line)
        line: dict[str, Any] = next(lines, {})
        found = line.get(f"{self.objective}_se")

        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None

    def settings(self, trial: Trial) -> dict[str, Any]:
        r"""Returns the keys of CONFIG by which a run differs, with their values."""

        if not self.seeded or trial.record.source:
            return trial.record.config

        return {
            "seed": (CONFIG | self.sweep["definition"]["config"])["seed"]
        } | trial.record.config

    @cached_property
    def seeded(self) -> bool:
        r"""Whether configurations have several seeds, here or where they were brought in from."""

        return self.rules.seeds > 1 or any(t.record.replica_of for t in self.trials)

    def uncertainty(self, trial: Trial) -> float | None:
        r"""Returns the standard error of a configuration's objective, over seeds if it has any."""

        over_seeds = trial.record.error_over_seeds

        return self.error(trial) if over_seeds is None else over_seeds

    @cached_property
    def expected(self) -> dict[str, float]:
        r"""The objective of each run at the end, by id: that of a complete run, and of another the
        value at its last epoch times the median factor by which complete runs improved from there.
        """

        found: dict[str, float] = {}

        for trial in self.trials:
            r = trial.record
            value = trial.record.value

            lost = r.replica_of or r.state in ("failed", "diverged")

            if lost or value is None or not math.isfinite(value):
                continue

            if r.state == "complete":
                found[r.run_id] = value
                continue

            factors = [
                (c.record.value or 0.0) / x
                for c in self.complete
                if (x := c.record.curve.get(r.last)) and math.isfinite(x) and x > 0
            ]

            if factors:
                found[r.run_id] = value * statistics.median(factors)

        return found

    @cached_property
    def history(self) -> list[tuple[int, float, str]]:
        r"""The epochs that all runs had spent when one was complete, its objective and its name."""

        own = [trial for trial in self.trials if not trial.record.source]
        times = sorted(x for trial in own for x in trial.times)

        return sorted(
            (
                int(np.searchsorted(times, t.times[-1], side="right")),
                t.record.value or math.nan,
                t.name,
            )
            for t in self.complete
            if t.times and not t.record.source
        )

    @cached_property
    def random_search(self) -> list[tuple[int, float]]:
        r"""The epochs and the expected best objective of a search that trains all runs to the end.

        It is the mean over all orders of the configurations that this sweep has drawn, with the
        objectives that paused ones are expected to have, see :attr:`expected`.
        """

        values = sorted(self.expected.values())
        count, line = len(values), list[tuple[int, float]]()

        for n in range(1, count + 1):
            weights = [math.comb(count - i, n - 1) for i in range(1, count + 1)]
            mean = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
            line.append((n * self.rules.epochs, mean))

        return line

    def correlations(self) -> list[tuple[int, float, int]]:
        r"""Returns the rungs, Kendall's rank correlation of each with the end over the complete runs,
        and the number of these.
        """

        found = []

        for rung in self.rules.rungs[:-1]:
            pairs = [
                (t.record.values[rung], t.record.value)
                for t in self.complete
                if rung in t.record.values
            ]

            if len(pairs) >= TELLING:
                from scipy.stats import kendalltau  # takes a second

                tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)

                if math.isfinite(tau):
                    found.append((rung, tau, len(pairs)))

        return found

    # Sentences

    def found(self) -> Iterator[str]:
        r"""Yields what the sweep has found, a sentence each."""

        if (best := self.best) is None:
            yield "No run is complete yet."
            return

        value, error = best.record.value or math.nan, self.uncertainty(best)
        shown = f"{value:.4g}" + ("" if error is None else f" ± {error:.1g}")
        over = f", the mean of {n} seeds" if (n := len(best.record.seeds)) > 1 else ""
        text = f"Run {best.record.index} is the best: {self.objective} {shown}{over}"

        if len(self.complete) > 1:
            gap = (self.complete[1].record.value or math.nan) - value
            errors = [self.uncertainty(t) for t in self.complete[:2]]
            text += f", {gap:.2g} below the next, run {self.complete[1].record.index}"

            if all(errors):
                deviation = math.hypot(*(x or 0.0 for x in errors))
                text += f" ({gap / deviation:.1f} standard errors of their difference)"

        yield f"{text}."

        if self.shares:
            name, (share, low, high) = next(iter(self.shares.items()))
            yield (
                f"{name} mattered most: a share of {share:.2f}, with a 90 % interval of {low:.2f} "
                f"to {high:.2f}."
            )

    def cost(self) -> Iterator[str]:
        r"""Yields what the sweep has cost, a sentence each."""

        trials, whole = count_trials([t.record for t in self.trials]), self.rules.epochs
        seconds = sum(trial.seconds for trial in self.trials if not trial.record.source)
        text = f"{self.spent} epochs, which took {format_duration(seconds)} of training"

        if trials:
            share = self.spent / (trials * whole * self.rules.seeds)
            each = f" with {self.rules.seeds} seeds each" * (self.rules.seeds > 1)
            text += f": {share:.0%} of what all {trials} trials would take to the end{each}"

        yield f"{text}."

    def doubts(self) -> Iterator[str]:
        r"""Yields what is doubtful about the result, a sentence each."""

        if (best := self.best) is None:
            return

        for key in self.at_boundary(best):
            yield (
                f"{key} of the best run, {format_value(best.record.trial.params[key])}, is at the "
                "boundary of its range: the optimum may be beyond."
            )

        if len(self.complete) < FEW:
            yield f"Only {len(self.complete)} runs are complete."

        if len({trial.record.config.get("seed") for trial in self.trials}) <= 1:
            yield (
                f"One seed: the first of {len(self.trials)} is flattered by the selection. "
                f"`sda-ray confirm {self.name}` trains the best with other seeds."
            )

        if is_off((best.metrics[-1] if best.metrics else {}).get("sample_std")):
            yield "Samples of the best run are off the data by more than a factor of two."

        failed = sum(trial.record.state == "failed" for trial in self.trials)

        if failed:
            yield f"{failed} runs failed."

        lost = sum(trial.directory is None for trial in self.trials)

        if lost:
            yield f"The directories of {lost} runs are gone or damaged: their curves are incomplete."

    def at_boundary(self, trial: Trial) -> Iterator[str]:
        r"""Yields the numerical parameters of a run that are at a boundary of their range."""

        drawn = trial.record.trial

        for key, domain in drawn.distributions.items():
            low, high = getattr(domain, "low", None), getattr(domain, "high", None)

            if low is None or high is None or low >= high:
                continue

            x = drawn.params[key]

            if domain.log:
                low, high, x = map(math.log, (low, high, x))

            if not EDGE <= (x - low) / (high - low) <= 1 - EDGE:
                yield key


def read_findings(runs: Path, name: str) -> Findings:
    r"""Reads a sweep.

    Raises:
        UserError: If there is no such sweep, it has not begun, or its record is damaged.
    """

    sweep, study = read_sweep(runs, name), read_study(runs, name)
    rules = recorded_rules(sweep)
    records = ranked(study.records())
    paths = {path.id: path for path in RunPath.all(runs)}
    trials = [_trial(r, paths.get(r.run_id), why_stopped(r, records, rules)) for r in records]

    return Findings(name, sweep_directory(runs, name), sweep, rules, trials, importances(records))


def _trial(record: TrialRecord, path: RunPath | None, why: str) -> Trial:
    if path is not None:
        with suppress(UserError, OSError):
            metrics = [x for x in read_metrics(path.metrics) if x["epoch"] <= record.last]
            return Trial(record, path.name, path.directory, metrics, read_record(path), why)

    return Trial(record, record.run_id, None, [], {}, why)


def why_stopped(record: TrialRecord, records: Sequence[TrialRecord], rules: Rules) -> str:
    r"""Returns why a run stopped where it did, or that it has not."""

    rung = record.last

    if record.state == "complete" and record.replica_of:
        return f"another seed of run {record.replica_of}"
    elif record.state == "complete":
        return "brought in" if record.source else "trained to the end"
    elif record.state in ("failed", "diverged"):
        return record.error or record.state
    elif record.state == "stopped":
        return "stopped by hand"
    elif not record.paused:
        return "in progress"
    elif rules.pruner in FINAL:
        return f"stopped at epoch {rung} by the pruner '{rules.pruner}'"

    rank, count = standing(record, rung, records)
    room = len(best_at_rung(rung, records, rules))

    return f"rank {rank} of {count} at epoch {rung}: {room or 'none'} go{'es' * (room == 1)} on"
