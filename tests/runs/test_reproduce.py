r"""Tests for reproductions: whether the first epochs of a run come out again."""

import json
import math
from pathlib import Path
from typing import Any

import h5py
import pytest
from opened import DISABLED, runs

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.core.files import write_json
from sda_ray.data.dataset import fingerprint
from sda_ray.runs.export import first_attempt, reproduce_run
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.train import train_run

__all__ = ["runs"]  # fixture

FILES = ("config.json", "state.pth", "checkpoint.pth", "metrics.jsonl", "run.json", "lease.json")


def train(runs: Path, config: Config, data: Path, init: Path | None = None, **record: Any) -> Run:
    run = Run(runs, config, wandb=DISABLED, record={"data": fingerprint(data)} | record)
    list(train_run(run, data, rungs=record.get("rungs", ()), init=init))
    run.close("finished")

    return run


def again(run: Run, data: Path, epochs: int = 1) -> tuple[str, list[str]]:
    return reproduce_run(run.path, run.config, data, epochs, "cpu")


def edit_loss(path: RunPath, epoch: int, **losses: float) -> None:
    lines = [json.loads(line) for line in path.metrics.read_text().splitlines()]
    lines[epoch - 1] |= losses
    path.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_run_comes_out_with_the_same_bits_and_is_only_read(
    runs: Path, data: Path, small: Config
) -> None:
    run = train(runs, small, data, rungs=[1])
    before = {file: file.read_bytes() for file in run.path.directory.iterdir()}

    assert again(run, data, epochs=3) == ("", [])
    assert {file: file.read_bytes() for file in run.path.directory.iterdir()} == before
    assert [path.directory for path in RunPath.all(runs)] == [run.path.directory]


def test_first_bit_that_differs_is_found_beside_its_cause(
    runs: Path, data: Path, small: Config
) -> None:
    run = train(runs, small, data)
    loss, error = run.lines[2]["loss_valid"], run.lines[2]["loss_valid_se"]
    edit_loss(run.path, 2, loss_valid=math.nextafter(loss, 2), loss_valid_se=error)
    assert again(run, data) == ("", [])

    fault, causes = again(run, data, epochs=3)
    assert fault.startswith("epoch 2 differs: loss_valid ") and f"{loss!r} now" in fault
    assert f"{(math.nextafter(loss, 2) - loss) / error:.2g} times the standard error" in fault
    assert causes == []

    record = json.loads(run.path.record.read_text())
    record["attempts"][0] |= {"threads": 7, "device": "abacus", "code": "0" * 64, "dirty": True}
    record["attempts"][0]["versions"]["torch"] = "1.0"
    write_json(run.path.record, record | {"exact": False})
    _, causes = again(run, data, epochs=2)

    assert any(cause == "Different threads: 7 then, 1 now." for cause in causes)
    assert any(cause.startswith("Different code: 000000000000, commit ") for cause in causes)
    assert [word for word in ("device: abacus", "torch: 1.0") if word in " ".join(causes)]
    assert causes[-1].startswith("The run itself resumed elsewhere")

    edit_loss(run.path, 2, loss_valid=loss)  # the same bits: nothing has to be explained
    fault, (note,) = again(run, data, epochs=2)
    assert not fault and "threads" in note and note.endswith(" and code made no difference.")


def test_other_data_are_refused(runs: Path, data: Path, small: Config, tmp_path: Path) -> None:
    run = train(runs, small, data)
    (tmp_path / "other").mkdir()

    for split in ("train", "valid"):
        with (
            h5py.File(data / f"{split}.h5") as f,
            h5py.File(tmp_path / "other" / f"{split}.h5", "w") as g,
        ):
            g["x"] = 2 * f["x"][:]

    with pytest.raises(UserError, match=r"was trained on other data\. .*with --data"):
        again(run, tmp_path / "other")


def test_run_from_weights_of_another_follows_that_one(
    runs: Path, data: Path, small: Config
) -> None:
    parent = train(runs, small | {"epochs": 1}, data)
    run = train(runs, small, data, parent.path.directory, parent=parent.path.id)
    assert again(run, data) == ("", [])

    parent.path.directory.rename(runs / "elsewhere")

    with pytest.raises(UserError, match=r"started with the weights of run .*Put that run back"):
        again(run, data)


def test_extended_run_is_trained_from_scratch(runs: Path, data: Path, small: Config) -> None:
    config = small | {"scheduler": "constant"}
    short = train(runs, config | {"epochs": 1}, data)
    record = {"parent": short.path.id, "extends": short.path.id}
    run = train(runs, config, data, short.path.directory, **record)

    assert again(run, data, epochs=3) == ("", [])


def test_what_cannot_be_reproduced_is_refused(runs: Path, data: Path, small: Config) -> None:
    run = train(runs, small, data)
    assert first_attempt(run.path)["threads"] == 1

    with pytest.raises(UserError, match=r"--epochs is 4, but .* has 3 epochs"):
        again(run, data, epochs=4)

    run.path.record.unlink()

    with pytest.raises(UserError, match=r"cannot be reproduced: no run\.json says"):
        first_attempt(run.path)
