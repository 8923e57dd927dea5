r"""Tests for what a sweep promises where Ray Tune with Optuna alone does not.

`benchmarks/raw_tune.py` shows each of these with both of them. Here the driver and the study are
real, a formula trains, and what became of the sweep is read by Optuna alone, from its journal.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from simulated import Crash, Sweeping, outcomes

from sda_ray.cli.main import main
from sda_ray.search.promotion import Rules

RULES = Rules(12, 9, 1, 3)


def diverges(config: dict[str, Any], epoch: int) -> bool:
    return config["learning_rate"] > 0.01 and epoch == 1


def trials(sweeping: Sweeping) -> list[FrozenTrial]:
    r"""Returns the newest trial of each run, as Optuna reads them."""

    copy = sweeping.journal.with_name("copy.journal")
    shutil.copy(sweeping.journal, copy)
    storage = JournalStorage(JournalFileBackend(str(copy)))
    (name,) = optuna.get_all_study_names(storage)
    found = optuna.load_study(study_name=name, storage=storage).trials

    return list({trial.user_attrs["run_id"]: trial for trial in found}.values())


def crash(sweeping: Sweeping, appends: int) -> None:
    with pytest.raises(Crash):
        sweeping.drive(crash=appends)


def test_only_full_trainings_count_as_complete(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, RULES)
    sweeping.drive()
    found = trials(sweeping)

    for trial in found:
        reached = max(trial.intermediate_values)
        assert (trial.state.name == "COMPLETE") == (reached == 9)
        assert trial.state.name in ("COMPLETE", "PRUNED")

        if reached == 9:
            assert trial.value == trial.intermediate_values[9]

    assert {trial.state.name for trial in found} == {"COMPLETE", "PRUNED"}


def test_run_that_diverges_is_told_so_and_none_stays_open(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, RULES, diverges=diverges)
    sweeping.drive()
    found = trials(sweeping)
    gone = [trial for trial in found if trial.user_attrs.get("status") == "diverged"]

    assert gone and all(trial.state.name == "PRUNED" for trial in gone)
    assert {trial.params["learning_rate"] > 0.01 for trial in gone} == {True}
    assert not [trial for trial in found if trial.state.name == "RUNNING"]
    assert all(math.isfinite(t.value or 0) for t in found if t.state.name == "COMPLETE")


@pytest.mark.parametrize("appends", [3, 11, 20, 29, 40])
def test_killed_driver_goes_on_with_what_it_knew(tmp_path: Path, appends: int) -> None:
    r"""With its runs, and with all values that its rungs had: the same decisions follow."""

    whole = Sweeping(tmp_path / "whole", RULES).drive()
    sweeping = Sweeping(tmp_path / "killed", RULES)
    crash(sweeping, appends)
    before = {trial.user_attrs["run_id"]: trial for trial in trials(sweeping)}
    records = sweeping.drive()

    assert list(outcomes(records)) == list(outcomes(whole))
    assert before.keys() <= {record.run_id for record in records}

    for trial in trials(sweeping):
        if (old := before.get(trial.user_attrs["run_id"])) is not None:
            assert trial.params == old.params
            assert old.intermediate_values.items() <= trial.intermediate_values.items()

        assert trial.state.name in ("COMPLETE", "PRUNED")


def test_finished_sweep_that_is_extended_has_more_runs(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, Rules(4, 9, 1, 3))
    first = {record.run_id: record.config for record in sweeping.drive()}
    sweeping.rules = RULES
    records = sweeping.drive()

    assert len(first) == 4 and len(records) == 12 == len(trials(sweeping))
    assert {r.run_id: r.config for r in records[:4]} == first


@pytest.mark.parametrize("option", ["--cpus-per-trial=4096", "--gpus-per-trial=64"])
def test_infeasible_request_is_refused_before_anything_starts(
    tmp_path: Path, data: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "sweep.py"
    script.write_text(
        "from sda_ray import CONFIG, Sweep, loguniform\n"
        'sweep = Sweep("tiny", CONFIG | {"window": 3, "hidden_channels": (8, 16), '
        '"hidden_blocks": (1, 1)}, {"learning_rate": loguniform(1e-4, 1e-2)}, trials=2)\n'
    )

    with pytest.raises(SystemExit) as exit:
        main(argv=["sweep", str(script), f"--root={tmp_path}", f"--data={data}", option])

    assert exit.value.code == 2
    assert f"={option.partition('=')[2]}, but this machine has CPU=" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
