r"""What a sweep has found, as one HTML file that works offline."""

from .findings import Findings as Findings
from .findings import read_findings as read_findings
from .frames import LoadedSweep as LoadedSweep
from .frames import load_runs as load_runs
from .frames import load_sweep as load_sweep
from .page import write_report as write_report
