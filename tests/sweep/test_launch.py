r"""Tests for sda_ray.sweep.launch: whole sweeps with Ray, carried on, extended, side by side."""

import json
import re
import shutil

import pytest
from scene import GRID, SCRIPT, Place, lines, place

from sda_ray.cli.main import main
from sda_ray.core.config import load_config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import holder
from sda_ray.runs.path import RunPath
from sda_ray.search.promotion import TrialRecord
from sda_ray.sweep.definition import load_script
from sda_ray.sweep.launch import Options, launch

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
        assert (holder(path.lease) or {}).get("pid") is None

    return records


def test_sweep_ends_with_all_runs_complete_or_pruned(place: Place, finished: str) -> None:
    records = check_whole(place, "tiny", 8)

    assert any(r.state == "complete" for r in records)
    assert any(r.state == "pruned" for r in records)
    assert all(r.last in (1, 3, 9) for r in records)
    assert "8 trials, rungs at epochs 1, 3, 9" in finished
    assert "Leaderboard of tiny" in finished
    assert "Best configuration: learning_rate=" in finished


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

    assert "carried on: 8 runs so far, 0 of them under way" in out
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
        (["tiny", "epochs=18"], "is carried on as it was started"),
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

    with pytest.raises(UserError, match=r"has ended just now.*copies to s3://lab-bucket/runs"):
        launch(load_script(place.root / "tiny.py"), options)

    directory = runs / "sweeps" / "tiny"
    assert (holder(directory / "lease.json") or {"pid": 1})["pid"] is None
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
        gone, good = place.records(name)
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

    assert [(r.state, r.config) for r in records] == [
        ("complete", {"seed": seed}) for seed in (5, 6, 7)
    ]
    assert place.same_as_alone(records[1])
