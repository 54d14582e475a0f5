"""Files and objects by URL: local paths (also ``file:///path``), ``s3://bucket/key``, ``gs://`` and ``az://`` behind the same functions.

A file that is written appears whole or not at all; readers never see a half-written one. Large files are transferred in parts, and broken transfers are
retried. ``S3_ENDPOINT_URL`` names an S3 server other than AWS; credentials are found in boto3's usual ways (``AWS_ACCESS_KEY_ID`` and
``AWS_SECRET_ACCESS_KEY``, profiles, instance roles). Every function raises DataError for a missing or damaged file, and ConfigError for an unwritable place,
a missing bucket, refused credentials or an unknown scheme.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from infra import files, globs, kept_within, shown, strict_json
from infra.errors import ConfigError, DataError, MissingError
from infra.files import TEMPORARY as TEMPORARY
from infra.files import sha256_file as sha256_file
from infra.globs import FileInfo as FileInfo
from infra.objects import SCHEMES, ObjectFile, store

STREAM_BUFFER = 1 << 18
"""Bytes that an open stream reads at a time."""


def is_remote(url: str) -> bool:
    """Whether ``url`` names an object of a remote store (True) or a local path (False).

    Raises:
        ConfigError: the scheme is unknown, or the URL contains a password.
    """
    scheme, separator, _ = url.partition("://")
    if ("@" in url or "%" in url or "?" in url) and shown.holds_password(url):  # its value is not quoted: no mask knows every password
        raise ConfigError(f"{scheme if scheme in SCHEMES else 'an address'}{separator}***: {shown.NO_PASSWORDS}")
    if separator and scheme not in (*SCHEMES, "file"):
        raise ConfigError(f"{url}: storage '{scheme}://' is not known; accepted are local paths, file:///path, s3://bucket/prefix, gs:// and az://.")
    return scheme in SCHEMES and bool(separator)


def local_path(url: str) -> Path:
    """The local path of a path or ``file://`` URL. Escapes (``%20``) are decoded in a ``file://`` URL, and nowhere else.

    Raises:
        ConfigError: a remote URL, or a ``file://`` URL that names a host.
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
    """``url/part/part``, for paths and URLs alike. Parts are relative names, taken literally; empty ones are left out."""
    words = [word for word in (part.strip("/") for part in parts) if word]
    if url.startswith("file://"):
        words = [word.replace("%", "%25") for word in words]
    return "/".join([url.rstrip("/"), *words]) if words else url


def absolute(url: str) -> str:
    """The URL with a local path made absolute, so that it does not depend on the working directory."""
    return url if is_remote(url) else os.path.abspath(local_path(url))


def read_bytes(url: str) -> bytes:
    """The whole file or object.

    Raises:
        DataError: it is missing or cannot be read, even after retries.
    """
    if is_remote(url):
        return store(url).read(url)
    with files.read_errors(url):
        return files.regular(local_path(url), url, files.LARGEST_WHOLE).read_bytes()


def read_at_most(url: str, most: int) -> bytes:
    """The whole file or object; a DataError if it is larger than ``most`` bytes or not a regular file."""
    if is_remote(url):
        return store(url).read(url, most)
    with open_stream(url) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise DataError(f"{url}: larger than {most:,} bytes, but such files are never that large; it is damaged, or was not written by this project.")
    return data


def read_range(url: str, start: int, size: int) -> bytes:
    """``size`` bytes of a file or object, from byte ``start`` on.

    Raises:
        DataError: it is missing, cannot be read, or is too short.
    """
    if is_remote(url):
        data = store(url).read_range(url, start, size)
    else:
        with files.read_errors(url), files.regular(local_path(url), url).open("rb") as file:
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
    """The value of a JSON file; JSON that our writers never produce is refused (``infra/strict_json.py``).

    Raises:
        DataError: as read_text, or the file is not valid JSON.
    """
    return parse_json(url, read_at_most(url, strict_json.MAX_BYTES))


def parse_json(url: str, data: bytes | memoryview, *, alike: bool = False, taken: strict_json.Taken | None = None) -> Any:
    """``read_json`` for a file whose content was read already; ``alike`` and ``taken`` as in ``strict_json.loads``."""
    try:
        text = str(data, "utf-8")
        del data  # of a large index 0.1 GB in every process, while its objects are made
        return strict_json.loads(text, alike=alike, taken=taken)
    except ValueError as error:
        raise DataError(f"{url}: not valid JSON ({error}); delete it and run the stage that wrote it again.") from error


def exists(url: str) -> bool:
    """Whether a file or object (not a folder) exists."""
    return store(url).head(url) is not None if is_remote(url) else files.is_file(local_path(url))


def size(url: str) -> int:
    """Size of a file or object in bytes; a DataError if it is missing."""
    return stat(url).size


def stat(url: str) -> FileInfo:
    """Size and version of a file or object. The version changes with the content: it is made of size and modification time, or size and ETag.

    Raises:
        MissingError: there is no such file.
        DataError: it cannot be looked at.
    """
    if not is_remote(url):
        with files.read_errors(url):
            return globs.local_info(url, local_path(url).stat())
    found = store(url).head(url)
    if found is None:
        raise MissingError(f"{url}: does not exist.")
    return globs.remote_info(url, int(found["ContentLength"]), str(found.get("ETag", "")).strip('"'))


def glob(url: str, roots: tuple[str, ...] = ()) -> tuple[str, Iterator[FileInfo]]:
    """The files that a URL names: a file, all files below a folder, or those that match a pattern.

    A pattern holds ``*``, ``?`` or ``[...]``, which stay within one folder, or ``**`` for folders of any depth. Only what lies below its
    longest fixed part is listed, lazily. Hidden and temporary files are left out. A name that exists is taken literally, and so are the folders of a pattern.

    Args:
        url: what to list.
        roots: real paths of the folders that links in a local folder may lead to; empty: links may lead anywhere.

    Returns:
        The folder to which names are relative, of a ``file://`` URL as a path, and the files in a stable order (none if nothing matches).

    Raises:
        DataError: a folder cannot be read; may also be raised while the files are iterated.
    """
    if url.startswith("file://"):
        url = str(local_path(url)) + "/" * url.endswith("/")
    found = None
    if not url.endswith("/"):
        with suppress(MissingError):
            found = stat(url)
    if found is not None and (is_remote(url) or files.is_file(local_path(url))):
        base, _, name = url.rpartition("/")
        return base or ("/" if url.startswith("/") else "."), iter([FileInfo(name, found.size, found.version)])
    level = _remote_level if is_remote(url) else partial(_local_level, roots=roots)
    deep = _remote_walk if is_remote(url) else partial(_local_walk, roots=roots)
    if found is not None or not globs.is_pattern(url) or _is_folder(url.rstrip("/")):
        return url.rstrip("/") or url, deep(url)
    base, parts = globs.literal(*globs.split(url), _is_folder)
    return base or ".", globs.expand(base or ".", parts, level, deep)


def _is_folder(url: str) -> bool:
    return store(url).is_folder(url) if is_remote(url) else files.is_folder(local_path(url))


def _local_level(place: str, start: str, roots: tuple[str, ...] = ()) -> Iterator[FileInfo]:
    return globs.local_level(local_path(place), start, roots=roots)


def _local_walk(place: str, roots: tuple[str, ...] = ()) -> Iterator[FileInfo]:
    return globs.local_walk(local_path(place), roots)


def _remote_level(place: str, start: str) -> Iterator[FileInfo]:
    return (globs.remote_info(*found) for found in store(place).list_objects(place, start, shallow=True))


def _remote_walk(place: str) -> Iterator[FileInfo]:
    return (globs.remote_info(*found) for found in store(place).list_objects(place) if not globs.is_hidden(found[0]))


@contextmanager
def open_stream(url: str, start: int = 0) -> Iterator[BinaryIO]:
    """A file or object, open for sequential reading from byte ``start`` on. A transfer that breaks off continues at that byte.

    Raises:
        MissingError: there is no such file.
        DataError: it is not a regular file, or cannot be read even after retries; may also be raised while reading.
    """
    if is_remote(url):
        with io.BufferedReader(store(url).ObjectStream(url, start), STREAM_BUFFER) as stream:
            yield cast(BinaryIO, stream)
        return
    path = local_path(url)
    with files.read_errors(url):
        if path.is_dir():
            raise DataError(f"{url}: not a regular file.")
        with files.regular(path, url).open("rb", buffering=STREAM_BUFFER) as file:
            file.seek(start)
            yield file


@contextmanager
def open_seekable(url: str) -> Iterator[BinaryIO]:
    """A file or object, open for reading at any position. Of a remote object, every read fetches exactly the requested bytes, without a buffer.

    Raises:
        MissingError, DataError: as open_stream.
    """
    if is_remote(url):
        yield cast(BinaryIO, ObjectFile(url, size(url)))
        return
    with open_stream(url) as file:
        yield file


def modified(url: str) -> float:
    """When a file or object was last written: seconds since 1970, by the storage's clock. A DataError if it is missing."""
    if not is_remote(url):
        with files.read_errors(url):
            return local_path(url).stat().st_mtime
    found = store(url).head(url)
    if found is None:
        raise DataError(f"{url}: does not exist.")
    return float(found["LastModified"].timestamp())


def list_files(url: str) -> list[str]:
    """Names of all files below a folder or prefix, relative to it, sorted, without temporary files; none if the folder is missing."""
    names = store(url).list_names(url) if is_remote(url) else files.list_names(local_path(url))
    return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith(TEMPORARY))


def list_level(url: str) -> list[str]:
    """Names directly in a folder, sorted, those of folders with a slash at the end; what lies deeper is not listed. Temporary files are left out; a missing
    folder has no names."""
    return sorted(found.name for found in (_remote_level if is_remote(url) else _local_level)(url, "") if not found.name.startswith(TEMPORARY))


def write_bytes(url: str, data: bytes) -> None:
    """Write a file or object; it appears whole or not at all. Missing folders are made.

    Raises:
        ConfigError: the place is not writable (folder, bucket or credentials).
    """
    if is_remote(url):
        store(url).write(url, data)
        return
    with files.atomic(local_path(url)) as file:
        file.write(data)


def write_text(url: str, text: str) -> None:
    """Write UTF-8 text; see write_bytes."""
    write_bytes(url, text.encode())


def write_json(url: str, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values are equal files; see write_bytes. A number that is not finite is a ValueError."""
    write_bytes(url, strict_json.written(value))


def create_once(url: str, data: bytes) -> bool:
    """Create a file or object that must not exist yet: of any number of racing callers exactly one gets True, and its data are kept. See write_bytes."""
    return store(url).create_once(url, data) if is_remote(url) else files.create_once(local_path(url), data)


def check_writable(url: str) -> None:
    """Write and delete a test file below a folder or prefix; a missing folder is made. A ConfigError says why it is not possible."""
    probe = join(url, f"{TEMPORARY}probe-{secrets.token_hex(8)}")
    write_bytes(probe, b"")
    delete(probe)


def delete(url: str) -> None:
    """Delete a file or object; it may be missing. Of a link, the link itself. A ConfigError if it cannot be deleted, or is a folder (see delete_prefix)."""
    if is_remote(url):
        store(url).delete(url)
        return
    kept_within.check(local_path(url))
    with files.write_errors(local_path(url)):
        local_path(url).unlink(missing_ok=True)


def delete_prefix(url: str) -> None:
    """Delete everything below a folder or prefix, including temporary files; there may be nothing. Not atomic: delete the marker that makes it valid first.

    Raises:
        ConfigError: it cannot be deleted, or is a whole bucket or file system.
    """
    whole = not store(url).bucket_and_key(url)[1] if is_remote(url) else local_path(url).resolve() == Path("/")
    if whole:
        raise ConfigError(f"{url}: refusing to delete a whole bucket or file system; name a folder in it.")
    if is_remote(url):
        store(url).delete_all(url)
    else:
        files.delete_tree(local_path(url))


def upload_file(local: Path, url: str) -> None:
    """Copy a local file to a URL. A large file is sent in parts, and the object appears once all have arrived.

    Raises:
        DataError, ConfigError: the local file is missing, or the server cannot be reached; the place is not writable.
    """
    with files.read_errors(str(local)):
        source = local.open("rb")
    with source:
        if is_remote(url):
            store(url).upload(source, url)
            return
        with files.atomic(local_path(url)) as file:
            shutil.copyfileobj(source, file, 1 << 20)


def download_file(url: str, local: Path, sha256: str = "") -> None:
    """Copy a file or object to a local path, where it appears once it is complete.

    Args:
        url: what to copy.
        local: path to write; missing folders are made.
        sha256: expected hash. Large objects are fetched in ranges, which S3 does not verify: give the hash whenever it is known.

    Raises:
        DataError: it is missing, cannot be read after retries, or has another hash.
        ConfigError: ``local`` is not writable.
    """
    if is_remote(url):
        store(url).download(url, local, sha256)
        return
    with files.read_errors(url):
        source = files.regular(local_path(url), url).open("rb")
    with source, files.atomic(local, url, sha256) as file:
        shutil.copyfileobj(source, file, 1 << 20)


def upload_folder(local: Path, url: str, last: Sequence[str] = ()) -> list[str]:
    """Copy all files below a local folder, except temporary ones, and return their names. Files named in ``last`` must exist and are copied after all others."""
    names = list_files(str(local))
    missing = sorted(set(last) - set(names))
    if missing:
        raise DataError(f"{local}: {', '.join(missing)} is missing: the folder is not complete.")
    names = [name for name in names if name not in last] + list(last)
    for name in names:
        upload_file(local / name, join(url, name))
    return names


def download_folder(url: str, local: Path) -> list[str]:
    """Copy all files below a folder or prefix to a local folder and return their names; see download_file. A name that leads out of the folder is refused."""
    names = list_files(url)
    if outside := [name for name in names if {"", ".", ".."} & set(name.split("/"))]:
        raise DataError(f"{url}: the object {outside[0]!r} leads out of it; rename or delete it.")
    for name in names:
        download_file(join(url, name), local / name)
    return names
