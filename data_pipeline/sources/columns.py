"""Usual names of the columns, keys and fields that hold images and captions. docs/data.md lists them; a test keeps that list true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.sources.rows_to_pairs import NESTED_CAPTIONS, ODD_CAPTION, BadRecord
from infra.errors import UnchangingError

CAPTION_NAMES = ("captions?", "texts?|txt", "alt_?text|sentences?", "description|prompt", "title|raw|comments?")
"""Patterns of names, in order of precedence. A number may follow a name: 'caption', or 'caption_0', 'caption_1' ..."""
IMAGE_NAMES = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_path", "img_path", "image_file", "file_name", "filename"),
    *("file", "filepath", "file_path", "path", "image_url", "url", "image_name"),
)
ABOUT = ("id", "uid", "key", "group", "sha256", "md5", "url", "source", "license", "licence", "LICENSE", "split")
"""Columns with further facts about a record."""
_CAPTIONS = tuple(re.compile(rf"({name})(_?\d+)?", re.IGNORECASE) for name in CAPTION_NAMES)


def caption_values(value: Any) -> list[str]:
    """The captions in a cell: a string, a list of strings, structs with a field of a usual name (or a list of these), or a list written as JSON. Any other value
    holds none.

    Raises:
        BadRecord: a list in a list, of which nobody knows what it stands for, or a list or struct in which a caption is no text: the others would be taken, and it
            would be lost. Nothing (null) says nothing, and is passed over.
    """
    if isinstance(value, str):
        if value.startswith("[") and value.endswith("]"):
            try:
                listed = json.loads(value)
            except (ValueError, RecursionError):
                return [value]
            if isinstance(listed, list) and not any(isinstance(item, (str, list, Mapping)) for item in listed):
                return [value]  # a caption in brackets, such as [1]
            return caption_values(listed) or [value]
        return [value]
    if isinstance(value, (list, tuple)):
        _refuse_nested(value)
        return [caption for item in value if item is not None for caption in ([item] if isinstance(item, str) else _of_item(item))]
    return _of_struct(value)


def _of_item(item: Any) -> list[str]:
    if not isinstance(item, Mapping) or not usual_captions(item):
        raise BadRecord(ODD_CAPTION)
    return _of_struct(item)


def _of_struct(value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return []
    said = [value[name] for name in usual_captions(value)]
    for found in said:
        if isinstance(found, list):
            _refuse_nested(found)
    texts = [text for found in said for text in (found if isinstance(found, list) else [found]) if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord(ODD_CAPTION)
    return texts


def _refuse_nested(value: list[Any] | tuple[Any, ...]) -> None:
    if any(isinstance(item, (list, tuple)) for item in value):
        raise BadRecord(NESTED_CAPTIONS)


def refuse_repeated(url: str, names: Sequence[str], used: Iterable[str]) -> None:
    """Refuse a table in which a column that is read comes twice: one of the two would be lost.

    Raises:
        UnchangingError: there is one.
    """
    for name in used:
        if names.count(name) > 1:
            raise UnchangingError(
                f"{url}: {names.count(name)} of its columns are called '{name}', and which one is meant cannot be told; rename the others."
            )


def usual_captions(names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that match the first pattern of CAPTION_NAMES with any match."""
    listed = list(names)
    found = (tuple(name for name in listed if usual.fullmatch(name)) for usual in _CAPTIONS)
    return next(filter(None, found), ())


def find_image(names: Iterable[str], config: SourceConfig) -> str:
    """The column of images: the configured one, else the first one with a usual name; empty if there is none."""
    listed = list(names)
    if config.image:
        return config.image if config.image in listed else ""
    lower = {name.lower(): name for name in reversed(listed)}
    return next((lower[name] for name in IMAGE_NAMES if name in lower), "")


def find_captions(names: Iterable[str], config: SourceConfig) -> tuple[str, ...]:
    """The columns of captions: the configured ones, else all with the same usual name ('caption', or 'caption_0', 'caption_1' ...)."""
    listed = list(names)
    if config.captions:
        return tuple(name for name in config.captions if name in listed)
    return usual_captions(listed)
