r"""A sweep that is driven by single steps, in which anything may die, vanish or be asked for."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated import Crash, Sweeping, Training, diverges, loss

from sda_ray.core.lease import Lease, read_holder
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import Rules, TrialRecord, decide
from sda_ray.search.reconcile import read_directories, reconcile
from sda_ray.search.study import Study

__all__ = ["Ordeal"]


def fails(config: dict[str, Any], epoch: int) -> bool:
    return epoch == 2 and int(1e6 * config["learning_rate"]) % 3 == 0


class Ordeal(RuleBasedStateMachine):
    r"""Drives a sweep by single steps, in which anything may die, vanish or be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.names = map(str, range(10**6))
        self.dead = True  # the driver
        self.asked = 0  # how many runs more than the target there may be
        self.known: dict[str, TrialRecord] = {}

    @initialize(
        wanted=st.integers(1, 8),
        slots=st.integers(1, 3),
        finalists=st.integers(0, 2),
        kind=st.sampled_from(["promotion", "none", "final", "several"]),
        seeds=st.sampled_from([1, 1, 2, 3]),
    )
    def begin(self, wanted: int, slots: int, finalists: int, kind: str, seeds: int = 1) -> None:
        pruner = {"final": "median", "several": "none"}.get(kind, kind)
        first = None if pruner == "none" else 1
        self.slots = slots
        self.sweeping = Sweeping(
            self.directory / "sweep",
            Rules(wanted, 9, first, 3, finalists, pruner=pruner, seeds=seeds),
            diverges=diverges,
            fails=fails,
            stops=(lambda record, records: record.index % 3 == 0) if kind == "final" else None,
            objectives=("loss_valid", "parameters")[: 1 + (kind == "several")],
        )
        self.start(None)

    # The driver

    @precondition(lambda self: self.dead)
    @rule(crash=st.none() | st.integers(1, 20))
    def start(self, crash: int | None) -> None:
        self.trials: dict[str, Training] = {}  # those of a dead driver end with its leases
        self.open: list[str] = []
        self.lease = Lease(self.directory / "sweep" / "lease.json", "the sweep", takeover=True)
        self.dead = False

        with self.mortal():
            self._foresee()
            at = None if crash is None else self.sweeping.appends + crash
            self.study = self.sweeping.open(self.lease, at)
            self.driver = self.sweeping.driver(self.study, self.slots)

            seen = self.study.records()
            again = read_directories(seen, self.sweeping.runs, self.study.objectives)
            now, rungs = {record.run_id: record for record in seen}, self.sweeping.rules.rungs
            assert all(
                reconcile(now[id], found, rungs) == (now[id], "") for id, found in again.items()
            )

            action = decide(seen, (), self.driver.rules, stops=self.driver.stops)
            assert (action.kind, action.until) == self.foreseen

    def _foresee(self) -> None:
        r"""Notes what the pure function says will come first, before anything is written."""

        study = Study(self.sweeping.journal, "simulated", self.lease, self.sweeping.objectives)
        seen, rules = study.records(), self.sweeping.rules
        failed = sum(r.state == "failed" for r in seen)
        found = read_directories(seen, self.sweeping.runs, study.objectives)
        rules = replace(rules, excused=failed)
        seen = [
            reconcile(r, found[r.run_id], rules.rungs)[0] if r.run_id in found else r for r in seen
        ]
        action = decide(seen, (), rules, stops=self.sweeping.stops)
        self.foreseen = action.kind, action.until

    @contextmanager
    def mortal(self) -> Iterator[None]:
        try:
            yield
        except Crash:
            self.die()

    @precondition(lambda self: not self.dead)
    @rule()
    def die(self) -> None:
        self.dead = True
        self.lease.release()

    @precondition(lambda self: not self.dead)
    @rule()
    def suggest(self) -> None:
        name = next(self.names)

        with self.mortal():
            try:
                spec = self.driver.suggest(name)
            except StopIteration:
                if self.driver.done:
                    assert not self.trials
                    self.study.close()

                return self.die()

            if spec is not None:
                assert spec["run_id"] not in {t.spec["run_id"] for t in self.trials.values()}
                assert spec["index"] not in self.driver.closing, "its process is at it still"
                self.trials[name] = Training(self.sweeping, spec)

    # Trials

    @precondition(lambda self: self.trials)
    @rule(i=st.integers(0, 9), count=st.integers(1, 9), told=st.integers(0, 5))
    def train(self, i: int, count: int, told: int) -> None:
        name = list(self.trials)[i % len(self.trials)]
        trial = self.trials[name]
        result = trial.step(count)

        if self.dead:  # it does not know yet
            if result["event"] != "running":
                del self.trials[name]
        elif told:
            with self.mortal():
                if not self.driver.report(name, result, self._closing(name, trial)):
                    del self.trials[name]
        else:
            self._lose(name)

    def _closing(self, name: str, trial: Training) -> Callable[[str], Callable[[], bool]]:
        def close(status: str) -> Callable[[], bool]:
            self.open.append(name)
            trial.write(status)

            return lambda: name not in self.open

        return close

    @precondition(lambda self: self.trials and not self.dead)
    @rule(i=st.integers(0, 9))
    def lose(self, i: int) -> None:
        self._lose(list(self.trials)[i % len(self.trials)])

    def _lose(self, name: str) -> None:
        del self.trials[name]

        with self.mortal():
            self.driver.lose(name, "killed")

    @precondition(lambda self: self.open)
    @rule()
    def let_go(self) -> None:
        self.open.pop()

    # Wishes

    @precondition(lambda self: not self.dead)
    @rule(i=st.integers(0, 9), told=st.booleans())
    def stop_one(self, i: int, told: bool) -> None:
        seen = [r for r in self.study.records() if r.state == "running"]
        names = {t.spec["index"]: name for name, t in self.trials.items()}

        if seen and (record := seen[i % len(seen)]).index not in self.driver.closing:
            if name := names.get(record.index):
                self.trials.pop(name).write("stopped")
                self.driver.live.pop(name)

            with self.mortal():
                if not told and name:
                    raise Crash

                self.study.tell(record, "stopped")

    @precondition(lambda self: not self.dead)
    @rule(rate=st.sampled_from([1e-3, 2e-3, 5e-2]))
    def enqueue(self, rate: float) -> None:
        with self.mortal():
            self.study.enqueue({"learning_rate": rate})

    @precondition(lambda self: not self.dead)
    @rule(rate=st.sampled_from([1e-4, 1e-3]))
    def bring(self, rate: float) -> None:
        seen = self.study.records()
        drawn = self.sweeping.propose(seen, {"learning_rate": rate})

        if drawn is not None:
            index, values = 1 + len(seen), {e: loss(drawn[0], e) for e in range(1, 10)}
            finals = (values[9], *[1 / rate for _ in self.study.objectives[1:]])
            brought = TrialRecord(
                index,
                f"prior{index:03}",
                "complete",
                9,
                9,
                values,
                config=drawn[0],
                source="elsewhere",
                finals=finals,
            )

            with self.mortal():
                self.study.add(brought, drawn[1])

    @precondition(lambda self: not self.dead)
    @rule()
    def retry(self) -> None:
        with self.mortal():
            for record in self.study.records():
                if record.state == "failed":
                    self.asked += 1
                    self.study.start(record, record.until, record.shown)

    @precondition(lambda self: self.dead)
    @rule(more=st.integers(1, 3))
    def extend(self, more: int) -> None:
        target = min(self.sweeping.rules.target + more, 16)
        self.sweeping.rules = replace(self.sweeping.rules, target=target)

    # Files

    @precondition(lambda self: self.dead)
    @rule(i=st.integers(0, 99), how=st.sampled_from(["gone", "json", "torn", "behind", "running"]))
    def damage(self, i: int, how: str) -> None:
        paths = list(RunPath.all(self.sweeping.runs))

        if not paths:
            return

        path = paths[i % len(paths)]

        if how == "gone":
            shutil.rmtree(path.directory)
            self._forget_attempts()
            self.trials = {n: t for n, t in self.trials.items() if t.path.id != path.id}
        elif how == "json":
            path.record.write_text('{"status": ')
        elif how == "running":
            path.record.write_text('{"status": "running"}')
        elif path.metrics.exists():
            lines = path.metrics.read_text().splitlines(keepends=True)

            if how == "torn":
                lines.append('{"epoch": 1, "lo')
            else:  # an older copy: a line is on the disk before the checkpoint of its epoch
                lines = lines[: len(lines) // 2]
                path.checkpoint.write_text(str(len(lines)))

            path.metrics.write_text("".join(lines))

    @precondition(lambda self: self.dead)
    @rule(torn=st.binary(min_size=1, max_size=9).filter(lambda x: b"\n" not in x))
    def tear(self, torn: bytes) -> None:
        with open(self.sweeping.journal, "ab") as file:
            file.write(torn)

    @precondition(lambda self: self.dead)
    @rule(count=st.integers(1, 6))
    def go_back(self, count: int) -> None:
        r"""Takes the journal back, as a copy of it may be, though not so far that runs are lost."""

        lines = self.sweeping.journal.read_bytes().splitlines(keepends=True)

        while count and lines and lines[-1].endswith(b"\n"):
            if json.loads(lines[-1])["op_code"] not in (6, 7, 8):
                break

            del lines[-1]
            count -= 1

        self.sweeping.journal.write_bytes(b"".join(lines))
        self.known = {id: replace(r, until=0, values={}) for id, r in self.known.items()}
        self.known = {id: replace(r, state="running") for id, r in self.known.items()}
        self._forget_attempts()

    def _forget_attempts(self) -> None:
        r"""Forgets the numbers that the journal alone has: nothing has them, if it goes back."""

        there = {p.id: read_holder(p.lease) or {} for p in RunPath.all(self.sweeping.runs)}
        begun = {id: there.get(id, {}).get("attempt", 0) for id in self.known}
        self.known = {
            id: replace(r, attempt=min(r.attempt, begun[id])) for id, r in self.known.items()
        }
