r"""Fragments: what W&B leaves of an attempt at a run that was offline.

A fragment is a log of records in `wandb/offline-run-{date}_{time}-{id}/run-{id}.wandb`, beside
`files/` with pictures; further ones of the same second end in `-1`, `-2`, … wandb 0.31 has no
reader in Python; the format is that of LevelDB's log.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .path import RunPath
from .tracking import own_environment

__all__ = ["Fragment", "await_end", "read_fragments", "sync_fragments"]

HEADER = 7  # bytes: of the file, and of each piece of a record
BLOCK = 2**15  # bytes; no piece crosses the border of a block
LARGEST = 2**28  # bytes; a longer file is not one of ours

FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Fragment:
    r"""Creates what a fragment says.

    Arguments:
        file: Its file.
        size: The bytes of its whole records: a kill may have torn the last one.
        run: What run it belongs to: `id`, `name`, `project`, `entity`, `group` and `job_type`.
        rows: Its rows as (step, values), in order. Pictures have no values.
        ended: Whether the attempt came to its end.
    """

    file: Path
    size: int
    run: dict[str, str]
    rows: tuple[tuple[int, dict[str, str]], ...]
    ended: bool


def read_fragments(path: RunPath) -> list[Fragment]:
    r"""Returns the fragments of a run in the order of their attempts; empty ones are left out.

    Links are not followed.

    Raises:
        UserError: If a fragment is damaged, in its middle.
    """

    found = []

    for directory in _directories(path):
        file = directory / f"run-{path.id}.wandb"
        plain = directory.is_dir() and not (directory.is_symlink() or file.is_symlink())

        if plain and not file.parent.parent.is_symlink() and file.is_file():
            if (size := file.stat().st_size) > LARGEST:
                raise UserError(f"{file} has {size} bytes, but at most {LARGEST} are read.")

            if (fragment := _read(file)) is not None:
                found.append(fragment)

    return found


def await_end(file: Path, patience: float = 5.0) -> None:
    r"""Waits until a fragment that this process has made has its end.

    wandb 0.31 says that an offline run is finished some ms before it has written the rest of it.

    Arguments:
        file: Its file.
        patience: The seconds that it may take.

    Raises:
        UserError: If the fragment is damaged.
    """

    deadline = time.monotonic() + patience

    while not ((fragment := _read(file)) and fragment.ended) and time.monotonic() < deadline:
        time.sleep(0.002)


def _directories(path: RunPath) -> list[Path]:
    r"""Returns where W&B has put the attempts at a run, in their order."""

    name = re.compile(rf"offline-run-(.+)-{re.escape(path.id)}(?:-(\d+))?")
    found = [
        (match[1], int(match[2] or 0), directory)
        for directory in path.directory.glob("wandb/offline-run-*")
        if (match := name.fullmatch(directory.name))
    ]

    return [directory for *_, directory in sorted(found)]


def _read(file: Path) -> Fragment | None:
    from wandb.proto.wandb_internal_pb2 import Record

    size, ended = 0, False
    run: dict[str, str] = {}
    rows: list[tuple[int, dict[str, str]]] = []

    for size, data in _records(file):  # noqa: B007
        record: Any = Record()

        try:
            record.ParseFromString(data)
        except Exception as error:  # whatever damage provokes in protobuf
            raise UserError(f"{file} is damaged: {error}.") from error

        kind = record.WhichOneof("record_type")

        if kind == "run":
            run = _describe(record.run)
        elif kind == "history":
            items = ((item.key or ".".join(item.nested_key), item) for item in record.history.item)
            values = {key: item.value_json for key, item in items}
            rows.append((record.history.step.num, values))

        ended = kind == "exit" or (ended and kind != "history")

    return Fragment(file, size, run, tuple(rows), ended) if run else None


def _describe(run: Any) -> dict[str, str]:
    return {
        "id": run.run_id,
        "name": run.display_name,
        "project": run.project,
        "entity": run.entity,
        "group": run.run_group,
        "job_type": run.job_type,
    }


def _records(file: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yields the whole records of a fragment, each with the position after it."""

    data = file.read_bytes()
    position, record = HEADER, b""

    if data[:4] != b":W&B"[: len(data)]:
        raise UserError(f"{file} is damaged: it does not begin as a fragment of W&B does.")

    while position + HEADER <= len(data):
        if (rest := BLOCK - position % BLOCK) < HEADER:
            position += rest
            continue

        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        end = position + HEADER + length
        piece = data[position + HEADER : end]

        if end > len(data):  # torn
            return

        checksum = int.from_bytes(data[position : position + 4], "little")

        if zlib.crc32(data[position + 6 : end]) != checksum or kind not in (1, 2, 3, 4):
            if not any(data[position:]):  # a power cut may leave zeros
                return

            raise UserError(f"{file} is damaged at byte {position}: its checksum is wrong.")

        record = piece if kind in (FULL, FIRST) else record + piece
        position = end

        if kind in (FULL, LAST):
            yield position, record


def sync_fragments(fragments: Sequence[Fragment], patience: float) -> None:
    r"""Uploads fragments by `wandb sync`, all of them in one go: it puts them in their order.

    Whether it worked is for the caller to see: wandb 0.31 exits with 0 in any case. It gets
    copies, since it marks what it has read, and would pass over it the next time.

    Arguments:
        fragments: The fragments of one run.
        patience: The seconds that it may take.
    """

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, own_environment():
        copies = [str(_copy(fragment, Path(scratch))) for fragment in fragments]
        process = subprocess.Popen(
            [sys.executable, "-m", "wandb", "sync", *copies],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):  # its service, too, which would try for ever
                os.killpg(process.pid, signal.SIGKILL)

            process.wait()


def _copy(fragment: Fragment, directory: Path) -> Path:
    r"""Copies a fragment and its pictures, without what a kill has torn. Links are left out."""

    copy = directory / fragment.file.parent.name / fragment.file.name
    copy.parent.mkdir()
    copy.write_bytes(fragment.file.read_bytes()[: fragment.size])
    files = fragment.file.parent / "files"

    if files.is_dir() and not files.is_symlink():
        shutil.copytree(files, copy.parent / "files", ignore=_links)

    return copy


def _links(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(directory) / name).is_symlink()]
