r"""What the bits of a run depend on beside its config.

A process finds it out once, for all runs that it trains one after the other: what it has imported
stays as it was at that time.
"""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core.files import write_atomic
from ..sweep.code import code_of, digests

if TYPE_CHECKING:
    import torch

__all__ = ["differences", "origin", "provenance", "save_diff"]

logger = logging.getLogger(__name__)

PACKAGES = (
    "coolname",
    "h5py",
    "numpy",
    "optuna",
    "pillow",
    "ray",
    "rich",
    "wandb",
)

DECISIVE = ("sda_ray", "numpy", "torch")  # the packages that bits depend on

PACKAGE = Path(__file__).resolve().parents[1]
ORIGIN = PACKAGE / "origin.json"  # of a copy of the package in the record of a sweep
LARGEST = 2**20  # bytes of a diff that is kept


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    r"""Returns what bits depend on beside the config: versions, code, device and threads."""

    import torch

    cuda = torch.device(device).type == "cuda"

    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "code": _code(),
        "versions": {**_versions(), "torch": str(torch.__version__)},  # which build, too
        **_commit(),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    r"""Returns in which decisive respects two provenances differ."""

    def decisive(found: dict[str, Any]) -> dict[str, Any]:
        versions = {name: found.get("versions", {}).get(name) for name in DECISIVE}
        return {"device": found.get("device"), "threads": found.get("threads"), **versions}

    then = decisive(before)
    differ = [key for key, value in decisive(now).items() if then[key] != value]

    if (was := before.get("code")) and now.get("code") not in (None, was):
        differ.append("code")

    return differ


def origin() -> tuple[dict[str, Any], bytes | None]:
    r"""Returns where the package is from, and how it differs from its commit, for a copy of it."""

    return {"package": str(PACKAGE), "host": platform.node(), **_commit()}, _diff()


@cache
def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "sda_ray": __version__,
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


@cache
def _code() -> str:
    r"""Returns the hash of the package that this process has begun to import."""

    return code_of(digests(PACKAGE))


@cache
def _commit() -> dict[str, Any]:
    r"""Returns the commit of the package's own repository, if it runs from one or is a copy."""

    if ORIGIN.is_file():
        known = json.loads(ORIGIN.read_bytes())
        return {key: known.get(key) for key in ("commit", "dirty")}

    if not _is_tracked():
        return {"commit": None, "dirty": None}

    return {
        "commit": (_git("rev-parse", "HEAD") or b"").decode().strip() or None,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def save_diff(directory: Path, hold: Callable[[], AbstractContextManager[None]]) -> None:
    r"""Saves how the package's own repository differs from its commit as `diff.patch`, if it does.

    Untracked files are left out. The file is for its owner alone; that of an earlier attempt is
    replaced only if there is something to say.

    Arguments:
        directory: The directory of the run.
        hold: Entered around the write, see :meth:`sda_ray.core.lease.Lease.hold`.
    """

    diff = _diff()

    if diff and len(diff) > LARGEST:
        logger.warning(
            "The code differs from its commit by %d bytes, but at most %d are kept as diff.patch.",
            len(diff),
            LARGEST,
        )
    elif diff:
        with hold():
            write_atomic(directory / "diff.patch", diff, mode=0o600)


@cache
def _diff() -> bytes | None:
    # Neither the user's settings nor programs named in the repository shall have a part in it
    options = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "--binary")

    if ORIGIN.is_file():
        return patch.read_bytes() if (patch := ORIGIN.with_suffix(".patch")).is_file() else None

    return _git("diff", *options, "HEAD") if _is_tracked() else None


@cache
def _is_tracked() -> bool:
    r"""Tells whether the package runs from its repository, and not a venv in another one."""

    return _git("ls-files", "--error-unmatch", "__init__.py") is not None


def _git(*command: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *command], cwd=PACKAGE, capture_output=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None

    return done.stdout if done.returncode == 0 else None


@cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]

    return names[0] if names else platform.processor() or platform.machine()
