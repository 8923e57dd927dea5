r"""What a sweep has found, as one HTML file that works offline."""

from .findings import Findings as Findings
from .findings import read_findings as read_findings
from .page import write_report as write_report
