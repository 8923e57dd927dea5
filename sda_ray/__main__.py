r"""Runs the command line as `python -m sda_ray`."""

from .cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
