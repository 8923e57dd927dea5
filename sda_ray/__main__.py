r"""Runs the command line as `python -m sda_ray`."""

import os
import sys
from contextlib import suppress

__all__: list[str] = []

if __name__ == "__main__":
    # Last, not first: a script here may have a library's name
    with suppress(OSError):
        if sys.path[0] == os.getcwd():
            sys.path.append(sys.path.pop(0))

    from .cli.main import main

    main()
