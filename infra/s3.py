"""Objects of S3. Other modules use ``infra/storage.py``; ``infra/s3_client.py`` makes the clients. boto3 is imported at first use.

``S3_ENDPOINT_URL`` names a server other than AWS; credentials are found in boto3's usual ways and are never logged. An error tells whether an object is
missing or damaged (DataError), the server does not answer (UnreachableError, which may be retried), or the bucket, the credentials or the endpoint are wrong
(ConfigError, with the variable to set).
"""

from __future__ import annotations

import contextlib
import io
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from infra import environment, s3_client, s3_download, s3_errors
from infra.errors import ConfigError, DataError, UnreachableError
from infra.files import atomic

MAX_ATTEMPTS = 6
"""Attempts of one request (after throttling or a reset connection), and of one download whose body broke off."""
BACKOFF_S = 0.25
"""Seconds before a broken download is tried again; doubled each time. Between failed requests botocore's standard mode waits."""
READ_TIMEOUT_S = 60.0
"""Seconds without data after which a request counts as broken; LAUNCHER_S3_SILENCE_S. A silent server is given up after MAX_ATTEMPTS of them (6 minutes); no
operation lasts longer than twice that without receiving any byte."""
PART_BYTES, MOST_PARTS = 16 << 20, 9_000
"""Larger files are transferred in parts of this many bytes (S3 accepts at least 5 MiB), or in larger parts if there would be too many (S3 accepts 10,000)."""
DELETE_AT_ONCE = 1000
"""Objects that one delete request names: S3's limit."""

_LACK = (
    "so a launcher cannot make sure that it is the only one; use a server that does (AWS, SeaweedFS, MinIO and Ceph of 2024 or later), or set "
    "cluster.kept_apart=true if the scheduler never runs two launchers of a stage at a time."
)

T = TypeVar("T")


def bucket_and_key(url: str) -> tuple[str, str]:
    """Split ``s3://bucket/key``.

    Raises:
        ConfigError: there is no bucket.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{url}: the bucket is missing; expected s3://bucket/prefix.")
    return bucket, key.strip("/")


def read(url: str, most: int | None = None) -> bytes:
    """The whole object; its checksum is verified if the server keeps one. If it is larger than ``most`` bytes it is not read; that is a DataError."""
    bucket, key = bucket_and_key(url)

    def get() -> bytes:
        answer = _client().get_object(Bucket=bucket, Key=key)
        if most is not None and int(answer["ContentLength"]) > most:
            raise DataError(
                f"{url}: larger than {most:,} bytes, but such files are never that large; it is damaged, or was not written by this project."
            )
        return bytes(answer["Body"].read())

    return _retry_body(url, get)


def read_range(url: str, start: int, size: int) -> bytes:
    """``size`` bytes of an object, from ``start`` on; fewer if the object ends earlier."""
    bucket, key = bucket_and_key(url)

    def get() -> bytes:
        body: bytes = _client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + size - 1}")["Body"].read()
        return body

    return _retry_body(url, get)


def download(url: str, local: Path, sha256: str) -> None:
    """Copy an object to a local file, in parallel ranges if it is large. S3 does not verify ranges, so give the expected hash (empty: unknown)."""
    bucket, key = bucket_and_key(url)

    def get() -> None:
        with atomic(local, url, sha256) as file:
            s3_download.into(file, _client(), bucket, key, _transfer())

    _retry_body(url, get)


class ObjectStream(io.RawIOBase):
    """An object read from ``start`` to its end. If the transfer breaks off, it continues at that byte, unless the object has changed meanwhile."""

    def __init__(self, url: str, start: int = 0) -> None:
        super().__init__()
        self._url, self._position, self._etag, self._failures = url, start, "", 0
        self._body: Any = None
        self._connect()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
        self._body = None
        super().close()

    def readinto(self, buffer: Any) -> int:
        """See RawIOBase.

        Raises:
            UnreachableError: MAX_ATTEMPTS requests in a row returned no data.
            DataError: the object has changed, or its checksum is wrong.
        """
        from botocore.exceptions import FlexibleChecksumError

        while True:
            try:
                if self._body is None:
                    self._connect()
                data: bytes = self._body.read(len(buffer))
                break
            except FlexibleChecksumError as error:
                raise DataError(f"{self._url}: damaged in transit ({error}).") from error
            except _broken_bodies() as error:
                self._body, self._failures = None, self._failures + 1
                if self._failures >= MAX_ATTEMPTS:
                    raise UnreachableError(
                        f"{self._url}: failed after {MAX_ATTEMPTS} attempts at byte {self._position} ({error}); check the network."
                    ) from error
                time.sleep(BACKOFF_S * 2 ** (self._failures - 1))
        if data:
            self._failures = 0
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _connect(self) -> None:
        from botocore.exceptions import ClientError

        bucket, key = bucket_and_key(self._url)
        options = {"Range": f"bytes={self._position}-"} if self._position else {}
        options |= {"IfMatch": self._etag} if self._etag else {}
        with _errors(self._url):
            try:
                answer = _client().get_object(Bucket=bucket, Key=key, **options)
            except ClientError as error:
                if s3_errors.code(error) in ("PreconditionFailed", "412"):
                    raise DataError(f"{self._url}: has changed while it was being read; run again.") from error
                if s3_errors.code(error) not in ("InvalidRange", "416"):
                    raise
                self._body = io.BytesIO()  # the range begins at the end
                return
        self._body, self._etag = answer["Body"], str(answer.get("ETag", ""))


def write(url: str, data: bytes) -> None:
    """Write an object."""
    bucket, key = bucket_and_key(url)
    with _errors(url):
        _client().put_object(Bucket=bucket, Key=key, Body=data)


def upload(source: IO[bytes], url: str, size: int = 0) -> None:
    """Write an object from an open file, in parts if it is large; it appears once all parts have arrived. ``size`` is needed for a source without ``seek``."""
    bucket, key = bucket_and_key(url)
    with _errors(url):
        _client().upload_fileobj(source, bucket, key, Config=_transfer(size))


def create_once(url: str, data: bytes) -> bool:
    """Write an object unless it exists: of any number of racing callers exactly one gets True."""
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(url)
    writer = secrets.token_hex(16)
    if kept_apart():
        if head(url) is not None:
            return False
        write(url, data)
        return True
    with _errors(url):
        for attempt in range(MAX_ATTEMPTS):
            try:
                _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"writer": writer})
                return True
            except ClientError as error:
                if s3_errors.code(error) in ("PreconditionFailed", "412"):
                    break
                if s3_errors.status(error) == 501 or s3_errors.code(error) == "NotImplemented":
                    raise ConfigError(
                        f"{url}: this server does not create objects on condition (If-None-Match: {s3_errors.code(error) or 501}), {_LACK}"
                    ) from error
                # A conflict means that a rival's request is under way: ask again to learn how it ended.
                if s3_errors.code(error) not in ("ConditionalRequestConflict", "409") or attempt == MAX_ATTEMPTS - 1:
                    raise
    # A request that boto3 sent twice may have found the object of its own first attempt: the token tells.
    return bool(((head(url) or {}).get("Metadata") or {}).get("writer") == writer)


def kept_apart() -> bool:
    """Whether cluster.kept_apart declares that nobody else creates objects at the same time, so that looking first and writing afterwards is safe."""
    return bool(environment.whole("LAUNCHER_KEPT_APART", 0))


def check_creation(url: str) -> None:
    """Check that the server honours the condition of ``create_once`` and does not ignore it, by trying to create an object of ours that exists already.

    Raises:
        ConfigError: it ignores the condition.
    """
    if not kept_apart() and create_once(url, read(url)):
        raise ConfigError(f"{url}: this server ignores the condition to create an object only once (If-None-Match), {_LACK}")


def head(url: str) -> dict[str, Any] | None:
    """Size (ContentLength) and Metadata of an object, or None if there is no such object."""
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(url)
    with _errors(url):
        try:
            found: dict[str, Any] = _client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if s3_errors.code(error) in s3_errors.MISSING:
                return None
            raise
    return found


def list_names(url: str) -> list[str]:
    """Names of all objects below a prefix, relative to it."""
    return [name for name, _, _ in list_objects(url)]


def list_objects(url: str, start: str = "", *, shallow: bool = False) -> Iterator[tuple[str, int, str]]:
    """(name relative to ``url``, size in bytes, ETag) of the objects below a prefix, in the server's order, page by page.

    Args:
        url: the prefix, a folder.
        start: only names that begin with this.
        shallow: list this folder only; a folder in it is one item of size -1, whose name ends with a slash.
    """
    bucket, key = bucket_and_key(url)
    prefix = f"{key}/" if key else ""
    options = {"Delimiter": "/"} if shallow else {}
    with _errors(url):
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + start, **options):
            found = [
                (item["Key"], int(item.get("Size", 0)), str(item.get("ETag", "")).strip('"'))
                for item in page.get("Contents", [])
                if item["Key"][-1] != "/"
            ]
            found += [(item["Prefix"], -1, "") for item in page.get("CommonPrefixes", [])]
            yield from ((name.removeprefix(prefix), size, etag) for name, size, etag in sorted(found))


def is_folder(url: str) -> bool:
    """Whether there are objects below a prefix."""
    bucket, key = bucket_and_key(url)
    with _errors(url):
        return bool(_client().list_objects_v2(Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1).get("KeyCount"))


def delete(url: str) -> None:
    """Delete an object; it may be missing."""
    bucket, key = bucket_and_key(url)
    with _errors(url):
        _client().delete_object(Bucket=bucket, Key=key)


def delete_all(url: str) -> None:
    """Delete all objects below a prefix."""
    bucket, key = bucket_and_key(url)
    names = list_names(url)
    with _errors(url):
        for start in range(0, len(names), DELETE_AT_ONCE):
            objects = [{"Key": f"{key}/{name}"} for name in names[start : start + DELETE_AT_ONCE]]
            failed = _client().delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True}).get("Errors", [])
            if failed:
                raise ConfigError(f"s3://{bucket}/{failed[0]['Key']}: cannot be deleted ({failed[0].get('Code')}); this key needs s3:DeleteObject.")


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted. Its parts take up space, and no listing of objects shows them."""

    url: str
    upload_id: str
    begun: float
    """Seconds since 1970, by the server's clock."""


def unfinished_uploads(url: str) -> list[Upload]:
    """All multipart uploads below a prefix that are not finished."""
    bucket, key = bucket_and_key(url)
    prefix = f"{key}/" if key else ""
    found = []
    with _errors(url):
        for page in _client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            # Checked here as well, because the uploads in this list get aborted.
            found += [
                Upload(f"s3://{bucket}/{item['Key']}", str(item["UploadId"]), float(item["Initiated"].timestamp()))
                for item in page.get("Uploads", [])
                if item["Key"].startswith(prefix)
            ]
    return found


def abort(upload: Upload) -> None:
    """Give up an unfinished upload and free its parts; one that has ended meanwhile is left as it is."""
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(upload.url)
    with _errors(upload.url):
        try:
            _client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload.upload_id)
        except ClientError as error:
            if s3_errors.code(error) not in ("NoSuchUpload", "404"):
                raise


def _client() -> Any:
    return s3_client.client(MAX_ATTEMPTS, silence_s())


def silence_s() -> float:
    """LAUNCHER_S3_SILENCE_S if it is set, else READ_TIMEOUT_S."""
    return environment.seconds("LAUNCHER_S3_SILENCE_S", READ_TIMEOUT_S)


def _transfer(size: int = 0) -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=max(PART_BYTES, -(-size // MOST_PARTS)), max_concurrency=4)


def _retry_body(url: str, action: Callable[[], T]) -> T:
    """Repeat a download when its body breaks off or fails its checksum: botocore retries a request only until the body begins."""
    from botocore.exceptions import FlexibleChecksumError

    broken: tuple[type[Exception], ...] = (FlexibleChecksumError, *_broken_bodies())
    deadline = time.monotonic() + MAX_ATTEMPTS * silence_s()
    with _errors(url):
        for attempt in range(MAX_ATTEMPTS - 1):
            try:
                return action()
            except broken:
                if time.monotonic() > deadline:  # the server was silent, and every attempt has waited for MAX_ATTEMPTS of botocore's
                    raise
                time.sleep(BACKOFF_S * 2**attempt)
        return action()


def _broken_bodies() -> tuple[type[Exception], ...]:
    """The exceptions that botocore raises when a body breaks off."""
    from botocore import exceptions as found

    return found.IncompleteReadError, found.ReadTimeoutError, found.ResponseStreamingError


def _errors(url: str) -> contextlib.AbstractContextManager[None]:
    return s3_errors.told(url, MAX_ATTEMPTS)
