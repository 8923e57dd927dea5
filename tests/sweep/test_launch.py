r"""Tests for sda_ray.sweep.launch: whole sweeps with Ray, resumed, extended, killed, side by side."""

import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
from scene import GRID, SCRIPT, Place, lines, place

from sda_ray.cli import table
from sda_ray.cli.main import main
from sda_ray.cli.options import Args
from sda_ray.cli.results import _paths
from sda_ray.core.config import load_config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import is_alive, read_holder
from sda_ray.runs.metrics import read_history
from sda_ray.runs.path import RunPath
from sda_ray.runs.record import read_record
from sda_ray.search.promotion import TrialRecord, count_trials
from sda_ray.search.study import Study
from sda_ray.sweep.definition import load_script
from sda_ray.sweep.launch import _resume_command, launch_sweep
from sda_ray.sweep.record import Options, compare, load_record, write_sweep

__all__ = ["place"]  # fixtures


@pytest.fixture(scope="module")
def finished(place: Place) -> str:
    r"""The output of a sweep of 8 trials from its script."""

    return place.run("tiny.py", "--parallel", "2")


def check_whole(place: Place, name: str, trials: int) -> list[TrialRecord]:
    r"""Checks that no run of a finished sweep is lost, twice or left."""

    records = place.records(name)
    directories = {
        path.id
        for path in RunPath.all(place.runs)
        if json.loads(path.record.read_text()).get("sweep") == name
    }

    assert [r.index for r in records] == list(range(1, trials + 1))
    assert {r.run_id for r in records} == directories
    assert len({str(r.config) for r in records}) == trials
    assert {r.state for r in records} == {"complete", "pruned"}

    for r in records:
        path = place.path(r)
        record = json.loads(path.record.read_text())
        assert lines(path) == list(range(1, r.last + 1)) == sorted(r.values)
        assert (record["trial"], path.name.rpartition("-")[2]) == (r.index, str(r.index))
        assert load_config(path.config)["learning_rate"] == r.config["learning_rate"]
        assert path.state.exists() == (r.state == "complete")
        assert record["status"] == {"complete": "finished", "pruned": "paused"}[r.state]
        assert not is_alive(path.lease)

    return records


def test_sweep_ends_with_all_runs_complete_or_pruned(place: Place, finished: str) -> None:
    records = check_whole(place, "tiny", 8)

    assert any(r.state == "complete" for r in records)
    assert any(r.state == "pruned" for r in records)
    assert all(r.last in (1, 3, 9) for r in records)
    assert "8 trials, rungs at epochs 1, 3, 9" in finished
    assert "Leaderboard of tiny" in finished
    assert "Best configuration: learning_rate=" in finished


@pytest.mark.parametrize("kept", ["nothing", "all but the first", "the first half"])
def test_runs_that_the_journal_has_lost_are_restored(
    place: Place, finished: str, tmp_path: Path, kept: str
) -> None:
    shutil.copytree(place.runs, tmp_path / "runs")
    journal = tmp_path / "runs" / "sweeps" / "tiny" / "study.journal"
    lines = journal.read_text().splitlines(keepends=True)

    def outcome() -> list[Any]:
        records = Study(journal, "tiny", None).records()
        return [
            (r.index, r.run_id, r.config, r.state, r.values, r.trial.params, r.trial.distributions)
            for r in records
        ]

    before = outcome()

    if kept == "nothing":
        journal.unlink()
    else:
        left = lines[1:] if kept == "all but the first" else lines[: len(lines) // 2]
        journal.write_text("".join(left))

    out = place.run("sweep", "tiny", f"--root={tmp_path}", f"--data={place.root / 'data'}")
    lost = re.search(r"study.journal had lost (\d) runs: they are restored", out)

    assert lost is not None and (int(lost[1]) < 8) == (kept == "the first half")
    assert outcome() == before


def test_a_sweep_whose_runs_cannot_be_restored_is_refused(
    place: Place, finished: str, tmp_path: Path
) -> None:
    shutil.copytree(place.runs, tmp_path / "runs")
    directory = tmp_path / "runs" / "sweeps" / "tiny"
    words = ("sweep", "tiny", f"--root={tmp_path}", f"--data={place.root / 'data'}")
    (directory / "study.journal").unlink()

    for file in tmp_path.glob("runs/*_????????/config.json"):
        file.write_text("{}")

    for _ in range(2):  # it is not forgotten
        out = place.run(*words, code=2)
        assert "study.journal has lost its runs" in out and "config.json" in out
        assert f"or remove {directory} to begin the sweep anew" in out


def test_complete_runs_have_whole_fragments_for_wandb(place: Place, finished: str) -> None:
    for record in place.records("tiny"):
        fragments = list(place.path(record).directory.glob("wandb/offline-run-*/*.wandb"))
        assert fragments
        assert all(fragment.stat().st_size > 1000 for fragment in fragments)


def test_sweep_leaves_nothing_outside_its_root(place: Place, finished: str) -> None:
    assert not [p for p in (place.root / "tmp").iterdir() if p.name.startswith("sda-ray-")]
    assert not (place.root / "home" / ".ray").exists()
    assert not (place.root / "home" / "ray_results").exists()


def test_finished_sweep_run_again_changes_nothing(place: Place, finished: str) -> None:
    journal = (place.runs / "sweeps" / "tiny" / "study.journal").read_bytes()
    out = place.run("sweep", "tiny")

    assert "resumed: 8 runs so far, 0 of them in progress" in out
    assert "Leaderboard of tiny" in out
    assert (place.runs / "sweeps" / "tiny" / "study.journal").read_bytes() == journal


def test_what_is_queued_in_a_finished_sweep_waits_for_more_trials(
    place: Place, finished: str
) -> None:
    out = place.run("sweep", "tiny", "--enqueue", "learning_rate=2e-3")

    assert (
        "The sweep has room for 0 more of its 8 trials and 1 are queued: raise --trials to try "
        "them all."
    ) in out


def test_complete_run_has_the_bits_of_a_training_alone(place: Place, finished: str) -> None:
    best = min((r for r in place.records("tiny") if r.state == "complete"), key=lambda r: r.last)

    assert place.same_as_alone(best)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny.py", "epochs=18"], "CONFIG['epochs'] was 9 and is 18"),
        (["tiny.py", "--fix", "activation=SiLU"], "SPACE['activation'] was "),
        (["other.py"], "seed was 0 and is 1"),
        (["other.py"], "SPACE['weight_decay'] was "),
        (["tiny.py", "--data", "other"], "the data was "),
        (["tiny.py", "--cpus-per-trial", "64"], "a trial wants CPU=64, but this machine has CPU="),
        (["tiny", "epochs=18"], "resumes as it was started"),
    ],
)
def test_sweep_that_differs_from_its_record_is_refused(
    place: Place,
    finished: str,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = SCRIPT.replace("trials=8", "trials=8, seed=1")
    changed = changed.replace('"learning_rate": loguniform', '"weight_decay": loguniform')
    (place.root / "other.py").write_text(changed)

    if "other" in words and not (place.root / "other").exists():
        shutil.copytree(place.root / "data", place.root / "other")
        shutil.copy(place.root / "data" / "test.h5", place.root / "other" / "valid.h5")

    before = {f: f.stat().st_mtime_ns for f in place.runs.rglob("*")}
    monkeypatch.chdir(place.root)

    with pytest.raises(SystemExit) as exit:
        main(argv=["sweep", *words])

    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in place.runs.rglob("*")} == before


def test_killed_and_extended_sweep_loses_nothing(
    place: Place, finished: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {r.run_id: r for r in place.records("tiny")}
    journal = place.runs / "sweeps" / "tiny" / "study.journal"
    words = ["sweep", "tiny", "--trials", "14", "--root", str(place.root), "--parallel", "2"]
    elsewhere = place.root / "tmp"

    def grow(size: int) -> None:
        size += journal.stat().st_size
        place.wait(lambda: journal.stat().st_size > size)

    # The driver is killed, after a few words or many
    for size in (500, 3000):
        driver = place.start(*words, cwd=elsewhere)
        grow(size)

        with pytest.raises(SystemExit):  # a second driver
            main(argv=["sweep", "tiny", "--root", str(place.root)])

        said = capsys.readouterr().err
        assert f"sweep 'tiny' is in use by process {driver.pid} on " in said
        assert " since " in said

        driver.kill()
        out, _ = driver.communicate()
        assert "Traceback" not in out

    place.run("tiny.py", "--trials", "14")
    records = check_whole(place, "tiny", 14)

    for record in records:
        old = before.get(record.run_id)
        assert old is None or (record.config == old.config and record.last >= old.last)

    complete = [r for r in records if r.state == "complete" and r.attempt > 1]
    assert all(place.same_as_alone(r) for r in complete[-2:])


def test_sweep_in_a_bucket_is_not_driven_without_what_copies_it(place: Place) -> None:
    r"""As if the driver that was to take a request up had ended just before."""

    runs = place.root / "other"
    options = Options(place.root, runs, place.root / "data", bucket="s3://lab-bucket/runs")

    with pytest.raises(UserError, match=r"has just ended.*with a copy in s3://lab-bucket/runs"):
        launch_sweep(load_script(place.root / "tiny.py"), options, table)

    directory = runs / "sweeps" / "tiny"
    assert (read_holder(directory / "lease.json") or {"pid": 1})["pid"] is None
    assert not (directory / "study.journal").exists()


def test_two_sweeps_of_one_script_side_by_side_and_divergence(place: Place) -> None:
    (place.root / "grid.py").write_text(GRID)
    sweeps = [
        place.start("grid.py", "--name", name, "--trials", "2", "--wandb=disabled", f"seed={i}")
        for i, name in enumerate(("one", "two"))
    ]
    outs = [sweep.communicate(timeout=180)[0] for sweep in sweeps]

    for sweep, name, out in zip(sweeps, ("one", "two"), outs, strict=True):
        assert sweep.returncode == 0, out
        good, gone = sorted(place.records(name), key=lambda r: r.config["learning_rate"])
        assert (gone.state, gone.attempt, gone.config["learning_rate"]) == ("diverged", 1, 100.0)
        assert gone.trial.state.name == "PRUNED"
        assert re.match(r"loss_\w+ is ", gone.error)
        assert good.state == "complete"
        assert json.loads(place.path(gone).record.read_text())["status"] == "diverged"
        assert "Best configuration: learning_rate=0.001" in out


def test_replicas_differ_in_the_seed_alone(place: Place) -> None:
    words = ["window=3", "embedding=8", "hidden_channels=8,16", "hidden_blocks=1,1", "epochs=2"]
    place.run("train", "--replicas", "3", *words, "seed=5", "--wandb=disabled")
    records = place.records("replicas-1")

    assert {r.state for r in records} == {"complete"}
    assert sorted(r.config["seed"] for r in records) == [5, 6, 7]
    assert {len(r.config) for r in records} == {1}
    assert place.same_as_alone(records[1])

    # The same command shows them again
    words += ["seed=5", "--wandb=disabled"]
    out = place.run("train", "--replicas", "3", *words)
    assert "replicas-1 has the same settings and data" in out
    place.run("train", "--replicas", "1", *words)
    assert len(place.records("replicas-1")) == 3 and len(place.records("replicas-2")) == 1


def test_killed_confirmation_ends_with_fresh_seeds_and_the_same_table(place: Place) -> None:
    place.run("sweep", "tiny.py", "--name=pair", "--trials=2", "--finalists=2", "epochs=3")
    words = ("confirm", "pair", "--seeds=2", "epochs=4", "--parallel=1")
    driver = place.start(*words)
    study = place.runs / "sweeps" / "pair-confirm" / "study.journal"
    place.wait(lambda: study.exists() and len(place.records("pair-confirm")) == 2)
    driver.kill()
    driver.communicate()

    out = place.run(*words)
    tables = [x.partition("Confirmation of pair")[2] for x in (out, place.run(*words))]
    records = place.records("pair-confirm")
    configs = [load_config(place.path(r).config) for r in records]

    assert "The winner of the sweep is " in out and tables[0] == tables[1]
    assert {r.state for r in records} == {"complete"} and len(records) == 4
    assert sorted(c["seed"] for c in configs) == [1, 1, 2, 2]
    assert {(c["valid_seed"], c["epochs"]) for c in configs} == {(1, 4)}
    assert place.same_as_alone(records[1])
    assert "Confirmation of pair" in place.run("sweep", "pair-confirm")
    out = place.run(*words, "--json")
    assert json.loads(out[out.index("\n{\n") :])["seeds"] == [1, 2]


def test_killed_sweep_judges_what_reaches_the_end_by_all_seeds(place: Place) -> None:
    words = ("tiny.py", "--name=seeds", "--trials=4", "epochs=3")
    driver = place.start(*words, "--seeds=2", "--parallel=2")
    study = place.runs / "sweeps" / "seeds" / "study.journal"
    place.wait(lambda: study.exists() and any(r.replica_of for r in place.records("seeds")))
    driver.kill()
    driver.communicate()

    place.run("sweep", "seeds")
    out = place.run("sweep", "seeds", "--seeds=3")  # more of them later
    assert "seeds was 2 and is 3" in out and "the value is their mean" in out

    def outcome() -> list[Any]:
        records = place.records("seeds")
        return [(r.run_id, r.config, r.replica_of, r.state, r.values) for r in records]

    records, before = place.records("seeds"), outcome()
    firsts = [r for r in records if r.state == "complete" and not r.replica_of]
    replicas = [r for r in records if r.replica_of]
    rates = {r.index: r.config["learning_rate"] for r in records}
    assert firsts and count_trials(records) == 4
    assert sorted((r.replica_of, r.config["seed"]) for r in replicas) == [
        (r.index, seed) for r in firsts for seed in (1, 2)
    ]
    assert {r.state for r in replicas} == {"complete"}
    assert all(rates[r.index] == rates[r.replica_of] for r in replicas)
    assert place.same_as_alone(replicas[0])

    study.unlink()
    place.run("sweep", "seeds")
    assert outcome() == before


def test_killed_worker_and_stopped_driver_cost_no_bit(place: Place) -> None:
    words = ["tiny.py", "--name", "long", "--trials", "1", "epochs=150", "--parallel", "1"]
    start = time.monotonic()
    driver = place.start("sweep", *words)

    def at_work() -> RunPath | None:
        for path in RunPath.all(place.runs):
            record = json.loads(path.record.read_text()) if path.record.exists() else {}

            if record.get("sweep") == "long" and path.metrics.exists() and len(lines(path)) > 10:
                return path

        return None

    path = place.wait(at_work)
    took = time.monotonic() - start  # more on a busy machine, as does the end
    worker = read_holder(path.lease)
    assert worker is not None
    os.kill(worker["pid"], signal.SIGKILL)
    place.wait(lambda: (read_holder(path.lease) or worker)["attempt"] == 2)
    done = len(lines(path))
    place.wait(lambda: len(lines(path)) > done + 5)

    driver.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, out
    assert "Traceback" not in out
    assert "is lost" in out
    assert time.monotonic() - start < max(15, took)
    assert json.loads(path.record.read_text())["status"] == "interrupted"
    assert len(lines(path)) < 150

    assert "resume with `sda-ray sweep long`" in out

    place.run("sweep", "long")
    (record,) = place.records("long")
    assert (record.state, record.attempt) == ("complete", 3)
    assert lines(path) == list(range(1, 151))
    assert place.same_as_alone(record)


def test_bug_in_all_runs_stops_the_sweep_until_it_is_mended(place: Place) -> None:
    shutil.copytree(place.root / "data", place.root / "broken")
    valid = place.root / "broken" / "valid.h5"
    driver = place.start("sweep", "tiny.py", "--name", "broken", "--data", "broken", "epochs=1")
    place.wait(lambda: (place.runs / "sweeps" / "broken" / "study.journal").exists())
    valid.rename(place.root / "kept.h5")  # every check has passed by now
    out, _ = driver.communicate(timeout=120)

    assert driver.returncode == 2, out
    assert "runs failed alike, so the sweep stops: " in out
    assert "valid.h5" in out
    assert "resume with `sda-ray sweep broken`" in out
    assert "Traceback" not in out

    failed = [r for r in place.records("broken") if r.state == "failed"]
    assert len(failed) >= 3
    assert all("Traceback" in place.path(r).error.read_text() for r in failed)

    (place.root / "kept.h5").rename(valid)
    place.run("sweep", "broken", "--trials", "3")
    records = place.records("broken")
    assert sum(r.state == "complete" for r in records) == 3
    assert sum(r.state == "failed" for r in records) == len(failed)


def test_run_whose_directory_vanishes_fails_and_the_sweep_goes_on(place: Place) -> None:
    script = GRID.replace("choice(100.0, 1e-3)", "choice(2e-3, 1e-3)")
    (place.root / "gone.py").write_text(script.replace('"epochs": 9', '"epochs": 60'))
    words = ("sweep", "gone.py", "--name=gone", "--wandb=disabled", "--parallel=1")
    before = set(RunPath.all(place.runs))
    process = place.start(*words)

    def begun() -> list[RunPath]:
        new = set(RunPath.all(place.runs)) - before
        return [path for path in new if path.metrics.exists()]

    (path,) = place.wait(begun)

    while path.directory.exists():  # the run writes meanwhile
        shutil.rmtree(path.directory, ignore_errors=True)

    out, _ = process.communicate(timeout=120)

    assert process.returncode == 0, out
    assert "Traceback" not in out and not path.directory.exists()
    first, *rest = place.records("gone")
    assert first.state == "failed" and "was deleted or unmounted" in first.error
    assert rest and {record.state for record in rest} == {"complete"}


def test_data_that_are_replaced_stop_the_sweep_until_they_are_back(place: Place) -> None:
    words = ["tiny.py", "--name", "swap", "--trials", "2", "epochs=60", "--parallel", "1"]
    file, aside = place.root / "data" / "train.h5", place.root / "train.h5"
    driver = place.start("sweep", *words)

    def begun() -> list[RunPath]:
        paths = [x for x in RunPath.all(place.runs) if x.record.exists() and x.metrics.exists()]
        return [x for x in paths if json.loads(x.record.read_text()).get("sweep") == "swap"]

    place.wait(begun)
    shutil.copy(file, other := place.root / "other.h5")

    with h5py.File(other, "r+") as f:
        f["x"][...] *= 2

    file.rename(aside)
    other.rename(file)
    out, _ = driver.communicate(timeout=120)
    assert "Stopped, since the data in" in out and "Put them back. Nothing is lost" in out, out
    assert sum(bool(lines(x)) for x in begun()) == 1

    aside.rename(file)
    place.run("sweep", *words)
    assert {r.state for r in place.records("swap")} <= {"complete", "pruned"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_interrupt_while_ray_starts_is_clean(place: Place, number: int) -> None:
    name = f"early-{number}"
    driver = place.start("sweep", "tiny.py", "--name", name)
    assert driver.stdout is not None

    for line in driver.stdout:
        if "rungs at epochs" in line:
            break

    time.sleep(0.3)
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=60)

    assert driver.returncode == 128 + number, out
    assert "Traceback" not in out
    assert f"resume with `sda-ray sweep {name}`" in out
    assert place.records(name) == []


def test_command_that_carries_on_has_all_that_matters(tmp_path: Path) -> None:
    root = Path.cwd()
    options = Options(root, root / "runs", root / "data")
    assert _resume_command("x", options) == "sda-ray sweep x"
    elsewhere = replace(options, bucket="s3://bucket/x", address="auto")
    assert _resume_command("x", elsewhere) == "sda-ray sweep x --runs s3://bucket/x --address auto"
    assert _resume_command("x", replace(options, job="7", address="auto")) == "sda-ray sweep x"
    elsewhere = Options(tmp_path, tmp_path / "runs", tmp_path / "data")
    assert _resume_command("x", elsewhere) == f"sda-ray sweep x --root {tmp_path}"


OBJECTS = """
import optuna
from sda_ray import CONFIG, Sweep, loguniform

sweep = Sweep(
    "objects",
    CONFIG,
    {"learning_rate": loguniform(1e-5, 1e-2)},
    sampler=lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=4),
    pruner=optuna.pruners.MedianPruner(n_warmup_steps=2),
)
"""


def test_sweep_with_a_sampler_and_a_pruner_of_its_own_is_resumed_by_its_script(
    tmp_path: Path,
) -> None:
    script, directory = tmp_path / "objects.py", tmp_path / "sweeps" / "objects"
    script.write_text(OBJECTS)
    directory.mkdir(parents=True)
    sweep = load_script(script).check()
    definition = sweep.definition()
    content = {"name": "objects", "trials": 16, "definition": definition}
    write_sweep(directory, content | {"fingerprint": "", "options": {}}, script)
    again, _ = load_record(tmp_path, "objects")

    assert definition["sampler"].startswith("TPESampler(n_startup_trials=4")
    assert definition["pruner"].startswith("MedianPruner(n_startup_trials=5, n_warmup_steps=2")
    assert again.definition() == definition
    assert again.propose([])[0] == sweep.propose([])[0]
    assert again.stops() is not None

    script.write_text(OBJECTS.replace("trials=4", "trials=5"))
    now = content | {"definition": load_script(script).check().definition(), "fingerprint": ""}
    (refused,) = compare(content | {"fingerprint": ""}, now).refused
    assert refused.startswith("sampler was")


def test_sweep_whose_runs_are_deleted_ends_with_one_line(place: Place) -> None:
    runs = place.root / "deleted"
    (place.root / "long.py").write_text(SCRIPT.replace('"epochs": 9', '"epochs": 600'))
    words = ("sweep", "long.py", "--wandb=disabled", "--parallel=1", "--runs", str(runs))
    process = place.start(*words)
    place.wait(lambda: list(runs.glob("*_*/metrics.jsonl")))

    for _ in range(100):  # the run writes meanwhile
        shutil.rmtree(runs, ignore_errors=True)

    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "Traceback" not in out, out
    assert not runs.exists()
    last = out.splitlines()[-1]
    assert last.startswith(f"sda-ray: {runs}/sweeps/tiny was deleted or unmounted while"), out
    assert out.count(f"{runs}/sweeps/tiny was deleted or unmounted") == 1, out


def test_runs_of_any_window_and_alpha_are_compared_by_denoising(place: Place) -> None:
    script = SCRIPT.replace('"tiny"', '"apart"').replace("trials=8", 'objectives=("denoising",)')
    script = script.replace(
        "SPACE = {", 'SPACE = {"window": choice(3, 5), "alpha": choice("cos", "lin"),'
    )
    (place.root / "apart.py").write_text(script.replace('"epochs": 9', '"epochs": 18'))

    def histories() -> dict[str, dict[int, Any]]:
        return {
            path.id: read_history(path.metrics)
            for path in RunPath.all(place.runs)
            if path.metrics.exists() and read_record(path).get("sweep") == "apart"
        }

    driver = place.start("apart.py", "--trials", "9", "--parallel", "1")
    place.wait(lambda: any(len(lines) > 8 for lines in histories().values()))
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, out
    before = {r.run_id: r.values for r in place.records("apart")}

    out = place.run("sweep", "apart")
    records, found = check_whole(place, "apart", 9), histories()
    rungs = (1, 2, 6, 18)

    # The study has what was measured at rungs, which a resume does not change
    for r in records:
        values = {e: line.get("denoising", math.nan) for e, line in found[r.run_id].items()}
        assert r.values == pytest.approx(values, nan_ok=True, rel=0, abs=0)
        assert {e for e, x in values.items() if not math.isnan(x)} == {*rungs} & {*values}
        assert r.last in rungs
        known = before.get(r.run_id, {})
        assert {e: r.values[e] for e in known} == pytest.approx(known, nan_ok=True, rel=0, abs=0)

    assert len({(r.config["window"], r.config["alpha"]) for r in records}) > 1

    # One in eta is promoted, by that number
    first = sorted(records, key=lambda r: r.values[1])
    assert all(r.last > 1 for r in first[:3])
    assert first[-1].last == 1

    board = out[out.index("Leaderboard of apart") :].splitlines()
    best = min((r for r in records if r.state == "complete"), key=lambda r: r.values[18])
    assert board[1].split()[4:6] == ["denoising", "±"]
    assert best.run_id in board[2] and f"{best.values[18]:.4f}" in board[2]
    assert place.path(best).directory.name in out[out.index("Its weights:") :]

    shown = place.run("runs", "--sweep", "apart", "--sort", "denoising", "--json")
    expected = sorted((r.value or math.inf, r.run_id) for r in records)
    assert [(x["denoising"], x["id"]) for x in json.loads(shown[shown.index("[") :])] == expected
    portrait = " ".join(place.run("runs", "show", best.run_id).split())
    assert f"denoising {best.values[18]:.4f}, best" in portrait
    top, _ = _paths(Args(sweep="apart", top=1, run=(), runs=place.runs))
    assert [path.id for path in top] == [best.run_id]

    # A window that the segments are too short for makes another sweep
    wider = (place.root / "apart.py").read_text().replace("choice(3, 5)", "choice(3, 5, 7)")
    (place.root / "wider.py").write_text(wider)
    assert "takes 13 states" in place.run("sweep", "wider.py", "--name", "apart", code=2)
