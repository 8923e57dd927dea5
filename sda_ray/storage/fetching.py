r"""From a bucket back to a machine: what it takes to list runs, or to carry a sweep on."""

import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..core.errors import UserError
from ..core.files import read_json, write_atomic
from ..runs.path import RECORDS, sweep_directory
from .folder import NOTHING, SUMS, Folder
from .store import Bucket

__all__ = ["MARK", "compare_journals", "fetch_records", "fetch_sweep"]

logger = logging.getLogger(__name__)

MARK = "copy.json"  # beside a journal: the number of the driver that copied it last from here
AT_ONCE = 16  # directories
ID = re.compile(rb'"run_id": ?"([a-z0-9]{8})"')


def fetch_records(bucket: Bucket, runs: Path) -> None:
    r"""Fetches what is small of all sweeps and runs that are not here: enough to list them."""

    keys = bucket.sizes()
    folders = {key.rpartition("/")[0] for key in keys if key.endswith(f"/{SUMS}")}
    sweeps = sorted(key for key in folders if key.startswith("sweeps/"))
    _fetch(bucket, runs, sweeps, ("sweep.json", "script.py"))
    _fetch(bucket, runs, sorted(key for key in folders if f"{key}/run.json" in keys), RECORDS)


def fetch_sweep(bucket: Bucket, runs: Path, name: str) -> None:
    r"""Fetches what a sweep can be carried on with, if the copy is newer than what is here.

    The longer one of two journals that begin alike is newer. If they have parted, the copy is, if
    it was written by a driver elsewhere after the last one here; what is here is kept beside it.

    Raises:
        UserError: If they have parted and it is not known how, or the copy is damaged.
    """

    fetch_records(bucket, runs)
    directory = sweep_directory(runs, name)
    file = directory / "study.journal"
    folder = Folder(bucket, f"sweeps/{name}", directory)
    copy, here = _journal(folder), file.read_bytes() if file.is_file() else b""
    newer = compare_journals(here, copy)

    if newer == "parted":
        _check_parted(folder, len(here), len(copy))
        logger.warning(
            "%s has %d bytes that another driver did not know of when it carried the sweep on: "
            "its journal of %d bytes takes the place, and this one is kept beside it.",
            *(file, len(here), len(copy)),
        )
        write_atomic(file.with_name(f"study.journal.parted-{folder.by}"), here)

    if newer in ("copy", "parted") or not here:
        folder.fetch(lambda name: name != "study.journal", replace=True)

    if newer in ("copy", "parted"):
        ids = {match.decode() for match in ID.findall(copy)}
        keys = [key for key in _folders(bucket) if key.rpartition("_")[2] in ids]
        _clear(bucket, keys)
        _fetch(bucket, runs, keys, RECORDS, replace=True)
        _fetch_checkpoints(bucket, runs, keys)
        write_atomic(file, copy)  # the last: an interrupted fetch is begun anew


def compare_journals(here: bytes, copy: bytes) -> str:
    r"""Tells which of two journals goes on where the other ends: `here`, `copy`, or `parted`."""

    whole = here[: here.rfind(b"\n") + 1]

    if whole.startswith(copy):
        return "here"

    return "copy" if copy.startswith(whole) else "parted"


def _journal(folder: Folder) -> bytes:
    r"""Returns the copy of a journal; if there is none, nothing."""

    from hashlib import sha256

    for again in (False, True):  # a writer may just have been at it
        accepted = folder.load(again).get("study.journal", [])
        data = folder.bucket.read(f"{folder.key}/study.journal")

        if data is None and (len(accepted) < 2 or NOTHING in accepted):
            return b""  # none, or its first was on its way

        if data is not None and sha256(data).hexdigest() in accepted:
            return data

    raise UserError(
        f"{folder.bucket.url}/{folder.key}/study.journal is damaged: its checksum is wrong. "
        f"Restore an older version of it and of {SUMS} beside it; or delete both, to go on from "
        f"what is in {folder.directory}."
    )


def _check_parted(folder: Folder, here: int, copy: int) -> None:
    try:
        last = int(read_json(folder.directory / MARK)["attempt"])
    except (UserError, KeyError, TypeError, ValueError):
        last = 0

    if last >= folder.by or last == 0:
        raise UserError(
            f"{folder.directory / 'study.journal'} ({here} bytes) and its copy in "
            f"{folder.bucket.url} ({copy} bytes) have parted, and which of them is right is not "
            "known. Move the one away that is not: the directory, to go on from the copy; or "
            f"{folder.bucket.url}/{folder.key}/, to go on from here."
        )


def _folders(bucket: Bucket) -> list[str]:
    keys = bucket.sizes()
    found = (key.rpartition("/")[0] for key in keys if key.endswith(f"/{SUMS}"))

    return sorted(key for key in found if f"{key}/run.json" in keys)


def _clear(bucket: Bucket, keys: Iterable[str]) -> None:
    r"""Deletes what killed uploads have left aside in folders that nobody writes to now."""

    own = frozenset(keys)

    for key in bucket.sizes():
        if key.endswith(".tmp") and key.rpartition("/")[0] in own:
            bucket.delete(key)


def _fetch(
    bucket: Bucket, runs: Path, keys: Iterable[str], names: Iterable[str], replace: bool = False
) -> None:
    wanted = frozenset(names)

    def fetch(key: str) -> None:
        Folder(bucket, key, runs / key).fetch(lambda name: name in wanted, replace)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, keys))


def _fetch_checkpoints(bucket: Bucket, runs: Path, keys: Iterable[str]) -> None:
    r"""Fetches what runs go on from that are not finished; a finished one stays in the bucket."""

    for key in keys:
        try:
            status = read_json(runs / key / "run.json")["status"]
        except (UserError, KeyError, TypeError):
            status = ""

        if status != "finished":
            checkpoints = ("checkpoint.pth", "checkpoint.decay.pth")
            _fetch(bucket, runs, [key], checkpoints, replace=True)
