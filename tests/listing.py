r"""Tiny run directories, and the command that lists them."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from sda_ray.cli.main import main
from sda_ray.core.config import CONFIG
from sda_ray.core.errors import UserError
from sda_ray.runs.inventory import Entry, read_entry
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run

__all__ = ["SMALL", "a", "entry_of", "lease_of", "made", "rewrite", "runs", "sda"]

SMALL = CONFIG | {
    "window": 3,
    "embedding": 8,
    "hidden_channels": (4, 8),
    "hidden_blocks": (1, 1),
    "epochs": 3,
    "batch_size": 8,
}


def make(runs: Path, data: Path, id: str, epochs: int | None = None, **more: Any) -> RunPath:
    r"""Trains a run, to its end or for some epochs."""

    record = {"sweep": more.pop("sweep", None)}
    run = Run(runs, SMALL | more, id=id, wandb=Wandb("disabled"), record=record)
    training = train_run(run, data)

    for metrics in training:
        if metrics["epoch"] == epochs:
            break

    training.close()  # type: ignore[attr-defined]
    run.close("finished" if epochs is None else "interrupted")

    return run.path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""Two finished runs, one of them of a sweep, and one that was interrupted."""

    root = tmp_path_factory.mktemp("inventory")
    rng = np.random.default_rng(0)
    (root / "data").mkdir()

    for name, count in {"train": 8, "valid": 2}.items():
        with h5py.File(root / "data" / f"{name}.h5", "w") as file:
            file["x"] = rng.standard_normal((count, 4, 2, 8, 8), dtype=np.float32)

    make(root / "runs", root / "data", "aaaaaaaa", sweep="width")
    make(root / "runs", root / "data", "bbbbbbbb", learning_rate=1e-3)
    make(root / "runs", root / "data", "cccccccc", epochs=1)

    return root / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


@pytest.fixture
def a(runs: Path) -> RunPath:
    return RunPath.find(runs, "aaaaaaaa")


@pytest.fixture
def sda(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    r"""Runs `sda-ray runs …` and returns what it prints; with --json, decoded."""

    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal

    def run(*words: str) -> Any:
        try:
            main(argv=["runs", *words, "--runs", str(runs), "--root", str(runs.parent)])
        except SystemExit:
            raise UserError(capsys.readouterr().err) from None

        first, _, printed = capsys.readouterr().out.partition("\n")

        return json.loads(f"{first}\n{printed}") if "--json" in words else printed

    return run


def entry_of(path: RunPath) -> Entry:
    entry = read_entry(path)
    assert entry is not None

    return entry


def rewrite(path: RunPath, **changes: Any) -> None:
    record = json.loads(path.record.read_text()) | changes
    path.record.write_text(json.dumps(record))


def lease_of(path: RunPath, **changes: Any) -> None:
    path.lease.write_text(json.dumps(json.loads(path.lease.read_text()) | changes))
