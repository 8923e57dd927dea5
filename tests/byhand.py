r"""A driver that is asked and told by hand, without Ray."""

from pathlib import Path
from typing import Any

from simulated import draw

from sda_ray.core.lease import Lease
from sda_ray.search.promotion import Rules
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study
from sda_ray.sweep.driver import Driver

__all__ = ["ManualDriver"]


class ManualDriver:
    r"""Creates a driver that is asked and told by hand."""

    def __init__(
        self,
        directory: Path,
        trials: int = 8,
        first: int | None = None,
        slots: int = 8,
        objectives: tuple[str, ...] = ("loss_valid",),
        seeds: int = 1,
        **more: Any,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.lease = Lease(directory / "lease.json", "the sweep")
        self.study = Study(directory / "journal", "test", self.lease, objectives)
        self.events: list[str] = []
        self.slots = slots
        self.driver = Driver(
            self.study,
            Rules(trials, 9, first, 3, seeds=seeds),
            lambda seen, fixed: propose(draw, seen, 0, "random", fixed),
            {
                "config": {"epochs": 9, "seed": 0},
                "runs": str(directory),
                "wandb": {"mode": "online", "project": "flows"},
            },
            lambda: self.slots,
            lambda event, record: self.events.append(event),
            directory / "stop",
            **more,
        )

    def tell(self, name: str, event: str, error: str = "", last: int = 0, **more: Any) -> bool:
        epochs = [(e, 1.0 / e) for e in range(1, last + 1)]
        result = {"event": event, "epochs": epochs, "error": error, **more}

        return self.driver.report(name, result, lambda status: lambda: False)
