"""Reads JSON files of sources: they are somebody else's, so advice about them is to fetch or mend them, and never to delete them."""

from __future__ import annotations

from typing import Any

from infra import storage, strict_json
from infra.errors import UnchangingError


def read(url: str, what: str, *, marked: bool = False) -> Any:
    """The value of a whole JSON file, which may begin with a byte order mark.

    Args:
        url: of the file.
        what: what it should hold, for messages.
        marked: objects in which a key occurs twice are marked (``strict_json.Twice``); else the file is refused.

    Raises:
        DataError: it is missing, too large, or not JSON of distinct keys.
    """
    size = storage.size(url)
    if size > strict_json.MAX_BYTES:
        raise UnchangingError(
            f"{url}: {size:,} bytes; {what} are read whole, up to {strict_json.MAX_BYTES:,} bytes. Divide it into several files, or write a table (docs/data.md)."
        )
    try:
        return strict_json.loads(storage.read_bytes(url).decode("utf-8-sig"), marked=marked)
    except ValueError as error:
        raise UnchangingError(f"{url}: not valid JSON, which {what} should be ({error}); fetch the file again, or mend it.") from error
