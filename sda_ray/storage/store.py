r"""Objects in a bucket: S3, or what speaks as it does.

Bytes go through pyarrow, which is there with Ray. It drops the conditions of a write, so that the
one object that two drivers may want, see :mod:`sda_ray.storage.bucket`, goes through boto3. Addresses and keys
are those of AWS' standard chain: variables, files, the machine's role; `AWS_ENDPOINT_URL` names
another server than Amazon's.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from ..core.errors import UserError
from ..core.files import open_atomic

__all__ = ["Bucket", "Damaged", "Refused", "Unreachable", "parse_url"]

PIECE = 8 * 2**20  # bytes of a part; what is larger is written aside and copied into its place
WAIT = (5.0, 20.0)  # seconds to connect, and for an answer


class Unreachable(OSError):
    r"""Signals that a bucket does not answer, or refuses: later it may be otherwise."""


class Refused(RuntimeError):
    r"""Signals that the condition of a write does not hold."""


class Damaged(ValueError):
    r"""Signals that an object is not what its checksum says."""


def parse_url(url: str) -> tuple[str, str]:
    r"""Returns the bucket and the prefix of `s3://bucket/prefix`; the prefix may be empty.

    Raises:
        UserError: If it is none.
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


@contextmanager
def _answers() -> Iterator[None]:
    r"""Makes one of the errors by which pyarrow and boto3 say that something did not work."""

    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")

        if code in (409, 412):  # 409: two conditional writes at the same time
            raise Refused(str(error)) from error

        raise Unreachable(str(error)) from error
    except (BotoCoreError, OSError) as error:
        raise Unreachable(str(error)) from error


class Bucket:
    r"""Creates the access to all objects below a prefix. Nothing is asked of the server yet.

    Keys are relative to the prefix. An object is whole or absent: one that is read is the old
    one or the new one.

    Arguments:
        url: `s3://bucket/prefix`.

    Raises:
        UserError: If the url is none, or what it takes is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name, self.prefix = parse_url(url)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")

        try:
            import boto3
            from botocore.config import Config
            from pyarrow import fs
        except ImportError as error:
            raise UserError(
                f"--runs {url} takes a package that is not installed ({error}): "
                "pip install 'sda-ray[cluster]'"
            ) from error

        session = boto3.session.Session()
        region = session.region_name or "us-east-1"
        connect, read = WAIT
        self._client = session.client(
            "s3",
            region_name=region,
            endpoint_url=endpoint,
            config=Config(connect_timeout=connect, read_timeout=read, retries={"max_attempts": 2}),
        )
        where: dict[str, Any] = {"region": region}

        if endpoint:  # pyarrow 26 knows no variable for it
            parsed = urlparse(endpoint)
            where |= {"endpoint_override": parsed.netloc, "scheme": parsed.scheme}

        where |= {"connect_timeout": connect, "request_timeout": read, "allow_delayed_open": True}
        once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        self._fs = fs.S3FileSystem(**where)
        # Repeated by pyarrow, a write might come after the time that its owner is trusted for
        self._writer = fs.S3FileSystem(retry_strategy=once, **where)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _path(self, key: str) -> str:
        return f"{self.name}/{self._key(key)}".rstrip("/")

    def check(self) -> None:
        r"""Raises a UserError if the bucket is not there, or is not ours to read."""

        try:
            with _answers():
                self._client.head_bucket(Bucket=self.name)
        except (Unreachable, Refused) as error:
            raise UserError(
                f"{self.url} cannot be used: {error}. Create the bucket; look at the keys "
                "(AWS_PROFILE, AWS_ACCESS_KEY_ID, or the machine's role) and, if the server is "
                "not Amazon's, at AWS_ENDPOINT_URL."
            ) from error

    def sizes(self, folder: str = "") -> dict[str, int]:
        r"""Returns the sizes of all objects in a folder, and in those below, by their keys."""

        from pyarrow import fs

        start = len(self._path("")) + 1
        selector = fs.FileSelector(self._path(folder), recursive=True, allow_not_found=True)

        with _answers():
            infos = self._fs.get_file_info(selector)

        return {x.path[start:]: x.size for x in infos if x.type == fs.FileType.File}

    def has(self, key: str) -> bool:
        r"""Tells whether there is such an object."""

        from pyarrow import fs

        with _answers():
            return bool(self._fs.get_file_info(self._path(key)).type == fs.FileType.File)

    def read(self, key: str) -> bytes | None:
        r"""Returns an object, or None if there is none."""

        with _answers():
            try:
                with self._fs.open_input_stream(self._path(key)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes) -> None:
        r"""Writes an object in one piece."""

        with _answers(), self._writer.open_output_stream(self._path(key)) as stream:
            stream.write(data)

    def upload(self, key: str, file: BinaryIO, going: Callable[[], None]) -> None:
        r"""Writes an object from an open file.

        A large one goes up in parts, aside, and takes its place only when all of it is there:
        pyarrow 26 cannot give an upload up, and would leave what has come by then as the object.

        Arguments:
            key: The key.
            file: The file, from where it stands.
            going: Called before each part. What it raises ends the upload.
        """

        data = file.read(PIECE + 1)

        if len(data) <= PIECE:
            return self.write(key, data)

        aside = f"{key}.{secrets.token_hex(4)}.tmp"
        lost: BaseException | None = None

        with _answers(), self._writer.open_output_stream(self._path(aside)) as stream:
            while data and lost is None:
                stream.write(data)
                data = file.read(PIECE)

                try:
                    going()
                except Exception as error:
                    lost = error

        try:
            if lost is not None:
                raise lost

            going()

            with _answers():
                self._writer.copy_file(self._path(aside), self._path(key))
        finally:
            self.delete(aside)

    def download(self, key: str, file: Path, accepted: list[Any]) -> None:
        r"""Writes a file from an object, whole or not at all.

        Arguments:
            key: The key.
            file: The file.
            accepted: The checksums that it may have.

        Raises:
            Damaged: If it has another.
            FileNotFoundError: If there is no such object.
        """

        digest, path = hashlib.sha256(), self._path(key)
        file.parent.mkdir(parents=True, exist_ok=True)

        with open_atomic(file) as target:
            try:
                with _answers(), self._fs.open_input_stream(path) as stream:
                    while data := stream.read(PIECE):
                        digest.update(data)
                        target.write(data)
            except Unreachable as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise FileNotFoundError(f"{self.url}/{key} is gone") from error

                raise

            if digest.hexdigest() not in accepted:
                raise Damaged(f"{self.url}/{key} is damaged: its checksum is wrong")

    def delete(self, key: str) -> None:
        r"""Deletes an object, if it is there."""

        with _answers():
            self._client.delete_object(Bucket=self.name, Key=self._key(key))

    def peek(self, key: str) -> tuple[bytes, str] | None:
        r"""Returns an object and its version, or None if there is none."""

        from botocore.exceptions import ClientError

        with _answers():
            try:
                found = self._client.get_object(Bucket=self.name, Key=self._key(key))

                return found["Body"].read(), found["ETag"]
            except ClientError as error:
                if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                    return None

                raise

    def swap(self, key: str, data: bytes, version: str | None) -> str:
        r"""Writes an object in the place of a version, or of none, and returns the new version.

        Raises:
            Refused: If there is another version.
        """

        # pyarrow's open_output_stream takes metadata, and drops If-Match among it.
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        with _answers():
            answer = self._client.put_object(
                Bucket=self.name, Key=self._key(key), Body=data, **condition
            )

        return str(answer["ETag"])
