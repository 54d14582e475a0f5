"""Files and objects by URL: local paths (also ``file://``) and ``s3://bucket/key`` behind the same functions. The only importer of boto3.

boto3 is imported at the first use of an s3 URL, so that commands which touch none stay fast. ``S3_ENDPOINT_URL`` names a server other than AWS;
credentials come by boto3's usual ways (``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, profiles, instance roles) and are never logged.
Whatever is written appears whole or not at all; readers never see a half-written file.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote

from infra.errors import ConfigError, DataError, ReportedError

MAX_ATTEMPTS = 6
"""Attempts of one request (throttling, resets), and of one whole download whose body broke off."""
BACKOFF_S = 0.25
"""Wait in seconds before a broken download is tried again; doubled each time. Failed requests wait by botocore's standard mode."""
PART_BYTES = 16 << 20
"""Larger files travel in parts of this many bytes (S3 accepts at least 5 MiB)."""
TEMPORARY = ".tmp-"
"""Prefix of the names of files that are being written; listings leave them out."""

_CLIENT_VARIABLES = (
    *("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_REGION", "AWS_DEFAULT_REGION"),
)
_REFUSED = ("403", "AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "AllAccessDisabled")
_MISSING = ("404", "NoSuchKey", "NotFound")
_lock = threading.Lock()
_clients: dict[str, Any] = {}

T = TypeVar("T")


# --- URLs ---------------------------------------------------------------------------------------------------------------------------------


def is_remote(url: str) -> bool:
    """Whether ``url`` is an object of S3 (True) or a local path (False).

    Raises:
        ConfigError: another scheme.
    """
    scheme, separator, _ = url.partition("://")
    if separator and scheme not in ("s3", "file"):
        raise ConfigError(f"{url}: storage '{scheme}://' is not known; accepted are local paths, file:///path and s3://bucket/prefix.")
    return scheme == "s3" and bool(separator)


def local_path(url: str) -> Path:
    """The local path of a path or ``file://`` URL.

    Raises:
        ConfigError: an s3 URL, or a ``file://`` URL that names a host.
    """
    if is_remote(url):
        raise ConfigError(f"{url}: a local path is needed here.")
    if not url.startswith("file://"):
        return Path(url)
    path = unquote(url.removeprefix("file://"))
    if not path.startswith("/"):
        raise ConfigError(f"{url}: file:// is followed by an absolute path, as in file:///data/images.")
    return Path(path)


def join(url: str, *parts: str) -> str:
    """``url/part/part``, for paths and URLs alike. Parts are relative; empty ones are left out."""
    words = [word for word in (part.strip("/") for part in parts) if word]
    if not words:
        return url
    return "/".join([url.rstrip("/"), *words])


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{url}: the bucket is missing; expected s3://bucket/prefix.")
    return bucket, key.strip("/")


# --- Reading ------------------------------------------------------------------------------------------------------------------------------


def read_bytes(url: str) -> bytes:
    """The whole file or object.

    Raises:
        DataError: it is missing or cannot be read, also after retries.
        ConfigError: the bucket is missing, or the credentials are refused.
    """
    if not is_remote(url):
        with _read_errors(url):
            return local_path(url).read_bytes()
    bucket, key = _bucket_and_key(url)

    def get() -> bytes:
        body: bytes = _client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return body

    return _retry_body(url, get)


def read_text(url: str) -> str:
    """The whole file as UTF-8.

    Raises:
        DataError: as read_bytes, or it is not UTF-8.
    """
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not UTF-8 text ({error}).") from error


def read_json(url: str) -> Any:
    """The parsed JSON file.

    Raises:
        DataError: as read_text, or it is not JSON.
    """
    text = read_text(url)
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{url}: not valid JSON ({error}); delete it to have it written again.") from error


def exists(url: str) -> bool:
    """Whether a file or object (not a folder) exists.

    Raises:
        ConfigError: the credentials are refused.
    """
    if not is_remote(url):
        return local_path(url).is_file()
    return _head(url) is not None


def size(url: str) -> int:
    """Size in bytes.

    Raises:
        DataError: it is missing.
    """
    if not is_remote(url):
        with _read_errors(url):
            return local_path(url).stat().st_size
    head = _head(url)
    if head is None:
        raise DataError(f"{url}: does not exist.")
    return int(head["ContentLength"])


def list_files(url: str) -> list[str]:
    """Names of all files below a folder or prefix, relative to it, sorted; temporary files are left out. A missing folder has none.

    Raises:
        ConfigError: the bucket is missing, or the credentials are refused.
    """
    names = _list_s3(url) if is_remote(url) else _list_local(local_path(url))
    return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith(TEMPORARY))


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal.

    Raises:
        DataError: it is missing or cannot be read.
    """
    with _read_errors(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Writing ------------------------------------------------------------------------------------------------------------------------------


def write_bytes(url: str, data: bytes) -> None:
    """Write a file or object; it appears whole or not at all, and missing folders are made.

    Raises:
        ConfigError: the place is not writable (folder, bucket or credentials).
        DataError: the server cannot be reached, after retries.
    """
    if not is_remote(url):
        with _atomic(local_path(url)) as file:
            file.write(data)
        return
    bucket, key = _bucket_and_key(url)
    with _s3_errors(url):
        _client().put_object(Bucket=bucket, Key=key, Body=data)


def write_text(url: str, text: str) -> None:
    """Write UTF-8 text; see write_bytes."""
    write_bytes(url, text.encode())


def write_json(url: str, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values are equal files; see write_bytes. A number that is not finite is a ValueError."""
    write_text(url, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def create_once(url: str, data: bytes) -> bool:
    """Create a file or object that must not exist yet: of any number of racing callers exactly one gets True, and its data stay.

    Raises:
        ConfigError: the place is not writable.
    """
    return _create_s3(url, data) if is_remote(url) else _create_local(local_path(url), data)


def check_writable(url: str) -> None:
    """Write and delete a probe below a folder or prefix.

    Raises:
        ConfigError: the folder is not writable, the bucket is missing, or the credentials are refused.
    """
    probe = join(url, f"{TEMPORARY}probe-{secrets.token_hex(8)}")
    write_bytes(probe, b"")
    delete(probe)


def delete(url: str) -> None:
    """Delete a file or object; a missing one is fine.

    Raises:
        ConfigError: it may not be deleted.
    """
    if not is_remote(url):
        with _write_errors(local_path(url)), suppress(FileNotFoundError):
            local_path(url).unlink()
        return
    bucket, key = _bucket_and_key(url)
    with _s3_errors(url):
        _client().delete_object(Bucket=bucket, Key=key)


def delete_prefix(url: str) -> None:
    """Delete everything below a folder or prefix, temporary files too; nothing there is fine. Not atomic: delete a marker first.

    Raises:
        ConfigError: it may not be deleted, or is a whole bucket or file system.
    """
    if not is_remote(url):
        folder = local_path(url)
        _refuse_root(url, folder.resolve() == Path(folder.anchor or "/").resolve())
        with _write_errors(folder), suppress(FileNotFoundError):
            shutil.rmtree(folder)
        return
    bucket, key = _bucket_and_key(url)
    _refuse_root(url, not key)
    names = _list_s3(url)
    with _s3_errors(url):
        for start in range(0, len(names), 1000):  # the most that one request may name
            objects = [{"Key": f"{key}/{name}"} for name in names[start : start + 1000]]
            failed = _client().delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True}).get("Errors", [])
            if failed:
                raise ConfigError(f"s3://{bucket}/{failed[0]['Key']}: cannot be deleted ({failed[0].get('Code')}); allow s3:DeleteObject.")


# --- Whole files and folders --------------------------------------------------------------------------------------------------------------


def upload_file(local: Path, url: str) -> None:
    """Copy a local file to a URL; large ones travel in parts, and the object appears when all have arrived.

    Raises:
        DataError: the local file is missing, or the server cannot be reached.
        ConfigError: the place is not writable.
    """
    with _read_errors(str(local)):
        source = local.open("rb")
    with source:
        if not is_remote(url):
            with _atomic(local_path(url)) as file:
                shutil.copyfileobj(source, file, 1 << 20)
            return
        bucket, key = _bucket_and_key(url)
        with _s3_errors(url):
            _client().upload_fileobj(source, bucket, key, Config=_transfer())


def download_file(url: str, local: Path, sha256: str = "") -> None:
    """Copy a file or object to a local path; it appears there when it is complete.

    Args:
        url: what to copy.
        local: path to write.
        sha256: expected hash. Large objects come in ranges, which S3 does not check: give the hash wherever one is known.

    Raises:
        DataError: it is missing, cannot be read after retries, or its hash is another.
        ConfigError: ``local`` is not writable, the bucket is missing, or the credentials are refused.
    """
    if not is_remote(url):
        with _read_errors(url):
            source = local_path(url).open("rb")
        with source, _atomic(local, url, sha256) as file:
            shutil.copyfileobj(source, file, 1 << 20)
        return
    bucket, key = _bucket_and_key(url)

    def get() -> None:
        with _atomic(local, url, sha256) as file:
            _client().download_fileobj(bucket, key, file, Config=_transfer())

    _retry_body(url, get)


def upload_folder(local: Path, url: str, last: Sequence[str] = ()) -> list[str]:
    """Copy all files below a local folder (temporary ones left out), those named in ``last`` after all others; returns the names.

    Raises:
        DataError: a name in ``last`` is not there; otherwise as upload_file.
    """
    names = list_files(str(local))
    missing = sorted(set(last) - set(names))
    if missing:
        raise DataError(f"{local}: {', '.join(missing)} is missing; the folder is not complete.")
    names = [name for name in names if name not in last] + list(last)
    for name in names:
        upload_file(local / name, join(url, name))
    return names


def download_folder(url: str, local: Path) -> list[str]:
    """Copy all files below a folder or prefix to a local folder; returns their names. As download_file; nothing there is nothing to do."""
    names = list_files(url)
    for name in names:
        download_file(join(url, name), local / name)
    return names


# --- Local files --------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _read_errors(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{name}: does not exist.") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}).") from error


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose a writable place, for example with run.root.") from error


@contextmanager
def _atomic(path: Path, origin: str = "", sha256: str = "") -> Iterator[IO[bytes]]:
    """A temporary file beside ``path`` that becomes ``path``, on disk, when the block ends well (and the content has the expected hash)."""
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            found = sha256_file(temporary) if sha256 else ""
            if found != sha256:
                raise DataError(f"{origin}: damaged: its SHA-256 is {found}, expected {sha256}. Delete it and run the stage that wrote it again.")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut. Some network file systems cannot; they order names themselves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_local(path: Path, data: bytes) -> bool:
    beside = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    with _atomic(beside) as file:
        file.write(data)
    with _write_errors(path):
        try:
            os.link(beside, path)  # unlike O_EXCL, the file has its content from its first moment
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(path.parent)
    return True


def _list_local(folder: Path) -> list[str]:
    return [(Path(top) / name).relative_to(folder).as_posix() for top, _, names in os.walk(folder) for name in names]


def _refuse_root(url: str, is_root: bool) -> None:
    if is_root:
        raise ConfigError(f"{url}: refusing to delete a whole bucket or file system; name a folder in it.")


# --- S3 -----------------------------------------------------------------------------------------------------------------------------------


def _client() -> Any:
    """The S3 client of this process and environment. Clients do not survive a fork, and tests change the environment."""
    settings = "\n".join(os.environ.get(name, "") for name in _CLIENT_VARIABLES)
    key = hashlib.sha256(f"{os.getpid()} {MAX_ATTEMPTS} {settings}".encode()).hexdigest()
    with _lock:
        if key not in _clients:
            _clients[key] = _connect()
        return _clients[key]


def _connect() -> Any:
    import boto3
    from botocore.config import Config

    endpoint = os.environ.get("S3_ENDPOINT_URL") or None
    config = Config(
        retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=16,
        s3={"addressing_style": "path"} if endpoint else None,  # bucket.host resolves on AWS, rarely elsewhere
    )
    with _s3_errors(endpoint or "S3"):
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)


def _head(url: str) -> dict[str, Any] | None:
    """Size and metadata of an object, or None if there is no such object."""
    from botocore.exceptions import ClientError

    bucket, key = _bucket_and_key(url)
    with _s3_errors(url):
        try:
            head: dict[str, Any] = _client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise
    return head


def _list_s3(url: str) -> list[str]:
    bucket, key = _bucket_and_key(url)
    prefix = f"{key}/" if key else ""
    with _s3_errors(url):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return [found.removeprefix(prefix) for found in keys if not found.endswith("/")]


def _create_s3(url: str, data: bytes) -> bool:
    from botocore.exceptions import ClientError

    bucket, key = _bucket_and_key(url)
    writer = secrets.token_hex(16)
    with _s3_errors(url):
        for _ in range(MAX_ATTEMPTS):
            try:
                _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"writer": writer})
                return True
            except ClientError as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    break
                if _code(error) not in ("ConditionalRequestConflict", "409"):
                    raise
    # A retried request may meet the object that its own first attempt created: the token tells.
    return ((_head(url) or {}).get("Metadata") or {}).get("writer") == writer


def _retry_body(url: str, action: Callable[[], T]) -> T:
    """Repeat a whole download when its body breaks off or fails its checksum: botocore only retries up to the first byte of a body."""
    from botocore.exceptions import ConnectionClosedError, FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    broken = (ConnectionClosedError, FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
    with _s3_errors(url):
        for attempt in range(MAX_ATTEMPTS - 1):
            try:
                return action()
            except broken:
                time.sleep(BACKOFF_S * 2**attempt)
        return action()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _s3_errors(url: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except ClientError as error:
        raise _explain(url, _code(error), str(error)) from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise ConfigError(f"{url}: no usable credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.") from error
    except ValueError as error:
        if isinstance(error, ReportedError):
            raise
        raise ConfigError(f"{url}: {error}; set S3_ENDPOINT_URL to a URL such as http://host:port.") from error
    except (BotoCoreError, Boto3Error, RetriesExceededError) as error:
        raise DataError(f"{url}: failed after {MAX_ATTEMPTS} attempts ({error}); check the network and S3_ENDPOINT_URL.") from error


def _explain(url: str, code: str, detail: str) -> ReportedError:
    if code == "NoSuchBucket":
        return ConfigError(f"{url}: the bucket does not exist; create it, or name another one.")
    if code in _REFUSED:
        return ConfigError(f"{url}: refused ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of this key on the bucket.")
    if code in _MISSING:
        return DataError(f"{url}: does not exist.")
    return DataError(f"{url}: the server answered {code or 'an error'} ({detail}).")
