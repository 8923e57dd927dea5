r"""Tests for sda_ray.sweep.entry: a sweep runs the code that it was started with."""

import argparse
import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_code import FAKE, PACKAGE, SCRIPT, fake, spoil, sweep

from sda_ray.cli import options
from sda_ray.sweep import entry
from sda_ray.sweep.entry import code_of, differing, digests

__all__ = ["sweep"]  # fixtures


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    r"""A copy of the package, to be broken, in a directory that is also the root."""

    shutil.copytree(
        PACKAGE, tmp_path / "sda_ray", ignore=shutil.ignore_patterns("__pycache__", "origin.*")
    )
    (tmp_path / "tiny.py").write_text(SCRIPT)

    return tmp_path


def run(checkout: Path, env: dict[str, str], *words: str, timeout: float = 60) -> Any:
    module = [] if words[0].endswith(".py") else ["-m", "sda_ray"]

    return subprocess.run(
        [sys.executable, *module, *words],
        cwd=checkout,
        env={**env, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def test_hash_is_over_names_and_contents_of_what_counts(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("2")
    before = digests(tmp_path)

    assert list(before) == ["a.py", "sub/b.txt"]

    for name in ("__pycache__/a.pyc", ".git/x", "origin.json", "origin.patch", "c.pyc", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("3")

    assert digests(tmp_path) == before

    (tmp_path / "a.py").rename(tmp_path / "c.py")
    now = digests(tmp_path)

    assert code_of(now) != code_of(before) and differing(before, now) == ["a.py", "c.py"]


def test_way_in_needs_the_standard_library_alone() -> None:
    tree = ast.parse((PACKAGE / "entry.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {x.name for node in found if isinstance(node, ast.Import) for x in node.names}
    names |= {node.module or "." for node in found if isinstance(node, ast.ImportFrom)}

    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    assert not any(node.level for node in found if isinstance(node, ast.ImportFrom))


def test_way_in_knows_which_options_have_no_value() -> None:
    parsers = next(
        action.choices
        for action in options._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    flags = {x for a in parsers["sweep"]._actions if a.nargs == 0 for x in a.option_strings}

    assert flags <= set(entry.FLAGS)


@pytest.mark.parametrize(
    "words",
    [
        ("sweep", "tiny", "--trials", "8"),
        ("sweep", "--trials", "8", "tiny", "seed=1"),
        ("sweep", "--retry-failed", "tiny.py", "--runs=runs"),
        ("sweep", "tiny.py", "--root", "."),
        ("sweep", "other.py", "--name", "tiny"),
        ("tiny.py", "--trials", "8"),
    ],
)
def test_recorded_code_runs_whatever_is_broken(
    checkout: Path, sweep: Path, env: dict[str, str], words: tuple[str, ...]
) -> None:
    place = fake(sweep)
    spoil(checkout, "cli", "config", "errors", "files", "options")
    out = run(checkout, env, *words).stdout

    assert "sweep 'tiny' goes on with the code that it was started with" in out

    if words[0] == "sweep":
        assert f"recorded code runs {['sda-ray', *words]} {place}" in out
    else:
        assert out.count("recorded code runs") >= 2  # Sweep and main, of the script


@pytest.mark.parametrize(
    "words",
    [
        ("sweep", "tiny", "--code", "current"),
        ("sweep", "tiny.py", "--fork"),
        ("sweep", "tiny", "--help"),
        ("sweep", "tiny.py", "--name", "other"),
        ("runs",),
    ],
)
def test_recorded_code_runs_only_where_it_is_meant(
    checkout: Path, sweep: Path, env: dict[str, str], words: tuple[str, ...]
) -> None:
    fake(sweep)
    out = run(checkout, env, *words).stdout

    assert "recorded code runs" not in out and "started with" not in out.replace("\n", " ")[:200]


def test_changed_recorded_code_is_not_run(
    checkout: Path, sweep: Path, env: dict[str, str]
) -> None:
    place = fake(sweep)
    (place / "sda_ray" / "entry.py").write_text(FAKE + "\n")
    done = run(checkout, env, "sweep", "tiny.py")

    assert done.returncode == 2 and "is not what was recorded" in done.stdout
    assert "recorded code runs" not in done.stdout


def test_sweep_ends_on_the_code_that_it_was_started_with(
    checkout: Path, env: dict[str, str], data: Path
) -> None:
    r"""A sweep whose package is broken in its middle, whose driver is killed, and which goes on."""

    shutil.copytree(data, checkout / "data")
    runs = checkout / "runs"

    def codes() -> list[str]:
        records = [json.loads(file.read_bytes()) for file in runs.glob("*/run.json")]
        return [attempt["code"] for record in records for attempt in record["attempts"]]

    def wait(what: Callable[[], bool], process: Any) -> None:
        deadline = time.monotonic() + 180

        while not what():
            assert process.poll() is None and time.monotonic() < deadline, "nothing happens"
            time.sleep(0.05)

    process = subprocess.Popen(
        [sys.executable, "-m", "sda_ray", "sweep", "tiny.py", "--parallel", "1"],
        cwd=checkout,
        env={**env, "PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    try:
        # Before its trials have begun to import anything, and once they have
        wait((runs / "sweeps" / "tiny" / "study.journal").exists, process)
        spoil(checkout, "trial", "nn", "executor", "cli", "train")
        wait(lambda: len(codes()) >= 2, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    code = json.loads((runs / "sweeps" / "tiny" / "sweep.json").read_bytes())["code"]
    done = run(checkout, env, "sweep", "tiny", timeout=240)

    assert done.returncode == 0, done.stdout
    assert "5 files of" in done.stdout and "cli.py, executor.py, nn.py, train.py" in done.stdout
    assert "Best configuration" in done.stdout and set(codes()) == {code}

    # As a script, too, which cannot even import the package
    done = run(checkout, env, "tiny.py")

    assert done.returncode == 0 and "5 files of" in done.stdout, done.stdout

    # The broken code is not taken up by accident, other code is if that is wanted
    shutil.rmtree(checkout / "sda_ray")
    shutil.copytree(PACKAGE, checkout / "sda_ray")

    with open(checkout / "sda_ray" / "outcome.py", "a") as f:
        f.write("# edited\n")

    done = run(checkout, env, "sweep", "tiny", "--code", "current")
    now = json.loads((runs / "sweeps" / "tiny" / "sweep.json").read_bytes())["code"]

    assert done.returncode == 0 and "outcome.py" in done.stdout, done.stdout
    assert now == code_of(digests(checkout / "sda_ray")) != code
    assert {file.name for file in (runs / "sweeps" / "tiny" / "code").iterdir()} == {
        now[:16],
        code[:16],
    }
