r"""The record of a run: `run.json`, all that is known beside its config and its metrics.

The bits of a run depend on versions, code, device and threads: its provenance. A process
determines these once, for all the runs that it trains: its imports do not change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .. import __version__
from ..core import Config, Hold, UserError, read_json, write_atomic, write_json
from .path import RunPath

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PACKAGES = ("coolname", "h5py", "numpy", "optuna", "pillow", "ray", "rich", "wandb")

DECISIVE = ("device", "threads", "sda_ray", "numpy", "torch")  # what bits depend on

PACKAGE = Path(__file__).resolve().parents[1]
ORIGIN = PACKAGE / "origin.json"  # of a copy of the package in the record of a sweep
LARGEST_DIFF = 2**20  # bytes


class Attempt(msgspec.Struct):
    number: int | None = None
    started: str | None = None
    ended: str | None = None
    host: str | None = None
    device: str | None = None
    threads: int | None = None
    code: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, Any] = {}
    restarted: str | None = None


class Fields(msgspec.Struct):
    r"""The keys of `run.json` that are checked. It and its attempts may have more."""

    id: str | None = None
    name: str | None = None
    status: str | None = None
    created: str | None = None
    exact: bool | None = None
    data: str | None = None
    parent: str | None = None
    extends: str | None = None
    sweep: str | None = None
    wandb: dict[str, Any] | None = None
    attempts: list[Attempt] | None = None
    rungs: list[int] | None = None
    objective: str | None = None
    measured: dict[str, int] | None = None


def read_record(path: RunPath) -> dict[str, Any]:
    r"""Returns the `run.json` of a run, or an empty dict if there is none, as in SDA's runs.

    Keys of :class:`Fields` that are null are left out.

    Raises:
        UserError: If the file is damaged.
    """

    record = read_json(path.record) if os.path.lexists(path.record) else {}

    if not isinstance(record, dict):
        raise UserError(f"{path.record} is damaged: it is not a JSON object.")

    try:
        msgspec.convert(record, Fields)
    except msgspec.ValidationError as error:
        raise UserError(f"{path.record} is damaged: {error}.") from error

    return {k: x for k, x in record.items() if x is not None or k not in Fields.__struct_fields__}


def check_same_data(path: RunPath, record: dict[str, Any], fingerprint: str) -> None:
    if record.get("data", fingerprint) != fingerprint:
        raise UserError(
            f"{path.directory.name} was trained on other data. Give the directory of its data with "
            "--data."
        )


class Record(dict[str, Any]):
    r"""The record of an open run. Each new status is written to the disk, under `hold`."""

    def __init__(self, path: RunPath, hold: Hold, more: dict[str, Any]) -> None:
        super().__init__(id=path.id, name=path.name, created=timestamp(), exact=True)
        self.update(read_record(path), **more)
        self.path, self.hold = path, hold

    def begin(self, attempt: int, provenance: dict[str, Any]) -> None:
        r"""Records the start of an attempt, and whether its bits may differ from the first's."""

        attempts = self.setdefault("attempts", [])

        if attempts and (differs := differences(attempts[0], provenance)):
            self["exact"] = False
            logger.warning(
                "%s resumes with another %s than it started with: its bits may differ from those "
                "of an uninterrupted run.",
                self.path.directory.name,
                " and ".join(differs),
            )

        attempts.append({"number": attempt, "started": timestamp(), **provenance})
        self.write("running")

    def end(self, status: str, **more: Any) -> None:
        self["attempts"][-1]["ended"] = timestamp()
        self.write(status, **more)

    def write(self, status: str, **more: Any) -> None:
        r"""Writes the record with a new status."""

        self.update(status=status, updated=timestamp(), **more)

        with self.hold():
            write_json(self.path.record, self)


def logged_config(config: Config, record: dict[str, Any]) -> Config:
    r"""Returns the config that W&B shows for a run, with the sweep that its `run.json` names."""

    origin = {key: record.get(key) for key in ("sweep", "trial", "study")}

    return config | {key: x for key, x in origin.items() if isinstance(x, str | int)}


def timestamp() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# Provenance


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    r"""Returns the versions, code, device and threads that bits depend on beside the config."""

    import torch

    cuda = torch.device(device).type == "cuda"

    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "code": _code(),
        "versions": {
            "python": platform.python_version(),
            "sda_ray": __version__,
            **{package: version(package) for package in PACKAGES},
            "torch": str(torch.__version__),  # with its build
        },
        **_source()[0],
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    r"""Returns the decisive respects in which two provenances differ."""

    then, here = ({**x, **x.get("versions", {})} for x in (before, now))
    differ = [key for key in DECISIVE if then.get(key) != here.get(key)]

    if (was := before.get("code")) and now.get("code") not in (None, was):
        differ.append("code")

    return differ


def digests(package: Path) -> dict[str, str]:
    r"""Returns the SHA-256 of each file of a package by its name, relative to the package.

    Caches, hidden files and the origin of a recorded copy are left out.
    """

    sums = {}

    for file in package.rglob("*"):
        name = file.relative_to(package)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)

        if not hidden and not file.match("origin.*") and file.suffix != ".pyc" and file.is_file():
            sums[name.as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()

    return dict(sorted(sums.items()))


def code_of(files: Mapping[str, str]) -> str:
    r"""Returns the hash of code: a SHA-256 over the names and digests of its files."""

    lines = (f"{digest} {name}\n" for name, digest in sorted(files.items()))

    return hashlib.sha256("".join(lines).encode()).hexdigest()


def origin() -> tuple[dict[str, Any], bytes | None]:
    r"""Returns where the package comes from, and its diff to its commit, for a copy of it."""

    commit, diff = _source()

    return {"package": str(PACKAGE), "host": platform.node(), **commit}, diff


def save_diff(path: RunPath, hold: Hold) -> None:
    r"""Saves the package's difference to its commit as `diff.patch`, if there is one.

    Untracked files are left out. Only its owner may read the file; that of an earlier attempt is
    replaced only by another difference.
    """

    _, diff = _source()

    if diff and len(diff) > LARGEST_DIFF:
        logger.warning(
            "The code differs from its commit by %d bytes, but diff.patch keeps at most %d.",
            len(diff),
            LARGEST_DIFF,
        )
    elif diff:
        with hold():
            write_atomic(path.diff, diff, mode=0o600)


@cache
def _code() -> str:
    return code_of(digests(PACKAGE))


@cache
def _source() -> tuple[dict[str, Any], bytes | None]:
    r"""Returns the commit of the package's own repository, or of which it is a copy, and the diff."""

    if ORIGIN.is_file():
        known, patch = json.loads(ORIGIN.read_bytes()), ORIGIN.with_suffix(".patch")
        source = {key: known.get(key) for key in ("commit", "dirty")}
        return source, patch.read_bytes() if patch.is_file() else None

    if _git("ls-files", "--error-unmatch", "__init__.py") is None:  # a venv in another repository
        return {"commit": None, "dirty": None}, None

    # Independent of the user's settings and of programs that the repository names
    options = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "--binary")
    diff = _git("diff", *options, "HEAD")
    commit = (_git("rev-parse", "HEAD") or b"").decode().strip() or None

    return {"commit": commit, "dirty": bool(diff)}, diff


def _git(*command: str) -> bytes | None:
    # In a hook, GIT_DIR and others name another repository
    own = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}

    try:
        done = subprocess.run(
            ["git", *command], cwd=PACKAGE, env=own, capture_output=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None

    return done.stdout if done.returncode == 0 else None


@cache
def cpu_model() -> str:
    r"""Returns the model of this machine's CPU."""

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]

    return names[0] if names else platform.processor() or platform.machine()
