"""Take-down lists, and the two spellings of an id that is a path: relative to its source (newer sets) and absolute (older sets). A take-down list may hold either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import globs, node_folder, text
from infra.digests import id_hash
from infra.errors import DataError, MissingError

_LONGEST_LIST = 1 << 30  # bytes of a take-down list


def read_takedown(url: str) -> frozenset[str]:
    """Ids on a take-down list: a text file with one id a line. An empty URL means no list.

    Raises:
        DataError: the list is missing or is not UTF-8.
    """
    # Both the line itself and the line without surrounding spaces: an id may begin with a space, or spaces may have been typed by mistake.
    return frozenset(each for line in takedown_lines(url) for each in (line, line.strip()))


def takedown_lines(url: str) -> list[str]:
    """The distinct lines of a take-down list that are not blank, in order. An empty URL means no list.

    Raises:
        DataError: as read_takedown.
    """
    if not url:
        return []
    try:
        found = node_folder.read_once(url, _LONGEST_LIST).decode("utf-8-sig")
    except MissingError as error:
        raise DataError(f"data.takedown = {url}: does not exist; name a text file with an id on each line, or leave it empty.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not UTF-8 text ({error}).") from error
    if "\0" in found:  # UTF-16 of ASCII letters is UTF-8 as well, of ids that no record has
        raise DataError(f"{url}: not UTF-8 text (it holds NUL bytes, as UTF-16 does); save it as UTF-8.")
    return list(dict.fromkeys(line for line in text.lines(found) if line.strip()))


def bases_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name of a source ('' for the first) -> the folder to which its ids are relative, from the settings in a manifest.

    Manifests of sets with absolute ids have no "bases" but list their sources; of a pattern, the fixed part of its path is taken.
    """
    if isinstance(settings.get("bases"), dict):
        return {str(name): str(base) for name, base in settings["bases"].items()}
    urls = [str(url) for url in settings.get("sources") or [] if url != "emoji"]
    folders = [globs.split(url)[0] if globs.is_pattern(url) else url for url in urls]
    return {str(number) if number else "": folder for number, folder in enumerate(folders)}


def spellings(lines: frozenset[str], bases: dict[str, str]) -> frozenset[str]:
    """The ids of a take-down list in both spellings, so that an old list fits a new set, and a new list an old set.

    Args:
        lines: lines of the list.
        bases: name of a source ('' for the first) -> the folder to which its ids are relative.
    """
    found = set(lines)
    for name, base in bases.items():
        before = f"{name}:" if name else ""
        for line in lines:
            if line.startswith(f"{base.rstrip('/')}/"):
                found.add(before + line[len(base.rstrip("/")) + 1 :])
            elif before and line.startswith(before):
                found.add(f"{base.rstrip('/')}/{line[len(before) :]}")
            elif not before and not line.startswith("/") and "://" not in line:
                found.add(f"{base.rstrip('/')}/{line}")
    return frozenset(found)


def without_match(lines: list[str], bases: dict[str, str], ids: list[NDArray[np.uint64]]) -> list[str]:
    """The lines of a take-down list that match no record in either spelling.

    Args:
        lines: unchanged lines of the list.
        bases: as for ``spellings``.
        ids: ``id_hash`` of all records.
    """
    named = [[id_hash(each) for each in spellings(frozenset({line, line.strip()}), bases)] for line in lines]
    wanted = np.unique(np.array([hashed for each in named for hashed in each], np.uint64))
    found = {int(hashed) for some in ids for hashed in wanted[np.isin(wanted, some)]}
    return [line for line, each in zip(lines, named, strict=True) if not found.intersection(each)]
