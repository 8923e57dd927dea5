r"""Ray, started for one command or attached to on request, and never found by accident."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

__all__ = ["connect", "local_cpus"]

STORE = 100 * 2**20  # bytes of shared memory; nothing large goes through Ray
PREFIX = "sda-ray-"


def local_cpus() -> int:
    r"""Returns the number of CPUs that this process may use, by its affinity."""

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connect(address: str | None = None, cpus: int | None = None) -> Iterator[Path]:
    r"""Starts a Ray of our own on this machine, or attaches to the one at an address.

    Our own Ray counts the CPUs of this process' affinity, keeps its files in a private directory,
    asks for a token that only this process and its workers know, and ends with the block.

    Arguments:
        address: The address of a running cluster, such as `auto` on its head.
        cpus: The number of CPUs of our own Ray.

    Yields:
        A private directory that ends with the block.

    Raises:
        UserError: If there is no cluster at the address.
    """

    # Ray would change into a directory per trial, renice its workers, give up on a slow start
    # after 30 s, send usage statistics and print what we print better.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

    if address is None:
        os.environ.pop("RAY_ADDRESS", None)

        if "ray" not in sys.modules:  # Ray 2.60 reads its authentication mode at its import
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

    import ray

    _sweep_out()
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=_short_directory()))
    local = {
        "num_cpus": cpus or local_cpus(),
        "include_dashboard": False,
        "object_store_memory": STORE,
        "_temp_dir": str(directory),
    }

    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else local),
        )
        yield directory
    except ConnectionError as error:
        raise UserError(
            f"there is no Ray at '{address}': {error}. Start one, or leave --address out to use "
            "this machine alone."
        ) from error
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def _short_directory() -> str:
    r"""Returns the temporary directory, if its path is short enough for Ray's sockets."""

    directory = tempfile.gettempdir()

    return directory if len(directory) <= 24 else "/tmp"


def _sweep_out() -> None:
    r"""Removes the directories of processes of ours that were killed."""

    for directory in Path(_short_directory()).glob(f"{PREFIX}*"):
        pid = directory.name.removeprefix(PREFIX).partition("-")[0]

        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(directory, ignore_errors=True)
