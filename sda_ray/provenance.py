r"""What the bits of a run depend on beside its config."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["provenance"]

PACKAGES = ("sda_ray", "torch", "numpy", "h5py", "ray", "optuna", "wandb")


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    r"""Returns what bits depend on beside the config: versions, code, device and threads."""

    def git(*command: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    def installed(package: str) -> str:
        try:
            return version(package)
        except ImportError:
            return "not installed"

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except FileNotFoundError:
        commit, changes = None, None

    cuda = torch.device(device).type == "cuda"

    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{package: installed(package) for package in PACKAGES},
        },
        "commit": commit,
        "dirty": bool(changes),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]

    return names[0] if names else platform.processor() or platform.machine()
