r"""Tests for the layout: what each package may import, and what it must not load."""

import ast
import functools
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sda_ray

PACKAGE = Path(sda_ray.__file__).parent

# A package imports from those above it in this list, and from itself.
ORDER = [
    "core",
    "data",
    "nn",
    "assimilation",
    "training",
    "runs",
    "search",
    "storage",
    "cluster",
    "sweep",
    "plan",
    "report",
    "cli",
]

# Imports that still run the other way: module -> packages. Nothing is added here.
UPWARD: dict[str, set[str]] = {}

# Which packages may import the libraries that are heavy, or whose behaviour we work around.
IMPORTERS = {
    "optuna": {"search", "sweep", "report"},  # the report has its figures
    "ray": {"cluster", "storage", "plan", "cli"},
    "wandb": {"runs"},
}

MODULES = sorted(
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if file.parent != PACKAGE
)


@functools.cache
def imports(module: str) -> set[str]:
    r"""Returns what a module imports anywhere in it: `.package.module` for our own, else the library."""

    file = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    names: set[str] = set()

    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level]
            names.add("." + ".".join([*base, *filter(None, [node.module])]))

    return names


def neighbours(module: str) -> set[str]:
    r"""Returns which of our own modules a module imports."""

    return {name[1:] for name in imports(module) if name.startswith(".")} & set(MODULES)


def loaded_by(code: str) -> set[str]:
    r"""Returns the packages that a fresh interpreter has loaded after some code."""

    code += "\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name for name in run.stdout.split() if "." not in name}


def test_packages_are_those_in_order() -> None:
    assert {file.parent.name for file in PACKAGE.glob("*/__init__.py")} == set(ORDER)
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    floor = ORDER.index(module.split(".")[0])
    packages = {name[1:].split(".")[0] for name in imports(module) if name.startswith(".")}
    higher = {package for package in packages if package in ORDER[floor + 1 :]}

    assert higher == UPWARD.get(module, set())


def test_imports_have_no_cycle() -> None:
    graph = {module: neighbours(module) for module in MODULES if module not in UPWARD}
    assert set(graph) <= set(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_imported_through_their_faces(module: str) -> None:
    tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
            face = importlib.import_module(f"sda_ray.{node.module}")
            assert node.module in ORDER
            assert {alias.name for alias in node.names} <= set(face.__all__)


@pytest.mark.parametrize("package", ORDER[:-1])
def test_face_offers_what_is_there_and_no_module_by_that_name(package: str) -> None:
    face = importlib.import_module(f"sda_ray.{package}")
    modules = {file.stem for file in (PACKAGE / package).glob("*.py")}

    assert all(getattr(face, name) is not None for name in face.__all__)
    assert not modules & set(face.__all__)


@pytest.mark.parametrize("library", IMPORTERS)
def test_library_is_imported_only_where_it_may(library: str) -> None:
    importers = {module.split(".")[0] for module in MODULES if library in imports(module)}
    assert importers <= IMPORTERS[library]


@pytest.mark.parametrize("module", MODULES)
def test_package_is_imported_relatively_and_by_name(module: str) -> None:
    assert "sda_ray" not in imports(module)
    assert "import *" not in PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text()


def test_training_needs_neither_ray_nor_optuna_nor_wandb() -> None:
    loaded = loaded_by("import sda_ray.runs.train")

    assert "torch" in loaded
    assert not loaded & {"ray", "optuna", "wandb", "matplotlib", "pandas"}


def test_sweep_starts_without_what_only_trials_need() -> None:
    loaded = loaded_by(
        "import sda_ray.cli.main, sda_ray.cli.sweep, sda_ray.sweep.launch\n"
        "from sda_ray.cluster import local_gpus\n"
        "assert local_gpus() >= 0"
    )

    assert "optuna" in loaded
    assert not loaded & {"ray", "wandb", "matplotlib", "pandas", "scipy"}
    assert "torch" not in loaded or any(Path("/dev").glob("nvidia*"))


def test_driver_of_a_sweep_does_without_torch() -> None:
    loaded = loaded_by(
        "from sda_ray.cluster import execute\n"
        "from sda_ray.storage import serve_files\n"
        "from sda_ray.sweep import launch_sweep"
    )

    assert {"ray", "optuna"} < loaded and "torch" not in loaded


def test_package_is_light() -> None:
    loaded = loaded_by("import sda_ray; sda_ray.CONFIG; sda_ray.choice(1); dir(sda_ray)")
    assert not loaded & {"torch", "numpy", "h5py", "ray", "optuna", "wandb", "rich"}


def test_public_names_are_found() -> None:
    assert {"CONFIG", "Sweep", "load_score", "main"} < set(dir(sda_ray))
    assert all(getattr(sda_ray, name) is not None for name in dir(sda_ray))

    with pytest.raises(AttributeError, match="Swep"):
        _ = sda_ray.Swep  # type: ignore[attr-defined]


def test_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert sda_ray.__version__ == version("sda_ray")
    except PackageNotFoundError:
        pytest.skip("sda_ray is not installed, only on the path")
