r"""Tests for sda_ray.core.console: what a terminal is shown."""

import subprocess
import sys

PROGRAM = r"""
import io, logging, sys
from sda_ray.core import log_warnings

log_warnings()
logging.getLogger("any").info("a detail")
shown, sys.stderr = sys.stderr, io.StringIO()  # as rich does while it shows a bar or a table
logging.getLogger("any").warning("a name with \x1b[2J")
shown.write(sys.stderr.getvalue())
"""


def test_warnings_have_a_level_and_pass_through_what_is_shown() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)

    assert run.stderr == "WARNING: a name with �[2J\n"
