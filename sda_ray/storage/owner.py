r"""Who may write to a folder of a bucket: one driver at a time, from whatever machine."""

import json
import logging
import secrets
import threading
import time
from typing import Any

from ..core.errors import UserError
from ..core.holder import STALE, described, verdict
from .store import Bucket, Refused, Unreachable

__all__ = ["Owner"]

logger = logging.getLogger(__name__)

BEAT = 10.0  # seconds between two signs of life
TRUST = 25.0  # seconds after the last that was confirmed, in which an owner still writes


class Owner:
    r"""Creates the ownership of a folder and takes it: one driver at a time writes there.

    It is an object that names the driver and is written anew every 10 s, each time only in the
    place of what was written last. Whoever finds it unchanged for `patience` seconds, by their own
    clock, takes it over; its former owner then cannot write it any more, and stops.

    Arguments:
        bucket: The bucket.
        key: The key of the object.
        what: What is owned, for messages.
        patience: How long to watch for a sign of life.

    Raises:
        UserError: If another driver owns it.
        Unreachable: If the bucket does not answer.
    """

    def __init__(self, bucket: Bucket, key: str, what: str, patience: float = STALE) -> None:
        self.bucket, self.key, self.what = bucket, key, what
        self.taken: dict[str, Any] | None = None  # by whom it was taken over
        self._over = threading.Event()
        self._lock = threading.Lock()

        while not self._take(patience):
            pass  # somebody was quicker

        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def _take(self, patience: float) -> bool:
        before = self.bucket.peek(self.key)
        found = _parse(before)

        if before is not None and self._lives(found, before[1], patience):
            raise UserError(
                f"{self.what} is carried out by process {found.get('pid')} on "
                f"{found.get('host')} since {found.get('since')}. Wait for it to end, or stop it, "
                "and try again."
            )

        last = found.get("attempt")
        self.attempt = (last if type(last) is int else 0) + 1
        self.mine = described(self.attempt) | {"token": secrets.token_hex(8)}
        self._version = before[1] if before else None

        try:
            self._write()
        except Refused:
            return False

        return True

    def _lives(self, found: dict[str, Any], version: str, patience: float) -> bool:
        if (known := verdict(found)) is not None:
            return known

        logger.warning(
            "%s was last carried out by process %s on %s, which cannot be seen from here: watching "
            "for a sign of life for up to %.0f s.",
            *(self.what, found.get("pid"), found.get("host"), patience),
        )
        deadline = time.monotonic() + patience

        while time.monotonic() < deadline:
            time.sleep(min(2.0, patience / 10))
            now = self.bucket.peek(self.key)

            if now is not None and now[1] != version:
                return _parse(now).get("pid") is not None

        return False

    def _write(self) -> None:
        with self._lock:
            start = time.monotonic()
            data = json.dumps(self.mine | {"beat": secrets.token_hex(4)}).encode()
            self._version = self.bucket.swap(self.key, data, self._version)
            self._confirmed = start

    def _beat(self) -> None:
        while not self._over.wait(BEAT) and self.taken is None:
            try:
                self._renew()
            except Unreachable:  # the next beat tells
                continue

    def _renew(self) -> None:
        try:
            self._write()
        except Refused:
            now = self.bucket.peek(self.key)

            if now is None or (found := _parse(now)).get("token") != self.mine["token"]:
                self.taken = found if now else {}
            else:  # written by us, with an answer that was lost
                self._version = now[1]

    def check(self) -> None:
        r"""Raises what keeps this driver from writing.

        Raises:
            UserError: If another driver has taken over.
            Unreachable: If it is not known, since the bucket has not answered for a while.
        """

        if time.monotonic() - self._confirmed > TRUST and self.taken is None:
            self._renew()

        if self.taken is not None:
            raise UserError(
                f"{self.what} was taken over by process {self.taken.get('pid')} on "
                f"{self.taken.get('host')}: this driver stops, and writes no more to "
                f"{self.bucket.url}."
            )

        if time.monotonic() - self._confirmed > TRUST:
            raise Unreachable(f"{self.bucket.url} has not confirmed that {self.what} is ours")

    def release(self) -> None:
        r"""Gives the ownership back, if it is still held."""

        self._over.set()

        if self.taken is None:
            try:
                self.mine |= {"pid": None, "started": None}
                self._write()
            except (Refused, Unreachable) as error:
                logger.warning("%s could not be given back: %s", self.what, error)


def _parse(found: tuple[bytes, str] | None) -> dict[str, Any]:
    try:
        content = json.loads(found[0]) if found else {}
    except ValueError:
        content = {}

    return content if isinstance(content, dict) else {}
