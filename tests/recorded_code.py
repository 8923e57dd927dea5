r"""A sweep script, and the directory of a sweep that has recorded its code."""

import json
from pathlib import Path

import pytest
import scene

import sda_ray
from sda_ray.runs.record import code_of, digests
from sda_ray.sweep.code import Code

__all__ = ["FAKE", "PACKAGE", "SCRIPT", "fake", "record", "spoil", "sweep"]

PACKAGE = Path(sda_ray.__file__).parent

SCRIPT = scene.SCRIPT.replace('"epochs": 9', '"epochs": 27').replace("trials=8", "trials=4")

# A package that prints that it runs, and with which arguments
FAKE = """
import os, sys

print("recorded code runs", sys.argv, os.path.dirname(os.path.dirname(__file__)))
"""
FAKE_SCRIPT_SIDE = """
CONFIG = {}

def __getattr__(name):
    return lambda *args, **kwargs: print("recorded code runs", name)
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    r"""The directory of a sweep without a record."""

    directory = tmp_path / "runs" / "sweeps" / "tiny"
    directory.mkdir(parents=True)

    return directory


def record(directory: Path, code: str) -> None:
    (directory / "sweep.json").write_text(json.dumps({"code": code}))


def fake(directory: Path) -> Code:
    r"""Records code that is not ours, of the flat layout of earlier versions."""

    aside = directory / "aside" / "sda_ray"
    aside.mkdir(parents=True)
    (aside / "__init__.py").write_text(FAKE_SCRIPT_SIDE)
    (aside / "__main__.py").write_text(FAKE)
    hash = code_of(digests(aside))
    code = Code(hash, directory / "code" / hash[:16])
    (directory / "code").mkdir()
    aside.parent.rename(code.place)
    record(directory, code.hash)

    return code


def spoil(checkout: Path, *modules: str) -> None:
    r"""Writes a syntax error into modules of a package."""

    for module in modules:
        with open(checkout / "sda_ray" / f"{module}.py", "a") as f:
            f.write("\ndef (\n")
