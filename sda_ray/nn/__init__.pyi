r"""Networks, diffusion and guidance."""

from .diffusion import VPSDE as VPSDE
from .guidance import DPSGaussianScore as DPSGaussianScore
from .guidance import GaussianScore as GaussianScore
from .guidance import MMPSGaussianScore as MMPSGaussianScore
from .precision import allowing_tf32 as allowing_tf32
from .precision import lowered as lowered
from .precision import make_deterministic as make_deterministic
from .score import MCScoreNet as MCScoreNet
from .score import check_archive as check_archive
from .score import load_network as load_network
from .score import load_score as load_score
from .score import load_sde as load_sde
from .score import make_score as make_score
from .score import mismatches as mismatches
from .score import network_settings as network_settings
from .score import total_size as total_size
