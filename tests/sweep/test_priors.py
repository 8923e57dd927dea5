r"""Tests for sda_ray.sweep.priors, and how sweeps begin with and draw among them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from adopting import OFF, SPACE, by_id, collected, elsewhere, record_of, records, runs, sweep

from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.core.space import choice, loguniform
from sda_ray.data.dataset import check_data, fingerprint
from sda_ray.runs.path import sweep_directory
from sda_ray.runs.run import Run
from sda_ray.runs.train import train
from sda_ray.search.promotion import TrialRecord
from sda_ray.search.sampler import distributions, memory_study, propose, view
from sda_ray.search.study import Study
from sda_ray.sweep.definition import Sweep
from sda_ray.sweep.prior_runs import adopt, fork, warm_start
from sda_ray.sweep.priors import bring_in
from sda_ray.sweep.record import Changes, compare, read_sweep, write_sweep

__all__ = ["elsewhere", "runs", "sweep"]  # fixtures


def test_nonsense_is_not_brought_in(sweep: Sweep, runs: Path, data: Path) -> None:
    directory = sweep_directory(runs, "x")
    directory.mkdir(parents=True)
    lease = Lease(directory / "lease.json", "x")
    study = Study(directory / "study.journal", "x", lease)
    good = {
        "run_id": "a" * 8,
        "source": "there",
        "epochs": 3,
        "config": {"learning_rate": 1e-3},
        "params": {"learning_rate": 1e-3},
        "distributions": {
            "learning_rate": '{"name": "FloatDistribution", "attributes": {"low": 1e-4, "high": 0.01, "log": true, "step": null}}'
        },
        "values": [[3, 0.5]],
        "finals": [0.5],
    }

    for bad in (
        {},
        good | {"values": [[2, 0.5]]},
        good | {"values": 3},
        good | {"params": {"learning_rate": 1.0}},
        good | {"distributions": {}},
        good | {"finals": []},
    ):
        with pytest.raises(UserError, match="is no finished run"):
            bring_in(study, bad)

    assert study.records() == []
    assert bring_in(study, good)
    assert not bring_in(study, good)
    lease.release()


def test_warm_start_brings_in_what_both_sweeps_have_in_common(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = runs / "own-run-1_aaaaaaaa"
    shutil.copytree(by_id(elsewhere, "1" * 8), own)
    record = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps(record | {"sweep": "x"}))
    adopt([str(by_id(elsewhere, "2" * 8))], sweep, runs, data, record_of)
    capsys.readouterr()

    # Its own finished run, and the one that it has adopted
    wider = replace(sweep, name="y", space=SPACE | {"learning_rate": loguniform(1e-5, 1.0)})
    items = warm_start("x", wider, runs, data)
    assert {item["source"] for item in items} == {str(own), str(by_id(elsewhere, "2" * 8))}
    assert "sweep 'x' has 2 finished runs" in capsys.readouterr().out
    assert json.loads(json.dumps(items))[0]["values"]

    narrow = replace(sweep, name="z", space=SPACE | {"activation": choice("ReLU", "ELU")})
    items = warm_start("x", narrow, runs, data)
    assert [item["params"]["activation"] for item in items] == ["ReLU"]
    assert "left out: own-run-1_aaaaaaaa: activation=SiLU is not in" in capsys.readouterr().out

    with pytest.raises(UserError, match="there is no sweep 'w'"):
        warm_start("w", sweep, runs, data)


def halves(trial: Any) -> dict[str, Any]:
    return {"learning_rate": 2.0 ** -trial.suggest_int("power", 5, 12)}


def test_parameters_of_functions_come_from_the_study_of_the_other_sweep(
    sweep: Sweep, runs: Path, data: Path, elsewhere: Path
) -> None:
    first = replace(sweep, space=halves)
    directory = sweep_directory(runs, "x")
    directory.mkdir(parents=True)
    write_sweep(directory, record_of(first, check_data(data)), None)
    lease = Lease(directory / "lease.json", "x")
    study = Study(directory / "study.journal", "x", lease)
    drawn = propose(first.draw, [], fixed={"power": 7})
    assert drawn is not None
    run = Run(
        runs,
        first.config | drawn[0],
        "b" * 8,
        1,
        OFF,
        record={"sweep": "x", "data": fingerprint(data)},
    )
    list(train(run, data))
    run.close("finished")
    study.add(TrialRecord(1, "b" * 8, "running", 3, 3, config=drawn[0]), drawn[1])

    (item,) = warm_start("x", replace(first, name="y"), runs, data)  # while it is in use
    assert item["params"] == {"power": 7}
    lease.release()

    _, (refusal,) = collected([by_id(runs, "b" * 8)], replace(first, name="y"), runs, data)
    assert "SPACE suggests 'power', which is no key of CONFIG" in refusal.reason


def test_fork_takes_the_next_name_and_the_same_one_again(
    sweep: Sweep, runs: Path, data: Path
) -> None:
    info = check_data(data)

    def write(sweep: Sweep) -> None:
        directory = sweep_directory(runs, sweep.name)
        directory.mkdir(parents=True)
        write_sweep(directory, record_of(sweep, info), None)

    write(sweep)
    changed = replace(sweep, seed=1)
    assert fork(changed, runs, data).name == "x-2"
    write(fork(changed, runs, data))
    assert fork(changed, runs, data).name == "x-2"  # killed, and tried again
    assert fork(replace(sweep, seed=2), runs, data).name == "x-3"


def test_prior_is_not_drawn_again(sweep: Sweep, runs: Path, data: Path, elsewhere: Path) -> None:
    space = {"activation": choice("SiLU", "ReLU"), "learning_rate": choice(1e-3, 2e-3)}
    other = replace(sweep, space=space, sampler="random").check()
    adopt([str(elsewhere)], other, runs, data, record_of)
    found = records(runs, "x")
    drawn = []

    while (more := propose(other.draw, found, 0, "random")) is not None:
        drawn.append(more[0])
        record = TrialRecord(
            1 + len(found), str(len(found)), "complete", 3, 3, {3: 1.0}, config=more[0]
        )
        found.append(replace(record, trial=more[1]))

    assert {(x["activation"], x["learning_rate"]) for x in drawn} == {
        ("SiLU", 2e-3),
        ("ReLU", 2e-3),
    }
    assert len(drawn) == 2


def test_widened_space_keeps_its_parameters_in_the_joint_space(
    sweep: Sweep, runs: Path, data: Path, elsewhere: Path
) -> None:
    adopt([str(elsewhere)], sweep, runs, data, record_of)
    wide = {"learning_rate": loguniform(1e-5, 1.0), "activation": choice("ELU", "SiLU", "ReLU")}
    wider = replace(sweep, space=wide).check()
    directory = sweep_directory(runs, "x")
    lease = Lease(directory / "lease.json", "x")
    study = Study(directory / "study.journal", "x", lease)

    for number in range(3, 16):  # TPE draws its first ten at random
        current = distributions(wider.draw)
        drawn = propose(wider.draw, study.records(), 0, "tpe", current=current)
        assert drawn is not None
        record = TrialRecord(number, f"{number:08}", "running", 3, 3, config=drawn[0])
        record = study.report(study.add(record, drawn[1]), {3: float(number)})
        study.tell(record, "complete")

    trials = view(study.records(), distributions(wider.draw))
    sampler = optuna.samplers.TPESampler(multivariate=True)
    space = sampler.infer_relative_search_space(memory_study(trials), trials[0])

    assert len(trials) == 15
    assert all(trial.distributions == distributions(wider.draw) for trial in trials)
    assert space.keys() == wide.keys()
    assert len(records_again(directory, lease)) == 15
    lease.release()


def records_again(directory: Path, lease: Lease) -> list[TrialRecord]:
    return Study(directory / "study.journal", "x", lease).records()


def test_three_sweeps_of_one_script_go_side_by_side(
    sweep: Sweep, runs: Path, data: Path, elsewhere: Path
) -> None:
    info, held = check_data(data), []

    for name, change in (("x", {}), ("y", {"batch_size": 4}), ("z", {"ema": 0.5})):
        one = replace(sweep, name=name, config=sweep.config | change).check()
        directory = sweep_directory(runs, name)
        directory.mkdir(parents=True)
        lease = Lease(directory / "lease.json", name)
        write_sweep(directory, record_of(one, info), None)
        held.append((one, lease, Study(directory / "study.journal", name, lease)))

    for one, _, study in held:  # all of them open
        drawn = propose(one.draw, [], 0, "random")
        assert drawn is not None
        study.add(TrialRecord(1, one.name * 8, "running", 3, 3, config=drawn[0]), drawn[1])
        assert compare(read_sweep(runs, one.name), record_of(one, info)) == Changes()

    for one, lease, study in held:
        assert [r.run_id for r in study.records()] == [one.name * 8]
        lease.release()

    with pytest.raises(UserError, match="batch_size"):
        changed = replace(sweep, config=sweep.config | {"batch_size": 4})
        adopt([str(elsewhere)], changed, runs, data, record_of)
