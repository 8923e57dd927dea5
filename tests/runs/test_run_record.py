r"""Tests for sda_ray.runs.record: `run.json`, and what it says about the code of a run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sda_ray
from sda_ray.core.errors import UserError
from sda_ray.runs.path import RunPath
from sda_ray.runs.record import read_record

CODE = """
import sys
from contextlib import nullcontext
from pathlib import Path
import json
from sda_ray.runs.path import RunPath
from sda_ray.runs.record import provenance, save_diff
save_diff(RunPath(Path(sys.argv[1])), nullcontext)
print(json.dumps(provenance()))
"""

Record = Callable[[], dict[str, object]]


# What a record holds


def written(tmp_path: Path, content: object) -> RunPath:
    path = RunPath(tmp_path)
    path.record.write_text(json.dumps(content))

    return path


def test_record_may_lack_keys_and_have_those_of_later_versions(tmp_path: Path) -> None:
    assert read_record(RunPath(tmp_path)) == {}

    attempt = {"number": 1, "versions": {"torch": "2.6"}, "later": [3]}
    content = {"status": "paused", "attempts": [attempt], "later": {"x": 1}, "trial": None}
    assert read_record(written(tmp_path, {**content, "sweep": None})) == content


@pytest.mark.parametrize(
    "content",
    [[], "x", {"status": 3}, {"exact": "yes"}, {"attempts": [3]}, {"rungs": [1.5]}]
    + [{"attempts": [{"versions": []}]}, {"attempts": [{"started": 5}]}, {"parent": ["x"]}],
)
def test_damaged_record_is_a_clear_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(UserError, match=r"run\.json is damaged: "):
        read_record(written(tmp_path, content))


# Provenance


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    r"""A repository of its own that holds the package."""

    directory = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(sda_ray.__file__).parent, directory / "sda_ray", ignore=ignore)
    (directory / "README.md").write_text("before\n")
    own = ("-c", "user.name=x", "-c", "user.email=x")

    for words in (("init", "-q"), ("add", "."), (*own, "commit", "-q", "-m", "x")):
        subprocess.run(["git", *words], cwd=directory, check=True)

    return directory


@pytest.fixture
def record(checkout: Path, tmp_path: Path, env: dict[str, str]) -> Record:
    def run() -> dict[str, object]:
        (tmp_path / "run").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-B", "-c", CODE, str(tmp_path / "run")],
            env=env | {"PYTHONPATH": str(checkout)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return {"errors": done.stderr, **json.loads(done.stdout)}

    return run


def test_diff_of_tracked_files_is_saved_for_its_owner_alone(
    checkout: Path, tmp_path: Path, record: Record
) -> None:
    (checkout / "secret.txt").write_text("untracked\n")
    assert record()["dirty"] is False
    assert not (tmp_path / "run" / "diff.patch").exists()

    (checkout / "README.md").write_text("after\n")
    errors = checkout / "sda_ray" / "core" / "errors.py"
    errors.write_text(errors.read_text() + "# more\n")
    subprocess.run(["git", "config", "diff.external", "/bin/false"], cwd=checkout, check=True)
    assert record()["dirty"] is True
    patch = tmp_path / "run" / "diff.patch"
    assert patch.stat().st_mode & 0o777 == 0o600
    assert "+after" in patch.read_text() and "untracked" not in patch.read_text()

    # It leads from the commit to the code
    subprocess.run(
        ["git", "stash", "-q"], cwd=checkout, check=True, env={**os.environ, **IDENTITY}
    )
    subprocess.run(["git", "apply", str(patch)], cwd=checkout, check=True)
    assert (checkout / "README.md").read_text() == "after\n"
    assert errors.read_text().endswith("# more\n")


def test_commit_is_that_of_the_package_whatever_git_is_told(
    checkout: Path, tmp_path: Path, record: Record, env: dict[str, str]
) -> None:
    before = record()
    subprocess.run(["git", "init", "-q", str(tmp_path / "other")], check=True)
    env |= {"GIT_DIR": str(tmp_path / "other" / ".git"), "GIT_INDEX_FILE": "index"}  # as in a hook

    assert before["commit"] and record() == before


def test_large_diff_is_not_kept(checkout: Path, tmp_path: Path, record: Record) -> None:
    (checkout / "README.md").write_text("x" * 2**20)
    found = record()
    assert found["dirty"] is True and "keeps at most 1048576" in str(found["errors"])
    assert not (tmp_path / "run" / "diff.patch").exists()


def test_package_that_is_not_in_a_repository_has_no_commit(
    checkout: Path, tmp_path: Path, record: Record
) -> None:
    shutil.rmtree(checkout / ".git")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # as a venv in another one
    found = record()
    assert (found["commit"], found["dirty"]) == (None, None)
    assert not (tmp_path / "run" / "diff.patch").exists()


IDENTITY = {
    f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}
