r"""The journal of a study: one record a line, appended by one writer and never changed.

Optuna's own tools, such as its dashboard, read it. Compared with Optuna's file backend, it survives
failures: the writer holds the lease of the sweep, an append is whole or undone, a full disk is
waited for, and a torn end is repaired on opening.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection

from ..core import (
    Lease,
    LeaseLost,
    UserError,
    append,
    cut_torn_lines,
    find_torn_lines,
    open_regular,
    write_atomic,
)

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # an append waits for the end of these errors
PATIENCE = 600.0  # seconds that it waits
PAUSE = 0.2  # seconds between two tries

RESTORE = "Restore a copy of the file, or move it away: runs are restored from their directories."


class Journal(BaseJournalBackend):
    r"""Creates the backend of Optuna's journal storage for a file, which it may only read.

    The file appears with its first record. Without a lease nothing is written.
    """

    storage: JournalStorage

    def __init__(self, file: Path, lease: Lease | None) -> None:
        self.file = file
        self.lease = lease
        self.give_up: Callable[[], bool] = lambda: False  # ends the wait for a full disk
        self.on_append: Callable[[list[dict[str, Any]]], None] = lambda logs: None
        self.line = 0  # the number of the last record that was read
        self._offset = 0  # its end
        self._batch: list[dict[str, Any]] | None = None

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if log_number_from != self.line:
            self.line = self._offset = 0

        try:
            if os.lstat(self.file).st_size == self._offset > 0:
                return

            descriptor = open_regular(self.file)
        except FileNotFoundError:
            return

        with os.fdopen(descriptor, "rb") as file:
            file.seek(self._offset)

            for line in file:
                if not line.endswith(b"\n"):
                    return

                self.line += 1
                self._offset += len(line)

                if self.line > log_number_from:
                    yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._batch is not None:
            self._batch += logs
        else:
            lines = (json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            self._append("".join(lines).encode())
            self.on_append(logs)

    @contextmanager
    def batch(self) -> Iterator[None]:
        r"""Appends all records of the block at once, unless the block raises.

        No record may depend on another one of the block, as a trial's number does.
        """

        if self._batch is not None:
            yield
            return

        self._batch = []

        try:
            yield
            logs = self._batch
        finally:
            self._batch = None

        if logs:
            self.append_logs(logs)

    def _append(self, data: bytes) -> None:
        r"""Appends records, and waits for room if the disk is full.

        Raises:
            OSError: If the disk stays full for too long, or the sweep is asked to stop.
        """

        if self.lease is None:
            raise LeaseLost(f"{self.file} was opened for reading only")

        start, warned = time.monotonic(), False

        while True:
            try:
                with self.lease.hold():
                    write = append if os.path.lexists(self.file) else write_atomic
                    return write(self.file, data)
            except OSError as error:
                waited = time.monotonic() - start

                if error.errno not in FULL or waited > PATIENCE or self.give_up():
                    raise

                if not warned:
                    text = "%s cannot be written: %s. Waiting for room."
                    logger.warning(text, self.file, error.strerror)
                    warned = True

            time.sleep(PAUSE)


def open_study(
    file: Path, name: str, lease: Lease | None, objectives: Sequence[str]
) -> tuple[optuna.Study, Journal]:
    r"""Opens the study in a journal, or creates both. A torn end, left by a crash, is cut off.

    Raises:
        UserError: If the file is damaged, empty, not a journal, or has another study.
    """

    if lease is not None:
        with lease.hold():
            _repair(file)

    journal = Journal(file, lease)

    try:
        journal.storage = storage = JournalStorage(journal)
    except UserError:
        raise
    except (OSError, MemoryError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    except Exception as error:  # Optuna has no error of its own for this
        raise UserError(
            f"{file} is damaged: its line {journal.line} is not a record of a study "
            f"({type(error).__name__}: {error}). {RESTORE}"
        ) from error

    try:
        return optuna.load_study(storage=storage, study_name=name), journal
    except KeyError:
        if others := [study.study_name for study in storage.get_all_studies()]:
            raise UserError(
                f"{file} holds the study '{others[0]}', not '{name}'. {RESTORE}"
            ) from None

        if journal.line and lease is None:
            raise UserError(f"{file} is damaged: it has no study.") from None

    directions = [StudyDirection.MINIMIZE] * len(objectives)
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)

    return study, journal


def _repair(file: Path) -> None:
    r"""Cuts off last records that are not whole."""

    if not os.path.lexists(file):
        return

    end, torn = find_torn_lines(file)

    if end == 0:
        what = "not a journal" if torn else "empty: its records are lost"
        raise UserError(f"{file} is {what}. {RESTORE}")

    if torn:
        cut_torn_lines(file)
        logger.warning("%s: a torn last record was cut off.", file)
