r"""Tests for sda_ray.sweep.code: the code that a sweep was started with is kept, and told apart."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from recorded_code import PACKAGE, fake, record, sweep

import sda_ray
from sda_ray.core.errors import UserError
from sda_ray.sweep.code import OtherCode, check_code, keep_code, running
from sda_ray.sweep.entry import Refused, digests, recorded, verify

__all__ = ["sweep"]  # fixtures


def test_code_is_kept_whole_and_once(sweep: Path) -> None:
    code = keep_code(sweep)
    record(sweep, code.hash)

    assert recorded(sweep) == (code.place, code.hash)
    assert verify(code.place, code.hash) == digests(PACKAGE)
    assert {"commit", "dirty", "package"} <= json.loads(
        (code.package / "origin.json").read_bytes()
    ).keys()

    before = (code.package / "entry.py").stat().st_ino
    (sweep / "code" / ".killed.tmp").mkdir()

    assert keep_code(sweep) == code
    assert (code.package / "entry.py").stat().st_ino == before

    (code.package / "entry.py").write_text("damaged")

    assert keep_code(sweep) == code
    assert verify(code.place, code.hash) == digests(PACKAGE)
    assert [file.name for file in (sweep / "code").iterdir()] == [code.place.name]


def test_code_that_is_not_what_was_recorded_is_refused(sweep: Path) -> None:
    place = fake(sweep)
    code = json.loads((sweep / "sweep.json").read_bytes())["code"]
    verify(place, code)

    (place / "sda_ray" / "more.py").write_text("")

    with pytest.raises(Refused, match="is not what was recorded"):
        verify(place, code)

    with pytest.raises(UserError, match=r"cannot go on .* is not what was .*--code current"):
        check_code(sweep)

    (place / "sda_ray" / "more.py").unlink()
    (place / "sda_ray" / "__pycache__").symlink_to(sweep)

    with pytest.raises(Refused, match="is a link"):
        verify(place, code)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_code_of_another_user_is_refused(sweep: Path) -> None:
    place = fake(sweep)
    code = json.loads((sweep / "sweep.json").read_bytes())["code"]

    for part in (place / "sda_ray" / "entry.py", place / "sda_ray", place, place.parent):
        os.chown(part, 4321, -1)

        with pytest.raises(Refused, match="belongs to another user"):
            verify(place, code)

        os.chown(part, 0, -1)

    (cache := place / "sda_ray" / "__pycache__").mkdir()
    (cache / "entry.cpython-311.pyc").write_text("")
    os.chown(cache / "entry.cpython-311.pyc", 4321, -1)

    with pytest.raises(Refused, match="belongs to another user"):
        verify(place, code)


def test_process_that_runs_other_code_is_told(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_code(sweep)  # nothing is recorded
    place = fake(sweep)

    with pytest.raises(
        OtherCode, match=r"with the code that it was started with.*: \w+\.py, "
    ) as e:
        check_code(sweep)

    assert e.value.place == place and ", … (--code current" in str(e.value)

    check_code(sweep, "current")

    assert "kept in" in capsys.readouterr().out

    record(sweep, keep_code(sweep).hash)
    check_code(sweep)


def test_what_is_imported_later_is_the_recorded_code(sweep: Path) -> None:
    code = keep_code(sweep)
    before = list(sda_ray.__path__)
    was = sys.modules.pop("sda_ray.runs.outcome", None)

    try:
        with running(code):
            outcome = importlib.import_module("sda_ray.runs.outcome")
            assert Path(str(outcome.__file__)) == code.package / "outcome.py"
    finally:
        sys.modules.pop("sda_ray.runs.outcome", None)

        if was is not None:
            sys.modules["sda_ray.runs.outcome"] = was

    assert list(sda_ray.__path__) == before
