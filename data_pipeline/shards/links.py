"""Guards against links in a set on disk. A set may come from anybody, so the files that its names refer to must lie inside its own folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from infra import storage
from infra.errors import DataError

_INSIDE = re.compile(r"part-[0-9a-f]{1,64}|versions|tries|inputs|[0-9a-f]{16}")
"""Names of the folders in a set, and of those beside the image sets."""


def check(url: str) -> None:
    """Refuse a file or folder of a set that is, or lies behind, a link out of the set. The set's own folder may be a link, because the user has named it.

    Raises:
        DataError: a link leads out of the set.
    """
    if storage.is_remote(url):
        return
    path = storage.local_path(url)
    chain = [path]
    while _INSIDE.fullmatch(chain[-1].parent.name):
        chain.append(chain[-1].parent)
    if not any(os.path.islink(each) for each in chain):
        return
    root, found = Path(os.path.realpath(chain[-1].parent)), Path(os.path.realpath(path))
    if root not in found.parents:
        raise DataError(
            f"{url}: a link that leads out of its set, to {found}; nothing is read, written or deleted through it. Put the files themselves there "
            "(cp -rL), or name the folder in which they lie."
        )
