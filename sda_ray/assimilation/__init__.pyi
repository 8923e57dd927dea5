r"""Observations of trajectories, posterior samples given them, and how good these are."""

from .operators import PANEL as PANEL
from .operators import PANEL_VERSION as PANEL_VERSION
from .operators import Observation as Observation
from .operators import Operator as Operator
from .operators import parse as parse
from .operators import points as points
from .posterior import GUIDANCES as GUIDANCES
from .posterior import assimilate as assimilate
from .skill import bootstrap as bootstrap
from .skill import chi_square as chi_square
from .skill import cross_spectral_error as cross_spectral_error
from .skill import crps as crps
from .skill import divergence_ratio as divergence_ratio
from .skill import earth_movers_distance as earth_movers_distance
from .skill import energy as energy
from .skill import enstrophy as enstrophy
from .skill import log_likelihood as log_likelihood
from .skill import rank_histogram as rank_histogram
from .skill import rmse as rmse
from .skill import spectral_error as spectral_error
from .skill import spread as spread
from .skill import spread_skill as spread_skill
