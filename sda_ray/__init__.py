r"""Hyperparameter sweeps for score-based data assimilation, on Ray Tune and Optuna."""

import lazy_loader

__version__ = "0.1.0"

# Names are imported at first use: `import sda_ray` stays light.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
