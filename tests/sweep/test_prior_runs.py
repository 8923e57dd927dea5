r"""Tests for sda_ray.sweep.prior_runs: runs are brought in whole, once, and into a live sweep, too."""

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from adopting import SPACE, by_id, bytes_of, elsewhere, record_of, records, runs, sweep

from sda_ray.core.config import load_config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.core.space import loguniform
from sda_ray.runs.inventory import read_entry
from sda_ray.runs.metrics import read_history
from sda_ray.runs.path import RunPath, sweep_directory
from sda_ray.runs.record import read_record
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study
from sda_ray.sweep.definition import Sweep
from sda_ray.sweep.driver import Driver
from sda_ray.sweep.prior_runs import adopt
from sda_ray.sweep.record import read_sweep
from sda_ray.sweep.requests import Desk

__all__ = ["elsewhere", "runs", "sweep"]  # fixtures

# Runs by us


def test_finished_runs_are_brought_in_with_their_curves(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(elsewhere)
    adopt([str(elsewhere)], sweep, runs, data, record_of)
    out = capsys.readouterr().out
    first, second = records(runs, "x")

    assert bytes_of(elsewhere) == before
    assert "seed=7 where the sweep has 0" in out
    assert "it is interrupted, and only finished runs" in out
    assert "2 runs brought in" in out
    assert (first.index, second.index) == (1, 2)

    for number, record in enumerate((first, second), 1):
        source = RunPath(by_id(elsewhere, f"{number}" * 8))
        copy = RunPath(by_id(runs, record.run_id))
        lines = read_history(source.metrics)

        assert record.state == "complete"
        assert record.source == str(source.directory)
        assert record.values == {epoch: line["loss_valid"] for epoch, line in lines.items()}
        assert record.config == {
            key: load_config(source.config)[key] for key in ("learning_rate", "activation")
        }
        assert load_config(copy.config) == load_config(source.config)
        assert read_history(copy.metrics) == lines
        assert {path.name for path in copy.directory.iterdir()} == {
            "config.json",
            "metrics.jsonl",
            "run.json",
        }

        entry = read_entry(copy)
        assert entry is not None
        assert (entry.status, entry.sweep, entry.faults) == ("adopted", "x", ())
        assert entry.loss_valid == record.values[3]
        assert read_record(copy)["origin"]["id"] == f"{number}" * 8


def test_a_second_adoption_changes_nothing(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt([str(elsewhere)], sweep, runs, data, record_of)
    journal = (sweep_directory(runs, "x") / "study.journal").read_bytes()
    before = {path.directory: bytes_of(path.directory) for path in RunPath.all(runs)}
    copy = elsewhere.parent / f"copy-{runs.parent.name}"
    shutil.copytree(elsewhere, copy)

    for words in ([str(elsewhere)], [str(elsewhere), str(copy)]):
        adopt(words, sweep, runs, data, record_of)
        assert "0 runs brought in" in capsys.readouterr().out.replace("\n2 runs", "")

    assert (sweep_directory(runs, "x") / "study.journal").read_bytes() == journal
    assert {path.directory: bytes_of(path.directory) for path in RunPath.all(runs)} == before


def test_runs_of_the_same_directory_are_brought_in(
    elsewhere: Path, sweep: Sweep, data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "all"
    shutil.copytree(elsewhere, runs)
    adopt(["1" * 8, RunPath(by_id(runs, "2" * 8)).name], sweep, runs, data, record_of)

    assert [len(r.values) for r in records(runs, "x")] == [3, 3]

    # The copies are the sweep's own: they are not brought in again, but into another sweep.
    with pytest.raises(UserError, match="covers none of the"):
        adopt(
            [str(by_id(runs, r.run_id)) for r in records(runs, "x")], sweep, runs, data, record_of
        )

    other = replace(sweep, name="y")
    adopt([str(runs)], other, runs, data, record_of)
    assert {r.source for r in records(runs, "y")} == {r.source for r in records(runs, "x")}


@pytest.mark.parametrize("word", ["nothing", "/nowhere/at_all"])
def test_words_that_are_no_run_are_refused(
    sweep: Sweep, runs: Path, data: Path, word: str
) -> None:
    with pytest.raises(UserError, match="there is no run"):
        adopt([word], sweep, runs, data, record_of)

    assert not list(runs.iterdir())


# Kills


KILLED = """
import os, shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
elsewhere, data, root = map(Path, sys.argv[2:])

import optuna, torch
from adopting import SMALL_SWEEP, record_of, records
from sda_ray.sweep.prior_runs import adopt
from sda_ray.runs.path import RunPath
from sda_ray.runs.inventory import read_entry

os.fsync = lambda handle: None  # only a power cut would miss it
left = 0

def counted(event, args):
    r"Dies before the n-th change of a file."
    global left

    if event in ("os.rename", "os.mkdir", "os.remove") or (event == "open" and args[2] & 3):
        left -= 1

        if left == 0:
            os._exit(9)

def child(n):
    global left
    left = n
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(counted)
    adopt([str(elsewhere)], SMALL_SWEEP, runs, data, record_of)
    os._exit(0)

n, code = 0, 9

while code == 9:
    n += 1
    runs = root / str(n)
    runs.mkdir()
    pid = os.fork()

    if pid == 0:
        try:
            child(n)
        finally:
            os._exit(1)

    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    for path in RunPath.all(runs):
        assert not read_entry(path).faults, (n, path)

    adopt([str(elsewhere)], SMALL_SWEEP, runs, data, record_of)
    found = records(runs, "x")
    assert len(found) == 2 and {r.index for r in found} == {1, 2}, n
    assert {r.run_id for r in found} == {p.id for p in RunPath.all(runs)}, n
    assert not list(runs.glob(".*")), n
    shutil.rmtree(runs)

assert code == 0, code
print("kills:", n - 1)
"""


def test_killed_before_any_change_leaves_nothing_half(
    elsewhere: Path, data: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    here = str(Path(__file__).parents[1])
    words = [sys.executable, "-c", KILLED, here, str(elsewhere), str(data), str(tmp_path)]
    run = subprocess.run(words, env=env, capture_output=True, text=True)

    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    assert int(run.stdout.split("kills:")[1]) > 20


# Sweeps


def test_definition_that_differs_is_refused(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    adopt([str(elsewhere)], sweep, runs, data, record_of)
    journal = (sweep_directory(runs, "x") / "study.journal").read_bytes()

    with pytest.raises(UserError, match="exists and differs"):
        adopt([str(elsewhere)], replace(sweep, seed=1), runs, data, record_of)

    wider = replace(sweep, space=SPACE | {"learning_rate": loguniform(1e-5, 1e-1)}, trials=99)
    adopt([str(elsewhere)], wider, runs, data, record_of)
    found = read_sweep(runs, "x")

    assert found["definition"]["space"]["learning_rate"]["range"] == [1e-5, 1e-1]
    assert found["trials"] == sweep.trials
    assert (sweep_directory(runs, "x") / "study.journal").read_bytes() == journal


def test_driver_of_a_live_sweep_takes_them_in(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    directory = sweep_directory(runs, "x")
    adopt([str(by_id(elsewhere, "1" * 8))], sweep, runs, data, record_of)
    lease = Lease(directory / "lease.json", "x")
    study = Study(directory / "study.journal", "x", lease)
    driver = Driver(
        study,
        sweep.rules,
        lambda seen, fixed: propose(sweep.draw, seen, fixed=fixed),
        {"config": sweep.config, "runs": str(runs)},
        lambda: 0,
        lambda event, record: None,
        directory / "stop",
    )
    desk, over = Desk(driver), threading.Event()

    def serve() -> None:
        while not over.wait(0.01):
            desk()

    thread = threading.Thread(target=serve)
    thread.start()

    try:
        adopt([str(elsewhere)], sweep, runs, data, record_of)
        wider = replace(sweep, space=SPACE | {"learning_rate": loguniform(1e-5, 1e-1)})

        with pytest.raises(UserError, match="is running, with a SPACE that is not as wide"):
            adopt([str(elsewhere)], wider, runs, data, record_of)
    finally:
        over.set()
        thread.join()
        lease.release()

    assert [r.index for r in study.records()] == [1, 2]
    assert {r.run_id for r in records(runs, "x")} == {path.id for path in RunPath.all(runs)}
