r"""Tests for sda_ray.sweep.code: a sweep runs the code that it was started with."""

import importlib
import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_code import PACKAGE, SCRIPT, fake, record, spoil, sweep

import sda_ray
from sda_ray.core.errors import UserError
from sda_ray.sweep.code import (
    OtherCode,
    check_code,
    code_of,
    damage,
    differing,
    digests,
    keep_code,
    recorded_code,
    running,
)

__all__ = ["sweep"]  # fixtures


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    r"""A copy of the package, to be edited, in a directory that is also the root."""

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


def test_code_is_kept_whole_and_once(sweep: Path) -> None:
    code = keep_code(sweep)
    record(sweep, code.hash)

    assert recorded_code(sweep) == code
    assert not damage(code) and digests(code.package) == digests(PACKAGE)
    assert {"commit", "dirty", "package"} <= json.loads(
        (code.package / "origin.json").read_bytes()
    ).keys()

    before = (code.package / "__main__.py").stat().st_ino
    (sweep / "code" / ".new.tmp").mkdir()

    assert keep_code(sweep) == code
    assert (code.package / "__main__.py").stat().st_ino == before

    (code.package / "__main__.py").write_text("damaged")

    assert keep_code(sweep) == code
    assert not damage(code) and digests(code.package) == digests(PACKAGE)
    assert [file.name for file in (sweep / "code").iterdir()] == [code.place.name]


def test_code_that_is_not_what_was_recorded_is_refused(sweep: Path) -> None:
    code = fake(sweep)
    assert not damage(code)

    (code.package / "more.py").write_text("")

    assert "is not what was recorded" in damage(code)

    with pytest.raises(UserError, match=r"cannot be resumed .* is not what was .*--code current"):
        check_code(sweep)

    (code.package / "more.py").unlink()
    (code.package / "__pycache__").symlink_to(sweep)

    assert "is a link" in damage(code)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_code_of_another_user_is_refused(sweep: Path) -> None:
    code = fake(sweep)

    for part in (code.package / "__main__.py", code.package, code.place, code.place.parent):
        os.chown(part, 4321, -1)

        assert "belongs to another user" in damage(code)

        os.chown(part, 0, -1)

    (cache := code.package / "__pycache__").mkdir()
    (cache / "main.cpython-311.pyc").write_text("")
    os.chown(cache / "main.cpython-311.pyc", 4321, -1)

    assert "belongs to another user" in damage(code)


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("name", ["sweeps", "tiny", "code", ".", "sda_ray", "sda_ray/__main__.py"])
def test_code_that_others_may_change_is_refused(sweep: Path, name: str, mode: int) -> None:
    if mode == 0o020 and os.geteuid() != 0:
        pytest.skip("the group may be the caller's alone")

    place = fake(sweep).place
    known = {x.name: x for x in place.parents}
    part = known.get(name, place / name)
    part.chmod(part.stat().st_mode | mode)

    with pytest.raises(UserError, match=r"others may write to .*chmod go-w.*--code current"):
        check_code(sweep)


@pytest.mark.parametrize(
    "name",
    [
        *("numpy.py", "sda_ray/.hidden", "sda_ray/x.pyc", "sda_ray/core/errors/__init__.pyc"),
        *("sda_ray/origin.py", "sda_ray/__pycache__/x.py"),
    ],
)
def test_code_with_more_than_was_recorded_is_refused(sweep: Path, name: str) -> None:
    code = fake(sweep)
    (code.place / name).parent.mkdir(parents=True, exist_ok=True)
    (code.place / name).write_text("")

    assert f"{code.place / name} was not recorded" in damage(code)


def test_recorded_code_is_safe_whatever_the_umask(sweep: Path) -> None:
    before = os.umask(0)

    try:
        code = keep_code(sweep)
    finally:
        os.umask(before)

    sweep.joinpath("code").chmod(0o755)
    assert not damage(code)


def test_bytecode_is_not_run_in_place_of_recorded_code(sweep: Path, tmp_path: Path) -> None:
    code = fake(sweep)
    (tmp_path / "other.py").write_text("print('other code runs')\n")
    cache = importlib.util.cache_from_source(str(code.package / "__main__.py"))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(tmp_path / "other.py"), cache, invalidation_mode=mode)
    program = (
        f"from sda_ray.sweep.code import *; execute(Path({str(code.place)!r}), 'sda-ray', [])"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    words = [sys.executable, "-c", f"from pathlib import Path; {program}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)

    assert not damage(code)
    assert "recorded code runs ['sda-ray']" in done.stdout, done.stderr
    assert "other code runs" not in done.stdout


def test_files_that_differ_are_named(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_code(sweep)  # nothing is recorded
    code = fake(sweep)

    with pytest.raises(OtherCode, match=r"with its recorded code.*: [\w/]+\.py, ") as e:
        check_code(sweep)

    assert e.value.place == code.place and ", … (`sda-ray sweep" in str(e.value)

    check_code(sweep, "current")

    assert "stays in" in capsys.readouterr().out

    record(sweep, keep_code(sweep).hash)
    check_code(sweep)


def test_what_is_imported_later_is_the_recorded_code(sweep: Path) -> None:
    code = keep_code(sweep)
    before = list(sda_ray.__path__)
    was = sys.modules.pop("sda_ray.runs.figures", None)

    try:
        with running(code):
            module = importlib.import_module("sda_ray.runs.figures")
            assert Path(str(module.__file__)) == code.package / "runs" / "figures.py"
    finally:
        sys.modules.pop("sda_ray.runs.figures", None)

        if was is not None:
            sys.modules["sda_ray.runs.figures"] = was

    assert list(sda_ray.__path__) == before


def test_code_of_an_earlier_layout_runs_as_a_process_of_its_own(
    checkout: Path, env: dict[str, str], data: Path
) -> None:
    r"""Resuming runs the recorded copy, by name and as a script, also a damaged one never."""

    shutil.copytree(data, checkout / "data")
    directory = checkout / "runs" / "sweeps" / "tiny"
    directory.mkdir(parents=True)
    place = fake(directory).place
    done = run(checkout, env, "sweep", "tiny.py", "--trials", "8")

    assert "sweep 'tiny' resumes with its recorded code" in done.stdout, done.stdout
    assert f"recorded code runs {['sda-ray', 'sweep', 'tiny.py', '--trials', '8']} {place}" in (
        done.stdout
    )

    out = run(checkout, env, "tiny.py", "--trials", "8").stdout

    assert out.count("recorded code runs") >= 2  # Sweep and main, of the script

    for words in (("tiny.py", "--name", "other"), ("tiny", "--help")):
        assert "recorded code runs" not in run(checkout, env, "sweep", *words, "--wandb=x").stdout

    (place / "sda_ray" / "__main__.py").write_text("print('recorded code runs')\n")
    done = run(checkout, env, "sweep", "tiny.py")

    assert done.returncode == 2 and "is not what was recorded" in done.stdout
    assert "recorded code runs" not in done.stdout


def test_sweep_ends_on_the_code_that_it_was_started_with(
    checkout: Path, env: dict[str, str], data: Path
) -> None:
    r"""A sweep whose package is broken in its middle, whose driver is killed, and is resumed."""

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
    broken = ("cluster/trial", "nn/score", "runs/train")

    try:
        # Before its trials have begun to import anything, and once they have
        wait((runs / "sweeps" / "tiny" / "study.journal").exists, process)
        spoil(checkout, *broken)
        wait(lambda: len(codes()) >= 2, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    code = json.loads((runs / "sweeps" / "tiny" / "sweep.json").read_bytes())["code"]

    # The edits are there, and do no harm to what a process imports before it knows the sweep
    for module in broken:
        shutil.copy(PACKAGE / f"{module}.py", checkout / "sda_ray" / f"{module}.py")

    with open(checkout / "sda_ray" / "nn" / "score.py", "a") as f:
        f.write("raise RuntimeError('edited')\n")

    done = run(checkout, env, "sweep", "tiny", timeout=240)

    assert done.returncode == 0, done.stdout
    assert "1 file of" in done.stdout and "nn/score.py" in done.stdout
    assert "Best configuration" in done.stdout and set(codes()) == {code}

    # By the script, too
    done = run(checkout, env, "tiny.py")

    assert done.returncode == 0 and "1 file of" in done.stdout, done.stdout

    # Other code is taken up if that is asked for
    shutil.copy(PACKAGE / "nn" / "score.py", checkout / "sda_ray" / "nn" / "score.py")

    with open(checkout / "sda_ray" / "runs" / "figures.py", "a") as f:
        f.write("# edited\n")

    done = run(checkout, env, "sweep", "tiny", "--code", "current")
    now = json.loads((runs / "sweeps" / "tiny" / "sweep.json").read_bytes())["code"]

    assert done.returncode == 0 and "runs/figures.py" in done.stdout, done.stdout
    assert now == code_of(digests(checkout / "sda_ray")) != code
    assert {file.name for file in (runs / "sweeps" / "tiny" / "code").iterdir()} == {
        now[:16],
        code[:16],
    }
