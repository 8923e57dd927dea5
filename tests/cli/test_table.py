r"""Tests for sda_ray.cli.table: what people look at."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sda_ray.cli.table import announce, conclude, leaderboard
from sda_ray.runs.evaluation import QUICK
from sda_ray.search.promotion import Rules, TrialRecord, count_trials

CONFIG = {"learning_rate": 1.23456e-3, "hidden_channels": [64, 128, 256], "activation": "SiLU"}


def records(count: int) -> list[TrialRecord]:
    states = ["running", "pruned", "complete", "diverged", "failed"]

    return [
        TrialRecord(
            i + 1, f"run{i:05}", states[i % 5], 9, 9, {1: 0.5 + i, 9: 0.25 + i}, config=CONFIG
        )
        for i in range(count)
    ]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for i in range(5):
        (tmp_path / f"crimson-cloud-{i}_run{i:05}").mkdir()

    return tmp_path


def test_leaderboard_has_the_best_first_and_says_how_far_it_carries(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaderboard("demo", records(15), runs, count=5)
    out = capsys.readouterr().out

    assert [line.split()[0] for line in out.splitlines()[3:8]] == ["3", "8", "13", "1", "2"]
    assert "crimson-cloud-2_run00002" in out
    assert "64,128,256" in out
    assert "and 10 more" in out
    assert "One seed, selected as the best of 15" in out
    assert "too narrow" not in out


def test_samples_that_are_off_are_marked_with_what_to_do(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaderboard("demo", records(5), runs)
    assert "sample_std" not in capsys.readouterr().out  # of runs by an earlier version

    for i, std in enumerate([62.0, 0.48, 0.93, 2.0, math.nan]):
        line = {"epoch": 9, "loss_valid": 0.25, "sample_std": std}
        (runs / f"crimson-cloud-{i}_run{i:05}" / "metrics.jsonl").write_text(
            f"{json.dumps(line)}\n"
        )

    leaderboard("demo", records(6), runs)
    lines = capsys.readouterr().out.splitlines()
    place = lines[2].split().index("sample_std")
    cells = {line.split()[0]: line.split()[place] for line in lines[3:9]}
    assert cells == {"1": "62!", "2": "0.48!", "3": "0.93", "4": "2", "5": "nan!", "6": "–"}

    told = "Samples of 3 of these runs are off the data by more than a factor of two: "
    assert f"{told}set parametrization=v, or train for more epochs." in " ".join(lines)


def test_text_of_others_is_shown_plainly(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "crimson-cloud-2_run00002").rename(runs / "x\x1b[2J[bold]_run00002")
    leaderboard("demo", records(5), runs)
    out = capsys.readouterr().out
    assert "x�[2J[bold]_run00002" in out and "\x1b" not in out


def test_conclusion_of_repeats_is_their_mean_and_spread(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repeats = [
        TrialRecord(i, f"run{i:05}", "complete", 9, 9, {9: float(i)}, config={"seed": i})
        for i in (1, 2, 3)
    ]
    conclude("demo", 3, repeats, runs, {})
    out = capsys.readouterr().out

    assert "loss_valid over 3 seeds: 2.0000 ± 1.0000" in out
    assert "One seed" not in out and "Best configuration" not in out


MATTER = {"learning_rate": (0.75, 0.61, 0.84)}


def test_conclusion_names_commands_that_exist(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    conclude("demo", 5, records(5), runs, MATTER)
    out = capsys.readouterr().out

    assert "learning_rate=0.00123456 hidden_channels=64,128,256 activation=SiLU" in out
    assert "What mattered:      learning_rate 0.75 (0.61 to 0.84)\n" in out
    assert "PED-ANOVA over 1 complete runs, 90 % intervals\n" in out
    assert "crimson-cloud-2_run00002/state.pth" in out
    assert "sda-ray sweep demo --trials 10 " in out
    assert "sda-ray confirm demo " in out
    assert "sda-ray dashboard demo " in out


def test_more_trials_are_not_recommended_where_there_is_no_more_to_try(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = [r for r in records(5) if r.state != "running"]  # one of them has failed

    for target, more in {3: True, 4: False}.items():
        conclude("demo", target, ended, runs, {})
        assert (f"--trials {2 * target} " in (out := capsys.readouterr().out)) == more
        assert "What next?" in out and "sda-ray confirm demo" in out

    conclude("demo", 2, records(10), runs, {})  # resumed with a smaller number
    assert f"--trials {2 * count_trials(records(10))} " in capsys.readouterr().out


def test_conclusion_survives_lost_directories_and_sweeps_without_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conclude("demo", 5, records(5), tmp_path, {})
    assert "Its directory, of run run00002, is gone." in capsys.readouterr().out

    conclude("demo", 5, records(2)[1:], tmp_path, {})
    assert "No run is complete" in capsys.readouterr().out

    conclude("demo", 5, [], tmp_path, {})


def test_announcement_tells_the_state_and_an_estimate(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = runs / "sweeps" / "demo"
    announce("demo", Rules(8, 9, 1, 3), records(6), directory, {"CPU": 1.0}, 2)

    assert "8 trials, rungs at epochs 1, 3, 9" in (out := capsys.readouterr().out)
    assert "6 runs so far, 2 of them in progress" in out
    assert "2 trials at a time, each with CPU=1; `sda-ray plan` measures" in out


def test_leaderboard_shows_the_objective_its_error_and_the_full_skill(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = [replace(r, values={8: r.values[r.last], 9: math.nan}) for r in records(2)]
    path = runs / "crimson-cloud-0_run00000"
    (path / "metrics.jsonl").write_text(
        '{"epoch": 8, "denoising": 0.5, "denoising_se": 0.0123}\n{"epoch": 9, "loss_valid": 1}\n'
    )
    leaderboard("demo", judged, runs, objective="denoising")
    assert "CRPS" not in capsys.readouterr().out  # none was evaluated

    evaluation = {"version": "1", "weights": "", "data": "", "settings": {}}

    for other in ({}, {"samples": {"0": {"sample_std": 1.0}}}, {"assim": {"0": {"lost": 16}}}):
        (path / "evaluation.json").write_text(json.dumps(evaluation | {"results": other}))
        leaderboard("demo", judged, runs, objective="denoising")
        assert "CRPS" not in capsys.readouterr().out

    results = {"assim": {"0": {"crps": 0.25}, "1": {"crps": 0.5}}}
    (path / "evaluation.json").write_text(json.dumps(evaluation | {"results": results}))
    leaderboard("demo", judged, runs, objective="denoising")
    lines = {x.split()[0]: x.split() for x in capsys.readouterr().out.splitlines() if x}

    assert lines["#"][4:7] == ["denoising", "±", "CRPS"]
    assert lines["1"][5:7] == ["0.012", "0.3750"] and lines["2"][5:7] == ["–", "–"]

    # One of --quick does not compare with it
    quick = {"settings": {"steps": QUICK.steps}, "results": {"assim": {"0": {"crps": 0.125}}}}
    second = runs / "crimson-cloud-1_run00001"
    (second / "evaluation.json").write_text(json.dumps(evaluation | quick))
    leaderboard("demo", judged, runs, objective="denoising")
    assert "0.1250" not in capsys.readouterr().out

    (path / "evaluation.json").unlink()
    leaderboard("demo", judged, runs, objective="denoising")
    assert "CRPS (quick)" in (out := capsys.readouterr().out) and "0.1250" in out
