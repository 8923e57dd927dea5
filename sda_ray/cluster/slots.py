r"""How many trials fit at a time on the nodes of a cluster."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

from ..core import UserError
from .connect import RayGone, live_nodes
from .ray_node import local_cpus, local_gpus

FRESH = 1.0  # seconds that a count of the nodes holds
LAST = 60.0  # seconds without room for a trial after which the sweep ends, if nodes are bad
BAD = "node "  # how reasons begin that are held against a node


def fitting(wanted: dict[str, float], resources: dict[str, float]) -> int:
    r"""Returns the number of trials that fit on a node. A share of a GPU lies on a single one."""

    def count(key: str, x: float) -> int:
        has = round(1e4 * resources.get(key, 0))  # as Ray counts; 1 // 0.1 is 9

        if key == "GPU" and x < 1:
            return has // 10_000 * (10_000 // max(1, round(1e4 * x)))

        return has // max(1, round(1e4 * x))

    return min(count(key, x) for key, x in wanted.items())


class Slots:
    r"""The number of trials that fit at a time, at most `most`, by the CPUs and GPUs of each."""

    def __init__(self, cpus: float, gpus: float, most: int | None = None) -> None:
        self.wanted = {key: x for key, x in {"CPU": cpus, "GPU": gpus}.items() if x > 0}
        self.most = most
        self.grows = False  # whether the cluster starts nodes for trials that wait for one
        self.left: Callable[[], float] = lambda: math.inf  # CPUs that other commands leave
        self.avoided: Mapping[str, str] = {}  # nodes where no trial may start -> why
        self.forgive: Callable[[], bool] = lambda: False  # allows some of them again, if it can
        self._count = 0
        self._counted = -FRESH
        self._room = time.monotonic()  # when there was room for a trial

    def __call__(self) -> int:
        r"""Returns the number of trials that fit on the nodes of the cluster, as it is now.

        Nodes that are avoided do not count. If the cluster grows, it is :attr:`most`:
        trials without a node are what an autoscaler starts nodes for. Unless :attr:`most` is given,
        other commands on this machine get their share, and one trial always fits.

        Raises:
            UserError: If all nodes have long been avoided.
        """

        if (now := time.monotonic()) - self._counted > FRESH:
            self._count, self._counted = self._look(), now
            self._room = now if self._count else self._room
            self._check_avoided(now - self._room)

        if self.most is None:
            return self._count

        return self.most if self.grows else min(self._count, self.most)

    def _look(self) -> int:
        nodes = live_nodes().items()

        return self._shared(
            sum(self._on(node["Resources"]) for id, node in nodes if id not in self.avoided)
        )

    def _shared(self, count: int) -> int:
        r"""Returns a number of trials without those whose CPUs here are for other commands."""

        if self.most is not None or "GPU" in self.wanted:
            return count

        here = local_cpus()
        fewer = self._on({"CPU": here}) - self._on({"CPU": min(here, self.left())})

        return max(min(1, count), count - fewer)

    def _check_avoided(self, seconds: float) -> None:
        r"""Raises a UserError if there was long no room, and never will be on bad nodes."""

        if seconds <= LAST or not (bad := [x for x in self.avoided.values() if x.startswith(BAD)]):
            return

        fit = {id for id, node in live_nodes().items() if self._on(node["Resources"])}

        if fit <= set(self.avoided) and not self.forgive():
            raise UserError(
                f"there is no node left for a trial: {'; '.join(dict.fromkeys(bad))}. Look at "
                "Ray's logs on them (/tmp/ray/session_latest/logs), then carry on with the same "
                "command."
            )

    def _on(self, resources: dict[str, float]) -> int:
        return fitting(self.wanted, resources)

    def local(self) -> int:
        r"""Returns the number of trials that fit in a Ray of our own on this machine."""

        here = self._on(_here())

        return here if self.most is None else min(here, self.most)

    def check_local(self) -> None:
        self._check([("this machine", _here())])

    def check(self, patience: float = 0.0) -> None:
        r"""Raises a UserError if no node can hold a trial, nor joins in time: Ray would wait for ever."""

        deadline = time.monotonic() + patience

        while not self.grows and not any(self._on(n["Resources"]) for n in live_nodes().values()):
            if time.monotonic() >= deadline:
                nodes = live_nodes().values()
                named = [(f"node {n['NodeManagerHostname']}", n["Resources"]) for n in nodes]
                self._check(named, "; if the cluster starts nodes on demand, give --parallel")

            time.sleep(1.0)

    def _check(self, nodes: Sequence[tuple[str, dict[str, float]]], more: str = "") -> None:
        if any(self._on(resources) for _, resources in nodes):
            return

        if not nodes:
            raise RayGone("Ray is gone: it has no node")

        has = dict.fromkeys(
            f"{name} has CPU={found.get('CPU', 0):g} GPU={found.get('GPU', 0):g}"
            for name, found in nodes
        )
        wanted = " ".join(f"{key}={x:g}" for key, x in self.wanted.items())
        raise UserError(
            f"a trial wants {wanted}, but {', '.join(has)}. Lower --cpus-per-trial or "
            f"--gpus-per-trial{more}."
        )


def _here() -> dict[str, float]:
    return {"CPU": local_cpus(), "GPU": local_gpus()}
