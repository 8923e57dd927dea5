r"""Objects in a bucket: S3, or any server that speaks its protocol.

An object is whole or absent: a reader gets the old one or the new one. Keys and addresses are found
by AWS's standard chain: environment variables, shared files and profiles (with boto3), the role of
the machine; `AWS_ENDPOINT_URL` names a server other than Amazon's.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO

from ..core import UserError, open_atomic

__all__ = [
    "Bucket",
    "Conflict",
    "Damaged",
    "Folder",
    "Found",
    "Unreachable",
    "digest",
    "parse_url",
]

PART = 5 * 2**20  # bytes of a part; larger files are uploaded in parts
CONNECT = timedelta(seconds=5)
REQUEST = timedelta(seconds=30)  # for one write, or between two packets of a read
KEYS = timedelta(minutes=5)  # how long the keys of a session serve

Version = dict[str, str]


class Unreachable(OSError):
    r"""Raised if a bucket does not answer, or refuses a request. A retry may succeed."""


class Conflict(RuntimeError):
    r"""Raised if an object is not at the version that a conditional write expects."""


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


def parse_url(url: str) -> tuple[str, str]:
    r"""Returns the bucket and the prefix of `s3://bucket/prefix`; the prefix may be empty.

    Raises:
        UserError: If the url is no such url.
    """

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    parts = prefix.split("/") if prefix else []

    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) or not all(
        re.fullmatch(r"[\w.=+-]+", part) and part.strip(".") for part in parts
    ):
        raise UserError(
            f"--runs is '{url}', but must be a directory, or s3://BUCKET/PREFIX with letters, "
            "digits and . _ = + - in it."
        )

    return bucket, prefix


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

    def head(self, key: str) -> Found | None:
        r"""Returns an object without its content, or None if it does not exist."""

        return self._get(key, head=True)

    def get(self, key: str) -> Found | None:
        r"""Returns an object with its content, or None if it does not exist."""

        return self._get(key, head=False)

    def _get(self, key: str, head: bool) -> Found | None:
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

        Arguments:
            key: The key.
            file: The file.
            size: How many bytes of it.
            check: Called before each part, and before the object takes its place. An exception
                aborts the upload, and the object stays as it was.
            attributes: The attributes of the object.
        """

        def parts() -> Iterator[bytes]:
            file.seek(0)
            missing = size

            while missing:
                check()

                if not (data := file.read(min(PART, missing))):
                    raise OSError(f"{key} has become shorter while it was uploaded")

                missing -= len(data)
                yield data

            check()

        options = {"attributes": attributes, "chunk_size": PART, "max_concurrency": 2}

        with _errors():
            return _version(self._writer.put(key, parts(), use_multipart=True, **options))

    def download(self, key: str, file: Path) -> None:
        r"""Writes a file from an object, whole or not at all, unless the file has its checksum.

        Raises:
            Damaged: If the content does not match the checksum.
            FileNotFoundError: If the object does not exist.
        """

        with _errors():
            result = self._reader.get(key)

        expected = result.attributes.get("sha256")

        if expected and file.is_file():
            with open(file, "rb") as stream:
                if digest(stream) == expected:
                    return

        file.parent.mkdir(parents=True, exist_ok=True)
        sha = hashlib.sha256()

        with open_atomic(file) as target:
            for part in _parts(result):
                sha.update(part)
                target.write(part)

            if expected not in (None, sha.hexdigest()):
                raise Damaged(f"{self.url}/{key} is damaged: its checksum is wrong")

    def delete(self, key: str) -> None:
        r"""Deletes an object, if it exists."""

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
            Unreachable: If it was not written, or was written by somebody else meanwhile.
        """

        key, sha = f"{self.key}/{name}", digest(file, size)

        if name not in self._versions:
            found = self.bucket.head(key)
            self._versions[name] = found.version if found else None

            if found and found.attributes.get("sha256") == sha:
                return

        version = self._versions.pop(name)  # unknown if the write fails
        attributes = self.attributes | {"sha256": sha}
        self.check()

        if size > PART:
            self._versions[name] = self.bucket.upload(key, file, size, self.check, attributes)
            return

        file.seek(0)

        try:
            self._versions[name] = self.bucket.put(key, file.read(size), version, attributes)
        except Conflict as error:
            raise Unreachable(f"{key} was written meanwhile") from error

    def remove(self, name: str) -> None:
        r"""Deletes an object."""

        self.check()
        self.bucket.delete(f"{self.key}/{name}")
        self._versions.pop(name, None)


def digest(file: BinaryIO, size: int | None = None) -> str:
    r"""Returns the SHA-256 of the first bytes of a file, or of all."""

    file.seek(0)
    sha, missing = hashlib.sha256(), 2**63 if size is None else size

    while missing and (data := file.read(min(PART, missing))):
        sha.update(data)
        missing -= len(data)

    return sha.hexdigest()


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


def _parts(result: Any) -> Iterator[Any]:
    with _errors():
        yield from result.stream(min_chunk_size=PART)


def _version(found: Any) -> Version:
    return {key: found[key] for key in ("e_tag", "version") if found[key] is not None}


def _connect(url: str) -> tuple[Any, Any]:
    r"""Returns the stores to read and to write through.

    Reads are retried. A write is not: the process might no longer own the copy by then.
    """

    parse_url(url)

    try:
        from obstore import store
    except ImportError as error:
        raise UserError(
            f"--runs {url} needs a package that is not installed ({error}): "
            "pip install 'sda-ray[cluster]'"
        ) from error

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region, keys = _session()
    more: dict[str, Any] = {"region": region} | ({"endpoint": endpoint} if endpoint else {})
    more |= {"credential_provider": keys} if keys else {}
    client = {"connect_timeout": CONNECT, "allow_http": bool(endpoint)}
    reads = client | {"read_timeout": REQUEST, "timeout": timedelta(days=1)}
    writes = client | {"timeout": REQUEST}

    make: Any = store.from_url

    return (
        make(url, client_options=reads, retry_config={"max_retries": 3}, **more),
        make(url, client_options=writes, retry_config={"max_retries": 0}, **more),
    )


def _session() -> tuple[str, Callable[[], dict[str, Any]] | None]:
    r"""Returns the region, and what provides keys; obstore itself reads no shared files."""

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")

    try:
        from boto3.session import Session
    except ImportError:
        return region or "us-east-1", None

    session = Session()
    credentials = session.get_credentials()

    def keys() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()

        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + KEYS,
        }

    return region or session.region_name or "us-east-1", keys if credentials else None
