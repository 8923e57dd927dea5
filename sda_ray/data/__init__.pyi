r"""The flow, and data sets of it."""

from .dataset import DataChanged as DataChanged
from .dataset import DataInfo as DataInfo
from .dataset import TrajectoryDataset as TrajectoryDataset
from .dataset import check_data as check_data
from .dataset import check_file as check_file
from .dataset import fingerprint as fingerprint
from .dataset import unusual as unusual
from .flow import KolmogorovFlow as KolmogorovFlow
from .flow import coarsen as coarsen
from .flow import divergence as divergence
from .flow import isotropic_spectrum as isotropic_spectrum
from .flow import vorticity as vorticity
from .simulate import PRESETS as PRESETS
from .simulate import simulate_dataset as simulate_dataset
