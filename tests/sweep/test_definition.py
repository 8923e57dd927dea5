r"""Tests for the sda_ray.sweep.definition and sda_ray.sweep.definition modules: what a sweep may be."""

import importlib
import json
import pickle
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from sda_ray.core.config import CONFIG
from sda_ray.core.errors import UserError
from sda_ray.core.space import choice, integer, loguniform
from sda_ray.data.dataset import check_data
from sda_ray.search.promotion import FINAL
from sda_ray.sweep.definition import SETTINGS, Sweep, load_script

SPACE = {"learning_rate": loguniform(1e-4, 1e-2)}
SEVERAL = ("loss_valid", "parameters")


def sweep_of(space: Any = SPACE, **settings: Any) -> Sweep:
    return Sweep("name", CONFIG | {"epochs": 54}, space, **settings)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "annealing"}, "sampler is 'annealing', but must be one of tpe, random, gp, grid"),
    (
        {"sampler": "cmaes"},
        "CMA-ES is left out: Optuna's keeps its state in the study as a pickle",
    ),
    ({"sampler": "gp"}, "sampler is 'gp', which learns from complete trials alone, and pruner is"),
    ({"sampler": "gp", "pruner": "median"}, "Take pruner='none', or sampler='tpe'."),
    ({"sampler": "nsga2"}, "sampler is 'nsga2', which is for several objectives."),
    ({"pruner": "asha"}, "pruner is 'asha', but must be one of promotion, median, percentile"),
    ({"pruner": "median", "objectives": SEVERAL}, "trials with several objectives can only be"),
    (
        {"pruner": "promotion", "objectives": SEVERAL},
        "Leave the pruner out, or take pruner='none'",
    ),
    ({"objectives": ("parameters",)}, "must be a tuple that begins with 'loss_valid'"),
    ({"objectives": "loss_valid"}, "must be a tuple that begins with 'loss_valid'"),
    ({"objectives": ()}, "must be a tuple that begins with 'loss_valid'"),
    ({"objectives": ("loss_valid", "beauty")}, "objectives has 'beauty', but may have loss_valid"),
    ({"objectives": ("loss_valid", "seconds", "seconds")}, "objectives has 'seconds' twice"),
    ({"percentile": 10}, "percentile is 10, but only pruner='percentile' takes it."),
    ({"percentile": 100, "pruner": "percentile"}, "must be a number between 0 and 100"),
    ({"percentile": "25", "pruner": "percentile"}, "must be a number between 0 and 100"),
    ({"patience": 4}, "patience is 4, but only pruner='patience' takes it."),
    ({"patience": 0, "pruner": "patience"}, "patience is 0, but must be an integer from 1."),
    ({"min_epochs": 55, "pruner": "hyperband"}, "min_epochs is 55, but must be at most epochs"),
    ({"rungs": (9, 3)}, "rungs is (9, 3), but must be rising epochs from min_epochs (=9)"),
    ({"rungs": (9, 54)}, "to below epochs (=54)"),
    ({"rungs": (3, 9), "min_epochs": 2}, "from min_epochs (=2)"),
    ({"space": {"epochs": integer(8, 16)}}, "SPACE has 'epochs', but pruned trials are compared"),
    ({"space": {"epochs": integer(8, 16)}, "pruner": "median"}, "or take pruner='none'"),
    ({"seeds": 0}, "seeds is 0, but must be an integer from 1"),
    ({"seeds": 2, "space": {"seed": integer(1, 9)}}, "seeds is 2, but SPACE has 'seed'"),
    (
        {"seeds": 2, "space": lambda trial: {"seed": trial.suggest_int("s", 1, 9)}},
        "seeds is 2, but SPACE has 'seed'",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        sweep_of(**settings).check()

    assert message in str(error.value)


def test_config_must_fit_together_with_what_space_sets_alone() -> None:
    two = CONFIG | {"hidden_blocks": (1, 1)}  # CONFIG has three levels

    def function(trial: Any) -> dict[str, Any]:
        return {"hidden_channels": (8, 8 * trial.suggest_int("factor", 1, 2))}

    for space in ({"hidden_channels": choice((8, 16), (8, 32))}, function):
        Sweep("name", two, space).check()

    for other in (SPACE, {"hidden_channels": choice((8, 16, 32), (8, 16))}):
        with pytest.raises(UserError, match="has 3 levels and hidden_blocks"):
            Sweep("name", two, other).check()


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    settings: dict[str, Any] = {
        "trials": np.int64(8),
        "seed": torch.tensor(3),
        "eta": np.int32(3),
        "min_epochs": np.int64(2),
        "rungs": np.array([2, 6]),
        "finalists": torch.tensor(2),
    }
    config = CONFIG | {
        "epochs": np.int64(18),
        "hidden_channels": np.array([8, 16, 32]),
        "hidden_blocks": torch.tensor([1, 1, 1]),
        "learning_rate": torch.tensor(0.5),
    }
    space = {
        "embedding": integer(4, np.int64(16), step=np.int64(4)),
        "dropout": choice(torch.tensor(0.5), np.float64(0.25)),
    }
    sweep = Sweep("name", config, space, **settings).check()
    plain: dict[str, Any] = {"trials": 8, "seed": 3, "eta": 3, "min_epochs": 2, "finalists": 2}
    values = {"epochs": 18, "hidden_channels": (8, 16, 32), "hidden_blocks": (1, 1, 1)}
    domains = {"embedding": integer(4, 16, step=4), "dropout": choice(0.5, 0.25)}
    same = Sweep("name", CONFIG | values | {"learning_rate": 0.5}, domains, **plain).check()

    assert json.dumps(sweep.definition()) == json.dumps(same.definition())
    assert (sweep.trials, sweep.rules.rungs) == (8, (2, 6, 18))


def test_options_that_are_equal_are_refused() -> None:
    def space(trial: Any) -> dict[str, Any]:
        return {"seed": trial.suggest_categorical("seed", [True, 1, 2])}

    with pytest.raises(UserError, match=r"SPACE suggests 'seed' from .* some are equal, as 1 and"):
        sweep_of(space).check()


def test_defaults_hang_on_the_number_of_objectives() -> None:
    one, several = sweep_of().check(), sweep_of(objectives=SEVERAL).check()

    assert (one.sampler, one.pruner, one.min_epochs) == ("tpe", "promotion", 3)
    assert (several.sampler, several.pruner, several.min_epochs) == ("nsga2", "none", None)
    assert sweep_of(objectives=SEVERAL, sampler="tpe").check().sampler == "tpe"
    assert sweep_of({"epochs": integer(8, 16)}, pruner="none").check().rules.rungs == (54,)


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "grid"])
def test_every_sampler_goes_without_pruning(sampler: str) -> None:
    sweep = sweep_of({"activation": choice("ELU", "SiLU")}, sampler=sampler, pruner="none").check()

    assert sweep.stops() is None
    assert sweep.propose([])[0]["activation"] in ("ELU", "SiLU")


@pytest.mark.parametrize("pruner", FINAL)
def test_pruners_by_name_have_rungs_and_verdicts(pruner: str) -> None:
    sweep = sweep_of(pruner=pruner).check()
    steady = (*range(3, 54, 3), 54)

    assert sweep.rules.pruner == pruner
    assert sweep.rules.rungs == ((3, 6, 13, 27, 54) if pruner == "hyperband" else steady)
    assert sweep.stops() is not None
    assert sweep_of().check().stops() is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rungs": (4, 12)},
        {"objectives": SEVERAL},
        {"pruner": "percentile", "percentile": 40.0},
        {"pruner": "patience", "patience": 3},
    ],
)
def test_a_recorded_definition_makes_the_same_sweep(settings: dict[str, Any]) -> None:
    sweep = sweep_of(**settings).check()
    recorded = json.loads(json.dumps(sweep.definition()))
    again = sweep_of(**{key: recorded[key] for key in SETTINGS})

    assert again.check() == sweep
    assert again.definition() == recorded


def by_branch(trial: Any) -> dict[str, Any]:
    smooth = trial.suggest_categorical("smooth", [True, False])
    channels = [(8, 16, 8), (8, 32, 8)] if smooth else [(4, 8, 8), (8, 16, 8)]

    return {"hidden_channels": trial.suggest_categorical("hidden_channels", channels)}


def by_kind(trial: Any) -> dict[str, Any]:
    if trial.suggest_categorical("smooth", [True, False]):
        return {"learning_rate": trial.suggest_float("x", 1e-4, 1e-3, log=True)}

    return {
        "learning_rate": {"low": 1e-4, "high": 1e-2}[
            trial.suggest_categorical("x", ["low", "high"])
        ]
    }


def by_bounds(trial: Any) -> dict[str, Any]:
    high = 1e-2 if trial.suggest_categorical("smooth", [True, False]) else 1e-3

    return {"learning_rate": trial.suggest_float("x", 1e-4, high, log=True)}


@pytest.mark.parametrize(
    ("space", "name", "options"),
    [
        (by_branch, "hidden_channels", ["(8, 16, 8), (8, 32, 8)", "(4, 8, 8), (8, 16, 8)"]),
        (by_kind, "x", ["0.0001 to 0.001 (log)", "low, high"]),
    ],
)
def test_names_of_several_kinds_are_refused_where_tpe_would_fail(
    space: Any, name: str, options: list[str]
) -> None:
    with pytest.raises(UserError, match=r"names need not be keys of CONFIG\.$") as error:
        sweep_of(space).check()

    assert f"SPACE suggests '{name}' from " in str(error.value)
    assert all(f"from {option}" in str(error.value) for option in options)
    assert f"as '{name}_a' and '{name}_b'" in str(error.value)

    for sampler in ("random", "grid") if space is by_branch else ("random",):
        assert sweep_of(space, sampler=sampler).check().space is space

    assert sweep_of(by_bounds).check().space is by_bounds


def test_draws_that_a_function_rejects_are_left_out_of_its_checks() -> None:
    def half(trial: Any) -> dict[str, Any]:
        if (rate := trial.suggest_float("learning_rate", 1e-4, 1e-2)) > 5e-3:
            raise optuna.TrialPruned

        return {"learning_rate": rate}

    def none(trial: Any) -> dict[str, Any]:
        raise optuna.TrialPruned

    def broken(trial: Any) -> dict[str, Any]:
        return {"learning_rate": {True: 1e-3}[trial.suggest_float("x", 0, 1) > 0.5]}

    assert 0 < len(sweep_of(half).check().configs(32)) < 32

    with pytest.raises(UserError, match="SPACE raised TrialPruned in all of 32 draws"):
        sweep_of(none).check()

    with pytest.raises(UserError, match=r"KeyError: False \(test_definition.py, line \d+\) \("):
        sweep_of(broken).check()


def test_schedules_that_vary_are_warned_about_where_trials_are_compared_early() -> None:
    space = {"scheduler": choice("linear", "cosine"), "warmup": integer(0, 8)}

    def function(trial: Any) -> dict[str, Any]:
        return {"warmup": trial.suggest_int("warmup", 0, 8)}

    assert [w[:20] for w in sweep_of(space).warnings()] == [
        "SPACE has 'scheduler",
        "SPACE has 'warmup', ",
    ]
    assert [w[:18] for w in sweep_of(function).warnings()] == ["SPACE has 'warmup'"]
    assert sweep_of(space, pruner="none").warnings() == []
    assert sweep_of(space, pruner="patience").warnings() == []  # a trial is compared with itself
    assert sweep_of().warnings() == []


def test_with_several_objectives_it_is_said_that_nothing_is_pruned() -> None:
    (said,) = sweep_of(objectives=SEVERAL).warnings()

    assert "nothing is pruned" in said


# Scripts

HEAD = "from sda_ray import CONFIG, Sweep, loguniform, main\n"
MADE = 'Sweep("x", CONFIG, {"learning_rate": loguniform(1e-4, 1e-2)}, trials=3)\n'


@pytest.fixture
def imports() -> Iterator[None]:
    r"""Forgets what scripts import, and where from."""

    path, modules = [*sys.path], {*sys.modules}
    yield
    sys.path[:] = path

    for name in {*sys.modules} - modules:
        if name in ("rates", "width", "launcher", "sda_ray_sweep"):
            del sys.modules[name]


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize(
    "text",
    [
        f"from rates import LOW\n{HEAD}sweep = {MADE}",
        f"{HEAD}sweep = again = {MADE}",
        f"from dataclasses import replace\n{HEAD}base = {MADE}sweep = replace(base, trials=3)\n",
        f"{HEAD}main({MADE})\nraise AssertionError\n",
        f"{HEAD}def make():\n    return {MADE}\nif 1:\n    one, sweep = make(), make()\nmain(sweep)\n",
        f"#!/usr/bin/python\n# coding: latin-1\n# \xe9\n{HEAD}sweep = {MADE}".encode("latin-1"),
    ],
    ids=["module", "names", "derived", "unguarded", "chosen", "encoding"],
)
def test_script_is_loaded_as_python_would_run_it(tmp_path: Path, text: str | bytes) -> None:
    script = tmp_path / "x.py"
    script.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "rates.py").write_text("LOW = 1e-4\n")
    sweep = load_script(script)

    assert (sweep.name, sweep.trials, sweep.script) == ("x", 3, script)
    assert not list(tmp_path.rglob("x.*.pyc"))


@pytest.mark.usefixtures("imports")
def test_what_a_script_defines_is_in_a_module(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        f"{HEAD}@dataclass\nclass Setup:\n    rate: float = 1\n\nsetup = Setup()\nsweep = {MADE}"
    )
    load_script(script)
    module = sys.modules["sda_ray_sweep"]

    assert typing.get_type_hints(module.Setup) == {"rate": float}
    assert pickle.loads(pickle.dumps(module.setup)) == module.setup
    assert module.__file__ == str(script)


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize("name", ["optuna", "random", "sda_ray"])
def test_script_with_the_name_of_a_library_does_not_hide_it(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(f"{HEAD}sweep = {MADE}")
    load_script(tmp_path / f"{name}.py")

    spec = importlib.util.find_spec(name)
    assert spec is not None and Path(str(spec.origin)).parent != tmp_path


@pytest.mark.usefixtures("imports")
def test_sweep_knows_the_module_that_made_it(tmp_path: Path) -> None:
    (tmp_path / "width.py").write_text(f"{HEAD}sweep = {MADE}")
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import width\nsweep = width.sweep\n")
    sweep = load_script(launcher)

    assert sweep.script == launcher
    assert sys.modules["width"].sweep.module == tmp_path / "width.py"
    assert eval(MADE, dict(vars(sys.modules["sda_ray"]), **vars(sys.modules["width"]))).module


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f"{HEAD}\n1 / 0\n", r"ZeroDivisionError: division by zero \(.*x\.py, line 3\)\."),
        ("import rates\nrates.low()\n", r"KeyError: 'a' \(x\.py, line 2\)\."),
        (f"{HEAD}sweep = (\n", r"SyntaxError: .*\(x\.py, line 2\)\."),
        (f"{HEAD}{HEAD}sweep = Sweep()\n", r"TypeError: .*name.* \(.*x\.py, line 3\)\."),
    ],
)
def test_error_of_a_script_is_told_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "x.py").write_text(text)
    (tmp_path / "rates.py").write_text("def low():\n    return {}['a']\n")

    with pytest.raises(UserError, match=rf"x\.py cannot be run: {where}$"):
        load_script(tmp_path / "x.py")


@pytest.mark.usefixtures("imports")
def test_error_of_a_function_is_told_with_its_line(tmp_path: Path) -> None:
    text = f"{HEAD}def space(trial):\n    return {{}}['a']\nsweep = Sweep('x', CONFIG, space)\n"
    (tmp_path / "x.py").write_text(text)

    with pytest.raises(UserError, match=r"SPACE: KeyError: 'a' \(.*x\.py, line 3\)"):
        load_script(tmp_path / "x.py").check()


# Objectives by which runs of any window compare


def test_window_and_alpha_may_vary_if_no_objective_is_a_loss() -> None:
    space = {"window": choice(3, 5), "alpha": choice("cos", "lin")}

    apart: list[tuple[str, ...]] = [("skill",), ("denoising", "skill", "parameters")]
    losses = [("loss_valid",), ("loss_valid", "denoising"), ("denoising", "loss_train")]

    for names in apart:
        assert sweep_of(space, objectives=names).check().space == space

    for names in losses:
        with pytest.raises(UserError) as error:
            sweep_of(space, objectives=names).check()

        for key in space:
            assert f"SPACE has '{key}', but the denoising losses" in str(error.value)

        assert "Take objectives=('denoising',)" in str(error.value)

    assert sweep_of(lambda trial: {"window": 3}, objectives=("denoising",)).check().measured
    assert sweep_of(objectives=("denoising",)).check().pruner == "promotion"


@pytest.mark.parametrize(
    ("space", "states"),
    [
        (SPACE, 9),  # CONFIG's window is 5
        ({"window": choice(3, 9, 7)}, 17),
        ({"window": choice(3)}, 5),
        ({"window": integer(3, 11, step=2)}, 21),
        ({"alpha,window": choice(("cos", 3), ("lin", 7))}, 13),
        (lambda trial: {"window": trial.suggest_int("k", 1, 5) * 2 + 1}, 21),
    ],
)
def test_segments_are_long_enough_for_the_largest_window(space: Any, states: int) -> None:
    sweep = sweep_of(space, objectives=("denoising", "seconds")).check()

    assert sweep.measured == {"denoising": states} == sweep.definition()["measured"]
    assert sweep.judged == {"objective": "denoising", "measured": sweep.measured}


def test_segments_longer_than_trajectories_are_refused(data: Path) -> None:
    space = {"window": choice(3, 7)}

    with pytest.raises(UserError, match=r"takes 13 states for a window of 7, but .* have 12"):
        sweep_of(space, objectives=("denoising",)).check(check_data(data))


def test_sweep_of_losses_is_recorded_as_before() -> None:
    sweep = sweep_of().check()

    assert sweep.measured == sweep.judged == {}
    assert "measured" not in sweep.definition()
