r"""Tests for sda_ray.cli.results: evaluations, exports, and what a confirmation says."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from kept import made, path_of, runs
from sweeping import loss, make_sweep, play_sweep

from sda_ray import CONFIG, Sweep, choice, load_sde
from sda_ray.cli.main import main
from sda_ray.cli.results import _pm
from sda_ray.runs.path import RunPath
from sda_ray.runs.tracking import Wandb
from sda_ray.sweep.confirm import make_confirmation

__all__ = ["made", "runs"]  # fixtures

LEVELS = ("mean", "low", "high")
RATES = (1e-4, 1e-3, 1e-2)


def test_runs_are_evaluated_on_ray_and_compared(runs: Path, cli: Cli, tmp_path: Path) -> None:
    words = ["--sweep=width", "--top=2", "--only=samples,circle", "--members=2", "--steps=2"]
    path_of(runs, 4).config.write_text("{")

    done = cli("evaluate", *words, "--trajectories=2", "--table=skill.csv", timeout=300)

    assert done.returncode == 0, done.stderr
    assert "χ²" in done.stdout and "Means over 2 trajectories" in done.stdout

    assert done.stdout.count(path_of(runs, 5).name) == 2
    assert path_of(runs, 4).name not in done.stdout

    rows = list(csv.DictReader((tmp_path / "skill.csv").read_text().splitlines()))
    (crps,) = [row for row in rows if row["metric"] == "crps"]
    assert float(crps["low"]) <= float(crps["mean"]) <= float(crps["high"])

    again = cli("evaluate", *words, "--trajectories=2", "--json", "--table=skill.tex", timeout=300)

    assert again.returncode == 0, again.stderr
    ((_, summary),) = json.loads(again.stdout)["summary"].items()
    assert summary["circle"]["crps"] == pytest.approx([float(crps[k]) for k in LEVELS])
    assert (tmp_path / "skill.tex").read_text().count(r"\\") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the runs to evaluate, or --sweep NAME"),
        (["00000004", "--sweep=width"], "only one of them"),
        (["00000004", "--top=3"], "--top goes with --sweep"),
        (["--sweep=with"], "no run of sweep 'with'"),
        (["00000004", "--only=circel"], "Did you mean 'circle'"),
        (["00000004", "--only=assim"], "'assim' does not fit"),
        (["00000004", "--table=x.pdf"], "must end with .csv or .tex"),
        (["00000004", "--trajectories=9"], "has 4"),
        (["nothing", "--only=samples"], "nothing is left out: there is no run 'nothing'"),
    ],
)
def test_mistakes_are_explained(
    runs: Path, data: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv=["evaluate", f"--runs={runs}", f"--data={data}", *words])

    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_run_is_exported_and_reproduced(
    cli_here: Cli, settings: list[str], tmp_path: Path
) -> None:
    assert cli_here("train", *settings, "epochs=2").returncode == 0
    (path,) = RunPath.all(tmp_path / "runs")

    done = cli_here("export", path.id, "out")
    assert done.returncode == 0, done.stderr
    assert load_sde(tmp_path / "out", length=8).shape == (8, 2, 16, 16)

    path = RunPath(path.directory.rename(tmp_path / "runs" / f"two\nlines_{path.id}"))
    done = cli_here("export", path.id, "other")
    assert f"two�lines_{path.id} is in other." in done.stdout, done.stderr

    done = cli_here("reproduce", path.name, "--epochs=2")
    assert done.returncode == 0, done.stderr
    assert "the same bits over 2 epochs." in done.stdout

    line, *others = path.metrics.read_text().splitlines()
    line = json.dumps(json.loads(line) | {"loss_train": 0.25})
    path.metrics.write_text("\n".join((line, *others, "")))
    done = cli_here("reproduce", path.name)
    assert done.returncode == 1
    assert "epoch 1 differs: loss_train 0.25 then, " in done.stdout
    assert "Versions, code, device and threads are those of the run." in done.stdout


@pytest.mark.parametrize("words", [("export", "width", "out"), ("reproduce", "width")])
def test_sweep_is_no_run_but_has_a_best_one(
    cli_here: Cli, tmp_path: Path, words: tuple[str, ...]
) -> None:
    study = make_sweep(tmp_path / "runs", "width", 6)
    complete = [trial for trial in study.records() if trial.state == "complete"]
    best = min(complete, key=lambda trial: trial.values[30])
    done = cli_here(*words)

    assert done.returncode == 2
    assert f"takes a run. Its best run is crimson-cloud-{best.index}_{best.run_id}" in done.stderr
    assert "there is no run 'nothing'" in cli_here(words[0], "nothing", *words[2:]).stderr


def lucky(config: dict[str, Any], epoch: int) -> float:
    luck = 0.5 if (config["seed"], config["learning_rate"]) == (0, 1e-2) else 0.0

    return loss(config, epoch) - luck + 0.01 * config["seed"]


@pytest.fixture
def confirmed(tmp_path: Path) -> Path:
    r"""A finished sweep whose winner is luck."""

    runs, space = tmp_path / "runs", {"learning_rate": choice(*RATES)}
    config = CONFIG | {"epochs": 4}
    sweep = Sweep("w", config, space, 3, sampler="grid", pruner="none")
    options = {"data": "data", "cpus": 1, "gpus": 0, "wandb": asdict(Wandb("disabled"))}
    play_sweep(runs, sweep, loss=lucky, options=options)

    return runs


def confirm(runs: Path, seeds: int = 2, **more: Any) -> None:
    sweep, confirms = make_confirmation(runs, "w", "w-confirm", 3, seeds, more.pop("epochs", None))
    play_sweep(runs, sweep, loss=lucky, confirms=confirms, **more)


def test_table_says_that_the_winner_was_luck(confirmed: Path, cli_here: Cli) -> None:
    confirm(confirmed)
    out = cli_here("attach", "w-confirm").stdout
    rows = [x.split() for x in out.splitlines() if "learning_rate=" in x]

    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][-1] == "learning_rate=0.001"
    assert "The winner of the sweep is now number " in out
    assert "The winner was flattered by 0.5150 ± 0.0050: it had -0.1750 in the sweep" in out
    assert " The others were, by 0.0150 on average." in out
    assert "sda-ray evaluate crimson-cloud-" in out
    assert "sda-ray confirm w --seeds 4 " in out


def test_one_seed_other_epochs_and_diverged_runs_are_named(confirmed: Path, cli_here: Cli) -> None:
    confirm(confirmed, 1, epochs=2, ends={1: "diverged", 2: "failed"})
    out = cli_here("attach", "w-confirm").stdout

    assert "One seed has no standard error: --seeds 3 adds two." in out
    assert "its values do not compare" in out and "flattered" not in out
    assert "! Of number " in out and "1 runs diverged: it ranks behind all with fewer." in out
    assert "! 1 runs are missing" in out and "sda-ray sweep w-confirm --retry-failed" in out
    assert "nan" not in out and "inf" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("v", "there is no sweep 'v'"),
        ("w batch_size=3", "batch_size is that of the sweep. Only epochs may differ."),
        ("w epochs=0", "epochs is 0, but must be an integer"),
        ("w --name w", "sweep 'w' exists, and was not started with SWEEP w. Give --name"),
        ("w --top 0", "0 is not in the range x>=1"),
        ("w --seeds 1001", "1001 is not in the range 1<=x<=1000"),
        ("w", "has other data than sweep 'w'. Give its --data."),
    ],
)
def test_what_cannot_be_confirmed_is_refused(
    confirmed: Path, cli_here: Cli, words: str, message: str
) -> None:
    before = sorted(confirmed.rglob("*"))
    refused = cli_here("confirm", *words.split())

    assert refused.returncode == 2 and message in refused.stderr
    assert sorted(confirmed.rglob("*")) == before


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (0.29170, 0.0012, "0.2917 ± 0.0012"),
        (5e-9, 6e-9, "5e-09 ± 6e-09"),
        (123.4, 56.0, "123 ± 56"),
        (0.25, math.nan, "0.25"),
        (0.25, 0.0, "0.25"),
        (math.nan, math.nan, "–"),
    ],
)
def test_mean_has_the_digits_of_its_error(mean: float, error: float, text: str) -> None:
    assert _pm(mean, error) == text


def test_a_confirmation_with_more_seeds_to_come_is_shown_as_far_as_it_is(
    confirmed: Path, cli_here: Cli
) -> None:
    confirm(confirmed)
    file = confirmed / "sweeps" / "w-confirm" / "sweep.json"
    record = json.loads(file.read_text())
    record["definition"]["space"]["seed"]["choice"] = [1, 2, 3]
    file.write_text(json.dumps(record | {"trials": 9}))
    out = cli_here("attach", "w-confirm").stdout

    assert out.count(" 2/3 ") == 3 and "! 3 runs are missing: " in out
