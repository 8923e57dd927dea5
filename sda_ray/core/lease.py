r"""Leases: who may write to a run or a sweep.

A lease is a small JSON file that names its holder (host, boot, process) and an attempt number that
only ever grows. Whoever writes under a lease first looks whether it is still the holder, with a
file lock in hand: a holder that was frozen, cut off or taken for dead finds another one when it
comes back, and writes nothing more.
"""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError
from .files import open_regular, write_json
from .holder import STALE, described, end_holder, holder, is_alive

__all__ = ["Lease", "LeaseLost"]

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0  # seconds between two signs of life


class LeaseLost(RuntimeError):
    r"""Signals that the lease is no longer held: nothing more may be written."""


class Lease:
    r"""Creates a lease and takes it.

    Arguments:
        file: The lease file. A lock file of the same name with suffix `.lock` lies beside it. If
            the directory is renamed under :meth:`hold`, this attribute must follow at once.
        what: What is held, for messages, such as "run crimson-cloud-4_6k7cjnx7".
        attempt: The number of this attempt, if the caller counts them. Otherwise one more than
            the highest before.
        takeover: Whether to take the lease from a holder that seems to live. On this host its
            process is killed; elsewhere the attempt number keeps it from writing.
        patience: How long to watch for the heartbeat of a holder on another host, in seconds.
        agent: The name of this process, if it holds leases for processes elsewhere. The same
            agent, started again, may take a lease again with the same attempt number.
        alive: Whether whom the lease is held for is alive: there is a heartbeat only then.

    Raises:
        UserError: If another process holds the lease, or the file cannot be written.
        LeaseLost: If an attempt of this or a higher number took the lease before.
    """

    def __init__(
        self,
        file: Path,
        what: str,
        attempt: int | None = None,
        takeover: bool = False,
        patience: float = STALE,
        agent: str | None = None,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.file = file
        self.what = what
        self.agent = agent
        self.alive = alive
        self._over = threading.Event()

        try:
            while not self._take(attempt, takeover, patience):
                pass  # somebody was quicker
        except OSError as error:
            raise UserError(f"{what} cannot be taken: {error}.") from error

        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def _take(self, attempt: int | None, takeover: bool, patience: float) -> bool:
        found = holder(self.file)

        if found is not None and takeover:
            end_holder(found)
        elif found is not None and is_alive(self.file, patience):
            raise UserError(
                f"{self.what} is in use by process {found['pid']} on {found['host']} since "
                f"{found['since']}. Wait for it to end, or stop it, and try again."
            )

        with self._lock():
            now = holder(self.file)

            if now != found and not takeover:
                return False

            last = 0 if now is None else now["attempt"]
            again = now is not None and self.agent and now.get("agent") == self.agent

            if attempt is not None and attempt <= last - bool(again):
                raise LeaseLost(f"attempt {attempt} at {self.what} comes after attempt {last}")

            self.attempt = last + 1 if attempt is None else attempt
            self._write(os.getpid())

        return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a stranger's link may lead anywhere
        descriptor = os.open(self.file.with_suffix(".lock"), flags, 0o644)

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, pid: int | None) -> None:
        mine = described(self.attempt) | ({} if pid else {"pid": None, "started": None})
        mine |= {"agent": self.agent} if self.agent else {}
        write_json(self.file, mine)
        self._mine = mine

    def _overwrite(self) -> None:
        r"""Gives the lease back in the place of its file, which takes no room."""

        text = json.dumps(self._mine | {"pid": None, "started": None}).encode()

        with os.fdopen(open_regular(self.file, os.O_RDWR), "r+b", buffering=0) as f:
            if len(text) <= (size := os.fstat(f.fileno()).st_size):
                f.write(text.ljust(size))
                os.fsync(f.fileno())

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            if not self.alive():
                continue

            try:
                with self.hold():
                    os.utime(self.file)
            except LeaseLost:
                return
            except OSError:  # a file system away for a while; the next beat tells
                continue

    @contextmanager
    def hold(self) -> Iterator[None]:
        r"""Holds the lease for the duration of one write. Not to be nested.

        Raises:
            LeaseLost: If another attempt has taken the lease, or it was given back.
            OSError: If the lease cannot be read: who holds it is not known then.
        """

        with self._lock():
            found = holder(self.file)

            if self._over.is_set():
                raise LeaseLost(f"{self.what} was given back by attempt {self.attempt}")

            if found is None:
                raise OSError(f"{self.file} cannot be read")

            if found != self._mine:
                raise LeaseLost(
                    f"{self.what} was taken over from attempt {self.attempt} by process "
                    f"{found['pid']} on {found['host']}"
                )

            yield

    def is_lost(self) -> bool:
        r"""Tells whether another attempt is known to have taken the lease.

        Nothing is held meanwhile, so that it may be called at any time, by a signal handler, too.
        """

        return holder(self.file) not in (None, self._mine)

    def release(self) -> None:
        r"""Gives the lease back, if it is still held. The attempt number stays on record."""

        with suppress(LeaseLost, OSError), self.hold():
            try:
                self._write(None)
            except OSError:  # a full disk: this process may live on, and must not be taken for it
                self._overwrite()

        self._over.set()
