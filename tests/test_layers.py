r"""Tests for the layout of the package: what each module may import, and how long it may be."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import sda_ray

PACKAGE = Path(sda_ray.__file__).parent
MODULES = sorted(file.stem for file in PACKAGE.glob("[!_]*.py"))

# A module imports from its own floor and from those below.
FLOORS = {
    0: "allocator errors keys config files hdf5 holder lease precision presence provenance streams watchdog pieces entry checkup diagnosis",
    1: "domain data flow generation padding periodic solver stencil weights winograd mailbox limits attempts depot bucket patches",
    2: "nn score",
    3: "diffusion guidance owner folder",
    4: "averaging compilation training validation checkpoint samples pruner forecast",
    5: "settings cost record history tracking fragments runs extension train curves inventory reclaim outcome vigil cluster link local",
    6: "scaling probe room space seen danger grid methods sampler stopping journal study reconcile slots details render upload mirror halt head",
    7: "fitting queueing priors coverage shapes places nodes archive definition trial drawing losses driver desk lookout executor table progress leaving clusterfile away member snapshot copier fetching",
    8: "steering faults plan bill start adoption driving sweep session simulate browse sync join allocation jobs attach detach status overview doctor",
    9: "chosen options commands cli slurm views",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}

# Who may import the libraries that are heavy, or whose behaviour we have to work around.
IMPORTERS = {
    "optuna": {
        "priors",
        "adoption",
        "study",
        "journal",
        "sampler",
        "seen",
        "danger",
        "grid",
        "methods",
        "stopping",
    },
    "ray": {
        "trial",
        "executor",
        "patches",
        "lookout",
        "simulate",
        "cluster",
        "slots",
        "nodes",
        "scaling",
        "leaving",
        "clusterfile",
        "link",
        "status",
        "detach",
        "doctor",
    },
    "wandb": {"tracking", "upload", "fragments"},
}


def imports(module: str) -> set[str]:
    r"""Returns what a module imports anywhere in it: `.x` for our own modules, else the package."""

    names: set[str] = set()

    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add("." + node.module)
        elif isinstance(node, ast.ImportFrom):
            names |= {"." + alias.name for alias in node.names}

    return names


def neighbours(module: str) -> set[str]:
    r"""Returns which of our own modules a module imports."""

    return {name[1:] for name in imports(module) if name.startswith(".")} & set(MODULES)


def loaded_by(code: str) -> set[str]:
    r"""Returns the packages that a fresh interpreter has loaded after some code."""

    code += "\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name for name in run.stdout.split() if "." not in name}


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_floor(module: str) -> None:
    assert module in FLOOR, f"Give {module}.py a floor in {Path(__file__).name}."


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_go_up(module: str) -> None:
    higher = {name for name in neighbours(module) if FLOOR[name] > FLOOR[module]}
    assert not higher, f"{module} (floor {FLOOR[module]}) imports {higher}."


def test_imports_have_no_cycle() -> None:
    graph = {module: neighbours(module) for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("library", IMPORTERS)
def test_library_is_imported_only_where_it_may(library: str) -> None:
    assert {module for module in MODULES if library in imports(module)} <= IMPORTERS[library]


@pytest.mark.parametrize("module", MODULES)
def test_package_is_imported_relatively_and_by_name(module: str) -> None:
    assert "sda_ray" not in imports(module)
    assert "import *" not in (PACKAGE / f"{module}.py").read_text()


@pytest.mark.parametrize("module", MODULES)
def test_module_lists_its_names(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    assigned = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]

    assert "__all__" in [t.id for t in assigned if isinstance(t, ast.Name)]


@pytest.mark.parametrize("folder", ["sda_ray", "sweeps", "benchmarks", "tests", "tests/cluster"])
def test_files_are_short(folder: str) -> None:
    files = (PACKAGE.parent / folder).glob("*.py")
    lengths = {file.name: len(file.read_text().splitlines()) for file in files}

    assert {name: length for name, length in lengths.items() if length > 320} == {}


def test_training_needs_neither_ray_nor_optuna_nor_wandb() -> None:
    loaded = loaded_by("import sda_ray.train")

    assert "torch" in loaded
    assert not loaded & {"ray", "optuna", "wandb", "matplotlib", "pandas"}


def test_sweep_starts_without_what_only_trials_need() -> None:
    loaded = loaded_by(
        "import sda_ray.cli, sda_ray.commands, sda_ray.sweep\n"
        "from sda_ray.cluster import local_gpus\n"
        "assert local_gpus() >= 0"
    )

    assert "optuna" in loaded
    assert not loaded & {"ray", "wandb", "matplotlib", "pandas", "scipy"}
    assert "torch" not in loaded or any(Path("/dev").glob("nvidia*"))


def test_package_is_light() -> None:
    loaded = loaded_by("import sda_ray; sda_ray.CONFIG; sda_ray.choice(1); dir(sda_ray)")
    assert not loaded & {"torch", "numpy", "h5py", "ray", "optuna", "wandb", "rich"}


def test_public_names_are_found() -> None:
    assert all(getattr(sda_ray, name) is not None for name in sda_ray.__all__)

    with pytest.raises(AttributeError, match="has no attribute 'Swep'"):
        _ = sda_ray.Swep


def test_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert sda_ray.__version__ == version("sda_ray")
    except PackageNotFoundError:
        pytest.skip("sda_ray is not installed, only on the path")
