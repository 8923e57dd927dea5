r"""The watch over a node that is about to be taken away: drained, or a spot machine with notice.

AWS gives a spot machine a notice of two minutes. The process of each trial looks for it, since it
has to save a checkpoint in time; the driver then starts no trial there any more.
"""

import os
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

LOOK = 5.0  # seconds between two looks, of the 120 that there are
WAIT = 2.0  # seconds that a machine's own metadata may take
SERVICE = "http://169.254.169.254"  # of AWS, on every machine there
VENDOR = Path("/sys/class/dmi/id/sys_vendor")


@cache
def leaving() -> Callable[[], bool]:
    r"""Returns a function that tells whether the node of this process is about to go."""

    notice = threading.Event()

    def watch() -> None:
        import ray

        while not notice.is_set():
            if not ray.is_initialized():
                return  # any call would start a Ray

            with suppress(Exception):  # the cluster does not answer: others detect that
                here = ray.get_runtime_context().get_node_id()

                if has_notice() or here in draining_nodes():
                    notice.set()

            time.sleep(LOOK)

    threading.Thread(target=watch, name="leaving", daemon=True).start()

    return notice.is_set


def has_notice() -> bool:
    r"""Tells whether AWS is about to take this machine away. No other machine is asked.

    `$SDA_RAY_METADATA` may name another address of the metadata service.
    """

    on_aws = VENDOR.is_file() and VENDOR.read_text().startswith("Amazon")

    if not (base := os.environ.get("SDA_RAY_METADATA") or (SERVICE if on_aws else "")):
        return False

    def ask(method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{base}/latest/{path}", headers=headers, method=method)

        with opener.open(request, timeout=WAIT) as answer:
            return answer.read(10_000).decode()

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    try:
        token = ask("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        ask("GET", "meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except (OSError, ValueError):  # 404, as long as it stays; or nobody answers
        return False

    return True


def draining_nodes() -> set[str]:
    r"""Returns the ids of the nodes that Ray drains, or nothing if this Ray cannot tell.

    Autoscalers drain a node before they stop it, and Ray places nothing there any more. Ray 2.60
    has no public call for it. Without one, trials on such a node are lost with it, which is not
    held against their runs.
    """

    import ray

    try:
        from ray._private.state import state

        return set(state.get_draining_nodes()) if ray.is_initialized() else set()
    except (ImportError, AttributeError):
        return set()
