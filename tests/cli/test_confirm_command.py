r"""Tests for sda_ray.cli.confirm: the table of a confirmation, and what is refused."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from sweeping import loss, play_sweep

from sda_ray import CONFIG, Sweep, choice
from sda_ray.cli.confirm import _pm
from sda_ray.runs.tracking import Wandb
from sda_ray.sweep.confirm import make_confirmation

RATES = (1e-4, 1e-3, 1e-2)


def lucky(config: dict[str, Any], epoch: int) -> float:
    luck = 0.5 if (config["seed"], config["learning_rate"]) == (0, 1e-2) else 0.0

    return loss(config, epoch) - luck + 0.01 * config["seed"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
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


def test_table_says_that_the_winner_was_luck(runs: Path, cli_here: Cli) -> None:
    confirm(runs)
    out = cli_here("attach", "w-confirm").stdout
    rows = [x.split() for x in out.splitlines() if "learning_rate=" in x]

    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][-1] == "learning_rate=0.001"
    assert "The winner of the sweep is now number " in out
    assert "The winner was flattered by 0.5150 ± 0.0050: it had -0.1750 in the sweep" in out
    assert " The others were, by 0.0150 on average." in out
    assert "sda-ray evaluate crimson-cloud-" in out
    assert "sda-ray confirm w --seeds 4 " in out


def test_one_seed_other_epochs_and_diverged_runs_are_named(runs: Path, cli_here: Cli) -> None:
    confirm(runs, 1, epochs=2, ends={1: "diverged", 2: "failed"})
    out = cli_here("attach", "w-confirm").stdout

    assert "One seed has no standard error: --seeds 3 adds two." in out
    assert "its values do not compare" in out and "flattered" not in out
    assert "! Of number " in out and "1 runs diverged: it ranks behind all with fewer." in out
    assert "! 1 runs are missing" in out
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
    runs: Path, cli_here: Cli, words: str, message: str
) -> None:
    before = sorted(runs.rglob("*"))
    refused = cli_here("confirm", *words.split())

    assert refused.returncode == 2 and message in refused.stderr
    assert sorted(runs.rglob("*")) == before


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
    runs: Path, cli_here: Cli
) -> None:
    confirm(runs)
    file = runs / "sweeps" / "w-confirm" / "sweep.json"
    record = json.loads(file.read_text())
    record["definition"]["space"]["seed"]["choice"] = [1, 2, 3]
    file.write_text(json.dumps(record | {"trials": 9}))
    out = cli_here("attach", "w-confirm").stdout

    assert out.count(" 2/3 ") == 3 and "! 3 runs are missing: " in out
