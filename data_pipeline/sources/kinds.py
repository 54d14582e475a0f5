"""The kinds of sources. The entry of a kind says how it is opened, by which file names it is recognised, and what messages and docs call it.

To add a kind: an entry here, its module, its name in ``SourceConfig.kind``, and a block in docs/data.md (docs/architecture.md, "To add a source").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources import coco, folder, table, webdataset
from data_pipeline.sources.pairs import Source
from data_pipeline.sources.rows_to_pairs import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Kind:
    """One kind of source."""

    name: str
    """As in ``SourceConfig.kind``."""
    opener: Callable[[SourceConfig, DataConfig], Source]
    suffixes: tuple[str, ...]
    """A URL with such a suffix, or a folder with such a file, is of this kind, unless an earlier kind matches as well."""
    holds: str
    """What the folder or pattern consists of, for messages."""
    unit: str
    """What an input shard of this kind is, for docs/data.md."""
    is_named: Callable[[str], bool] = lambda name: False
    """Whether a file belongs to this kind by its whole name."""

    def shows(self, name: str) -> bool:
        """Whether a file of this name belongs to this kind."""
        return name.lower().endswith(self.suffixes) or self.is_named(name)


def _emoji(config: SourceConfig, data: DataConfig) -> Source:
    from data_pipeline.sources.drawings import EmojiSource  # imported here, because only this source needs its packages

    return EmojiSource(data.render_size, data.records_per_part, "" if config.split == "hash" else config.split)


def _parquet(config: SourceConfig, data: DataConfig) -> Source:
    from data_pipeline.sources.parquet import ParquetSource  # imported here, because pyarrow takes a second to import

    return ParquetSource(config, data.records_per_part)


def _arrow(config: SourceConfig, data: DataConfig) -> Source:
    from data_pipeline.sources.arrow import ArrowSource  # as above

    return ArrowSource(config)


KINDS = (
    Kind("webdataset", lambda config, data: webdataset.WebDatasetSource(config), webdataset.SUFFIXES, "WebDataset .tar files", "a tar"),
    Kind("parquet", _parquet, (".parquet",), ".parquet files", "a range of row groups"),
    Kind("arrow", _arrow, (".arrow", ".feather"), "Arrow files of save_to_disk", "a file"),
    Kind(
        "coco",
        lambda config, data: coco.CocoSource(config, data.records_per_part),
        (),
        "COCO's captions_*.json and images",
        "`data.records_per_part` images",
        coco.is_captions,
    ),
    Kind(
        "table",
        lambda config, data: table.TableSource(config, data.records_per_part),
        table.SUFFIXES,
        f"tables ({', '.join(table.PLAIN)}, also as .gz, and captions.txt)",
        "a range of bytes",
        table.is_table,
    ),
    Kind(
        "folder",
        lambda config, data: folder.FolderSource(config, data.records_per_part),
        IMAGE_SUFFIXES,
        "images with same-named .txt or .json files",
        "`data.records_per_part` names",
    ),
    Kind("emoji", _emoji, (), "drawings that come with packages ('emoji')", "`data.records_per_part` drawings"),
)
"""In order of precedence when a folder holds files of several kinds: .parquet, .json and .jsonl files beside tars only describe the tars."""

BY_NAME = {kind.name: kind for kind in KINDS}
EMOJI, FOLDER, WEBDATASET = (BY_NAME[name] for name in ("emoji", "folder", "webdataset"))
