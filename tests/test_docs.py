r"""Tests that what the documents show can be run: the use of a finished run, and the examples."""

import ast
import doctest
import importlib
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import h5py
import pytest
import torch
from networks import SMALL, small
from sweeping import make_sweep

import sda_ray
from sda_ray import load_sweep
from sda_ray.cli.options import COMMANDS
from sda_ray.cli.options import sda_ray as commands
from sda_ray.core.config import save_config
from sda_ray.data.dataset import check_data

TOP = Path(__file__).parents[1]

# Docstrings with examples that need no run
EXAMPLES = [
    f"sda_ray.{name}"
    for name in (
        *("core.config", "core.space", "core.files", "search.promotion", "search.sampler"),
        *("assimilation.operators", "assimilation.skill"),
    )
]

PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]

# Options of other programs that the documents name by themselves
FOREIGN = {"--multirun", "--no-kill", "--signal", "--time"}


def options(words: list[str], command: click.Command = commands) -> set[str]:
    r"""Returns the options of the command that words begin with. Raises if there is none."""

    known = {option for param in command.params for option in param.opts}

    if not isinstance(command, click.Group):
        return known | {"--help"}

    context, names = click.Context(command), command.list_commands(click.Context(command))
    action = words[0] if words and words[0] in names else names[0] if command != commands else None
    assert action is not None, f"there is no command '{' '.join(words)}'"
    found = command.get_command(context, action)
    assert found is not None

    return known | options(words[1:], found)


def spans(text: str) -> list[str]:
    r"""Returns the code of a document: lines of blocks without comments, and spans in lines."""

    fenced = re.findall(r"```.*\n([\s\S]*?)```", text)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*\n[\s\S]*?```", "", text))

    return [re.sub(r"(^|\s)#.*", "", x) for x in "\n".join(fenced).split("\n")] + inline


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_documents_exist(page: Path) -> None:
    every = set().union(*(options([name]) for name in COMMANDS))

    for code in spans(page.read_text()):
        named = re.findall(r"--[a-z][a-z-]*", code.partition(" -- ")[0])

        if match := re.search(r"sda-ray +((?:[a-z]+ ?)*)([^'\"]*)", code):
            named = re.findall(r"--[a-z][a-z-]*", match[2].partition(" -- ")[0])
            assert {*named} <= options(match[1].split()), f"{page.name}: `{code}`"
        elif code.startswith("--") and not FOREIGN & {*named}:
            assert {*named} <= every, f"{page.name}: `{code}`"


def test_reference_has_all_public_names() -> None:
    text = (TOP / "docs" / "reference.md").read_text()
    names = {*re.findall(r"^::: sda_ray\.(\w+)$", text, re.M), "CONFIG"}

    assert names == {*dir(sda_ray)} - {"__version__"}


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


RECIPES = re.findall(r"```python\n([\s\S]*?)```", (TOP / "docs" / "cookbook.md").read_text())


@pytest.mark.parametrize("code", [code for code in RECIPES if "Sweep(" in code])
def test_recipe_is_a_sweep(code: str) -> None:
    scope: dict[str, Any] = {"__name__": "recipe"}
    exec(code, scope)

    scope["sweep"].check()


def test_recipe_makes_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()

    exec(next(code for code in RECIPES if "h5py" in code), {})

    assert check_data(Path("own")).length == 16


def test_messages_that_are_explained_exist() -> None:
    trees = [ast.parse(path.read_text()) for path in (TOP / "sda_ray").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    source = [x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    texts = [re.sub(r"%[sd.0-9]*[sdfr]", "…", x) for x in source]
    rows = re.findall(r"^\| `([^`]*)` \|", (TOP / "docs" / "troubleshooting.md").read_text(), re.M)

    for row in rows:
        for part in filter(None, row.split("…")):
            assert any(part in piece for text in texts for piece in text.split("…")), part
