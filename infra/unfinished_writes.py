"""Finds what killed writers leave behind: unfinished multipart uploads on S3, temporary files on local file systems."""

from __future__ import annotations

import time
from dataclasses import dataclass

from infra import files, s3, storage


@dataclass(frozen=True)
class Leftover:
    """An unfinished upload or a temporary file."""

    url: str
    begun: float
    """Seconds since 1970."""
    upload: s3.Upload | None = None

    def remove(self) -> None:
        """Delete it; nothing happens if the writer has finished meanwhile."""
        if self.upload is not None:
            s3.abort(self.upload)
        else:
            storage.delete(self.url)

    @property
    def days(self) -> float:
        return (time.time() - self.begun) / 86400


def find(url: str, before: float) -> list[Leftover]:
    """All leftovers below a folder or prefix that were begun before a time (seconds since 1970), sorted by URL.

    Raises:
        DataError, ConfigError: the place cannot be read.
    """
    found: list[Leftover] = []
    if url.startswith("s3://"):
        found = [Leftover(upload.url, upload.begun, upload) for upload in s3.unfinished_uploads(url)]
    elif not storage.is_remote(url):  # unfinished uploads to gs:// and az:// expire by themselves after a week
        names = [name for name in files.list_names(storage.local_path(url)) if name.rsplit("/", 1)[-1].startswith(files.TEMPORARY)]
        found = [Leftover(place, storage.modified(place)) for place in (storage.join(url, name) for name in names)]
    return sorted((each for each in found if each.begun < before), key=lambda each: each.url)
