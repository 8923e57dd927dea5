r"""Hyperparameter sweeps for score-based data assimilation, on Ray Tune and Optuna."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where each public name lives. Modules are imported at first use: `import sda_ray` stays light.
_MODULES = {
    "cli.main": ["main"],
    "core.config": ["CONFIG"],
    "data.dataset": ["TrajectoryDataset"],
    "sweep.definition": ["Sweep"],
    "nn.diffusion": ["SubSubVPSDE", "SubVPSDE", "VPSDE", "load_sde"],
    "data.flow": ["KolmogorovFlow", "coarsen", "vorticity"],
    "nn.guidance": ["DPSGaussianScore", "GaussianScore"],
    "nn.score": ["load_score", "make_score"],
    "core.space": ["choice", "integer", "loguniform", "uniform"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sda_ray' has no attribute {name!r}")

    return getattr(import_module(f"sda_ray.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
