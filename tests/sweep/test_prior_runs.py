r"""Tests for sda_ray.sweep.prior_runs: finished runs enter a sweep whole, once, also while it runs."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import optuna
import pytest
import torch
from adopting import (
    OFF,
    SPACE,
    by_id,
    bytes_of,
    collected,
    elsewhere,
    options_of,
    record_of,
    records,
    runs,
    sweep,
)

from sda_ray.cli import table
from sda_ray.core.config import CONFIG, load_config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.core.space import choice, loguniform
from sda_ray.data.dataset import TrajectoryDataset, check_data, fingerprint
from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.score import load_score
from sda_ray.runs.inventory import read_entry
from sda_ray.runs.metrics import read_history
from sda_ray.runs.path import RunPath, sweep_directory
from sda_ray.runs.record import read_record
from sda_ray.runs.run import Run
from sda_ray.runs.train import train_run
from sda_ray.search.promotion import TrialRecord, average_seeds, decide
from sda_ray.search.sampler import distributions, memory_study, propose, view
from sda_ray.search.study import Study
from sda_ray.sweep.definition import Sweep
from sda_ray.sweep.driver import Driver
from sda_ray.sweep.enqueue import bring_in
from sda_ray.sweep.launch import LaunchRequests, launch_sweep
from sda_ray.sweep.prior_runs import adopt, fork, place, warm_start
from sda_ray.sweep.record import Changes, Options, compare, read_sweep, write_sweep
from sda_ray.sweep.requests import RequestServer
from sda_ray.training.loop import DRAWS
from sda_ray.training.validation import Denoising, Validation

__all__ = ["elsewhere", "runs", "sweep"]  # fixtures

REFERENCE = Path(__file__).parents[1] / "reference" / "runs" / "crimson-cloud-4_6k7cjnx7"


# Runs of this package


def test_run_that_the_sweep_does_not_cover_is_refused_with_all_reasons(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    space = SPACE | {"learning_rate": loguniform(2e-3, 1e-2)}
    other = replace(
        sweep, space=space, config=sweep.config | {"batch_size": 4, "epochs": 9}, min_epochs=1
    ).check()
    covered, refused = collected([by_id(elsewhere, "1" * 8)], other, runs, data)

    assert covered == []
    assert refused[0].reason == (
        "learning_rate=0.001 is not in SPACE, which has 0.002 to 0.01 (log); it has epochs=3 "
        "where the sweep has 9; it has batch_size=8 where the sweep has 4"
    )


def test_seed_in_space_is_not_another_seed(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    other = replace(sweep, space=SPACE | {"seed": choice(0, 1, 2)}).check()
    sources = [by_id(elsewhere, "1" * 8), by_id(elsewhere, "2" * 8)]
    covered, refused = collected(sources, other, runs, data)

    assert [prior.fit.values["seed"] for prior in covered] == [0]
    assert refused[0].reason == "seed=7 is not in SPACE, which has 0, 1, 2"


def test_run_on_other_data_is_measured_on_the_data_of_the_sweep(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)

    with h5py.File(other / "valid.h5", "r+") as f:
        f["x"][...] = f["x"][...][::-1] * 1.1

    source = by_id(elsewhere, "1" * 8)
    (prior,), _ = collected([source], sweep, runs, other)
    loss = prior.lines[0]["loss_valid"]
    validset = TrajectoryDataset(other / "valid.h5", 3)
    sde = VPSDE(load_score(source).kernel, validset.shape)

    assert (
        loss
        == Validation(validset)(sde, DRAWS)[0]
        != read_history(source / "metrics.jsonl")[3]["loss_valid"]
    )
    assert prior.notes == (
        "it was trained on other data",
        "its loss is that of its state.pth on this data",
    )


def test_weights_and_curve_agree(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, tmp_path: Path
) -> None:
    source = tmp_path / "just-weights"
    source.mkdir()

    for name in ("config.json", "state.pth"):
        shutil.copy(by_id(elsewhere, "2" * 8) / name, source)

    (bare,), _ = collected([source], sweep, runs, data)
    (whole,), _ = collected([by_id(elsewhere, "2" * 8)], sweep, runs, data)

    assert bare.lines[-1]["loss_valid"] == whole.lines[-1]["loss_valid"]
    assert [line["epoch"] for line in bare.lines] == [3]


def test_objective_of_the_sweep_is_measured_unless_the_run_has_it(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    space = SPACE | {"window": choice(3, 5)}
    judged = replace(sweep, space=space, objectives=("denoising",), name="judged").check()
    source = by_id(elsewhere, "1" * 8)
    (prior,), _ = collected([source], judged, runs, data)
    validset = TrajectoryDataset(data / "valid.h5", 3)
    expected, _ = Denoising(validset, 9)(load_score(source), "cos")

    assert prior.finals == (expected,) == (prior.lines[-1]["denoising"],)
    assert prior.item["values"] == [[3, expected]]
    assert prior.lines[-1]["loss_valid"] == read_history(source / "metrics.jsonl")[3]["loss_valid"]

    # Its copy has the number, for segments of that length
    copy = place(prior, judged, runs, fingerprint(data))
    (again,), _ = collected([copy], replace(judged, name="again"), runs, data)
    assert again.finals == prior.finals

    wider = replace(judged, space=SPACE | {"window": choice(3, 5, 7)}, name="wider")
    _, (refusal,) = collected([copy], wider, runs, data)
    assert "it is a copy without weights, and judged otherwise" in refusal.reason


def test_all_objectives_have_values_or_the_run_is_refused(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, tmp_path: Path
) -> None:
    names = ("loss_valid", "parameters", "seconds")
    several = replace(sweep, objectives=names, sampler="nsga2", pruner="none", min_epochs=None)
    source = by_id(elsewhere, "1" * 8)
    bare = tmp_path / "bare"
    bare.mkdir()

    for name in ("config.json", "state.pth"):
        shutil.copy(source / name, bare)

    (prior,), (refusal,) = collected([source, bare], several.check(), runs, data)
    lines = read_history(source / "metrics.jsonl").values()

    assert prior.finals == pytest.approx(
        (
            prior.lines[-1]["loss_valid"],
            sum(x.numel() for x in load_score(source).parameters()),
            sum(line["seconds"] for line in lines),
        )
    )
    assert refusal.reason == "it has no seconds, which is an objective of the sweep"

    adopt([str(source)], several, options_of(runs, data))
    lease = Lease(tmp_path / "lease.json", "x")
    file = sweep_directory(runs, "x") / "study.journal"
    (record,) = Study(file, "x", lease, names).records()
    lease.release()
    assert record.finals == prior.finals


# Runs of SDA


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""Data of fields of 64x64, as the reference run's."""

    directory = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)

    for split in ("train", "valid"):
        with h5py.File(directory / f"{split}.h5", "w") as f:
            f["x"] = rng.standard_normal((2, 4, 2, 64, 64)).astype(np.float32)

    return directory


@pytest.fixture
def upstream() -> Sweep:
    config = CONFIG | {
        "window": 3,
        "embedding": 8,
        "hidden_channels": (8, 16),
        "hidden_blocks": (1, 2),
    }
    space = {"learning_rate": loguniform(1e-5, 1e-2), "weight_decay": loguniform(1e-4, 1e-2)}

    return Sweep("up", config, space, sampler="random").check()


def test_run_by_sda_is_measured_and_brought_in(
    upstream: Sweep, runs: Path, large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(REFERENCE)
    adopt([str(REFERENCE)], upstream, options_of(runs, large))
    (record,) = records(runs, "up")
    validset = TrajectoryDataset(large / "valid.h5", 3)
    sde = VPSDE(load_score(REFERENCE).kernel, validset.shape)
    loss, _ = Validation(validset)(sde, DRAWS)
    copy = RunPath(by_id(runs, record.run_id))

    assert "its loss is that of its state.pth on this data" in capsys.readouterr().out
    assert bytes_of(REFERENCE) == before
    assert record.values == {4096: loss}
    assert record.config == {"learning_rate": 2e-4, "weight_decay": 1e-3}
    assert load_config(copy.config) == load_config(REFERENCE / "config.json")
    assert read_record(copy)["origin"]["id"] == "6k7cjnx7"

    # Known to the sampler, without counting as one of the sweep's own
    assert decide([record], (), replace(upstream, trials=1).rules).kind == "draw"
    (seen,) = view([record])
    assert (seen.state.name, seen.value) == ("COMPLETE", loss)


def test_network_for_other_fields_is_refused(upstream: Sweep, runs: Path, data: Path) -> None:
    covered, refused = collected([REFERENCE], upstream, runs, data)

    assert not covered
    assert "for fields of 64x64, but the data has 16x16" in refused[0].reason


# Runs that cannot be trusted


def spoilt(elsewhere: Path, tmp_path: Path, what: Callable[[Path], Any]) -> Path:
    path = tmp_path / "bad-idea-1_zzzzzzzz"
    shutil.copytree(by_id(elsewhere, "1" * 8), path)
    what(path)

    return path


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]

    for line in lines:
        change(line)

    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def bare(path: Path) -> Path:
    r"""Deletes all files of a run but its config, and returns the path of its weights."""

    for file in path.iterdir():
        if file.name != "config.json":
            file.unlink()

    return path / "state.pth"


def weigh(path: Path, weights: Any) -> None:
    torch.save(weights, bare(path))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json"),
        (lambda p: (p / "config.json").write_text("{"), "is damaged, or not JSON"),
        (lambda p: (p / "metrics.jsonl").write_text("nonsense\nmore\n"), "is damaged"),
        (lambda p: rewrite(p / "metrics.jsonl", lambda x: x.update(loss_valid=-1.0)), "-1.0"),
        (lambda p: rewrite(p / "metrics.jsonl", lambda x: x.update(epoch=3)), "3 lines"),
        (lambda p: rewrite(p / "metrics.jsonl", lambda x: x.update(loss_valid=[])), "is damaged"),
        (lambda p: weigh(p, {"kernel.forcing": torch.zeros(1, 16, 16)}), "does not fit"),
        (lambda p: weigh(p, os.system), "is damaged, or not a file of weights"),
        (lambda p: os.mkfifo(bare(p)), "regular"),
        (lambda p: bare(p).symlink_to("/etc/passwd"), "out of its directory"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_files_are_refused(
    elsewhere: Path,
    sweep: Sweep,
    runs: Path,
    data: Path,
    tmp_path: Path,
    what: Callable[[Path], Any],
    said: str,
) -> None:
    bad = spoilt(elsewhere, tmp_path, what)
    covered, refused = collected([bad, by_id(elsewhere, "2" * 8)], sweep, runs, data)

    assert len(covered) == 1
    assert said in refused[0].reason
    assert "\n" not in refused[0].reason


def test_infinite_values_and_lines_beyond_the_end_are_not_taken(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, tmp_path: Path
) -> None:
    def spoil(line: dict[str, Any]) -> None:
        if line["epoch"] == 2:
            line["loss_valid"] = math.nan

    bad = spoilt(elsewhere, tmp_path, lambda p: rewrite(p / "metrics.jsonl", spoil))
    (prior,), _ = collected([bad], sweep, runs, data)

    assert [line["epoch"] for line in prior.lines] == [1, 3]


def test_malformed_items_are_not_brought_in(sweep: Sweep, runs: Path, data: Path) -> None:
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

    # Another seed of the configuration, with which it is averaged
    assert bring_in(study, good | {"run_id": "b" * 8, "values": [[3, 0.7]], "finals": [0.7]})
    (first,) = average_seeds(study.records())
    assert first.value == pytest.approx(0.6)
    lease.release()


def test_warm_start_brings_in_what_both_sweeps_have_in_common(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = runs / "own-run-1_aaaaaaaa"
    shutil.copytree(by_id(elsewhere, "1" * 8), own)
    record = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps(record | {"sweep": "x"}))
    paused = shutil.copytree(own, runs / "own-run-2_bbbbbbbb")
    (paused / "run.json").write_text(json.dumps(record | {"sweep": "x", "status": "paused"}))
    adopt([str(by_id(elsewhere, "2" * 8))], sweep, options_of(runs, data))
    capsys.readouterr()

    # Its own finished run, and the one that it has adopted
    wider = replace(sweep, name="y", space=SPACE | {"learning_rate": loguniform(1e-5, 1.0)})
    items = warm_start("x", wider, runs, data)
    assert {item["source"] for item in items} == {str(own), str(by_id(elsewhere, "2" * 8))}
    out = capsys.readouterr().out
    assert "sweep 'x' has 2 finished runs" in out
    assert "left out: 1 paused runs, whose loss at a rung is not their last one" in out
    assert json.loads(json.dumps(items))[0]["values"]

    narrow = replace(sweep, name="z", space=SPACE | {"activation": choice("ReLU", "ELU")})
    items = warm_start("x", narrow, runs, data)
    assert [item["params"]["activation"] for item in items] == ["ReLU"]
    assert "left out: own-run-1_aaaaaaaa: activation=SiLU is not in" in capsys.readouterr().out

    with pytest.raises(UserError, match="there is no sweep 'w'"):
        warm_start("w", sweep, runs, data)


def test_warm_start_copies_no_run_before_the_lease_is_taken(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    adopt([str(by_id(elsewhere, "1" * 8))], sweep, options_of(runs, data))
    before = sorted(path.name for path in runs.iterdir())
    directory = sweep_directory(runs, "y")
    directory.mkdir()
    lease = Lease(directory / "lease.json", "sweep 'y'")  # of a driver that is about to start it

    with pytest.raises(UserError, match="sweep 'y' is in use"):
        launch_sweep(
            replace(sweep, name="y"),
            Options(runs.parent, runs, data, OFF),
            table,
            LaunchRequests(warm_start=("x",)),
        )

    assert sorted(path.name for path in runs.iterdir()) == before
    lease.release()


def halves(trial: Any) -> dict[str, Any]:
    return {"learning_rate": 2.0 ** -trial.suggest_int("power", 5, 12)}


def test_parameters_of_functions_come_from_the_record_of_the_run(
    sweep: Sweep, runs: Path, data: Path
) -> None:
    first = replace(sweep, space=halves)
    directory = sweep_directory(runs, "x")
    directory.mkdir(parents=True)
    write_sweep(directory, record_of(first, check_data(data)), None)
    drawn = propose(first.draw, [], fixed={"power": 7})
    assert drawn is not None
    record = {"sweep": "x", "data": fingerprint(data), "params": drawn[1].params}
    run = Run(runs, first.config | drawn[0], "b" * 8, 1, OFF, record=record)
    list(train_run(run, data))
    run.close("finished")

    (item,) = warm_start("x", replace(first, name="y"), runs, data)
    assert item["params"] == {"power": 7}

    for params, said in (
        ({}, "SPACE suggests 'power', which is no key of CONFIG"),
        ({"power": 8}, "learning_rate=0.0078125 is not what SPACE makes of it"),
        ({"power": "x"}, "power=x is not in SPACE"),
        ([3], "SPACE suggests 'power'"),
    ):
        path = RunPath(by_id(runs, "b" * 8)).record
        path.write_text(json.dumps(json.loads(path.read_text()) | {"params": params}))
        _, (refusal,) = collected([path.parent], replace(first, name="y"), runs, data)
        assert said in refusal.reason


def test_fork_takes_the_next_name_and_keeps_it_after_a_kill(
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


def test_configuration_of_a_prior_run_is_not_drawn_again(
    sweep: Sweep, runs: Path, data: Path, elsewhere: Path
) -> None:
    space = {"activation": choice("SiLU", "ReLU"), "learning_rate": choice(1e-3, 2e-3)}
    other = replace(sweep, space=space, sampler="random").check()
    adopt([str(elsewhere)], other, options_of(runs, data))
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
    adopt([str(elsewhere)], sweep, options_of(runs, data))
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
    assert len(reopened_records(directory, lease)) == 15
    lease.release()


def reopened_records(directory: Path, lease: Lease) -> list[TrialRecord]:
    return Study(directory / "study.journal", "x", lease).records()


def test_three_sweeps_of_one_script_run_side_by_side(
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
        adopt([str(elsewhere)], changed, options_of(runs, data))


# Adoption


def test_finished_runs_are_brought_in_with_their_curves(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(elsewhere)
    adopt([str(elsewhere)], sweep, options_of(runs, data))
    out = capsys.readouterr().out
    first, second = records(runs, "x")

    assert bytes_of(elsewhere) == before
    assert "seed=7 where the sweep has 0" in out
    assert "it is interrupted, and only finished runs" in out
    assert "2 runs brought in" in out
    assert (first.index, second.index) == (1, 2)

    for number, record in enumerate((first, second), 1):
        source = RunPath(by_id(elsewhere, f"{number}" * 8))
        copy = RunPath(by_id(runs, record.run_id))
        lines = read_history(source.metrics)

        assert record.state == "complete"
        assert record.source == str(source.directory)
        assert record.values == {epoch: line["loss_valid"] for epoch, line in lines.items()}
        assert record.config == {
            key: load_config(source.config)[key] for key in ("learning_rate", "activation")
        }
        assert load_config(copy.config) == load_config(source.config)
        assert read_history(copy.metrics) == lines
        assert {path.name for path in copy.directory.iterdir()} == {
            "config.json",
            "metrics.jsonl",
            "run.json",
        }

        entry = read_entry(copy)
        assert entry is not None
        assert (entry.status, entry.sweep, entry.faults) == ("adopted", "x", ())
        assert entry.loss_valid == record.values[3]
        assert read_record(copy)["origin"]["id"] == f"{number}" * 8


def test_second_adoption_changes_nothing(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt([str(elsewhere)], sweep, options_of(runs, data))
    journal = (sweep_directory(runs, "x") / "study.journal").read_bytes()
    before = {path.directory: bytes_of(path.directory) for path in RunPath.all(runs)}
    copy = elsewhere.parent / f"copy-{runs.parent.name}"
    shutil.copytree(elsewhere, copy)

    for words in ([str(elsewhere)], [str(elsewhere), str(copy)]):
        adopt(words, sweep, options_of(runs, data))
        assert "0 runs brought in" in capsys.readouterr().out.replace("\n2 runs", "")

    assert (sweep_directory(runs, "x") / "study.journal").read_bytes() == journal
    assert {path.directory: bytes_of(path.directory) for path in RunPath.all(runs)} == before


def test_later_adoption_is_not_taken_for_a_loss(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt([str(by_id(elsewhere, "1" * 8))], sweep, options_of(runs, data))
    adopt([str(by_id(elsewhere, "2" * 8))], sweep, options_of(runs, data))
    out = " ".join(capsys.readouterr().out.split())

    assert out.count("1 run brought in") == 2 and "had lost" not in out


def test_runs_that_were_brought_in_outlive_their_source_and_the_journal(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt([str(by_id(elsewhere, "1" * 8))], sweep, options_of(runs, data))
    (first,) = records(runs, "x")
    (sweep_directory(runs, "x") / "study.journal").unlink()
    adopt([str(by_id(elsewhere, "2" * 8))], sweep, options_of(runs, data))
    restored, _ = records(runs, "x")

    assert "study.journal had lost 1 runs" in " ".join(capsys.readouterr().out.split())
    assert (restored.run_id, restored.values) == (first.run_id, first.values)
    assert (restored.source, restored.finals) == (first.source, first.finals)
    assert (restored.config, restored.trial.params) == (first.config, first.trial.params)


def test_runs_of_the_same_directory_are_brought_in(
    elsewhere: Path, sweep: Sweep, data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "all"
    shutil.copytree(elsewhere, runs)
    adopt(["1" * 8, RunPath(by_id(runs, "2" * 8)).name], sweep, options_of(runs, data))

    assert [len(r.values) for r in records(runs, "x")] == [3, 3]

    # The copies are the sweep's own: they are not brought in again, but into another sweep.
    with pytest.raises(UserError, match="covers none of the"):
        adopt(
            [str(by_id(runs, r.run_id)) for r in records(runs, "x")], sweep, options_of(runs, data)
        )

    other = replace(sweep, name="y")
    adopt([str(runs)], other, options_of(runs, data))
    assert {r.source for r in records(runs, "y")} == {r.source for r in records(runs, "x")}


@pytest.mark.parametrize("word", ["nothing", "/nowhere/at_all"])
def test_arguments_that_name_no_run_are_refused(
    sweep: Sweep, runs: Path, data: Path, word: str
) -> None:
    with pytest.raises(UserError, match="there is no run"):
        adopt([word], sweep, options_of(runs, data))

    assert not list(runs.iterdir())


# Kills


KILLED = """
import os, shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
elsewhere, data, root = map(Path, sys.argv[2:])

import optuna, torch
from adopting import SMALL_SWEEP, options_of, records
from sda_ray.sweep.prior_runs import adopt
from sda_ray.runs.path import RunPath
from sda_ray.runs.inventory import read_entry

os.fsync = lambda handle: None  # only a power cut would miss it
left = 0

def counted(event, args):
    r"Dies before the n-th change of a file."
    global left

    if event in ("os.rename", "os.mkdir", "os.remove") or (event == "open" and args[2] & 3):
        left -= 1

        if left == 0:
            os._exit(9)

def child(n):
    global left
    left = n
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(counted)
    adopt([str(elsewhere)], SMALL_SWEEP, options_of(runs, data))
    os._exit(0)

n, code = 0, 9

while code == 9:
    n += 1
    runs = root / str(n)
    runs.mkdir()
    pid = os.fork()

    if pid == 0:
        try:
            child(n)
        finally:
            os._exit(1)

    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    for path in RunPath.all(runs):
        assert not read_entry(path).faults, (n, path)

    adopt([str(elsewhere)], SMALL_SWEEP, options_of(runs, data))
    found = records(runs, "x")
    assert len(found) == 2 and {r.index for r in found} == {1, 2}, n
    assert {r.run_id for r in found} == {p.id for p in RunPath.all(runs)}, n
    assert not list(runs.glob(".*")), n
    shutil.rmtree(runs)

assert code == 0, code
print("kills:", n - 1)
"""


def test_adoption_killed_at_any_change_is_completed_by_the_next(
    elsewhere: Path, data: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    here = str(Path(__file__).parents[1])
    words = [sys.executable, "-c", KILLED, here, str(elsewhere), str(data), str(tmp_path)]
    run = subprocess.run(words, env=env, capture_output=True, text=True)

    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    assert int(run.stdout.split("kills:")[1]) > 20


# Sweeps


def test_definition_that_differs_is_refused(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    adopt([str(elsewhere)], sweep, options_of(runs, data))
    journal = (sweep_directory(runs, "x") / "study.journal").read_bytes()

    with pytest.raises(UserError, match="exists and differs"):
        adopt([str(elsewhere)], replace(sweep, seed=1), options_of(runs, data))

    wider = replace(sweep, space=SPACE | {"learning_rate": loguniform(1e-5, 1e-1)}, trials=99)
    adopt([str(elsewhere)], wider, options_of(runs, data))
    found = read_sweep(runs, "x")

    assert found["definition"]["space"]["learning_rate"]["range"] == [1e-5, 1e-1]
    assert found["trials"] == sweep.trials
    assert (sweep_directory(runs, "x") / "study.journal").read_bytes() == journal


def test_driver_of_a_running_sweep_brings_them_in(
    elsewhere: Path, sweep: Sweep, runs: Path, data: Path
) -> None:
    directory = sweep_directory(runs, "x")
    adopt([str(by_id(elsewhere, "1" * 8))], sweep, options_of(runs, data))
    lease = Lease(directory / "lease.json", "x")
    study = Study(directory / "study.journal", "x", lease)
    driver = Driver(
        study,
        sweep.rules,
        lambda seen, fixed: propose(sweep.draw, seen, fixed=fixed),
        {"config": sweep.config, "runs": str(runs)},
        lambda: 0,
        lambda event, record: None,
        directory / "stop",
    )
    server, over = RequestServer(driver), threading.Event()

    def serve() -> None:
        while not over.wait(0.01):
            server()

    thread = threading.Thread(target=serve)
    thread.start()

    try:
        adopt([str(elsewhere)], sweep, options_of(runs, data))
        wider = replace(sweep, space=SPACE | {"learning_rate": loguniform(1e-5, 1e-1)})

        with pytest.raises(UserError, match=r"is running as it was: SPACE.* widened"):
            adopt([str(elsewhere)], wider, options_of(runs, data))
    finally:
        over.set()
        thread.join()
        lease.release()

    assert [r.index for r in study.records()] == [1, 2]
    assert {r.run_id for r in records(runs, "x")} == {path.id for path in RunPath.all(runs)}
