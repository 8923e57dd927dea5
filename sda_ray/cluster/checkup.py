r"""What a machine says of itself when it is asked whether it is fit for trials.

Facts only, gathered without Ray and within seconds; :mod:`sda_ray.plan.doctor` judges them.
"""

import ipaddress
import os
import platform
import pwd
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from .. import __version__

__all__ = ["PACKAGES", "examine", "listening", "owner_of", "reaches"]

PACKAGES = ("ray", "torch", "optuna", "wandb")
GPUS = 60.0  # seconds that torch may take to find GPUs
REACH = 5.0  # seconds that a server may take to answer
LISTEN = "0A"  # what the kernel calls the state of a socket that waits for connections
COUNT = "import torch; print(torch.cuda.device_count())"


def examine(runs: Path, token: str, gpus: bool, url: str | None) -> dict[str, Any]:
    r"""Returns what this machine, and this user on it, are like.

    Arguments:
        runs: The directory of all runs, as the driver calls it.
        token: The name of a file that the driver has left there.
        gpus: Whether to look for GPUs.
        url: The server that shall be reached from here, if any.
    """

    local = Path(os.environ.get("SDA_RAY_LOCAL") or tempfile.gettempdir())

    return {
        "host": socket.gethostname(),
        "versions": _versions(),
        "sees": bool(token) and (runs / token).is_file(),
        "writes": os.access(runs if runs.is_dir() else _parent(runs), os.W_OK),
        "free": {str(place): _free(place) for place in {_parent(runs), _parent(local)}},
        "gpus": _count_gpus() if gpus else None,
        "listening": [list(found) for found in listening()],
        "auth": os.environ.get("RAY_AUTH_MODE", ""),
        "token": _token(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "cpus": os.cpu_count() or 1,
        "ray": owner_of(Path("/tmp/ray")),
        "address": os.environ.get("RAY_ADDRESS", ""),
        "unreached": reaches(url) if url else "",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sda_ray": __version__}

    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"

    return found


def _parent(place: Path) -> Path:
    return next(part for part in (place, *place.parents) if part.is_dir())


def _free(place: Path) -> int:
    return shutil.disk_usage(place).free


def _count_gpus() -> int | str:
    r"""Returns how many GPUs torch sees, or why it cannot tell."""

    # Ray hides them from a process that has not asked for any.
    env = {key: x for key, x in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}

    try:
        done = subprocess.run(
            [sys.executable, "-c", COUNT], env=env, capture_output=True, text=True, timeout=GPUS
        )
    except subprocess.TimeoutExpired:
        return f"torch has not answered within {GPUS:g} s"

    if done.returncode:
        return (done.stderr.strip().splitlines() or ["torch cannot be imported"])[-1]

    return int(done.stdout)


def _token() -> int | None:
    r"""Returns the permissions of the file with Ray's token, or None if there is none.

    In a directory that others cannot enter they count for nothing.
    """

    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")

    with suppress(OSError):
        mode = file.stat().st_mode & 0o777
        open_to = [part.stat().st_mode & 0o011 for part in file.absolute().parents]

        return mode if all(open_to) else mode & 0o700

    return None


def owner_of(directory: Path) -> str:
    r"""Returns whom a directory belongs to that we cannot write to, else nothing."""

    if not directory.exists() or os.access(directory, os.W_OK | os.X_OK):
        return ""

    try:
        return pwd.getpwuid(directory.stat().st_uid).pw_name
    except KeyError:
        return f"user {directory.stat().st_uid}"


def reaches(url: str) -> str:
    r"""Returns why a server cannot be reached from here, or nothing if it can."""

    parsed = urlparse(url)
    port = parsed.port or (80 if parsed.scheme == "http" else 443)

    try:
        socket.create_connection((parsed.hostname or "", port), timeout=REACH).close()
    except OSError as error:
        return f"{parsed.hostname}:{port}: {error}"

    return ""


def listening() -> Iterator[tuple[int, str, str]]:
    r"""Yields ports that other machines may connect to, with address and command of who listens.

    The command is empty if the process is another user's. That of a driver of Ray begins with
    `ray::`, as those of Ray's workers do.
    """

    seen, commands = set(), _sockets()

    for file in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with suppress(OSError):
            for line in file.read_text().splitlines()[1:]:
                fields = line.split()
                place, _, port = fields[1].partition(":")
                address = _address(place)

                if fields[3] != LISTEN or address.is_loopback or (port, fields[9]) in seen:
                    continue

                seen.add((port, fields[9]))
                yield int(port, 16), str(address), commands.get(fields[9], "")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    r"""Returns the address that the kernel prints as words of 32 bits in its own byte order."""

    words = [bytes.fromhex(text[i : i + 8]) for i in range(0, len(text), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)

    return mapped or address


def _sockets() -> dict[str, str]:
    r"""Returns the commands of the processes that have sockets open, by the sockets' numbers."""

    found = {}

    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or another user's
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()

            if "/ray/_raylet" in (process / "maps").read_text():  # a driver opens a port, too
                command = f"ray:: {command}"

            for handle in (process / "fd").iterdir():
                with suppress(OSError):
                    target = os.readlink(handle)

                    if target.startswith("socket:["):
                        found[target[8:-1]] = command

    return found
