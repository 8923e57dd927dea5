r"""The training loop, which knows no files."""

from .loop import DRAWS as DRAWS
from .loop import Diverged as Diverged
from .loop import Measure as Measure
from .loop import Metrics as Metrics
from .loop import TrainState as TrainState
from .loop import check_compiler as check_compiler
from .loop import epochs as epochs
from .loop import steady_epochs as steady_epochs
from .loop import train_epoch as train_epoch
from .loop import validate as validate
from .samples import LIMIT as LIMIT
from .samples import SAMPLE_COST as SAMPLE_COST
from .samples import Samples as Samples
from .samples import compare_samples as compare_samples
from .samples import plot as plot
from .validation import Denoising as Denoising
from .validation import Ensembles as Ensembles
from .validation import Validation as Validation
from .watchdog import OTHER as OTHER
from .watchdog import STACKS as STACKS
from .watchdog import STALL as STALL
from .watchdog import TAKEN as TAKEN
from .watchdog import Watchdog as Watchdog
from .watchdog import take_stacks as take_stacks
