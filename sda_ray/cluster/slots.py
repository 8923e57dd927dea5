r"""How many trials fit at a time, on what is up of a cluster and on what it may start."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.errors import UserError
from .connect import local_cpus, local_gpus
from .scaling import Growth, growth, leaving_nodes

__all__ = ["Slots", "fitting"]

logger = logging.getLogger(__name__)

FRESH = 1.0  # seconds that a count of the nodes holds
PATIENCE = 20.0  # seconds without room for a trial after which that is said
LAST = 60.0  # … after which the sweep ends, if all nodes that are up are avoided
BAD = "node "  # how reasons begin that are held against a node


def fitting(wanted: dict[str, float], resources: dict[str, float]) -> int:
    r"""Returns the number of trials that fit on a node. A share of a GPU lies on a single one."""

    def count(key: str, x: float) -> int:
        here = round(1e4 * resources.get(key, 0))  # as Ray counts; 1 // 0.1 is 9

        if key == "GPU" and x < 1:
            return here // 10_000 * (10_000 // max(1, round(1e4 * x)))

        return here // max(1, round(1e4 * x))

    return min(count(key, x) for key, x in wanted.items())


class Slots:
    r"""Creates the count of the trials that fit at a time.

    Arguments:
        cpus: The CPUs of a trial.
        gpus: The GPUs of a trial.
        most: The most trials at a time, if not as many as fit.
    """

    def __init__(self, cpus: float, gpus: float, most: int | None = None) -> None:
        self.wanted = {key: x for key, x in {"CPU": cpus, "GPU": gpus}.items() if x > 0}
        self.most = most
        self.avoided: Mapping[str, str] = {}  # nodes where no trial may start -> why
        self.forgive: Callable[[], bool] = lambda: False  # gives some of them back, if it can
        self.growth: Growth | None = None  # what the cluster may start, once it was checked
        self._count = 0
        self._counted = self._room = -FRESH
        self._said = False

    def __call__(self) -> int:
        r"""Returns the number of trials that fit on the nodes of the cluster, as it is now.

        What the cluster may start counts as well; nodes that are leaving or avoided do not.

        Raises:
            UserError: If all nodes have long been avoided.
        """

        if (now := time.monotonic()) - self._counted > FRESH:
            self._count, self._counted = self._look(), now
            self._room = now if self._count or self._room < 0 else self._room
            self._complain(now - self._room)

        return self._count if self.most is None else min(self._count, self.most)

    def _look(self) -> int:
        here = {node["NodeID"]: self._on(node["Resources"]) for node in _nodes()}
        gone = leaving_nodes() if here else set()
        avoided = sum(here.get(id, 0) for id in self.avoided)
        able = sum(x for id, x in here.items() if id not in self.avoided and id not in gone)

        return max(able, self._possible() - avoided)

    def _possible(self) -> int:
        if self.growth is None:
            return 0

        return self.growth.fit([self._on(kind.resources) for kind in self.growth.types])

    def _complain(self, seconds: float) -> None:
        r"""Says once that there is no room for a trial, or that there never will be again."""

        if seconds == 0:
            self._said = False
            return

        bad = [why for why in self.avoided.values() if why.startswith(BAD)]
        fit = {node["NodeID"] for node in _nodes() if self._on(node["Resources"])}

        if seconds > LAST and bad and fit <= set(self.avoided) and not self.forgive():
            raise UserError(
                f"there is no node left for a trial: {'; '.join(dict.fromkeys(bad))}. Look at "
                "Ray's logs on them (/tmp/ray/session_latest/logs), then carry on with the same "
                "command."
            )

        if seconds > PATIENCE and not self._said:
            self._said = True
            wanted = " ".join(f"{key}={x:g}" for key, x in self.wanted.items())
            logger.warning(
                "no node has room for a trial of %s at the moment: the sweep waits for one to "
                "join. `ray status` says what the cluster has.",
                wanted,
            )

    def _on(self, resources: dict[str, float]) -> int:
        return fitting(self.wanted, resources)

    def local(self) -> int:
        r"""Returns the number of trials that fit in a Ray of our own on this machine."""

        here = self._on(_here())

        return here if self.most is None else min(here, self.most)

    def check_local(self) -> None:
        r"""Raises a UserError if a Ray of our own on this machine could never hold a trial."""

        self._check([("this machine", _here())])

    def check(self) -> None:
        r"""Raises a UserError if no node can ever hold a trial: Ray would wait for ever.

        Nodes that the cluster starts when they are wanted need not be up.
        """

        self.growth = growth()
        found = [(f"node {n['NodeManagerHostname']}", n["Resources"]) for n in _nodes()]

        if self.growth is not None and self.growth.unknown:
            return

        for kind in () if self.growth is None else self.growth.types:
            found.append((f"a node of type {kind.name}", kind.resources))

        self._check(found)

    def _check(self, nodes: Sequence[tuple[str, dict[str, float]]]) -> None:
        if any(self._on(resources) for _, resources in nodes):
            return

        has = dict.fromkeys(
            f"{name} has " + " ".join(f"{key}={found.get(key, 0):g}" for key in ("CPU", "GPU"))
            for name, found in nodes
        )
        wanted = " ".join(f"{key}={x:g}" for key, x in self.wanted.items())
        raise UserError(
            f"a trial wants {wanted}, but {', '.join(has)}. Lower --cpus-per-trial or "
            "--gpus-per-trial."
        )


def _here() -> dict[str, float]:
    return {"CPU": local_cpus(), "GPU": local_gpus()}


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
