r"""Observations of trajectories, posterior samples given them, and how good these are."""

from .operators import PANEL as PANEL
from .operators import PANEL_VERSION as PANEL_VERSION
from .operators import Observation as Observation
from .operators import Operator as Operator
from .operators import parse as parse
from .operators import points as points
