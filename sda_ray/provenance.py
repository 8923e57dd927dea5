r"""What the bits of a run depend on beside its config."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import __version__

__all__ = ["differences", "provenance"]

PACKAGES = (
    "coolname",
    "h5py",
    "matplotlib",
    "numpy",
    "optuna",
    "ray",
    "rich",
    "torch",
    "wandb",
)

DECISIVE = ("sda_ray", "numpy", "torch")  # the packages that bits depend on


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    r"""Returns what bits depend on beside the config: versions, code, device and threads."""

    cuda = torch.device(device).type == "cuda"

    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "sda_ray": __version__,
            **{package: _version(package) for package in PACKAGES},
        },
        **_commit(),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    r"""Returns in which decisive respects two provenances differ."""

    def decisive(found: dict[str, Any]) -> dict[str, Any]:
        versions = {name: found.get("versions", {}).get(name) for name in DECISIVE}
        return {"device": found.get("device"), "threads": found.get("threads"), **versions}

    then = decisive(before)

    return [key for key, value in decisive(now).items() if then[key] != value]


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


def _commit() -> dict[str, Any]:
    r"""Returns the commit of the package's own repository, if it runs from one."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None

        return done.stdout.strip() if done.returncode == 0 else None

    here = Path(__file__)

    if git("ls-files", "--error-unmatch", here.name) is None:  # perhaps in a venv in another one
        return {"commit": None, "dirty": None}

    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ".")),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]

    return names[0] if names else platform.processor() or platform.machine()
