r"""Runs the command line as `python -m sda_ray`."""

from .sweep.entry import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
