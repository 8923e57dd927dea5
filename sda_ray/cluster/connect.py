r"""Ray, started for one command or attached to on request, and never found by accident."""

import fcntl
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import UserError
from ..storage.server import on_node
from .patches import started_lean

__all__ = [
    "RAY",
    "connect",
    "gate",
    "local_cpus",
    "local_gpus",
    "map_on_ray",
    "on_node",
    "private_directory",
]

T = TypeVar("T")
R = TypeVar("R")

STORE = 100 * 2**20  # bytes of shared memory; nothing large goes through Ray
PREFIX = "sda-ray-"
RAY = "r"  # the part of a private directory that Ray 2.60 opens to everybody
PRELOADED = "RAY_preload_python_modules"
KNOCK = 10.0  # seconds in which somebody at an address answers
LONGEST = 24  # characters of a directory in which the paths of Ray's sockets stay short enough


def local_cpus() -> int:
    r"""Returns the number of CPUs that this process may use, by its affinity."""

    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))

    return os.cpu_count() or 1


def local_gpus() -> int:
    r"""Returns the number of GPUs that torch can use here. Where there are none, it is not loaded."""

    devices = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")  # of NVIDIA, AMD and WSL

    if sys.platform == "linux" and not any(any(Path("/dev").glob(x)) for x in devices):
        return 0

    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def connect(
    address: str | None = None,
    cpus: int | None = None,
    package: Path | None = None,
    modules: Sequence[str] = (),
) -> Iterator[Path]:
    r"""Starts a Ray of our own on this machine, or attaches to the one at an address.

    Our own Ray counts the CPUs of this process' affinity, keeps its files in a private directory,
    asks for a token that only this process and its workers know, and ends with the block.

    Arguments:
        address: The address of a running cluster, such as `auto` on its head.
        cpus: The number of CPUs of our own Ray.
        package: The package that workers import, instead of what they find themselves.
        modules: What the workers of our own Ray import as they start, while the driver does other
            things. There are as many workers as CPUs.

    Yields:
        A private directory that ends with the block.

    Raises:
        UserError: If there is no cluster at the address.
    """

    # Ray would renice its workers, give up on a slow start after 30 s, end workers that wait a
    # second for their first trial, send usage statistics and print what we print better.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

    if address is None:
        os.environ.pop("RAY_ADDRESS", None)

        if "ray" not in sys.modules:  # Ray 2.60 reads its authentication mode at its import
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    else:
        _knock(address)

    import ray

    with private_directory() as directory:
        local = {
            "num_cpus": cpus or local_cpus(),
            "include_dashboard": False,
            "object_store_memory": STORE,
            "_temp_dir": str(directory / RAY),
        }

        try:
            with nullcontext() if address else started_lean(), _preloaded(modules):
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level="ERROR",
                    **({} if address else local),
                    **({} if package is None else _code(package, ship=address is not None)),
                )
        except Exception as error:  # Ray 2.60 raises just that if it takes more than 30 s
            ray.shutdown()

            if address is None:
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"Ray could not be started on this machine: {said} Nothing is lost; is the "
                    "machine overloaded, or out of memory or disk? The same command tries again."
                ) from error

            raise UserError(
                f"there is no Ray at '{address}': {error} Start one, or leave --address out to "
                "use this machine alone."
            ) from error

        try:
            yield directory
        finally:
            ray.shutdown()


def gate(own: bool) -> tuple[str, str | None]:
    r"""Returns where other machines can reach the Ray that this process is at, and its token.

    Arguments:
        own: Whether the Ray is for the sweep alone. The token of another one is not told.
    """

    import ray

    address = str(ray.get_runtime_context().gcs_address)

    if not own or os.environ.get("RAY_AUTH_MODE") != "token":
        return address, None

    if file := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return address, os.environ.get("RAY_AUTH_TOKEN") or Path(file).read_text().strip()

    return address, os.environ.get("RAY_AUTH_TOKEN")


def _knock(address: str) -> None:
    r"""Raises a UserError if nobody is at an address: Ray 2.60 tries for minutes."""

    host, colon, port = address.rpartition(":")

    if not colon or "/" in host or not port.isdecimal():
        return  # `auto`, or what Ray itself has to understand

    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"there is no Ray at '{address}': {error}. Start one, or leave --address out to use "
            "this machine alone."
        ) from error


@contextmanager
def _preloaded(modules: Sequence[str]) -> Iterator[None]:
    r"""Lets the workers of a Ray that starts within the block import modules at once."""

    if modules:
        os.environ[PRELOADED] = ",".join(modules)

    try:
        yield
    finally:
        os.environ.pop(PRELOADED, None)


class _Paths(list[str]):
    r"""Creates a list of directories that stays as it is."""

    def extend(self, more: Any) -> None:
        pass


def _code(package: Path, ship: bool) -> dict[str, Any]:
    r"""Returns arguments of `ray.init` that let workers import a package, and no other of its name.

    To a cluster it is shipped, since nodes may not see the directory.
    """

    from ray.job_config import JobConfig

    # Ray 2.60 lets workers look in the driver's current directory and its script's before all
    # others: a checkout there would be imported.
    config = JobConfig()
    config._py_driver_sys_path = _Paths([] if ship else [str(package.parent)])
    job: dict[str, Any] = {"job_config": config}

    if ship:
        job["runtime_env"] = {"py_modules": [str(package)], "excludes": ["**/__pycache__/**"]}

    return job


@contextmanager
def private_directory() -> Iterator[Path]:
    r"""Makes a directory that ends with the block, and removes those of killed processes.

    Each is locked by its process for as long as that lives, in whatever container.
    """

    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST else "/tmp"

    with ExitStack() as held:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        held.callback(shutil.rmtree, directory, ignore_errors=True)
        lock = held.enter_context(open(directory / "new", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.replace(directory / "new", directory / "lock")  # never there without being locked

        for other in Path(parent).glob(f"{PREFIX}*"):
            if other != directory and not _is_locked(other):
                shutil.rmtree(other, ignore_errors=True)

        yield directory


def _is_locked(directory: Path) -> bool:
    try:
        with open(directory / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except OSError:  # in use, not ours, or just being made
        return True


def map_on_ray(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int | None = None,
    address: str | None = None,
) -> Generator[tuple[T, R]]:
    r"""Applies a function to items in parallel on Ray, and yields each with its result when ready.

    Arguments:
        function: The function, which runs in workers with one CPU each.
        items: The items.
        workers: The number of workers. If :py:`None`, one for each CPU that may be used.
        address: The address of a running cluster. If :py:`None`, a private Ray is started.

    Raises:
        UserError: If the number of workers is below 1, or there is no cluster at the address.
    """

    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}, but must be at least 1.")

    def run(item: T) -> R:
        return function(item)

    with connect(address, workers):
        import ray

        cpus = workers or int(ray.cluster_resources().get("CPU", 1))
        task = ray.remote(num_cpus=1)(run)
        queue = deque(items)
        running: dict[Any, T] = {}

        while queue or running:
            while queue and len(running) < 2 * cpus:
                item = queue.popleft()
                running[task.remote(item)] = item

            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(ready), ray.get(ready)
