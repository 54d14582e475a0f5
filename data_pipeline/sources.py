"""From a configured source to handles, and from handles to input parts."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.config import DataConfig
from data_pipeline.folder_source import FolderSource
from data_pipeline.pairs import Source
from infra.errors import ConfigError


def open_source(spec: str, config: DataConfig) -> Source:
    """The source that one entry of ``data.sources`` names: 'emoji', or the path or s3:// URL of a folder.

    Raises:
        ConfigError: the entry is empty.
    """
    if not spec.strip():
        raise ConfigError("data.sources: an entry is empty; accepted are 'emoji' and the path or s3:// URL of a folder.")
    if spec == "emoji":
        from data_pipeline.emoji_source import EmojiSource  # its packages are needed by this source only

        return EmojiSource(config.render_size)
    return FolderSource(spec)


@dataclass(frozen=True)
class InputPart:
    """One unit of work: consecutive handles of one source."""

    index: int
    source: int
    """Position in ``data.sources``."""
    keys: tuple[str, ...]


def input_parts(handles: list[list[str]], records_per_part: int) -> list[InputPart]:
    """Cut the handles of every source into parts of at most ``records_per_part``. No part crosses sources, so appending one moves nothing."""
    parts: list[InputPart] = []
    for source, keys in enumerate(handles):
        for start in range(0, len(keys), records_per_part):
            parts.append(InputPart(len(parts), source, tuple(keys[start : start + records_per_part])))
    return parts
