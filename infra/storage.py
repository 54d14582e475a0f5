"""Files and objects by URL: local paths (also ``file:///path``) and ``s3://bucket/key`` behind the same functions.

Whatever is written appears whole or not at all; readers never see a half-written file. Large files travel in parts, broken transfers are
repeated. ``S3_ENDPOINT_URL`` names an S3 server other than AWS; credentials come by boto3's usual ways (``AWS_ACCESS_KEY_ID`` and
``AWS_SECRET_ACCESS_KEY``, profiles, instance roles). Every function raises DataError for what is missing or broken, and ConfigError for an
unwritable place, a missing bucket, refused credentials or an unknown scheme.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from infra import files, s3
from infra.errors import ConfigError, DataError
from infra.files import TEMPORARY, sha256_file

__all__ = [
    "check_writable",
    "create_once",
    "delete",
    "delete_prefix",
    "download_file",
    "download_folder",
    "exists",
    "is_remote",
    "join",
    "list_files",
    "local_path",
    "modified",
    "read_bytes",
    "read_json",
    "read_range",
    "read_text",
    "sha256_file",
    "size",
    "upload_file",
    "upload_folder",
    "write_bytes",
    "write_json",
    "write_text",
]


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
    return "/".join([url.rstrip("/"), *words]) if words else url


def read_bytes(url: str) -> bytes:
    """The whole file or object.

    Raises:
        DataError: it is missing or cannot be read, also after retries.
    """
    if is_remote(url):
        return s3.read(url)
    with files.read_errors(url):
        return local_path(url).read_bytes()


def read_range(url: str, start: int, size: int) -> bytes:
    """``size`` bytes of a file or object, from byte ``start`` on.

    Raises:
        DataError: it is missing, cannot be read, or ends before.
    """
    if is_remote(url):
        data = s3.read_range(url, start, size)
    else:
        with files.read_errors(url), local_path(url).open("rb") as file:
            file.seek(start)
            data = file.read(size)
    if len(data) != size:
        raise DataError(f"{url}: ends after {start + len(data)} bytes, {start + size} were expected; run the stage that wrote it again.")
    return data


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
        raise DataError(f"{url}: not valid JSON ({error}); delete it and run the stage that wrote it again.") from error


def exists(url: str) -> bool:
    """Whether a file or object (not a folder) exists."""
    return s3.head(url) is not None if is_remote(url) else local_path(url).is_file()


def size(url: str) -> int:
    """Size of a file or object in bytes.

    Raises:
        DataError: it is missing.
    """
    if not is_remote(url):
        with files.read_errors(url):
            return local_path(url).stat().st_size
    found = s3.head(url)
    if found is None:
        raise DataError(f"{url}: does not exist.")
    return int(found["ContentLength"])


def modified(url: str) -> float:
    """When a file or object was last written, by the clock of its storage: seconds since 1970.

    Raises:
        DataError: it is missing.
    """
    if not is_remote(url):
        with files.read_errors(url):
            return local_path(url).stat().st_mtime
    found = s3.head(url)
    if found is None:
        raise DataError(f"{url}: does not exist.")
    return float(found["LastModified"].timestamp())


def list_files(url: str) -> list[str]:
    """Names of all files below a folder or prefix, relative to it, sorted; temporary files are left out. A missing folder has none."""
    names = s3.list_names(url) if is_remote(url) else files.list_names(local_path(url))
    return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith(TEMPORARY))


def write_bytes(url: str, data: bytes) -> None:
    """Write a file or object; it appears whole or not at all, and missing folders are made.

    Raises:
        ConfigError: the place is not writable (folder, bucket or credentials).
    """
    if is_remote(url):
        s3.write(url, data)
        return
    with files.atomic(local_path(url)) as file:
        file.write(data)


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
    return s3.create_once(url, data) if is_remote(url) else files.create_once(local_path(url), data)


def check_writable(url: str) -> None:
    """Write and delete a probe below a folder or prefix; a missing folder is made.

    Raises:
        ConfigError: the folder is not writable, the bucket is missing, or the credentials are refused.
    """
    probe = join(url, f"{TEMPORARY}probe-{secrets.token_hex(8)}")
    write_bytes(probe, b"")
    delete(probe)


def delete(url: str) -> None:
    """Delete a file or object; a missing one is fine.

    Raises:
        ConfigError: it may not be deleted, or is a folder (see delete_prefix).
    """
    if is_remote(url):
        s3.delete(url)
        return
    with files.write_errors(local_path(url)):
        local_path(url).unlink(missing_ok=True)


def delete_prefix(url: str) -> None:
    """Delete everything below a folder or prefix, temporary files too; nothing there is fine. Not atomic: delete a marker first.

    Raises:
        ConfigError: it may not be deleted, or is a whole bucket or file system.
    """
    whole = not s3.bucket_and_key(url)[1] if is_remote(url) else local_path(url).resolve() == Path("/")
    if whole:
        raise ConfigError(f"{url}: refusing to delete a whole bucket or file system; name a folder in it.")
    if is_remote(url):
        s3.delete_all(url)
    else:
        files.delete_tree(local_path(url))


def upload_file(local: Path, url: str) -> None:
    """Copy a local file to a URL; large ones travel in parts, and the object appears when all have arrived.

    Raises:
        DataError: the local file is missing, or the server cannot be reached.
        ConfigError: the place is not writable.
    """
    with files.read_errors(str(local)):
        source = local.open("rb")
    with source:
        if is_remote(url):
            s3.upload(source, url)
            return
        with files.atomic(local_path(url)) as file:
            shutil.copyfileobj(source, file, 1 << 20)


def download_file(url: str, local: Path, sha256: str = "") -> None:
    """Copy a file or object to a local path; it appears there when it is complete.

    Args:
        url: what to copy.
        local: path to write; missing folders are made.
        sha256: expected hash. Large objects come in ranges, which S3 does not check: give the hash wherever one is known.

    Raises:
        DataError: it is missing, cannot be read after retries, or its hash is another.
        ConfigError: ``local`` is not writable.
    """
    if is_remote(url):
        s3.download(url, local, sha256)
        return
    with files.read_errors(url):
        source = local_path(url).open("rb")
    with source, files.atomic(local, url, sha256) as file:
        shutil.copyfileobj(source, file, 1 << 20)


def upload_folder(local: Path, url: str, last: Sequence[str] = ()) -> list[str]:
    """Copy all files below a local folder (temporary ones left out), those named in ``last`` after all others; returns the names.

    Raises:
        DataError: a name in ``last`` is not there; otherwise as upload_file.
    """
    names = list_files(str(local))
    missing = sorted(set(last) - set(names))
    if missing:
        raise DataError(f"{local}: {', '.join(missing)} is missing: the folder is not complete.")
    names = [name for name in names if name not in last] + list(last)
    for name in names:
        upload_file(local / name, join(url, name))
    return names


def download_folder(url: str, local: Path) -> list[str]:
    """Copy all files below a folder or prefix to a local folder; returns their names. Nothing there is nothing to do; see download_file."""
    names = list_files(url)
    for name in names:
        download_file(join(url, name), local / name)
    return names
