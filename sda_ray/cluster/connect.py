r"""Ray: started for one command, or attached to on request, and how many trials fit there.

A running Ray is never found by accident.
"""

import importlib
import logging
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..core import UserError, leave_screens, uncollected
from .ray_node import (
    ENVIRONMENT,
    answers,
    local_cpus,
    local_gpus,
    not_started,
    private_directory,
    started,
)

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

ANSWER = 120.0  # seconds for a Ray to let a process attach
ATTACH = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"
SHUTDOWN = 15.0  # seconds after which a Ray of our own that does not answer is killed
MISSES = 10  # seconds without a head of Ray after which this process ends
RETRY = "The same command tries again"
FRESH = 1.0  # seconds that a count of the nodes holds
LAST = 60.0  # seconds without room for a trial after which the sweep ends, if nodes are bad
BAD = "node "  # how reasons begin that are held against a node

# Variables that describe another Ray, or processes unlike this one
FOREIGN = ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK")


_heads: list[Callable[[], bool]] = []  # tell whether the head of this process' Ray is alive


class RayGone(UserError):
    r"""Raised if Ray has no node that is alive, or no head."""


@contextmanager
def connected(
    address: str | None = None,
    cpus: int | None = None,
    package: Path | None = None,
    modules: Sequence[str] = (),
    hint: str = RETRY,
) -> Iterator[Path]:
    r"""Starts a Ray of our own on this machine, or attaches to the one at an address.

    Our own Ray accepts the processes that know its random token only, and ends with the block or
    with this process, see :func:`sda_ray.cluster.ray_node.started`. If Ray dies within the block,
    functions of Ray may wait for a minute, deaf to signals: then this process ends with exit code 2.

    Arguments:
        address: The address of a running cluster, such as `auto` on its head.
        cpus: The number of CPUs of our own Ray.
        package: The directory of the package that workers import, whatever else they could find.
        modules: The modules to import in this process while Ray starts.
        hint: What to do if Ray dies.

    Yields:
        A private directory that is removed at the end of the block.

    Raises:
        UserError: If Ray does not start, or there is no cluster at the address.
        RayGone: If the block raises it. The hint is added.
    """

    if sys.flags.optimize > 1:
        raise UserError(
            "Ray needs docstrings: unset PYTHONOPTIMIZE, and start Python without -OO."
        )

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    if address is None:
        token = _own_token()
    elif re.fullmatch(r"[^/]+:\d+", address) and not answers(address):  # Ray would try for minutes
        raise _no_ray(address, "nothing answers there")

    importing = threading.Thread(target=_import, args=("ray", *modules), daemon=True)
    importing.start()

    with ExitStack() as stack:
        try:
            if address is None:
                own = started(token, cpus=cpus, gpus=local_gpus(), alone=True)
                node = stack.enter_context(own)
                directory = node.directory
                importing.join()
                stack.enter_context(_attachment(hint, node.is_running, node.kill))

                with _workers_import(package):
                    _attach(node.address)
            else:
                directory = stack.enter_context(private_directory())

                _check_answer(address, directory)
                importing.join()
                _attach(address, package)
                head = ray_endpoint(own=False)[0]
                stack.enter_context(_attachment(hint, partial(answers, head)))
        except UserError:
            raise
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise (not_started(why) if address is None else _no_ray(address, why)) from error

        yield directory


def check_ray_init() -> None:
    r"""Raises a UserError if this process has called `ray.init`, which it may do once."""

    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise UserError(
            "the script has called ray.init, but a sweep starts a Ray of its own. Leave ray.init "
            "out, and attach to a running Ray with --address."
        )


def _own_token() -> str:
    r"""Returns a token for a Ray of our own, and clears the environment of what describes another."""

    token = os.environ.get("RAY_AUTH_TOKEN")

    if "ray" not in sys.modules:
        token = secrets.token_hex(32)
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    elif os.environ.get("RAY_AUTH_MODE") != "token" or not token:  # Ray reads it when imported
        raise UserError(
            "ray was imported before the sweep started a Ray of its own, which could not ask for "
            "a token then: anyone on this machine could run code as you. Import ray inside the "
            "functions that need it, or attach to a running Ray with --address."
        )

    for name in FOREIGN:
        if os.environ.pop(name, None) is not None and name not in ("RAY_ADDRESS", "RAY_NAMESPACE"):
            logger.warning(
                "%s is ignored: the sweep starts a Ray of its own, whose workers have the "
                "environment of this process.",
                name,
            )

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # workers run this very interpreter

    return token


def _import(*modules: str) -> None:
    with uncollected():
        for module in modules:
            importlib.import_module(module)


@contextmanager
def _workers_import(package: Path | None) -> Iterator[None]:
    r"""Makes workers on this machine import a package, whatever else they could find.

    A Ray has its workers look for modules where the process is that attaches, and beside its script.
    """

    if package is None:
        yield
        return

    here, paths = os.getcwd(), sys.path[:]
    script = os.path.dirname(os.path.realpath(sys.argv[0]))
    sys.path[:] = [path for path in paths if path != script]
    os.chdir(package.parent)

    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = paths


def _attach(address: str, package: Path | None = None) -> None:
    import ray

    options: dict[str, Any] = {}

    if package is not None:
        # A working directory also keeps Ray from looking for modules in the current one, where
        # another version of the package may be.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        options["runtime_env"] = {
            "working_dir": str(package.parent),
            "excludes": ["**/__pycache__/**"],
        }

    terminate = signal.getsignal(signal.SIGTERM)  # Ray replaces it

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except SystemExit:
        signal.signal(signal.SIGTERM, terminate)
        signal.raise_signal(signal.SIGTERM)
        raise
    except Exception:
        ray.shutdown()
        raise
    finally:
        with suppress(ValueError):  # in a thread, where Ray leaves it alone, too
            signal.signal(signal.SIGTERM, terminate)


@contextmanager
def _attachment(
    hint: str, alive: Callable[[], bool], kill: Callable[[], None] = lambda: None
) -> Iterator[None]:
    r"""Leaves Ray at the end of the block, and kills it if it does not answer in time."""

    import ray

    leaving, left = threading.Event(), threading.Event()

    def watch() -> None:
        misses = 0

        while misses < MISSES and not leaving.wait(1.0):
            misses = 0 if alive() else misses + 1

        if leaving.is_set() and left.wait(SHUTDOWN):
            return

        kill()

        if leaving.is_set() and left.wait(SHUTDOWN):
            return

        try:
            leave_screens()
            os.write(2, f"\nsda-ray: Ray is gone: its head is dead. {hint}.\n".encode())
        finally:
            os._exit(2)

    threading.Thread(target=watch, name="ray", daemon=True).start()

    try:
        _heads.append(alive)
        yield
    except RayGone as error:
        kill()
        raise RayGone(f"{error}. {hint}.") from None
    finally:
        leaving.set()

        try:
            ray.shutdown()
        finally:
            left.set()
            _heads.remove(alive)


def ray_endpoint(own: bool) -> tuple[str, str | None]:
    r"""Returns the address of this process' Ray for other machines, and its token if it is our own."""

    import ray

    address = str(ray.get_runtime_context().gcs_address)

    if not own or os.environ.get("RAY_AUTH_MODE") != "token":
        return address, None

    token = os.environ.get("RAY_AUTH_TOKEN")

    if not token and (file := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        token = Path(file).read_text().strip()

    return address, token


def live_nodes() -> dict[str, dict[str, Any]]:
    r"""Returns Ray's record of each live node, by id; none if Ray's head is gone."""

    import ray

    if not all(alive() for alive in _heads):
        return {}  # Ray would wait for it

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _check_answer(address: str, directory: Path) -> None:
    r"""Raises a UserError unless a process can attach to a Ray.

    Ray 2.60 tries for up to 14 minutes, prints a line for each try, and cannot be interrupted.
    """

    command = [sys.executable, "-c", ATTACH, address]
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    why = ""

    try:
        done = subprocess.run(command, env=env, cwd=directory, capture_output=True, timeout=ANSWER)
        output = done.stderr

        if done.returncode:
            why = output.decode(errors="replace").strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired as error:
        output, why = error.stderr or b"", f"it has not answered in {ANSWER:g} s"

    if why and b"InvalidAuthToken" in output:
        raise UserError(
            f"the Ray at '{address}' is that of another sweep or user: it does not accept the "
            "token of this process. Give the address of yours, or its token in RAY_AUTH_TOKEN."
        )

    if why:
        raise _no_ray(address, why.rstrip("."))


def _no_ray(address: str, why: str) -> UserError:
    return UserError(
        f"there is no Ray at '{address}': {why}. Start one, or leave --address out to use this "
        "machine alone."
    )


def map_on_ray(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int | None = None,
    address: str | None = None,
    gpu: bool = False,
) -> Generator[tuple[T, R]]:
    r"""Applies a function to items in parallel on Ray, and yields each with its result when ready.

    Arguments:
        function: The function, which runs in workers with one CPU each.
        workers: The number of workers, by default one for each CPU that may be used.
        address: The address of a running cluster, or None to start a private Ray.
        gpu: Whether each worker takes a GPU, if there are any.

    Raises:
        UserError: If the number of workers is below 1, or there is no cluster at the address.
    """

    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}, but must be at least 1.")

    def run(item: T) -> tuple[T, R]:
        return item, function(item)

    with connected(address, workers):
        import ray

        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if gpu else 0
        at_once = workers or gpus or int(resources.get("CPU", 1))
        remote = ray.remote(num_cpus=1, num_gpus=min(gpus, 1))(run).remote
        tasks = map(remote, items)
        running = list(islice(tasks, 2 * at_once))

        while running:
            (ready,), running = ray.wait(running)
            running += islice(tasks, 1)
            yield ray.get(ready)


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
            nodes = [node for id, node in live_nodes().items() if id not in self.avoided]
            self._count = self._shared(sum(self._on(node["Resources"]) for node in nodes))
            self._counted = now
            self._room = now if self._count else self._room

            if now - self._room > LAST:
                self._check_avoided()

        if self.most is None:
            return self._count

        return self.most if self.grows else min(self._count, self.most)

    def _shared(self, count: int) -> int:
        r"""Returns a number of trials without those whose CPUs here are for other commands."""

        if self.most is not None or "GPU" in self.wanted:
            return count

        here = local_cpus()
        fewer = self._on({"CPU": here}) - self._on({"CPU": min(here, self.left())})

        return max(min(1, count), count - fewer)

    def _check_avoided(self) -> None:
        r"""Raises a UserError if all nodes that could have a trial are avoided, some as bad."""

        bad = [why for why in self.avoided.values() if why.startswith(BAD)]
        fit = {id for id, node in live_nodes().items() if self._on(node["Resources"])}

        if bad and fit <= set(self.avoided) and not self.forgive():
            raise UserError(
                f"there is no node left for a trial: {'; '.join(dict.fromkeys(bad))}. Look at "
                "Ray's logs on them (/tmp/ray/session_latest/logs), then carry on with the same "
                "command."
            )

    def _on(self, resources: dict[str, float]) -> int:
        return fitting(self.wanted, resources)

    def local(self) -> int:
        r"""Returns the number of trials that fit in a Ray of our own on this machine."""

        here = self._on({"CPU": local_cpus(), "GPU": local_gpus()})

        return here if self.most is None else min(here, self.most)

    def check_local(self) -> None:
        self._check([("this machine", {"CPU": local_cpus(), "GPU": local_gpus()})])

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
