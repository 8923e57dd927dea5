r"""What is around a sweep: its directories, this machine and its limits, and the key of W&B."""

import configparser
import netrc
import os
import platform
import resource
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from ..cluster.connect import local_cpus
from ..core.errors import UserError
from ..data.dataset import fingerprint
from ..runs.tracking import Wandb
from ..storage.scratch import local_directory

__all__ = [
    "check_machine",
    "check_runs",
    "check_wandb",
    "free_disk",
    "look_here",
    "machine_memory",
    "processor",
    "wandb_server",
]

FILES = 8  # that Ray opens for each CPU, beside the first 64, or fewer


def check_runs(runs: Path) -> None:
    r"""Raises a UserError if nothing can be written where the runs will be."""

    place = next(part for part in (runs, *runs.parents) if os.path.lexists(part))

    try:
        with tempfile.NamedTemporaryFile(prefix=".sda-ray-", dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"runs cannot be written to {runs}: {error.strerror or error}. Make room, or give "
            "another directory with --runs."
        ) from error


def free_disk(place: Path) -> int:
    r"""Returns the bytes that are free where a directory is, or will be."""

    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.is_dir())).free


def check_machine() -> None:
    r"""Raises a UserError if Ray cannot run on this machine."""

    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray goes up to the hard limit itself
    least = 64 + FILES * local_cpus()

    if limit != resource.RLIM_INFINITY and limit < least:
        raise UserError(
            f"processes may open {limit} files here, but Ray on {local_cpus()} CPUs needs about "
            f"{least}. Raise the hard limit (`ulimit -Hn`)."
        )

    temporary = tempfile.gettempdir()

    if not os.access(temporary, os.W_OK):
        raise UserError(f"{temporary} cannot be written, but Ray keeps its files there.")


def check_wandb(wandb: Wandb) -> None:
    r"""Raises a UserError if W&B needs a key and there is none."""

    if wandb.mode != "online":
        return

    if any(os.environ.get(f"WANDB_{x}") for x in ("API_KEY", "IDENTITY_TOKEN_FILE")):
        return

    host = urlparse(wandb_server()).netloc  # with the port, as `wandb login` writes it
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()

    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(str(file)).authenticators(host):
            return

    raise UserError(
        f"W&B is to be used online, but there is no key for {host}, neither in WANDB_API_KEY nor "
        f"in {file}. Do `wandb login`, or leave --wandb online out and `sda-ray sync` later."
    )


def wandb_server() -> str:
    r"""Returns the address of W&B's server: $WANDB_BASE_URL, or what `wandb login --host` noted."""

    directory = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)

    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(directory / "settings")

    noted = settings.get("default", "base_url", fallback="https://api.wandb.ai")

    return os.environ.get("WANDB_BASE_URL") or noted


def look_here(
    runs: Path, data: Path, expected: str | None, token: str, away: bool = False
) -> tuple[str, int, list[str], list[str]]:
    r"""Looks at the node that it is called on.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        expected: The fingerprint of the data, if they are known.
        token: A file in the directory of all runs.
        away: Whether trials may do without these directories, see :mod:`sda_ray.storage.client`.

    Returns:
        The model of its CPU, its memory, what is wrong there, and what is missing there that the
        head has.
    """

    faults: list[str] = []
    missing: dict[str, str] = {}

    try:
        if not (runs / token).is_file():
            shared = "is not the one of the sweep, but must be shared by all nodes"
            missing[str(runs)] = f"{runs} {shared}"
        else:
            with tempfile.NamedTemporaryFile(prefix=".sda-ray-", dir=runs) as file:
                file.write(token.encode())
    except OSError as error:
        faults.append(f"runs cannot be written to {runs}: {error.strerror or error}")

    if expected is not None:
        try:
            if fingerprint(data) != expected:
                others = f"the data in {data} are others than those of the sweep"
                missing[str(data)] = others
        except (UserError, OSError) as error:
            missing[str(data)] = str(error)

    if not away:
        faults += missing.values()
    elif missing:
        try:
            local_directory("runs")
        except UserError as error:
            faults.append(str(error))

    return processor(), machine_memory(), faults, list(missing)


def processor() -> str:
    r"""Returns the model of this machine's CPU."""

    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()

    return platform.processor() or platform.machine()


def machine_memory() -> int:
    r"""Returns the bytes of memory that processes may use here, by the machine and its cgroup."""

    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]

    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max` is no number
            found.append(int(Path(file).read_text()))

    return min(found)
