r"""Tests for sda_ray.sweep.confirm: what means over fresh seeds say about the winner of a sweep."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sweeping import loss, play_sweep

from sda_ray import CONFIG, Sweep, choice
from sda_ray.core.errors import UserError
from sda_ray.search.study import Study
from sda_ray.sweep.confirm import (
    Configuration,
    Confirmation,
    estimate,
    kendall,
    make_confirmation,
    read_confirmation,
    resume_confirmation,
)

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LUCK = -0.5  # of the worst configuration, with the seed of the sweep


def lucky(config: dict[str, Any], epoch: int) -> float:
    r"""Returns a loss with noise that is small for all but one configuration and seed."""

    luck = LUCK if (config["seed"], config["learning_rate"]) == (0, 1e-2) else 0.0

    return loss(config, epoch) + luck + 0.001 * (config["seed"] % 3)


def make_parent(runs: Path, space: Any = None) -> None:
    space = space or {"learning_rate": choice(*RATES), "activation": choice("SiLU", "ReLU")}
    sweep = Sweep("w", CONFIG | {"epochs": 4}, space, 10, sampler="grid", pruner="none")
    play_sweep(runs, sweep, loss=lucky)


def confirm(runs: Path, top: int = 4, seeds: int = 3, ends: Any = None, **more: Any) -> Study:
    sweep, confirms = make_confirmation(runs, "w", "w-confirm", top, seeds, more.get("epochs"))

    return play_sweep(runs, sweep, ends, lucky, confirms=confirms)


def test_mean_and_standard_error_are_those_of_the_closed_form() -> None:
    mean, error = estimate([1.0, 2.0, 4.0, 9.0])

    assert mean == 4.0 and error == pytest.approx(math.sqrt(38 / 3) / 2)
    assert estimate([2.5])[0] == 2.5 and math.isnan(estimate([2.5])[1])
    assert all(map(math.isnan, estimate([])))


def test_kendall_counts_pairs_in_order() -> None:
    assert [kendall(x) for x in ([1, 2, 3, 4], [4, 3, 2, 1])] == [1.0, -1.0]
    assert kendall([2, 1, 3, 4]) == pytest.approx((5 - 1) / 6)
    assert math.isnan(kendall([1]))


def configurations(*values: dict[int, float], **more: Any) -> Confirmation:
    found = (Configuration(i, f"run{i}", 0.1 * i, 4, {}, x) for i, x in enumerate(values, 1))

    return Confirmation("w", "loss_valid", (1, 2, 3), tuple(found), **more)


def test_noise_that_seeds_share_does_not_count_in_differences() -> None:
    found = configurations({1: 1.0, 2: 2.0, 3: 6.0}, {1: 0.9, 2: 1.9, 3: 5.9})
    difference, error = found.behind(found.configurations[0])

    assert [x.rank for x in found.order] == [2, 1] and found.tau == -1
    assert found.configurations[0].mean[1] > 1
    assert difference == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-12)
    assert found.recommended.rank == 2


def test_winner_within_a_standard_error_of_the_first_is_kept() -> None:
    found = configurations({1: 1.0, 2: 2.0, 3: 3.0}, {1: 2.0, 2: 1.0, 3: 2.9})

    assert found.order[0].rank == 2 and found.recommended.rank == 1
    assert configurations({1: 1.0}, {1: 0.9}).recommended.rank == 2  # one seed has no error


def test_winner_by_luck_is_found_out(tmp_path: Path) -> None:
    make_parent(tmp_path)
    confirm(tmp_path)
    found = read_confirmation(tmp_path, "w-confirm")
    winner = found.configurations[0]

    assert winner.config["learning_rate"] == 1e-2
    assert winner.mean[0] == pytest.approx(loss(winner.config, 4) + 0.001)
    assert found.flattery(winner)[0] == pytest.approx(-LUCK + 0.001)
    assert found.flattery(winner)[1] == pytest.approx(0.001 / math.sqrt(3))
    assert found.recommended.config["learning_rate"] == 1e-3
    assert found.order[-1] is not found.configurations[-1] and found.tau < 1
    assert all(len(x.values) == len(x.runs) == 3 for x in found.order)
    assert json.loads(json.dumps(found.as_json()))["recommended"] == found.recommended.rank


def test_seeds_and_validation_are_others_than_those_of_the_sweep(tmp_path: Path) -> None:
    space = {"learning_rate": choice(*RATES), "seed": choice(4, 7)}
    make_parent(tmp_path, space)
    sweep, confirms = make_confirmation(tmp_path, "w", "w-confirm", 3, 2, None)

    assert sweep.space["seed"].options == (8, 9)  # type: ignore[index]
    assert sweep.config["valid_seed"] == 1 and sweep.trials == 6
    assert (
        len({x["config"]["learning_rate"] for x in confirms["runs"]}) == 3
    )  # none is there twice
    assert all({"seed", "valid_seed"}.isdisjoint(x["config"]) for x in confirms["runs"])


def test_settings_that_are_equal_in_all_are_not_in_space(tmp_path: Path) -> None:
    make_parent(tmp_path)
    sweep, _ = make_confirmation(tmp_path, "w", "w-confirm", 1, 2, None)
    assert sweep.definition()["space"].keys() == {"seed"} and sweep.config["learning_rate"] == 1e-2

    sweep, _ = make_confirmation(tmp_path, "w", "w-confirm", 9, 2, None)
    assert sweep.definition()["space"].keys() == {"activation,learning_rate", "seed"}


def test_diverged_seed_ranks_last_and_one_that_failed_is_missing(tmp_path: Path) -> None:
    make_parent(tmp_path)
    study = confirm(tmp_path, seeds=2, ends={1: "diverged", 2: "failed"})
    bad, failed = (r.config for r in study.records()[:2])
    found = read_confirmation(tmp_path, "w-confirm")

    assert found.order[-1].config["learning_rate"] == bad["learning_rate"]
    assert found.order[-1].diverged == (bad["seed"],)
    assert sum(len(x.values) for x in found.order) == 4 * 2 - 2
    assert math.isnan(found.behind(found.order[-1])[1])
    assert failed["seed"] not in next(
        x.values for x in found.order if x.config | failed == x.config | {"seed": failed["seed"]}
    )


def test_values_after_other_epochs_do_not_compare(tmp_path: Path) -> None:
    make_parent(tmp_path)
    confirm(tmp_path, epochs=2)

    found = read_confirmation(tmp_path, "w-confirm")

    assert not found.comparable
    assert {tuple(x["flattery"]) for x in found.as_json()["configurations"]} == {(None, None)}


def test_more_seeds_extend_a_confirmation_and_nothing_else_may_change(tmp_path: Path) -> None:
    make_parent(tmp_path)
    confirm(tmp_path, top=20)  # there are 10
    same = resume_confirmation(tmp_path, "w", "w-confirm", 20, 3, 4)
    more = resume_confirmation(tmp_path, "w", "w-confirm", None, 5, None)

    assert same.trials == 30 and same.space["seed"].options == (1, 2, 3)  # type: ignore[index]
    assert more.trials == 50 and more.space["seed"].options == (1, 2, 3, 4, 5)  # type: ignore[index]
    assert resume_confirmation(tmp_path, "w", "w-confirm", 10, 2, None).trials == 30

    with pytest.raises(UserError, match="not started with --top 3 and epochs 8"):
        resume_confirmation(tmp_path, "w", "w-confirm", 3, None, 8)

    with pytest.raises(UserError, match="sweep 'w' exists, and was not started with SWEEP v"):
        resume_confirmation(tmp_path, "v", "w", None, None, None)


def test_sweep_without_a_complete_run_cannot_be_confirmed(tmp_path: Path) -> None:
    play_sweep(
        tmp_path,
        Sweep("w", CONFIG, {"seed": choice(1, 2)}, trials=2, sampler="grid", pruner="none"),
        {1: "failed", 2: "diverged"},
    )

    with pytest.raises(UserError, match="has no complete run to confirm: sda-ray sweep w"):
        make_confirmation(tmp_path, "w", "w-confirm", 5, 3, None)
