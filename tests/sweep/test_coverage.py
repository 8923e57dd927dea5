r"""Tests for sda_ray.sweep.coverage: which runs a sweep covers, and what they are worth to it."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from adopting import SPACE, by_id, bytes_of, collected, elsewhere, record_of, records, runs, sweep

from sda_ray.core.config import CONFIG, load_config
from sda_ray.core.lease import Lease
from sda_ray.core.space import choice, loguniform
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.score import load_score
from sda_ray.runs.metrics import read_history
from sda_ray.runs.path import RunPath, sweep_directory
from sda_ray.runs.record import read_record
from sda_ray.search.promotion import decide
from sda_ray.search.sampler import view
from sda_ray.search.study import Study
from sda_ray.sweep.definition import Sweep
from sda_ray.sweep.prior_runs import adopt
from sda_ray.training.validation import DRAWS, Validation

__all__ = ["elsewhere", "runs", "sweep"]  # fixtures

REFERENCE = Path(__file__).parents[1] / "reference" / "runs" / "crimson-cloud-4_6k7cjnx7"


# Runs by us


def test_what_the_sweep_does_not_cover_is_refused_with_all_reasons(
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


def test_run_on_other_data_is_measured_on_those_of_the_sweep(
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
    assert refusal.reason == "it does not tell its seconds, which is an objective of the sweep"

    adopt([str(source)], several, runs, data, record_of)
    lease = Lease(tmp_path / "lease.json", "x")
    file = sweep_directory(runs, "x") / "study.journal"
    (record,) = Study(file, "x", lease, names).records()
    lease.release()
    assert record.finals == prior.finals


# Runs by SDA


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
    adopt([str(REFERENCE)], upstream, runs, large, record_of)
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


# Strangers


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
    r"""Leaves nothing but the config of a run, and returns where its weights have been."""

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
        (lambda p: bare(p).symlink_to("/etc/passwd"), "out of the run directory"),
    ],
)  # fmt: skip
def test_files_of_strangers_are_refused(
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
