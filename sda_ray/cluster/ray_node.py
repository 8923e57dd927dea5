r"""One node of a Ray that belongs to a sweep: started here, and ended in good order.

Ray counts the CPUs of a machine, listens on fixed ports, and keeps its files in `/tmp/ray`, which
belongs to whoever came first. A node of ours counts what this process may use, takes free ports,
and has a private directory, so that several of them, of whatever jobs, live on one machine.
"""

import ctypes
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..core import UserError

__all__ = ["DRAIN", "Member", "member", "own_cpus", "own_gpus", "own_ip", "write_secret"]

START = 180.0  # seconds that Ray may take to start
TRIES = 3  # times that it may, if the machine is busy
DRAIN = 100.0  # seconds that trials have to save a checkpoint when a node leaves
END = 10.0  # seconds that Ray may take to end, beyond that
STORE = 100 * 2**20  # bytes of shared memory; nothing large goes through Ray
PREFIX = "sda-ray-"
RAY = "r"  # the part of a private directory that Ray opens to everybody
LONGEST = 24  # characters of a directory in which the paths of Ray's sockets stay short enough

# Ray would renice its workers, give up on a slow start after 30 s, start a worker on each CPU that no
# trial takes, and send usage statistics.
SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

# A node among others counts as lost after 10 s without an answer.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}

_LIBC = ctypes.CDLL(None)


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


def own_cpus(environ: Mapping[str, str]) -> int:
    r"""Returns the number of CPUs that this process may use: its affinity, its share in Slurm."""

    share = environ.get("SLURM_CPUS_ON_NODE", "")

    return min(local_cpus(), int(share)) if share.isdigit() and int(share) else local_cpus()


def own_gpus(environ: Mapping[str, str]) -> int | None:
    r"""Returns the number of GPUs that Slurm gives to this process, or None outside of Slurm."""

    if "SLURM_JOB_ID" not in environ:
        return None

    given = environ.get("SLURM_GPUS_ON_NODE", "")
    seen = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")

    return int(given) if given.isdigit() else sum(x not in ("", "NoDevFiles", "-1") for x in seen)


def own_ip(peer: str = "8.8.8.8") -> str:
    r"""Returns the address of this machine that another one, by name, would see. Sends nothing."""

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])

    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())

    return "127.0.0.1"


class Member:
    r"""Creates the handle of a node that has been started.

    Arguments:
        process: `ray start --block`.
        directory: The private directory of the node.
        address: The address of its Ray.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", directory: Path, address: str) -> None:
        self.process = process
        self.directory = directory
        self.address = address

    def lives(self) -> bool:
        return self.process.poll() is None

    def leave(self) -> None:
        r"""Begins to leave. Nothing new starts here, and trials save a checkpoint first.

        Ray 2.60 drains a node when `ray start --block` is asked to end, and waits until it is
        idle. Trials look out for that, see :mod:`sda_ray.cluster.preemption`.
        """

        with suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        r"""Kills all processes of the node, in whatever state they are."""

        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        r"""Ends the node, with whatever runs on it."""

        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END)

        self.kill()
        self.process.wait()


@contextmanager
def member(
    token: str | None,
    address: str | None = None,
    ip: str | None = None,
    cpus: int | None = None,
    gpus: int | None = None,
    alone: bool = False,
) -> Iterator[Member]:
    r"""Starts a node of Ray on this machine, which ends with the block.

    Arguments:
        token: The token of the Ray, or None for the one that this user keeps.
        address: The address of the Ray to join, or None to start one.
        ip: The address of this machine, by default the one that Ray finds.
        cpus: The CPUs that it offers, by default as many as this process may use.
        gpus: The GPUs that it offers, by default those that Slurm gives, or that Ray finds.
        alone: Whether no other node joins it, as a rule.

    Raises:
        UserError: If it does not start.
    """

    cpus = own_cpus(os.environ) if cpus is None else cpus
    gpus = own_gpus(os.environ) if gpus is None else gpus

    with private_directory() as directory:
        environment = {**os.environ, **SETTINGS, **({} if alone else HEALTH)}
        environment.pop("RAY_ADDRESS", None)
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = f"{DRAIN if address else 0:g}"

        if token is not None:
            write_secret(directory / "token", token)
            environment.pop("RAY_AUTH_TOKEN", None)
            environment |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
            }

        where = (
            ["--head", "--port=0", "--include-dashboard=false", "--no-monitor", *_client_port()]
            if address is None
            else [f"--address={address}"]
        )
        resources = [f"--num-cpus={cpus}", *([] if gpus is None else [f"--num-gpus={gpus}"])]
        command = [
            *[sys.executable, "-m", "ray.scripts.scripts", "start", *where, *resources],
            *([f"--node-ip-address={ip}"] if ip else []),
            *["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"],
            *[f"--object-store-memory={STORE}", f"--temp-dir={directory / RAY}"],
            *["--include-log-monitor=false", "--disable-usage-stats", "--block"],
        ]

        process, found = _start(command, environment, directory)

        try:
            yield Member(process, directory, found)
        finally:
            Member(process, directory, found).end()


def _start(
    command: list[str], environment: dict[str, str], directory: Path
) -> tuple["subprocess.Popen[bytes]", str]:
    r"""Starts a node, again if the machine is too busy. Returns it and the address of its Ray."""

    for left in reversed(range(TRIES)):
        with open(directory / "ray.log", "wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us
                preexec_fn=_end_with_parent,
            )

        try:
            return process, _wait(process, directory)
        except BaseException as error:
            Member(process, directory, "").end()

            # Ray 2.60 gives its own processes 30 s, whatever RAY_raylet_start_wait_time_s says
            if not (left and isinstance(error, UserError) and "timed out" in str(error)):
                raise

            shutil.rmtree(directory / RAY, ignore_errors=True)

    raise AssertionError


def _client_port() -> list[str]:
    r"""Returns what keeps Ray's client, where it is installed, from the port that all would take."""

    if importlib.util.find_spec("grpc") is None:
        return []

    with socket.socket() as probe:
        probe.bind(("", 0))
        return [f"--ray-client-server-port={probe.getsockname()[1]}"]


def _end_with_parent() -> None:
    with suppress(AttributeError):
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; Linux only


def _wait(process: "subprocess.Popen[bytes]", directory: Path) -> str:
    r"""Waits until a node has started, and returns the address of its Ray."""

    file, deadline = directory / RAY / "ray_current_cluster", time.monotonic() + START

    while not (file.is_file() and (found := file.read_text().strip())):
        if process.poll() is not None or time.monotonic() > deadline:
            said = (directory / "ray.log").read_text(errors="replace").strip().splitlines()
            why = said[-1].strip() if process.poll() is not None and said else "it timed out"
            raise UserError(f"Ray could not be started on {socket.gethostname()}: {why}")

        time.sleep(0.1)

    return found


def write_secret(file: Path, text: str) -> None:
    r"""Writes a new file that nobody else can read at any time."""

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    with os.fdopen(descriptor, "w") as f:
        f.write(text + "\n")


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
