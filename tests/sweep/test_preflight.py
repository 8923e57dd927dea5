r"""Tests for checks of sda_ray.sweep.launch: everything that is wrong is found, and all of it is reported at once."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planned import SCRIPT, faults_of, plan, script, spoil, write

from sda_ray.cluster.ray_node import local_cpus
from sda_ray.core.errors import UserError
from sda_ray.data.dataset import check_data
from sda_ray.runs.tracking import Wandb
from sda_ray.sweep.definition import load_script
from sda_ray.sweep.launch import check_start
from sda_ray.sweep.record import Options, write_sweep

__all__ = ["script"]  # fixtures

SOMETIMES = """
def SPACE(trial):
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-2)
    if rate > 9e-3:
        raise ArithmeticError("too fast")
    return {"learning_rate": rate}
"""

BEYOND = """
def SPACE(trial):
    return {"learning_rat": trial.suggest_float("learning_rate", 1e-4, 1e-2)}
"""

# What a user writes into the script, and what is said of it
MISTAKES = {
    "syntax": ("SPACE = {", "cannot be run: SyntaxError"),
    "import": ("import no_such_module", "No module named 'no_such_module'"),
    "argument": ("MORE = {'min_epoch': 2}", "unexpected keyword argument 'min_epoch'"),
    "second sweep": ("other = Sweep('other', CONFIG, SPACE)", "defines 2 sweeps"),
    "config no dict": ("CONFIG = 3", "must be a dict of CONFIG's keys"),
    "unknown key": ("CONFIG['learning_rates'] = 1e-3", "Did you mean 'learning_rate'?"),
    "missing key": ("del CONFIG['window']", "window is missing"),
    "type": ("CONFIG['epochs'] = '9'", "epochs is '9', but must be an integer"),
    "word": ("CONFIG['activation'] = 'silu'", "Did you mean 'SiLU'?"),
    "range of value": ("CONFIG['learning_rate'] = -1", "learning_rate is -1, but must be"),
    "even kernel": ("CONFIG['kernel_size'] = 4", "kernel_size is 4, but must be an odd integer"),
    "levels": ("CONFIG['hidden_blocks'] = (1, 1, 1)", "must have the same number of levels"),
    "long window": ("CONFIG['window'] = 13", "window is 13, but must be at most 12"),
    "downsampling": (
        "CONFIG |= {'hidden_channels': (4,) * 6, 'hidden_blocks': (1,) * 6}",
        "16 must be divisible by 32",
    ),
    "warm-up": ("CONFIG['warmup'] = 10", "warmup is 10, but must be at most epochs"),
    "far too big": (
        "CONFIG |= {'hidden_channels': (4096, 4096)}",
        "must have at most 1e+09. Take fewer",
    ),
    "space no dict": ("SPACE = [1e-3]", "must be a dict of keys of CONFIG and their ranges"),
    "unknown key in space": ("SPACE['batchsize'] = choice(8)", "Did you mean 'batch_size'?"),
    "plain value": ("SPACE['batch_size'] = [4, 8]", "but must be choice(…), uniform(…)"),
    "empty choice": ("SPACE['batch_size'] = choice()", "the choice is empty"),
    "choice of a list": ("SPACE['batch_size'] = choice((4, 8))", "takes its options one by one"),
    "same option twice": ("SPACE['batch_size'] = choice(4, 4)", "has 4 2 times"),
    "reversed bounds": ("SPACE['dropout'] = uniform(0.5, 0.1)", "must be below the upper bound"),
    "log of 0": ("SPACE['weight_decay'] = loguniform(0, 1)", "above 0 for a logarithm"),
    "range of tuples": ("SPACE['hidden_channels'] = integer(8, 16)", "take choice(…)"),
    "real integer": ("SPACE['batch_size'] = uniform(4, 8)", "take integer(…)"),
    "even in range": ("SPACE['kernel_size'] = integer(1, 5)", "must be even"),
    "levels in space": (
        "SPACE['hidden_channels'] = choice((8, 16), (8, 16, 32))",
        "(2 of 4 combinations, as hidden_channels=8,16,32)",
    ),
    "epochs": ("SPACE['epochs'] = choice(4, 8)", "SPACE has 'epochs', but pruned trials"),
    "window": ("SPACE['window'] = choice(3, 5)", "the denoising losses of different windows"),
    "rarely raises": (SOMETIMES, "ArithmeticError: too fast"),
    "returns unknown": (BEYOND, "Did you mean 'learning_rate'?"),
    "name": ("MORE = {'name': 'my sweep'}", "the sweep's name is 'my sweep'"),
    "trials": ("MORE = {'trials': 0}", "trials is 0, but must be"),
    "min_epochs": ("MORE = {'min_epochs': 10}", "min_epochs is 10, but must be at most epochs"),
    "eta": ("MORE = {'eta': 1}", "eta is 1, but must be"),
    "sampler": ("MORE = {'sampler': 'bayes'}", "sampler is 'bayes', but must be"),
    "pruner": ("MORE = {'pruner': 'asha'}", "pruner is 'asha', but must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_script_is_caught(mistake: str, tmp_path: Path, data: Path) -> None:
    text, expected = MISTAKES[mistake]
    made = plan(write(tmp_path, text), tmp_path / "runs", data)

    assert expected in faults_of(made)
    assert not made.nodes, "Ray was started"
    assert not (tmp_path / "runs").exists()


def test_script_without_a_sweep_is_caught(tmp_path: Path, data: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    assert "defines 0 sweeps" in faults_of(plan(tmp_path / "script.py", tmp_path / "runs", data))
    assert "there is no sweep script" in faults_of(
        plan(tmp_path / "no.py", tmp_path / "runs", data)
    )


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(Path.unlink, "there is no file"), (cut, "valid.h5"), (spoil, "is not finite")],
)
def test_damaged_data_are_caught(
    damage: Any, expected: str, script: Path, tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    damage(tmp_path / "data" / "valid.h5")

    assert expected in faults_of(plan(script, tmp_path / "runs", tmp_path / "data"))


def test_resources_that_no_node_has_are_caught(script: Path, tmp_path: Path, data: Path) -> None:
    made = plan(script, tmp_path / "runs", data, cpus=local_cpus() + 1)
    assert "Lower --cpus-per-trial" in faults_of(made)

    made = plan(script, tmp_path / "runs", data, gpus=99)
    assert "a trial wants CPU=1 GPU=99" in faults_of(made)


def test_place_that_cannot_be_written_is_caught(script: Path, data: Path) -> None:
    assert "runs cannot be written to /proc/runs" in faults_of(
        plan(script, Path("/proc/runs"), data)
    )


def test_missing_key_of_wandb_is_caught(
    script: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = Wandb("online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    made = plan(script, tmp_path / "runs", data, cpus=999, wandb=online)
    assert "there is no key for api.wandb.ai" in faults_of(made)

    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    made = plan(script, tmp_path / "runs", data, cpus=999, wandb=online)
    assert "there is no key" not in faults_of(made)


def test_other_sweep_of_the_name_is_caught(script: Path, tmp_path: Path, data: Path) -> None:
    info = check_data(data)
    before = replace(load_script(script).check(info), seed=1)
    record = {"definition": before.definition(), "fingerprint": info.fingerprint}
    directory = tmp_path / "runs" / "sweeps" / "test"
    directory.mkdir(parents=True)
    write_sweep(directory, {"name": "test", "trials": 4, "options": {}, **record}, script)

    assert "sweep 'test' exists and differs" in faults_of(plan(script, tmp_path / "runs", data))


def test_all_mistakes_are_told_at_once(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data" / "train.h5")
    cut(tmp_path / "data" / "valid.h5")
    script = write(
        tmp_path,
        "CONFIG |= {'kernel_size': 4, 'activation': 'silu', 'widow': 5}",
        "SPACE |= {'batch_size': choice(), 'epoch': choice(2, 3)}",
        "MORE = {'name': 'my sweep', 'trials': 0, 'sampler': 'bayes', 'min_epochs': 10}",
    )
    made = plan(script, Path("/proc/runs"), tmp_path / "data", cpus=999, wandb=Wandb("online"))

    for expected in (
        "train.h5 holds a number",
        "valid.h5",
        "kernel_size is 4",
        "Did you mean 'SiLU'?",
        "Did you mean 'window'?",
        "the choice is empty",
        "Did you mean 'epochs'?",
        "my sweep",
        "trials is 0",
        "'bayes'",
        "min_epochs is 10",
        "/proc/runs",
        "--cpus-per-trial",
        "no key for",
    ):
        assert expected in faults_of(made)

    assert len(set(made.faults)) == len(made.faults)


def test_what_is_odd_is_a_warning_only(tmp_path: Path, data: Path) -> None:
    script = write(
        tmp_path,
        "CONFIG['batch_size'] = 64",
        "SPACE = {'scheduler': choice('linear', 'cosine')}",
    )
    made = plan(script, tmp_path / "runs", data, cpus=999)
    warnings = "\n".join(made.warnings)

    assert len(made.faults) == 1
    assert "an epoch is one step" in warnings
    assert "SPACE has 'scheduler'" in warnings


def test_rare_branches_are_caught_in_which_a_name_has_another_kind(
    tmp_path: Path, data: Path
) -> None:
    script = write(
        tmp_path,
        "def SPACE(trial):",
        "    rare = trial.suggest_int('n', 1, 200) == 7",
        "    rates = [1e-3, 1e-4] if rare else [1e-3, 1e-2]",
        "    return {'learning_rate': trial.suggest_categorical('rate', rates)}",
    )

    assert "SPACE suggests 'rate' from" in faults_of(
        plan(script, tmp_path / "runs", data, cpus=999)
    )


def test_start_lists_all_faults_together(script: Path, tmp_path: Path, data: Path) -> None:
    sweep, options = load_script(script), Options(tmp_path, tmp_path / "runs", data, gpus=0)

    assert check_start(sweep, options).sweep == sweep.check()

    with pytest.raises(UserError, match=r"(?s)name is 'a b'.*--cpus-per-trial"):
        check_start(replace(sweep, name="a b"), replace(options, cpus=999))


def test_checked_data_are_checked_again_when_they_change(
    script: Path, tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    options = Options(tmp_path, tmp_path / "runs", tmp_path / "data", gpus=0)
    check_start(load_script(script), options)
    spoil(tmp_path / "data" / "train.h5")

    with pytest.raises(UserError, match="is not finite"):
        check_start(load_script(script), options)
