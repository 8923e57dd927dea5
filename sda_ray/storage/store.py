r"""Objects in a bucket: S3, or any server that speaks its protocol.

An object is whole or absent: a reader gets the old one or the new one. Keys and addresses are found
by AWS's standard chain: environment variables, shared files and profiles (with boto3), the role of
the machine; `AWS_ENDPOINT_URL` names a server other than Amazon's.
"""

import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from ..core import Conflict, UserError, open_atomic
from .replica import CHUNK, chunks, digest

CONNECT = timedelta(seconds=5)
REQUEST = timedelta(seconds=30)  # for one write, or between two packets of a read

Version = dict[str, str]


class Unreachable(OSError):
    r"""Raised if a bucket does not answer, or refuses a request. A retry may succeed."""


class Damaged(ValueError):
    r"""Raised if the content of an object does not match its checksum."""


@dataclass(frozen=True)
class Found:
    r"""An object: its version, its attributes, and its content if that was asked for."""

    version: Version
    attributes: dict[str, str]
    data: bytes = b""

    @property
    def damaged(self) -> bool:
        expected = self.attributes.get("sha256")

        return expected is not None and expected != hashlib.sha256(self.data).hexdigest()


def check_url(url: str) -> None:
    r"""Raises a UserError unless the url is `s3://bucket/prefix`; the prefix may be empty."""

    bucket, part = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", r"(?!\.+(/|$))[\w.=+-]+"

    if not re.fullmatch(rf"s3://{bucket}(/{part})*/?", url):
        raise UserError(
            f"--runs is '{url}', but must be a directory, or s3://BUCKET/PREFIX with letters, "
            "digits and . _ = + - in it."
        )


class Bucket:
    r"""The objects below a prefix of a bucket. Keys are relative to the prefix.

    Arguments:
        url: `s3://bucket/prefix`.
        store: The store of obstore to use instead, such as one in memory.

    Raises:
        UserError: If the url is not valid, or obstore is not installed.
    """

    def __init__(self, url: str, store: Any = None) -> None:
        self.url = url.rstrip("/")
        self._reader, self._writer = (store, store) if store else _connect(self.url)

    def check(self) -> None:
        r"""Raises a UserError if the bucket does not exist, or may not be read."""

        try:
            with _errors():
                next(iter(self._reader.list(chunk_size=1)), None)
        except OSError as error:
            raise UserError(
                f"{self.url} cannot be used: {error}. Create the bucket; look at the keys "
                "(AWS_PROFILE, AWS_ACCESS_KEY_ID, or the machine's role) and, if the server is "
                "not Amazon's, at AWS_ENDPOINT_URL."
            ) from error

    def list(self) -> dict[str, int]:
        r"""Returns the sizes of all objects, by key."""

        with _errors():
            return {str(x["path"]): int(x["size"]) for page in self._reader.list() for x in page}

    def get(self, key: str, head: bool = False) -> Found | None:
        r"""Returns an object, without its content if `head`, or None if it does not exist."""

        with _errors():
            try:
                result = self._reader.get(key, options={"head": head})
                data = b"" if head else bytes(result.bytes())
            except FileNotFoundError:
                return None

        return Found(_version(result.meta), dict(result.attributes), data)

    def put(
        self,
        key: str,
        data: bytes,
        version: Version | None = None,
        attributes: dict[str, str] | None = None,
    ) -> Version:
        r"""Writes an object in place of a version, or as a new one, and returns its version.

        Raises:
            Conflict: If the object is at another version, or exists although none is expected.
        """

        with _errors():
            options = {"mode": version or "create", "attributes": attributes}
            return _version(self._writer.put(key, data, use_multipart=False, **options))

    def upload(
        self,
        key: str,
        file: BinaryIO,
        size: int,
        check: Callable[[], None],
        attributes: dict[str, str] | None = None,
    ) -> Version:
        r"""Writes an object from the first bytes of a file, in parts.

        `check` is called before each part, and before the object takes its place. If it raises, the
        upload is aborted, and the object stays as it was.
        """

        def parts() -> Iterator[bytes]:
            for _, data in chunks(file, 0, size):
                check()
                yield data

            check()

        options = {"attributes": attributes, "chunk_size": CHUNK, "max_concurrency": 2}

        with _errors():
            return _version(self._writer.put(key, parts(), use_multipart=True, **options))

    def download(self, key: str, file: Path) -> None:
        r"""Writes a file from an object, whole or not at all.

        Raises:
            Damaged: If the content does not match the checksum.
            FileNotFoundError: If the object does not exist.
        """

        with _errors():
            result, sha = self._reader.get(key), hashlib.sha256()
            file.parent.mkdir(parents=True, exist_ok=True)

            with open_atomic(file) as target:
                for part in result.stream(min_chunk_size=CHUNK):
                    sha.update(part)
                    target.write(part)

                if result.attributes.get("sha256") not in (None, sha.hexdigest()):
                    raise Damaged(f"{self.url}/{key} is damaged: its checksum is wrong")

    def delete(self, key: str) -> None:
        with _errors(), suppress(FileNotFoundError):
            self._writer.delete(key)


class Folder:
    r"""A folder of a bucket as the target of a :class:`sda_ray.storage.replica.Replica`.

    Small objects replace the version that this process knows, so that a delayed write of a former
    owner is refused; large ones are checked part by part. Each has its SHA-256 as an attribute.

    Arguments:
        bucket: The bucket.
        key: The key of the folder.
        check: Called before each write. An exception keeps it from happening.
        attributes: More attributes of each object.
    """

    def __init__(
        self,
        bucket: Bucket,
        key: str,
        check: Callable[[], None] = lambda: None,
        attributes: dict[str, str] | None = None,
    ) -> None:
        self.bucket, self.key, self.check = bucket, key, check
        self.attributes = attributes or {}
        self._versions: dict[str, Version | None] = {}

    def put(self, name: str, file: BinaryIO, size: int) -> None:
        r"""Writes an object from the first bytes of a file, unless it has that content already.

        Raises:
            Unreachable: If it was not written, or another process wrote it meanwhile.
        """

        key, sha = f"{self.key}/{name}", digest(file, size)

        if name not in self._versions:
            found = self.bucket.get(key, head=True)
            self._versions[name] = found.version if found else None

            if found and found.attributes.get("sha256") == sha:
                return

        version = self._versions.pop(name)  # unknown if the write fails
        attributes = self.attributes | {"sha256": sha}
        self.check()

        if size > CHUNK:
            self._versions[name] = self.bucket.upload(key, file, size, self.check, attributes)
            return

        file.seek(0)

        try:
            self._versions[name] = self.bucket.put(key, file.read(size), version, attributes)
        except Conflict as error:
            raise Unreachable(f"{key} was written meanwhile") from error

    def remove(self, name: str) -> None:
        self.check()
        self.bucket.delete(f"{self.key}/{name}")
        self._versions.pop(name, None)


class LeaseObject:
    r"""The record of a :class:`sda_ray.core.lease.Lease` in an object, as its backend."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket, self.key = bucket, key
        self._lock = threading.Lock()  # among the threads here; versions exclude other processes

    def read(self) -> tuple[bytes, Version] | None:
        found = self.bucket.get(self.key)

        return None if found is None else (found.data, found.version)

    def write(self, data: bytes, version: Version | None) -> Version:
        return self.bucket.put(self.key, data, version)

    def beat(self, data: bytes, version: Version) -> Version:
        record = json.loads(data) | {"beat": secrets.token_hex(4)}

        return self.write(json.dumps(record).encode(), version)

    def lock(self) -> AbstractContextManager[object]:
        return self._lock


@contextmanager
def _errors() -> Iterator[None]:
    r"""Turns the errors of obstore into those of this module."""

    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        yield
    except (AlreadyExistsError, PreconditionError) as error:
        raise Conflict(_first_line(error)) from error
    except BaseError as error:
        raise Unreachable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return re.split(r"\n|: <\?xml", str(error))[0]


def _version(found: Any) -> Version:
    return {key: found[key] for key in ("e_tag", "version") if found[key] is not None}


def _connect(url: str) -> tuple[Any, Any]:
    r"""Returns the stores to read and to write through.

    Reads are retried. A write is not: the process might no longer own the copy by then.
    """

    check_url(url)

    try:
        from obstore import store
    except ImportError as error:
        raise UserError(
            f"--runs {url} needs a package that is not installed ({error}): "
            "pip install 'sda-ray[cluster]'"
        ) from error

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    more: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}

    with suppress(ImportError, ValueError):  # no boto3, or no keys: obstore reads the environment
        from obstore.auth.boto3 import Boto3CredentialProvider

        more["credential_provider"] = Boto3CredentialProvider()

    def connect(retries: int, **timeouts: timedelta) -> Any:
        make: Any = store.from_url
        client = {"connect_timeout": CONNECT, "allow_http": True, **timeouts}

        return make(url, client_options=client, retry_config={"max_retries": retries}, **more)

    return (
        connect(3, read_timeout=REQUEST, timeout=timedelta(days=1)),
        connect(0, timeout=REQUEST),
    )
