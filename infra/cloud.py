"""Objects of Google Cloud Storage (gs://bucket/key) and Azure Blob Storage (az://container/key), with the functions of ``infra/s3.py``.

Both are reached through fsspec: gcsfs and adlfs, which are installed separately (``MISSING`` says how) and imported at first use. Credentials are found as usual:
Google's application default credentials; AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with a key, a token or a managed identity.
STORAGE_EMULATOR_HOST names a server other than Google's. Both libraries retry requests that fail for a passing reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from infra import cloud_errors, environment, s3_client, scratch
from infra.errors import ConfigError, DataError
from infra.files import atomic

RANGE_BYTES = 8 << 20
"""Objects are read in ranges of this many bytes."""
AT_ONCE = 8
"""Parallel requests of one download or deletion."""
MISSING = {
    "gs": "pip install -c constraints.txt gcsfs google-auth-oauthlib",
    "az": "pip install -c constraints.txt adlfs",
}
"""The command that installs the library of a scheme."""
_VARIABLES = {
    "gs": ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"),
    "az": (
        *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
        *("AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_STORAGE_TENANT_ID"),
    ),
}
_lock = threading.Lock()
_known: dict[tuple[Any, ...], Any] = {}


def bucket_and_key(url: str) -> tuple[str, str]:
    """Split ``gs://bucket/key``.

    Raises:
        ConfigError: there is no bucket.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{url}: the bucket is missing; expected {scheme}://bucket/prefix.")
    return bucket, key.strip("/")


def read(url: str, most: int | None = None) -> bytes:
    """The whole object. If it is larger than ``most`` bytes it is not read; that is a DataError."""
    if most is not None:
        found = _stat(url)
        if int(found["size"]) > most:
            raise DataError(
                f"{url}: larger than {most:,} bytes, but such files are never that large; it is damaged, or was not written by this project."
            )
    with cloud_errors.told(url):
        return bytes(_files(url).cat_file(_path(url)))


def read_range(url: str, start: int, size: int) -> bytes:
    """``size`` bytes of an object, from ``start`` on; fewer if the object ends earlier."""
    if size <= 0:
        return b""
    with cloud_errors.told(url):
        try:
            return bytes(_files(url).cat_file(_path(url), start=start, end=start + size))
        except Exception as error:
            if cloud_errors.is_beyond_end(error):
                return b""
            raise


def download(url: str, local: Path, sha256: str) -> None:
    """Copy an object to a local file, in parallel ranges. If the object changes meanwhile, that is a DataError."""
    found = _stat(url)
    with atomic(local, url, sha256) as file, ThreadPoolExecutor(AT_ONCE) as pool:
        starts = range(0, int(found["size"]), RANGE_BYTES)
        for window in (starts[first : first + AT_ONCE] for first in range(0, len(starts), AT_ONCE)):
            for part in pool.map(lambda start: read_range(url, start, RANGE_BYTES), window):
                file.write(part)
        _refuse_changed(url, found)


class ObjectStream(io.RawIOBase):
    """An object read from ``start`` to its end, in ranges."""

    def __init__(self, url: str, start: int = 0) -> None:
        super().__init__()
        self._url, self._position, self._found = url, start, _stat(url)
        self._ahead = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """See RawIOBase.

        Raises:
            DataError: the object has changed since the stream was opened.
        """
        if not self._ahead:
            left = int(self._found["size"]) - self._position
            if left <= 0:
                _refuse_changed(self._url, self._found)
                return 0
            self._ahead = memoryview(read_range(self._url, self._position, min(left, RANGE_BYTES)))
            self._position += len(self._ahead)
            if not self._ahead:
                raise DataError(f"{self._url}: has changed while it was being read; run again.")
        count = min(len(buffer), len(self._ahead))
        buffer[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count


def write(url: str, data: bytes) -> None:
    """Write an object."""
    with cloud_errors.told(url, writing=True):
        _files(url).pipe_file(_path(url), data)


def upload(source: IO[bytes], url: str, size: int = 0) -> None:
    """Write an object from an open file, in parts if it is large; it appears once all parts have arrived. A source that is not a local file is first copied to
    a temporary one."""
    if isinstance(name := getattr(source, "name", None), str):
        with cloud_errors.told(url, writing=True):
            _files(url).put_file(name, _path(url))
        return
    with scratch.folder("upload-") as room:
        with Path(room, "object").open("wb") as file:
            shutil.copyfileobj(source, file, RANGE_BYTES)
        with cloud_errors.told(url, writing=True):
            _files(url).put_file(str(Path(room, "object")), _path(url))


def create_once(url: str, data: bytes) -> bool:
    """Write an object unless it exists: of any number of racing callers exactly one gets True."""
    writer = secrets.token_hex(16)
    with cloud_errors.told(url, writing=True):
        try:
            _files(url).pipe_file(_path(url), data, mode="create", **_marked(url, writer))
            return True
        except FileExistsError:
            pass
    # A request that the library sent twice may have found the object of its own first attempt: the token tells.
    return ((head(url) or {}).get("Metadata") or {}).get("writer") == writer


def check_creation(url: str) -> None:
    """Check that the server honours the condition of ``create_once``, by trying to create an object of ours that exists already.

    Raises:
        ConfigError: it does not.
    """
    if create_once(url, read(url)):
        raise ConfigError(
            f"{url}: this server ignores the condition to create an object only once, so a launcher cannot make sure that it is the only one."
        )


def head(url: str) -> dict[str, Any] | None:
    """Size (ContentLength), ETag, LastModified and Metadata of an object, or None if there is no such object."""
    with cloud_errors.told(url):
        try:
            found = _files(url).info(_path(url))
        except FileNotFoundError:
            return None
    if found["type"] != "file":
        return None
    said = found.get("metadata") or {}
    disposition = (found.get("content_settings") or {}).get("content_disposition") or ""
    return {
        "ContentLength": int(found["size"]),
        "ETag": str(found.get("generation") or found.get("etag") or ""),
        "LastModified": found.get("mtime") or found.get("last_modified"),
        "Metadata": {"writer": said.get("writer") or disposition},
    }


def list_names(url: str) -> list[str]:
    """Names of all objects below a prefix, relative to it."""
    return [name for name, _, _ in list_objects(url)]


def list_objects(url: str, start: str = "", *, shallow: bool = False) -> Iterator[tuple[str, int, str]]:
    """(name relative to ``url``, size in bytes, version) of the objects below a prefix, sorted; see ``s3.list_objects``. The version changes with the content.

    fsspec returns a listing in one piece: a million objects take about a gigabyte of memory.
    """
    bucket, key = bucket_and_key(url)
    prefix = f"{bucket}/{key}/" if key else f"{bucket}/"
    with cloud_errors.told(url):
        listed = _listed(_files(url), prefix.rstrip("/"), shallow)
        if not listed and not _files(url).exists(bucket):
            raise ConfigError(f"{url}: the bucket does not exist; create it, or name another one.")
    for path, found in sorted(listed.items()):
        name, folder = path.removeprefix(prefix), found["type"] == "directory"
        if path.startswith(prefix) and name and name.startswith(start) and not path.endswith("/"):
            yield (f"{name}/", -1, "") if folder else (name, int(found["size"]), str(found.get("generation") or found.get("etag") or ""))


def is_folder(url: str) -> bool:
    """Whether there are objects below a prefix."""
    return next(list_objects(url, shallow=True), None) is not None


def delete(url: str) -> None:
    """Delete an object; it may be missing."""
    with cloud_errors.told(url, writing=True), contextlib.suppress(FileNotFoundError):
        _files(url).rm_file(_path(url))


def delete_all(url: str) -> None:
    """Delete all objects below a prefix."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda name: delete(f"{url.rstrip('/')}/{name}"), list_names(url)):
            pass


def _listed(files: Any, path: str, shallow: bool) -> dict[str, dict[str, Any]]:
    """Path -> what the listing says about it; empty if nothing lies below the prefix."""
    files.invalidate_cache()
    try:
        if shallow:
            return {found["name"].rstrip("/"): found for found in files.ls(path, detail=True)}
        return dict(files.find(path, detail=True, withdirs=False))
    except FileNotFoundError:
        return {}


def _stat(url: str) -> dict[str, Any]:
    """Size and version (which changes with the content) of an object."""
    found = head(url)
    if found is None:
        raise cloud_errors.missing(url)
    return {"size": found["ContentLength"], "version": found["ETag"]}


def _refuse_changed(url: str, found: dict[str, Any]) -> None:
    if _stat(url) != found:
        raise DataError(f"{url}: has changed while it was being read; run again.")


def _path(url: str) -> str:
    """What the libraries call an object.

    Raises:
        DataError: they would take the name for that of another object, as adlfs does with 'a?versionid=1' (it reads and deletes 'a') and with line ends, which it
            leaves out; or it leads out of the folder that it lies in, as a server may resolve it.
    """
    bucket, key = bucket_and_key(url)
    path, files = f"{bucket}/{key}", _files(url)
    begins_empty = url.partition("://")[2].startswith(f"{bucket}//")
    found = files.split_path(files._strip_protocol(path))[:2]
    if begins_empty or {".", ".."} & set(key.split("/")) or tuple(found) != (bucket, key):
        raise DataError(f"{url}: an object of another name would be meant by it; rename this one, or delete it, with the tools of its storage.")
    return path


def _marked(url: str, writer: str) -> dict[str, Any]:
    """The option that stores the writer's token with an object. adlfs keeps an object's metadata for itself, so there the token is the content disposition."""
    return {"metadata": {"writer": writer}} if url.startswith("gs://") else {"content_settings": {"content_disposition": writer}}


def _files(url: str) -> Any:
    """The filesystem of this process and environment.

    Raises:
        ConfigError: there is no bucket, or its library is not installed.
    """
    bucket_and_key(url)
    scheme = url.partition("://")[0]
    key = (scheme, os.getpid(), *(environment.text(name) for name in _VARIABLES[scheme]))
    with _lock:
        if key not in _known:
            _known[key] = _connect(scheme)
        return _known[key]


def _connect(scheme: str) -> Any:
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        if scheme == "gs":
            from gcsfs import GCSFileSystem

            s3_client.refuse_passwords()
            server = environment.text("STORAGE_EMULATOR_HOST")
            return GCSFileSystem(**({"token": "anon", "endpoint_url": server} if server else {}), **fresh)
        from adlfs import AzureBlobFileSystem

        return AzureBlobFileSystem(**fresh)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a library that is not installed ({error}): {MISSING[scheme]}") from error
