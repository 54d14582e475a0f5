"""Opens what stages read of the data: images and the tokenizer. Without torch, whose import would take a stage like the tokenizer's longer than its work."""

from __future__ import annotations

from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ShardSet, open_set
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.run import places


def open_images(cfg: RunConfig, run: RunFolder, split: str) -> ShardSet:
    """The image set of a split, in the version that this run's stage prepare made or found. If others add shards to the set later, this run does not see them.

    Raises:
        DataError: prepare has not finished, or the version does not exist any more.
    """
    version = places.version(run, "prepare", split)
    return open_set(places.image_set(cfg, run, split), IMAGE_SCHEMA, version=version, takedown=cfg.data.takedown)


def open_tokenizer(cfg: RunConfig, run: RunFolder) -> tuple[Tokenizer, str]:
    """The run's tokenizer and its content hash."""
    tokenizer, manifest = load_tokenizer(places.tokenizer(cfg, run), cfg.tokenizer)
    return tokenizer, str(manifest["content_hash"])


def loader_options(data: DataConfig) -> dict[str, Any]:
    """The options of a training stage's loader. Which samples a batch holds depends only on two of them: ``block`` and ``weights``."""
    weights = {source.url: source.weight for source in data.sources}
    return {"workers": data.workers, "prefetch": data.prefetch, "cache_bytes": data.cache_bytes, "block": data.shuffle_block, "weights": weights}
