r"""Sweeps without Ray and without networks: a formula trains, everything else is real.

What is played here is the executor (who asks the driver for trials and tells it results) and the
trials (who write run directories). Both may die at any moment.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sda_ray.core.lease import Lease, this_host
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import PruneRule, Rules, TrialRecord
from sda_ray.search.reconcile import catch_up
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study
from sda_ray.sweep.driver import Driver

__all__ = ["Crash", "Sweeping", "Training", "diverges", "draw", "fails", "loss", "outcomes"]


class Crash(BaseException):
    r"""Signals the death of the driver."""


def loss(config: dict[str, Any], epoch: int) -> float:
    r"""Returns curves that cross: what is good early is not what is good in the end."""

    x = math.log10(config["learning_rate"])

    curve = (x + 2.5) ** 2 / epoch + abs(math.sin(1e3 * x)) * epoch / 20

    return curve + config.get("seed", 0) / 10


def diverges(config: dict[str, Any], epoch: int) -> bool:
    return config["learning_rate"] > 0.03 and epoch > 100 * (config["learning_rate"] - 0.03)


def fails(config: dict[str, Any], epoch: int) -> bool:
    return epoch == 2 and int(1e6 * config["learning_rate"]) % 7 == 0


def never(config: dict[str, Any], epoch: int) -> bool:
    return False


class Training:
    r"""Creates a trial: the same contract as :class:`sda_ray.cluster.trial.Trial`, on real files."""

    def __init__(self, sweeping: "Sweeping", spec: dict[str, Any]) -> None:
        self.sweeping = sweeping
        self.spec = spec
        path = RunPath.of_id(sweeping.runs, spec["run_id"])
        self.path = path or RunPath(sweeping.runs / f"run-{spec['index']}_{spec['run_id']}")
        self.path.directory.mkdir(exist_ok=True)
        self.checkpoint = self.path.directory / "checkpoint.pth"
        self.opened = False

        held = {"attempt": spec["attempt"], "pid": None, "since": "", **this_host()}
        self.path.lease.write_text(json.dumps(held))
        self.write("running")

    def step(self, count: int) -> dict[str, Any]:
        r"""Trains for some epochs, or to the next rung."""

        config, rungs = self.spec["config"], self.sweeping.rules.rungs
        known = self.lines()
        values = [] if self.opened else list(known.items())
        epoch = int(self.checkpoint.read_text()) if self.checkpoint.exists() else 0
        self.opened = True

        for _ in range(count):
            if epoch == rungs[-1]:
                break

            epoch += 1

            if self.sweeping.diverges(config, epoch):
                return self.end("diverged", values, "exploded")

            if self.sweeping.fails(config, epoch):
                return self.end("failed", values, f"RuntimeError: epoch {epoch}")

            if epoch not in known:
                line = {"epoch": epoch, "loss_valid": loss(config, epoch)}

                with open(self.path.metrics, "a") as file:
                    file.write(json.dumps(line) + "\n")

            values.append((epoch, loss(config, epoch)))
            self.checkpoint.write_text(str(epoch))

            if epoch in rungs[:-1]:
                break

        if epoch == rungs[-1]:
            self.path.state.write_text(repr(loss(config, epoch)))
            return self.end("finished", values) | {"event": "complete", "finals": self.finals()}

        return {"event": "running", "epochs": values, "error": ""}

    def lines(self) -> dict[int, float]:
        r"""Returns the values in the metrics, without a torn last line, which is cut off."""

        if not self.path.metrics.exists():
            return {}

        text = self.path.metrics.read_text()
        self.path.metrics.write_text(text := text[: text.rfind("\n") + 1])

        return {line["epoch"]: line["loss_valid"] for line in map(json.loads, text.splitlines())}

    def finals(self) -> list[float]:
        r"""Returns the values of all objectives: the others are functions of the configuration."""

        rate = self.spec["config"]["learning_rate"]
        last = loss(self.spec["config"], self.sweeping.rules.epochs)

        return [last, *[1 / rate for _ in self.sweeping.objectives[1:]]]

    def end(self, status: str, values: list[Any], error: str = "") -> dict[str, Any]:
        self.write(status, error)

        return {"event": status, "epochs": values, "error": error}

    def write(self, status: str, reason: str = "") -> None:
        others = dict(zip(self.sweeping.objectives[1:], self.finals()[1:], strict=True))
        self.path.record.write_text(json.dumps({"status": status, "reason": reason, **others}))


class Sweeping:
    r"""Creates a sweep in a directory, which may be driven, killed and driven again.

    Arguments:
        directory: Where runs and study are.
        rules: The rules.
        sampler: The sampler.
        diverges: Tells whether a configuration diverges at an epoch.
        fails: Tells whether a configuration fails at an epoch.
        stops: The verdict on a run at a rung, if it is final.
        objectives: What is minimised; those after the first are functions of the configuration.
        space: Gives the values of the keys that vary, for an Optuna trial.
    """

    def __init__(
        self,
        directory: Path,
        rules: Rules,
        sampler: str = "random",
        diverges: Callable[[dict[str, Any], int], bool] = never,
        fails: Callable[[dict[str, Any], int], bool] = never,
        stops: PruneRule | None = None,
        objectives: Sequence[str] = ("loss_valid",),
        space: Callable[[Any], dict[str, Any]] | None = None,
    ) -> None:
        self.runs = directory / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.journal = directory / "study.journal"
        self.rules = rules
        self.sampler = sampler
        self.diverges = diverges
        self.fails = fails
        self.stops = stops
        self.objectives = tuple(objectives)
        self.space = space or draw
        self.appends = 0
        self.promotions: list[tuple[TrialRecord, list[TrialRecord]]] = []

    def drive(
        self,
        slots: int = 1,
        rng: random.Random | None = None,
        crash: int | None = None,
        begin: Callable[[Study], None] = lambda study: None,
    ) -> list[TrialRecord]:
        r"""Drives the sweep to its end and returns its runs.

        Arguments:
            slots: The trials at a time.
            rng: Decides who comes next, who is lost, and when the driver dies; by default the
                oldest trial makes an epoch at a time and nobody dies.
            crash: The number of appends to the journal after which the driver dies.
            begin: Called with the study before anything is decided.

        Raises:
            Crash: If the driver died.
        """

        lease = Lease(self.journal.with_name("lease.json"), "the sweep")

        try:
            study = self.open(lease, crash)
            begin(study)
            self._drive(self.driver(study, slots), rng)
            study.close()

            return study.records()
        finally:
            lease.release()

    def open(self, lease: Lease, crash: int | None = None) -> Study:
        r"""Opens the study as a new driver does, which dies after a number of appends."""

        study = Study(self.journal, "simulated", lease, self.objectives)
        append = study.journal._append

        def count(data: bytes) -> None:
            append(data)
            self.appends += 1

            if self.appends == crash:
                raise Crash

        study.journal._append = count  # type: ignore[method-assign]
        catch_up(study, self.runs, self.rules.rungs)

        return study

    def driver(self, study: Study, slots: int) -> Driver:
        def notify(event: str, record: TrialRecord) -> None:
            if event == "promote" and record.shown is None:
                self.promotions.append((record, study.records()))

        failed = sum(r.state == "failed" for r in study.records())

        return Driver(
            study,
            replace(self.rules, excused=failed),
            self.propose,
            {"config": {"epochs": self.rules.epochs, "seed": 0}},
            lambda: slots,
            notify,
            self.runs.parent / "stop",
            self.stops,
        )

    def propose(self, seen: Sequence[TrialRecord], fixed: dict[str, Any] | None) -> Any:
        more: dict[str, Any] = {}

        if len(self.objectives) > 1:
            more["objectives"] = len(self.objectives)

        return propose(self.space, seen, 0, self.sampler, fixed, **more)

    def _drive(self, driver: Driver, rng: random.Random | None) -> None:
        trials: dict[str, Training] = {}
        open_: list[str] = []  # paused, and not closed yet
        names = map(str, range(10**6))
        step = 0

        while True:
            step += 1
            assert step < 10**5, "the sweep does not end"

            if rng is not None and rng.random() < 0.03:
                raise Crash

            if rng is None or rng.random() < 0.5:
                name = next(names)

                try:
                    spec = driver.suggest(name)
                except StopIteration:
                    if not driver.done:  # asked to stop, by itself
                        raise Crash

                    assert not trials
                    return

                if spec is not None:
                    assert spec["run_id"] not in {t.spec["run_id"] for t in trials.values()}
                    assert spec["index"] not in driver.closing, "its process is at it still"
                    trials[name] = Training(self, spec)
                    continue

            if open_ and rng is not None and rng.random() < 0.5:
                open_.pop()

            if trials:
                name = next(iter(trials)) if rng is None else rng.choice(list(trials))

                if rng is not None and rng.random() < 0.05:
                    del trials[name]
                    driver.lose(name, "killed")
                    continue

                result = trials[name].step(1 if rng is None else rng.randint(1, 3))

                def close(status: str, name: str = name) -> Callable[[], bool]:
                    trials[name].write(status)

                    if rng is not None:
                        open_.append(name)

                    return lambda: name not in open_

                if not driver.report(name, result, close):
                    del trials[name]


def draw(trial: Any) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}


def outcomes(records: list[TrialRecord]) -> Iterator[tuple[Any, ...]]:
    r"""Yields what came of each run, ids apart."""

    for r in records:
        yield r.index, r.config, r.state, r.values, r.shown
