"""The two spellings of an id that is a place: relative to its source, and absolute. A take-down list may hold either, of an older set or a newer one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra import globs


def bases_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name of a source ('' for the first) -> the folder to which its ids are relative, by the settings in a manifest.

    Sets whose ids are absolute name their sources alone; a file among them stands for its folder.
    """
    if isinstance(settings.get("bases"), dict):
        return {str(name): str(base) for name, base in settings["bases"].items()}
    urls = [str(url) for url in settings.get("sources") or [] if url != "emoji"]
    folders = [globs.split(url)[0] if globs.is_pattern(url) else url for url in urls]
    return {str(number) if number else "": folder for number, folder in enumerate(folders)}


def spellings(lines: frozenset[str], bases: dict[str, str]) -> frozenset[str]:
    """Ids of a take-down list in both spellings, relative to their source and absolute: an old list fits a new set, and the reverse.

    Args:
        lines: of the list.
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
