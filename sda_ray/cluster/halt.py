r"""How a trial learns that it shall stop."""

import os
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM
from typing import Any

from ..runs.train import Stop

__all__ = ["stop_of"]

LOOK = 0.2  # seconds between two looks


def stop_of(request: Path, index: int, away: Any = None) -> Any:
    r"""Returns the wish to stop that is expressed by the existence of a file.

    The file `request` is meant for all trials of the sweep, `request.N` for run N `alone`. Where
    they cannot be seen, the depot tells; whoever has lost it is told so instead.
    """

    class Request(Stop):
        looked = 0.0
        number: int | None = None
        alone = False

        @property
        def signal(self) -> int | None:
            if self.number is None and time.monotonic() - self.looked > LOOK:
                self.looked = time.monotonic()
                wanted = _look(request, index) if away is None else away.wish()
                self.alone = wanted == "alone"
                self.number = SIGTERM if wanted else None

            return self.number

        @signal.setter
        def signal(self, number: int | None) -> None:
            self.number = number

    return Request()


def _look(request: Path, index: int) -> str:
    names: list[str] = []

    with suppress(OSError):  # a file system away for a while
        # A listing is fresh on NFS, where the absence of a file may be remembered
        names = os.listdir(request.parent)

    if f"{request.name}.{index}" in names:
        return "alone"

    return "all" if request.name in names else ""
