r"""The depot of a sweep on Ray, see :mod:`sda_ray.storage.server`, and the links of trials to it."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..cluster.connect import on_node
from .attempts import Unknown
from .server import GROUPS, Depot

__all__ = ["PATIENCE", "Cut", "Link", "bandwidth", "opened", "sees"]

START = 300.0  # seconds that a depot may take to start
SOME = 16 * 2**20  # bytes that measure the way here

PATIENCE = 60.0  # seconds without an answer after which a trial stops
AGAIN = 0.5  # seconds before what has failed is tried again


class Cut(RuntimeError):
    r"""Signals that a trial was cut off from the depot, or is no longer wanted there."""


class Link:
    r"""Creates the link of an attempt at a run to the depot of its sweep.

    Arguments:
        depot: What :func:`sda_ray.storage.link.opened` yielded.
        run_id: The run.
        attempt: The number of the attempt.
        patience: The seconds without an answer after which the attempt is cut off.
    """

    def __init__(
        self, depot: dict[str, str], run_id: str, attempt: int, patience: float = PATIENCE
    ) -> None:
        import ray

        self.run_id, self.attempt, self.patience = run_id, attempt, patience
        self.heard = time.monotonic()

        try:
            self.actor = ray.get_actor(depot["actor"], depot["namespace"])
        except ValueError as error:  # the driver has ended
            raise Cut(f"the trial was cut off from the head: {error}") from error

    def __call__(self, method: str, *args: Any, group: str = "files") -> Any:
        r"""Calls a method of the depot for this attempt, again and again if it is out of reach.

        Raises:
            Cut: If it is so for too long.
            LeaseLost: If another attempt has begun.
        """

        try:
            return self.ask(method, self.run_id, self.attempt, *args, group=group)
        except Unknown:  # it was started again
            self.ask("open", self.run_id, self.attempt)
            return self.ask(method, self.run_id, self.attempt, *args, group=group)

    def ask(self, method: str, *args: Any, group: str = "files") -> Any:
        r"""Calls a method of the depot."""

        import ray

        while True:
            ref = getattr(self.actor, method).options(concurrency_group=group).remote(*args)

            try:
                while not ray.wait([ref], timeout=1.0)[0]:
                    self._check("no answer")

                found = ray.get(ref)
                self.heard = time.monotonic()

                return found
            except ray.exceptions.RayTaskError as error:  # what the depot has raised
                self.heard = time.monotonic()
                raise error.cause from None
            except ray.exceptions.RayError as error:
                self._check(str(error).strip().partition("\n")[0])
                time.sleep(AGAIN)

    def _check(self, why: str) -> None:
        if (silent := time.monotonic() - self.heard) > self.patience:
            raise Cut(f"the trial was cut off from the head for {silent:.0f} s: {why}")


def sees(depot: dict[str, str]) -> bool:
    r"""Tells whether this node has the very directory of the sweep, and may write there.

    Arguments:
        depot: What :func:`opened` yielded.
    """

    file = Path(depot["probe"])

    try:
        return file.read_text() == depot["nonce"] and os.access(file.parent, os.W_OK)
    except OSError:
        return False


@contextmanager
def opened(runs: Path, data: Path, request: Path) -> Iterator[dict[str, str]]:
    r"""Starts a depot on this node, which ends with the block.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        request: The file by which trials are told to stop, in the directory of the sweep.

    Yields:
        What a trial is told: `actor` and `namespace`, by which the depot is found, and `probe`
        and `nonce`, a file that every node which has the directory sees, and what it says.
    """

    import ray

    nonce = secrets.token_hex(16)
    name, here = f"depot-{nonce[:8]}", ray.get_runtime_context()
    actor = ray.remote(concurrency_groups=GROUPS)(Depot).options(
        name=name,
        num_cpus=0,
        max_restarts=-1,
        **on_node(here.get_node_id()),
    )
    depot = actor.remote(name, str(runs), str(data), str(request))

    for old in request.parent.glob(".probe-*"):
        old.unlink(missing_ok=True)

    probe = request.with_name(f".probe-{nonce[:8]}")
    probe.write_text(nonce)

    try:
        ray.get(depot.ready.remote(), timeout=START)
        told = {"actor": name, "namespace": here.namespace}
        yield told | {"probe": str(probe), "nonce": nonce}
    finally:
        probe.unlink(missing_ok=True)

        with suppress(Exception):  # Ray may be gone
            ray.kill(depot)


def bandwidth(node: str) -> float:
    r"""Returns the bytes a second that come here from a node, given Ray's id of it.

    Raises:
        Exception: If it does not answer within a minute.
    """

    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(_some_bytes)
    ref = task.options(**on_node(node)).remote()
    ray.wait([ref], timeout=PATIENCE, fetch_local=False)
    start = time.monotonic()
    ray.get(ref, timeout=PATIENCE)

    return SOME / (time.monotonic() - start)


def _some_bytes() -> bytes:
    return bytes(SOME)
