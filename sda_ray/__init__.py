r"""Hyperparameter sweeps for score-based data assimilation, on Ray Tune and Optuna."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where each public name lives. Modules are imported at first use: `import sda_ray` stays light.
_MODULES = {
    "cli": ["main"],
    "config": ["CONFIG"],
    "data": ["TrajectoryDataset"],
    "definition": ["Sweep"],
    "diffusion": ["SubSubVPSDE", "SubVPSDE", "VPSDE", "load_sde"],
    "flow": ["KolmogorovFlow", "coarsen", "vorticity"],
    "guidance": ["DPSGaussianScore", "GaussianScore"],
    "score": ["load_score", "make_score"],
    "space": ["choice", "integer", "loguniform", "uniform"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sda_ray' has no attribute {name!r}")

    try:
        return getattr(import_module(f"sda_ray.{_HOMES[name]}"), name)
    except Exception:
        from .entry import rescue

        rescue()  # returns if there is no sweep to go on with
        raise


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
