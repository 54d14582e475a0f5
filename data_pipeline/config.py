"""Sections of the data pipeline: sources, filters, splits, shards and the tokenizer. No torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from infra.config import Section
from infra.config_keys import ANY_TIME, PLACE

MAX_PIXELS = 64_000_000
"""Images with more pixels are never decoded, anywhere: a small file can claim an enormous size."""

LATER = ("name", "roots")
"""Keys of a source that were added later. At their defaults they are left out of the names of parts, so that older parts keep their names."""

ImageFormat = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
ImageKind = Literal["animated", "cmyk", "16-bit", "palette", "greyscale", "transparent", "rotated"]


class SourceConfig(Section):
    """One source of captioned images. A plain string in its place is taken for the url."""

    url: str = Field(json_schema_extra=PLACE)
    """'emoji' (drawings embedded in packages), or the path or s3:// URL of a folder, a file, or a pattern (*, ?, [...]; ** for any depth)."""
    kind: Literal["", "emoji", "folder", "table", "parquet", "arrow", "coco", "webdataset"] = ""
    """How it is read; empty: recognised by the names of its files."""
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$")
    """Prefix of the ids of its records. Empty: the first source without a name has no prefix, each further one a number. Name sources that you may later
    remove or reorder."""
    roots: tuple[str, ...] = Field(default=(), json_schema_extra=PLACE)
    """Further folders or s3:// prefixes that links and image paths may lead to; images elsewhere are dropped as 'outside the source'."""
    weight: float = Field(default=1.0, gt=0)
    """How often each record is used in an epoch; 0.5: half of the records in each epoch, in turn."""
    split: Literal["", "train", "validation", "hash"] = ""
    """Split of all records; empty: the one that a record names, else by the hash of its group; 'hash': by the hash, whatever records and file names say."""
    image: str = ""
    """Column, key or tar extension of the image (its bytes or its path); empty: the usual names are tried."""
    captions: tuple[str, ...] = ()
    """Columns, keys or tar extensions of the captions; empty: the usual names are tried."""
    license: str = ""
    """Licence of records that name none."""

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"url": given}
        # After a validator in mode "before", pydantic no longer treats the value as JSON, and then a strict tuple does not accept a list.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.url.strip():
            raise ValueError("an entry is empty; accepted are 'emoji' and the path or s3:// URL of a folder, a file or a pattern")
        if (self.kind == "emoji") != (self.url == "emoji") and (self.kind or self.url != "emoji"):
            raise ValueError(
                f"kind = '{self.kind}' does not fit url = '{self.url}'; the drawings are url = 'emoji', for a folder of that name write ./emoji"
            )
        return self

    def at_default(self) -> set[str]:
        """Keys of ``LATER`` at their default, which are left out of the names of parts."""
        return {key for key in LATER if getattr(self, key) == type(self).model_fields[key].default}

    @property
    def is_emoji(self) -> bool:
        """Whether it stands for the drawings embedded in packages."""
        return self.url == "emoji"


class DataConfig(Section):
    """Where captioned images come from, and where shard sets are."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(url="emoji"),)
    """Sources of captioned images: URLs, or tables with the keys of a source (url, kind, name, roots, weight, split, image, captions, license). A single one
    needs no brackets."""
    images: str = Field(default="", json_schema_extra={**ANY_TIME, **PLACE})
    """URL of the image shard sets; empty: images/ in the run folder."""
    tokenizer: str = Field(default="", json_schema_extra={**ANY_TIME, **PLACE})
    """URL of the tokenizer; empty: tokenizer/ in the run folder."""
    codes: str = Field(default="", json_schema_extra={**ANY_TIME, **PLACE})
    """URL of the code shard sets; empty: codes/ in the run folder."""
    render_size: int = Field(default=384, gt=0)
    """Side in pixels at which vector drawings are rendered. The paper's augmentation needs 12/8 of dvae.image_size."""
    min_side: int = Field(default=0, ge=0)
    """Images with a shorter side below this many pixels are dropped; 0: dvae.image_size."""
    validation_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of groups (concepts) held out for validation, by a stable hash of the group key."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of groups that is used, chosen by a stable hash."""
    takedown: str = Field(default="", json_schema_extra={**ANY_TIME, **PLACE})
    """URL of a take-down list: ids, one a line, of records that may no longer be shown or trained on; empty: none."""
    records_per_part: int = Field(default=1024, gt=0)
    """Records of one input shard (the unit of work) in sources that are not divided into files (folders, drawings)."""
    shard_bytes: int = Field(default=1 << 26, gt=0)
    """Size limit of one MDS shard file in bytes."""
    max_tries: int = Field(default=3, gt=0)
    """How often reading an input shard is tried before it is quarantined and the stage continues without it."""
    max_quarantined: int = Field(default=10, ge=0)
    """How many quarantined input shards are tolerated; more end the stage with exit code 65."""
    workers: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Processes of each rank that prepare batches; 0: the rank prepares them itself, between its steps."""
    prefetch: int = Field(default=2, gt=0, json_schema_extra=ANY_TIME)
    """Batches that each of these processes prepares ahead. They wait in shared memory (/dev/shm)."""
    cache_bytes: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Limit in bytes, on each node, of a loader's local cache of remote shards; 0: no limit."""
    shuffle_block: int = Field(default=1 << 18, gt=0)
    """Least number of samples that are shuffled among each other within an epoch. A node caches the shards of about two such blocks."""
    decode: Literal["exact", "fast"] = "exact"
    """How JPEG files are decoded for training. 'exact': as in the paper. 'fast': if a picture is then shrunk by 1.25 or more, halved chroma is repeated instead
    of interpolated (47 dB or better on ordinary photographs, less on tiny ones with glaring colours; a tenth faster)."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_source(cls, given: Any) -> Any:
        # As in SourceConfig._from_url: after this validator a strict tuple no longer accepts a list.
        return (given,) if isinstance(given, (str, dict)) else tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        if not self.sources:
            raise ValueError("sources is empty: name at least one, for example 'emoji'")
        names = [source.name for source in self.sources if source.name]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources are called {max(names, key=names.count)!r}; names come before the ids of records: give each its own")
        urls = [source.url for source in self.sources]
        if len(set(urls)) != len(urls):
            raise ValueError(f"sources names {max(urls, key=urls.count)!r} twice; raise its weight instead")
        return self


class FilterConfig(Section):
    """Which records are dropped, and why (paper, appendix C; Sharma et al. 2018). The defaults suit photographs from the web; drawings with short names need
    milder ones."""

    min_words: int = Field(default=3, ge=0)
    """Captions with fewer words are 'caption too short'; 0: off. Captions without any visible character are always dropped."""
    max_characters: int = Field(default=1000, ge=0)
    """Captions with more characters are 'caption too long'; 0: off."""
    broken_text: bool = True
    """Drop captions with control characters, U+FFFD, HTML tags or HTML entities. Captions with lone surrogates are always dropped: they cannot be stored."""
    english: bool = True
    """Drop captions that are identified as another language than English; captions too short to judge are kept. Ignored if 'languages' is set."""
    languages: tuple[LanguageCode, ...] = ()
    """Languages of captions to keep, as ISO 639-1 codes such as "ru", "zh", "ar"; empty: English only, or any language if english = false."""
    boilerplate: bool = True
    """Drop captions that are mostly dates, file names, camera defaults and stock phrases such as 'photographed on'."""
    max_repetition: float = Field(default=0.6, gt=0, le=1)
    """Captions in which more than this share of the words are repetitions of an earlier word are dropped; 1: off."""
    max_capitals: float = Field(default=1.0, gt=0, le=1)
    """Captions with more than this share of capitalised words are dropped (Sharma et al.); 1: off."""
    blocked_words: str = Field(default="", json_schema_extra=PLACE)
    """URL of a text file with one word or phrase a line ('#' begins a comment): captions that contain one are dropped; empty: off."""
    formats: tuple[ImageFormat, ...] = ("jpeg", "png", "webp", "gif", "bmp")
    """Image formats that are accepted; "tiff" may be added, and ["jpeg"] is what Sharma et al. use."""
    refuse: tuple[ImageKind, ...] = ("animated",)
    """Kinds of images that are dropped, each with a reason of its own; []: none. Kinds that are not refused are converted: first frame, 8 bits, RGB, on white,
    upright."""
    max_aspect: float = Field(default=2.0, ge=0)
    """Images whose longer side is more than this multiple of the shorter one are dropped; 0: off. The smallest side is data.min_side."""
    max_pixels: int = Field(default=25_000_000, gt=0, le=MAX_PIXELS)
    """Images that claim more pixels (WebP: half as many) are dropped as a 'decompression bomb' without being decoded. Decoding takes up to 10 bytes a pixel."""
    max_image_bytes: int = Field(default=1 << 23, ge=0)
    """Larger image files are encoded again (as JPEG of quality 95, or PNG if they were lossless) and shrunk until they fit; 0: never."""
    max_side: int = Field(default=0, ge=0)
    """Images with a longer side above this are shrunk to it, but never below data.min_side, and encoded again; 0: never."""
    duplicates: bool = True
    """Drop records that repeat the image file and the captions of an earlier one."""
    near_duplicate_bits: int = Field(default=4, ge=-1, le=7)
    """Drop records whose image differs from an earlier one in at most this many of the 64 bits of the perceptual hash; -1: off."""
    validation_overlap: bool = True
    """Drop training records whose image is a near-duplicate of an image in the validation split (with near_duplicate_bits = -1: has the same hash)."""

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        if not self.formats:
            raise ValueError("formats is empty: no image would be accepted; name at least one, for example 'jpeg'")
        if 0 < self.max_aspect < 1:
            raise ValueError(f"max_aspect = {self.max_aspect}: longer over shorter side, expected at least 1, or 0 for off")
        return self


class TokenizerConfig(Section):
    """Byte-pair encoding of captions (paper B.2)."""

    vocab: int = Field(default=16384, ge=300, le=1 << 24)
    """Size of the vocabulary: padding, unknown, 256 bytes, characters and merges."""
    letters: Literal["a-z", "unicode"] = "a-z"
    """Which characters count as letters, whose runs are merged: a to z, as the paper's author describes it, or the letters and marks of all scripts, which
    captions in other languages need. Any other character is a token by itself if it is frequent, else it is spelled as bytes."""
    max_tokens: int = Field(default=256, gt=0, le=1 << 16)
    """Text positions; longer captions are truncated and counted."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """BPE dropout, in training only."""
