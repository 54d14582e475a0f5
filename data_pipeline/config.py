"""Sections of the data pipeline: sources, splits, shards and the tokenizer. No torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Section


class DataConfig(Section):
    """Where captioned images come from, and where shard sets lie."""

    sources: tuple[str, ...] = ("emoji",)
    """'emoji' (drawings embedded in packages), or folders of images with same-named .txt files, local or s3://."""
    images: str = ""
    """URL of the image shard sets; empty: images/ in the run folder."""
    tokenizer: str = ""
    """URL of the tokenizer; empty: tokenizer/ in the run folder."""
    codes: str = ""
    """URL of the code shard sets; empty: codes/ in the run folder."""
    render_size: int = Field(default=384, gt=0)
    """Side in pixels at which vector drawings are rendered. The paper's augmentation wants 12/8 of dvae.image_size."""
    min_side: int = Field(default=0, ge=0)
    """Images with a shorter side below this many pixels are dropped; 0: dvae.image_size."""
    validation_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of groups (concepts) held out for validation, by a stable hash of the group key."""
    max_groups: int = Field(default=0, ge=0)
    """Use only this many groups (the first by stable hash); 0: all."""
    records_per_part: int = Field(default=1024, gt=0)
    """Records of one input part: the unit of work, restart and exactly-once."""
    shard_bytes: int = Field(default=1 << 26, gt=0)
    """Size limit of one MDS shard file in bytes."""
    decode: Literal["exact", "fast"] = "exact"
    """How JPEG files are decoded for training: 'exact' as the paper; 'fast' repeats halved chroma instead of interpolating it where the picture is
    then shrunk by 1.25 or more (47 dB or better on ordinary photographs, less on tiny ones of glaring colours; a tenth faster)."""

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        if not self.sources:
            raise ValueError("sources is empty: name at least one, for example 'emoji'")
        return self


class TokenizerConfig(Section):
    """Byte-pair encoding of captions (paper B.2)."""

    vocab: int = Field(default=16384, ge=300)
    """Size of the vocabulary: padding, unknown, 256 bytes, characters and merges."""
    max_tokens: int = Field(default=256, gt=0)
    """Text positions; longer captions are truncated and counted."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """BPE dropout, in training only."""
