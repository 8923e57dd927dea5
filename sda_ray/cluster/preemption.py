r"""The watch over a node that is about to be taken away: drained, or a spot machine with notice.

AWS tells a spot machine two minutes before it is taken. Each trial's process asks, since it has to
save a checkpoint in time; whoever hears it first has Ray drain the node, so that nothing is placed
there any more.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Leaving", "Spot", "watch"]

LOOK = 5.0  # seconds between two looks, of the 120 that there are
WAIT = 2.0  # seconds that a machine's own metadata may take
TTL = 600  # seconds that a session with the metadata lasts
SERVICE = "http://169.254.169.254"  # of AWS, on every machine there
VENDOR = Path("/sys/class/dmi/id/sys_vendor")


class Spot:
    r"""Creates the question to AWS whether this machine is about to be taken away.

    Arguments:
        base: The address of the metadata service. By default `$SDA_RAY_METADATA`, else AWS's if
            this machine is one of AWS's: no other is asked anything.
    """

    def __init__(self, base: str | None = None) -> None:
        on_aws = VENDOR.is_file() and VENDOR.read_text().startswith("Amazon")
        self.base = base or os.environ.get("SDA_RAY_METADATA") or (SERVICE if on_aws else "")
        self.token = ""
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __call__(self) -> float | None:
        r"""Returns when this machine will be taken, in seconds since the epoch, if it is known."""

        if not self.base:
            return None

        try:
            try:
                found = self._get()
            except urllib.error.HTTPError as error:
                if error.code != 401:
                    raise

                self.token = ""  # the session is over
                found = self._get()
        except (OSError, ValueError):  # 404, as long as it stays; or nobody answers
            return None

        when = datetime.strptime(found["time"], "%Y-%m-%dT%H:%M:%SZ")

        return when.replace(tzinfo=timezone.utc).timestamp()

    def _get(self) -> dict[str, Any]:
        if not self.token:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(TTL)}
            self.token = self._ask("PUT", "api/token", ttl)

        session = {"X-aws-ec2-metadata-token": self.token}

        return json.loads(self._ask("GET", "meta-data/spot/instance-action", session))

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(
            f"{self.base}/latest/{path}", headers=headers, method=method
        )

        with self.opener.open(request, timeout=WAIT) as answer:
            return answer.read(10_000).decode()


class Leaving:
    r"""Creates the watch of a process of Ray over its node.

    Arguments:
        look: The seconds between two looks.
    """

    def __init__(self, look: float = LOOK) -> None:
        self.spot = Spot()
        self.look = look
        self.told = threading.Event()
        threading.Thread(target=self._watch, name="leaving", daemon=True).start()

    def __call__(self) -> bool:
        r"""Tells whether the node is about to go."""

        return self.told.is_set()

    def _watch(self) -> None:
        import ray

        from .slots import drain, leaving_nodes

        while not self.told.is_set():
            if not ray.is_initialized():
                return  # any call would start a Ray

            with suppress(Exception):  # the cluster does not answer: others detect that
                here = ray.get_runtime_context().get_node_id()

                if (when := self.spot()) is not None:
                    self.told.set()
                    drain(here, "its spot machine is being taken away", when)
                elif here in leaving_nodes():
                    self.told.set()

            time.sleep(self.look)


@cache
def watch() -> Leaving:
    r"""Returns the watch of this process."""

    return Leaving()
