r"""The journal of a study: one record a line, appended by one writer and never changed.

It is what Optuna's own tools read, such as its dashboard. What is different from Optuna's file
backend is what happens when something goes wrong: the writer holds the lease of the sweep, an
append is whole or undone, a full disk is waited for, and a torn end is put right on opening.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection

from ..core.errors import UserError
from ..core.files import open_regular, write_atomic
from ..core.lease import Lease, LeaseLost

__all__ = ["Holder", "Journal", "open_journal", "open_study"]

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what an append waits for the end of
PATIENCE = 600.0  # seconds that it waits
PAUSES = (0.1, 10.0)  # seconds between two tries, first and in the end
TAIL = 2**16  # bytes that are looked at first for the end of the last whole record


Holder = Lease | None  # None reads alone


class Journal(BaseJournalBackend):
    r"""Creates the backend of Optuna's journal storage for a file.

    Arguments:
        file: The journal. It appears with its first record.
        lease: The lease of the sweep, or None to read alone: without it nothing is written.
    """

    storage: JournalStorage

    def __init__(self, file: Path, lease: Holder) -> None:
        self.file = file
        self.lease = lease
        self.stopping: Callable[[], bool] = lambda: False  # whether to wait no longer
        self.appended: Callable[[list[dict[str, Any]]], None] = lambda logs: None  # who is told
        self.line = 0  # the number of the last record that was read
        self._offset = 0  # where it ends
        self._held: list[dict[str, Any]] | None = None

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if log_number_from != self.line:
            self.line = self._offset = 0

        try:
            if os.lstat(self.file).st_size == self._offset > 0:
                return
        except FileNotFoundError:
            return

        with os.fdopen(open_regular(self.file), "rb") as file:
            file.seek(self._offset)

            for line in file:
                if not line.endswith(b"\n"):
                    return

                self.line += 1
                self._offset += len(line)

                if self.line > log_number_from:
                    yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._held is not None:
            self._held += logs
        else:
            lines = (json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            self._append("".join(lines).encode())
            self.appended(logs)

    @contextmanager
    def together(self) -> Iterator[None]:
        r"""Appends all records of the block at once, when it ends well.

        They must not depend on each other's being there, as a trial's number does.
        """

        if self._held is not None:
            yield
            return

        self._held = []

        try:
            yield
            held = self._held
        finally:
            self._held = None

        if held:
            self.append_logs(held)

    def _append(self, data: bytes) -> None:
        r"""Appends records, and waits for room if the disk is full.

        Raises:
            OSError: If there is none for too long, or the sweep shall stop.
        """

        if self.lease is None:
            raise LeaseLost(f"{self.file} was opened to be read")

        start, pause = time.monotonic(), PAUSES[0]

        while True:
            try:
                with self.lease.hold():
                    return self._write(data)
            except OSError as error:
                waited = time.monotonic() - start

                if error.errno not in FULL or waited > PATIENCE or self.stopping():
                    raise

                if pause == PAUSES[0]:
                    free = shutil.disk_usage(self.file.parent).free
                    logger.warning(
                        "%s cannot be written: %s (%d bytes are free). Waiting for room.",
                        self.file,
                        error.strerror,
                        free,
                    )

            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def _write(self, data: bytes) -> None:
        if not os.path.lexists(self.file):
            return write_atomic(self.file, data)

        handle = open_regular(self.file, os.O_WRONLY | os.O_APPEND)

        try:
            end = os.fstat(handle).st_size

            try:
                if os.write(handle, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))

                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def open_study(
    file: Path, name: str, lease: Holder, objectives: Sequence[str]
) -> tuple[optuna.Study, Journal]:
    r"""Opens the study in a journal, or creates both.

    Raises:
        UserError: If the journal cannot be opened, or has another study.
    """

    journal = open_journal(file, lease)
    storage = journal.storage

    try:
        return optuna.load_study(storage=storage, study_name=name), journal
    except KeyError:
        if others := [study.study_name for study in storage.get_all_studies()]:
            raise UserError(
                f"{file} holds the study '{others[0]}', not '{name}'. Put the journal of '{name}' "
                "there, or remove the file to begin the sweep anew."
            ) from None

    directions = [StudyDirection.MINIMIZE] * len(objectives)
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)

    return study, journal


def open_journal(file: Path, lease: Holder) -> Journal:
    r"""Opens a journal, or makes ready for a new one, and puts right what a dead writer left.

    Raises:
        UserError: If the file is damaged, empty, or not a journal.
    """

    if lease is not None:
        _put_right(file, lease)

    journal = Journal(file, lease)

    try:
        journal.storage = JournalStorage(journal)
        return journal
    except UserError:
        raise
    except (OSError, MemoryError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    except Exception as error:  # whatever Optuna makes of records that are none of its own
        raise UserError(
            f"{file} is damaged: its line {journal.line} is not a record of a study "
            f"({type(error).__name__}: {error}). Restore a copy of the file. If there is none, "
            "remove the line: values are read again from the directories of the runs."
        ) from error


def _put_right(file: Path, lease: Lease) -> None:
    with lease.hold():
        # A lock that a killed dashboard left would stall the next one for 30 s.
        for stale in file.parent.glob(f"{file.name}.lock*"):
            stale.unlink(missing_ok=True)

        if os.path.lexists(file):
            _repair(file)


def _repair(file: Path) -> None:
    r"""Cuts off a last record that is not whole, and keeps it beside the journal."""

    with os.fdopen(open_regular(file, os.O_RDWR), "r+b") as stream:
        size = os.fstat(stream.fileno()).st_size
        end = _whole(stream.fileno(), size)

        if end == 0:
            raise UserError(
                f"{file} is {'not a journal' if size else 'empty: its records are lost'}. Restore "
                "a copy of the file, or remove it to begin the sweep anew."
            )

        if end == size:
            return

        torn = os.pread(stream.fileno(), size - end, end)
        kept = _unused(file.with_suffix(".journal.torn"))

        try:
            write_atomic(kept, torn)
        except OSError as error:
            logger.warning("%s cannot be written: %s.", kept, error)

        stream.truncate(end)
        os.fsync(stream.fileno())
        logger.warning("%s: a torn last record was cut off, and kept as %s.", file, kept.name)


def _whole(handle: int, size: int) -> int:
    r"""Returns how many leading bytes are whole records, as far as the end of the file tells."""

    tail = TAIL

    while True:
        start = max(0, size - tail)
        data = os.pread(handle, size - start, start)
        end = len(data)

        # A power cut may leave a last line that has its end but not its middle.
        while end and not _is_whole(data[data.rfind(b"\n", 0, end - 1) + 1 : end]):
            end = data.rfind(b"\n", 0, end - 1) + 1

        if end or not start:
            return start + end if end else 0

        tail *= 16


def _is_whole(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unused(file: Path) -> Path:
    r"""Returns a file name that is not taken: the given one, or one with a number."""

    names = (file if n == 1 else file.with_name(f"{file.name}-{n}") for n in range(1, 10**6))

    return next(name for name in names if not os.path.lexists(name))
