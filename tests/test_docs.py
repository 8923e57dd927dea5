r"""Tests that what the documents show can be run: the use of a finished run, and the examples."""

import doctest
import importlib
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from networks import SMALL, small
from sweeping import make_sweep

from sda_ray import load_sweep
from sda_ray.core.config import save_config

TOP = Path(__file__).parents[1]

# Docstrings with examples that need no run
EXAMPLES = [
    f"sda_ray.{name}"
    for name in (
        *("core.keys", "core.space", "core.files", "search.promotion", "search.sampler"),
        *("assimilation.operators", "assimilation.skill"),
    )
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""Returns a root with a small finished run, by the name in the documents, and data."""

    root = tmp_path_factory.mktemp("root")
    run = root / "runs" / "crimson-cloud-4_6k7cjnx7"
    run.mkdir(parents=True)
    (root / "data").mkdir()
    torch.manual_seed(0)
    save_config(SMALL | {"parametrization": "v"}, run / "config.json")
    torch.save(small(64, parametrization="v").state_dict(), run / "state.pth")

    with h5py.File(root / "data" / "valid.h5", "w") as f:
        f["x"] = torch.randn(1, 16, 2, 64, 64).numpy()

    return root


@pytest.fixture(autouse=True)
def in_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.delenv("SDA_RAY_ROOT", raising=False)


def blocks(file: str, begin: str, end: str) -> str:
    r"""Returns the Python code of a part of a document, with fewer steps and on the CPU."""

    text = (TOP / file).read_text().partition(begin)[2].partition(end)[0]
    code = "\n".join(re.findall("```python\n(.*?)```", text, re.DOTALL))
    code = re.sub(r', device="cuda"|\.to\("cuda"\)', "", code)

    return re.sub(r"steps=\d+", "steps=2", code)


@pytest.mark.parametrize(
    ("file", "begin", "end"),
    [("README.md", "**Use.**", "## Read on"), ("docs/use.md", "# Use", "## Data")],
)
def test_use_of_a_run_is_as_documented(file: str, begin: str, end: str) -> None:
    code = blocks(file, begin, end)
    assert "assimilate(" in code and "steps=2" in code

    exec(code, {})

    assert Path("samples.png").exists()


def test_skill_is_measured_as_documented() -> None:
    code = blocks("docs/skill.md", "# Skill", "## Observations")
    assert "spread_skill(x, truth)" in code and "steps=2" in code

    exec(code, {})


@pytest.fixture
def sweep(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    r"""Returns a function that makes a sweep, whose best run has a network, in a root of its own."""

    def make(name: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").symlink_to(root / "data")
        make_sweep(tmp_path / "runs", name, 6, epochs=4)
        directory = load_sweep(name).best["directory"]
        save_config(SMALL, directory / "config.json")
        torch.save(small(64).state_dict(), directory / "state.pth")

    return make


def test_sweep_opens_as_documented(sweep: Callable[[str], None]) -> None:
    sweep("width")
    exec(blocks("docs/use.md", "## Sweeps and runs as tables", "\0"), {})

    assert Path("slices.html").stat().st_size > 10_000


def test_notebook_runs(sweep: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    sweep("demo")
    cells = json.loads((TOP / "examples" / "tour.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}

    for cell in cells:
        if cell["cell_type"] == "code":
            exec(re.sub(r"steps=\d+", "steps=2", "".join(cell["source"])), names)

    assert names["x"].shape == (4, 8, 2, 64, 64)
    assert names["sweep"].study.best_value == names["best"]["loss_valid"]


@pytest.mark.parametrize("module", EXAMPLES)
def test_example_in_docstrings_is_true(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))

    assert tried and not failed


def test_example_paints_the_assimilation(capsys: pytest.CaptureFixture[str]) -> None:
    main: Any = runpy.run_path(str(TOP / "examples" / "assimilate.py"))["main"]
    main(["crimson-cloud-4", *["--steps", "2", "--members", "2", "--output", "picture.png"]])

    assert "root-mean-square error, mean: " in capsys.readouterr().out
    assert Path("picture.png").stat().st_size > 10_000

    with pytest.raises(SystemExit):
        main(["--help"])

    assert "--guidance {gaussian,dps,mmps}" in capsys.readouterr().out
