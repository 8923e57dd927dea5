r"""One node of a Ray that belongs to a sweep: started on this machine, and ended gracefully.

By default Ray counts the CPUs of the machine, listens on fixed ports, and keeps its files in
`/tmp/ray`, which belongs to the user who came first. A node of ours counts the CPUs that this process
may use, takes free ports, and has a private directory: several of them, of different jobs, can share
one machine.
"""

import ctypes
import importlib.util
import logging
import math
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..core import UserError, cgroup_cpus, locked, write_atomic

logger = logging.getLogger(__name__)

ANSWER = 2.0  # seconds that a TCP connection to the head of a Ray may take
START = 180.0  # seconds that Ray may take to start
TRIES = 3  # times that it may, if the machine is busy
DRAIN = 100.0  # seconds that trials have to save a checkpoint when a node leaves
END = 10.0  # seconds that Ray may take to end, beyond that
LOOK = 1.0  # seconds between two looks at its processes while it starts
LOOPBACK = 5.0  # seconds to connect to this machine itself
STORE = 100 * 2**20  # bytes of shared memory; nothing large goes through Ray
PREFIX = "sda-ray-"
RAY = "r"  # the part of a private directory that Ray opens to everybody
LOCK = "lock"
LEAVING = "SDA_RAY_LEAVING"  # the variable with the file that exists once a node is about to leave
LONGEST = 24  # characters of a directory in which the paths of Ray's sockets stay short enough
PATH = re.compile(rf"/[\w./-]{{0,{LONGEST - 1}}}", re.ASCII)  # Ray splits commands at blanks
PLACES = ("/tmp", "/var/tmp", "/dev/shm")

# The environment of drivers and nodes, unless the user sets other values. By default Ray renices its
# workers, gives up on a slow start after 30 s, starts a worker on each CPU that no trial takes, and
# sends usage statistics. Tune's own progress table, loggers and signal handler are off: the sweep has
# its own.
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_worker_niceness": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

# A node among others counts as lost after some 15 s without an answer; one alone, which may be on a
# busy machine, after half a minute. Ray itself takes more than a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}

ALONE = {"RAY_health_check_period_ms": "3000", "RAY_health_check_timeout_ms": "3000"}

_LIBC = ctypes.CDLL(None)

Process = subprocess.Popen[bytes]


def local_cpus() -> int:
    r"""Returns the number of CPUs that this process may use: its affinity, cgroups, and Slurm."""

    share = os.environ.get("SLURM_CPUS_ON_NODE", "")
    given = int(share) if share.isdigit() and int(share) else math.inf

    return max(1, int(min(len(os.sched_getaffinity(0)), cgroup_cpus(), given)))


def local_gpus() -> int:
    r"""Returns the number of GPUs that torch can use here. Where there are none, it is not loaded."""

    devices = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")  # of NVIDIA, AMD and WSL

    if not any(any(Path("/dev").glob(x)) for x in devices):
        return 0

    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def slurm_gpus() -> int | None:
    r"""Returns the number of GPUs that Slurm gives to this process, or None outside of Slurm."""

    if "SLURM_JOB_ID" not in os.environ:
        return None

    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")

    return int(given) if given.isdigit() else sum(x not in ("", "NoDevFiles", "-1") for x in seen)


def own_ip(peer: str = "8.8.8.8") -> str:
    r"""Returns the address of this machine that another one, by name, would see. Sends nothing."""

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])

    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())

    return "127.0.0.1"


def answers(address: str) -> bool:
    r"""Tells whether something listens at the address of a Ray."""

    host, _, port = address.rpartition(":")

    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
    except (OSError, ValueError, OverflowError):
        return False

    return True


@dataclass(frozen=True)
class RayNode:
    r"""A running node of Ray."""

    process: Process  # `ray start --block`
    directory: Path
    address: str  # of its Ray
    cpus: int
    gpus: int | None  # None if Ray counts them

    def is_running(self) -> bool:
        return self.process.poll() is None

    def leave(self) -> None:
        r"""Leaves the Ray. Nothing new starts here, and trials save a checkpoint first.

        Ray 2.60 drains a node when `ray start --block` is asked to end, and waits until it is
        idle. Trials look at the file, see :func:`is_leaving`: Ray has no public call for it.
        """

        with suppress(OSError):  # a disk that is full, or cleaned: nothing is told, but it leaves
            (self.directory / "leaving").touch()

        self.process.terminate()

        with suppress(subprocess.TimeoutExpired):
            self.process.wait(DRAIN + END)

    def kill(self) -> None:
        _kill(self.process)


def is_leaving() -> bool:
    r"""Tells whether the node that this process works for is about to leave its Ray."""

    return os.path.exists(os.environ.get(LEAVING, ""))


@contextmanager
def started(
    token: str | None,
    address: str | None = None,
    ip: str | None = None,
    cpus: int | None = None,
    gpus: int | None = None,
    alone: bool = False,
) -> Iterator[RayNode]:
    r"""Starts a node of Ray on this machine, which ends with the block or with this process.

    The node runs in a session of its own, which signals to this process' group do not reach.

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

    cpus = local_cpus() if cpus is None else cpus
    gpus = slurm_gpus() if gpus is None else gpus

    _check_loopback()

    with private_directory(cpus) as directory:
        environment = {**ENVIRONMENT, **HEALTH, **(ALONE if alone else {}), **os.environ}
        environment.pop("RAY_ADDRESS", None)
        environment[LEAVING] = str(directory / "leaving")
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = f"{DRAIN if address else 0:g}"

        if token is not None:
            file = directory / "token"
            write_atomic(file, token.encode(), mode=0o600)
            environment.pop("RAY_AUTH_TOKEN", None)
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}

        options = [
            *(_head_options() if address is None else [f"--address={address}"]),
            *([f"--node-ip-address={ip}"] if ip else []),
            *([] if gpus is None else [f"--num-gpus={gpus}"]),
            *[f"--num-cpus={cpus}", f"--object-store-memory={STORE}"],
            *["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"],
            *["--include-log-monitor=false", f"--temp-dir={directory / RAY}", "--block"],
        ]
        process, found = _start(options, environment, directory)

        try:
            yield RayNode(process, directory, found, cpus, gpus)
        finally:
            _end(process)


def _check_loopback() -> None:
    r"""Raises a UserError if processes of this machine cannot connect: Ray would try for minutes."""

    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), LOOPBACK).close()
    except OSError as error:
        raise UserError(
            f"Ray cannot start, since 127.0.0.1 does not answer: {error}. Set the loopback "
            "interface up, as root: ip link set lo up"
        ) from error


def _head_options() -> list[str]:
    r"""Returns the options of a node that starts a Ray, without autoscaler or dashboard.

    `--no-monitor` is not in the help of Ray 2.60. It saves a process, and a second at each start.
    """

    options = ["--head", "--port=0", "--include-dashboard=false", "--no-monitor"]

    if importlib.util.find_spec("grpc") is not None:  # then Ray's client takes a port, 10001
        with socket.socket() as probe:
            probe.bind(("", 0))
            options.append(f"--ray-client-server-port={probe.getsockname()[1]}")

    return options


def _start(
    options: list[str], environment: dict[str, str], directory: Path
) -> tuple[Process, str]:
    r"""Starts a node, again if the machine is too busy. Returns it and the address of its Ray."""

    script = Path(sys.executable).with_name("ray")
    ray = [str(script)] if script.exists() else ["-m", "ray.scripts.scripts"]

    for left in reversed(range(TRIES)):
        with open(directory / "ray.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *ray, "start", *options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us
                preexec_fn=lambda: _LIBC.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG
            )

        try:
            return process, _wait(process, directory)
        except BaseException as error:
            _end(process)

            # Ray 2.60 gives its own processes 30 s, whatever RAY_raylet_start_wait_time_s says
            again = isinstance(error, UserError) and re.search("timed out|was killed", str(error))

            if not (left and again):
                raise

            shutil.rmtree(directory / RAY, ignore_errors=True)

    raise AssertionError


def _wait(process: Process, directory: Path) -> str:
    r"""Waits until a node has started, and returns the address of its Ray."""

    import psutil

    file, start = directory / RAY / "ray_current_cluster", time.monotonic()
    looked = start

    while not (file.is_file() and (address := file.read_text().strip())):
        now = time.monotonic()

        if process.poll() is not None or now - start > START:
            lines = (directory / "ray.log").read_text(errors="replace").strip().splitlines()
            why = lines[-1].strip() if process.poll() is not None and lines else "it timed out"
            raise not_started(why)

        if now - looked > LOOK:  # Ray 2.60 waits for a dead raylet, 120 s by our settings
            looked = now

            with suppress(psutil.Error):
                children = psutil.Process(process.pid).children()
                dead = [x.name() for x in children if x.status() == psutil.STATUS_ZOMBIE]

                if "raylet" in dead:
                    raise not_started("its raylet was killed")

        time.sleep(0.05)

    return address


def not_started(why: str) -> UserError:
    return UserError(
        f"Ray could not be started on {socket.gethostname()}: {why}. Nothing is lost; is the "
        "machine overloaded, or out of memory or disk? The same command tries again."
    )


def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)

    with suppress(subprocess.TimeoutExpired):
        process.wait(END)

    _kill(process)
    process.wait()


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def private_directory(cpus: int = 0) -> Iterator[Path]:
    r"""Makes a directory that ends with the block, and removes those of killed processes.

    Each is locked by its process for as long as that lives, in whatever container. The lock says
    how many CPUs a node offers. A warning tells if this user's nodes offer more than there are.
    """

    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_parent()))
        stack.callback(_remove, directory)
        lock = stack.enter_context(locked(directory / "new"))
        lock.write(str(cpus).encode())
        lock.flush()
        os.replace(directory / "new", directory / LOCK)  # never there without being locked
        held = sum(_others(directory))

        if cpus and held and cpus + held > (os.cpu_count() or 1):
            logger.warning(
                "other commands of yours hold %d CPUs of this machine, and this one takes %d: they "
                "slow each other down. Sweeps without --parallel start fewer trials meanwhile.",
                held,
                cpus,
            )

        yield directory


def _others(directory: Path) -> list[int]:
    r"""Returns the CPUs of this user's other commands, and removes what those that died left."""

    cpus = list[int]()

    for other in directory.parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError, ValueError):  # removed by another process, or damaged
            status = other.parent.lstat()

            if other.parent == directory or not stat.S_ISDIR(status.st_mode):
                continue

            if status.st_uid != os.getuid():
                continue

            try:
                with locked(other, wait=False):
                    _remove(other.parent)
            except BlockingIOError:
                cpus.append(int(other.read_text() or 0))

    return [n for n in cpus if n]


def cpus_left(directory: Path) -> int:
    r"""Returns the CPUs that this user's other commands leave to the one with a private directory.

    They are those that no other uses, and at least an equal share.
    """

    cpus, others = int(min(os.cpu_count() or 1, cgroup_cpus())), _others(directory)

    return max(cpus // (1 + len(others)), cpus - sum(others))


def note_cpus(directory: Path, cpus: float) -> None:
    r"""Notes in a private directory how many CPUs its command uses now."""

    with suppress(OSError), open(directory / LOCK, "r+") as lock:
        lock.write(f"{math.ceil(cpus):<9}")  # in place: others read it at any time


def _parent() -> Path:
    r"""Returns a directory for temporary files whose path Ray's sockets and commands can have."""

    with suppress(FileNotFoundError):  # raised by gettempdir
        for place in (tempfile.gettempdir(), *PLACES):
            if PATH.fullmatch(place) and os.access(place, os.W_OK | os.X_OK):
                return Path(place)

    raise UserError(
        "Ray needs a directory for temporary files with a short and plain path, but none of "
        f"{', '.join(PLACES)} can be written. Set TMPDIR to one of at most {LONGEST} letters, "
        "digits and characters of '/._-'."
    )


def _remove(directory: Path) -> None:
    r"""Removes a private directory, the lock last: if this is cut short, another start goes on."""

    with suppress(OSError):
        for part in sorted(directory.iterdir(), key=lambda part: part.name == LOCK):
            shutil.rmtree(part) if part.is_dir() else part.unlink()

        directory.rmdir()
