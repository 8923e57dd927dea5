r"""Hyperparameter sweeps for score-based data assimilation, on Ray Tune and Optuna."""

from .assimilation import assimilate as assimilate
from .cli.main import main as main
from .core import CONFIG as CONFIG
from .core import choice as choice
from .core import integer as integer
from .core import loguniform as loguniform
from .core import uniform as uniform
from .data import KolmogorovFlow as KolmogorovFlow
from .data import TrajectoryDataset as TrajectoryDataset
from .data import coarsen as coarsen
from .data import vorticity as vorticity
from .nn import VPSDE as VPSDE
from .nn import DPSGaussianScore as DPSGaussianScore
from .nn import GaussianScore as GaussianScore
from .nn import MMPSGaussianScore as MMPSGaussianScore
from .nn import load_score as load_score
from .nn import load_sde as load_sde
from .nn import make_score as make_score
from .nn import network_settings as network_settings
from .report import load_runs as load_runs
from .report import load_sweep as load_sweep
from .sweep import Sweep as Sweep
from .training import plot as plot

__version__: str
