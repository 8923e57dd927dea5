r"""Pieces of files, as they come from and go to other nodes."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["append_to", "digest", "keep_previous", "place_of", "take_piece"]


def take_piece(file: Path, offset: int, size: int) -> tuple[bytes, str]:
    r"""Returns a piece of a file, and its SHA-256."""

    with open(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read(size)

    return data, hashlib.sha256(data).hexdigest()


def place_of(directory: Path, name: str) -> Path:
    r"""Returns where a file of a run goes: in its directory, or W&B's in there.

    Raises:
        ValueError: If it is no file of a run, or would lie elsewhere.
    """

    parts = Path(name).parts
    ours = len(parts) == 1 and not name.startswith((".", "lease."))

    if ".." in parts or Path(name).is_absolute() or not (ours or parts[:1] == ("wandb",)):
        raise ValueError(f"{name!r} is no file of a run")

    place = directory / name

    if len(parts) > 1:
        place.parent.mkdir(parents=True, exist_ok=True)

        if not place.parent.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"{name!r} leads out of the run")

    return place


def digest(file: Path) -> tuple[int, Any]:
    r"""Returns the length of a file, 0 if there is none, and the SHA-256 of it, to go on with."""

    sha, length = hashlib.sha256(), 0

    with suppress(FileNotFoundError), open(file, "rb") as stream:
        while piece := stream.read(2**20):
            sha.update(piece)
            length += len(piece)

    return length, sha


def append_to(file: Path, end: int, data: bytes, mode: int = 0o666, sync: bool = True) -> None:
    r"""Writes at the end of a file, all or nothing."""

    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    stream: BinaryIO

    with open(os.open(file, flags, mode), "wb", buffering=0) as stream:
        try:
            rest = memoryview(data)

            while rest:
                rest = rest[stream.write(rest) :]

            if sync:
                os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), end)
            raise


def keep_previous(place: Path) -> None:
    r"""Keeps the checkpoint before as the previous one, as :mod:`sda_ray.runs.checkpoint` does."""

    if place.name != "checkpoint.pth" or not place.exists():
        return

    previous = place.with_name("checkpoint.prev.pth")
    previous.unlink(missing_ok=True)

    try:
        os.link(place, previous)
    except OSError:  # a file system without links
        os.replace(place, previous)
