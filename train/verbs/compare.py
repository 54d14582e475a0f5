"""``launcher.py report RUN_A RUN_B``: one page that compares runs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from infra import files, storage
from infra.errors import DataError, UsageError
from infra.run_folder import RunFolder
from train.report.comparison import MOST, render
from train.report.view import RunView
from train.run.run_names import distinct

_LONGEST = 200
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*=")


def others(words: list[str]) -> list[str]:
    """Those words behind a stage's first that name further runs, and not values of keys."""
    return [word for word in words if not _OVERRIDE.match(word)]


def main(urls: list[str], words: list[str]) -> None:
    """Write compare-A-B.html to the working directory.

    Args:
        words: values of keys that were given beside the runs; none is accepted.

    Raises:
        UsageError: there are more runs than colours, the same one twice, or values of keys.
        DataError: there is no run in a folder.
        ConfigError: the working directory cannot be written to.
    """
    if words:
        raise UsageError(f"{words[0]}: a comparison changes no run, so it takes run folders and no values of keys.")
    named = distinct(urls)
    if len(named) < len(urls) or len(urls) > MOST:
        raise UsageError(f"a comparison takes two to {MOST} different run folders; given: {', '.join(urls)}.")
    for url in urls:
        if not storage.exists(RunFolder(url).config_url):
            raise DataError(f"{RunFolder(url).config_url} is missing: {url} is no run folder.")
    page = Path(f"compare-{_short('-'.join(named))}.html")
    with files.elsewhere("it is written to the folder where you stand: go to one that you may write to"), files.atomic(page) as file:
        file.write(render({name: RunView(url) for name, url in named.items()}).encode())
    print(page, flush=True)


def _short(names: str) -> str:
    """Names as a part of a file's name, which has at most 255 bytes."""
    if len(names.encode()) <= _LONGEST:
        return names
    return f"{names.encode()[:_LONGEST].decode(errors='ignore')}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
