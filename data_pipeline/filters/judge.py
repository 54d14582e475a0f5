"""Turns a pair into a record to store, or into the reason why it is dropped (paper, appendix C; Sharma et al. 2018).

Captions are judged one by one: those that fail are left out, and a record without any caption left is dropped. Then the image is judged by its header, and
decoded last. Each filter is a pure function with a fixed reason, and is switched by ``FilterConfig``. Duplicates are not found here, because that takes all
records; they are found later, from the two hashes of ``Accepted``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version

from data_pipeline.config import FilterConfig
from data_pipeline.filters.captions import blocked_words, caption_reason
from data_pipeline.filters.language import identifier
from data_pipeline.filters.perceptual_hash import DECODE_SIDE, perceptual_hash
from data_pipeline.filters.shrink import shrink
from data_pipeline.images.files import BombError, is_invisible, is_transparent, kinds, load_file, open_file, shown_size, to_grey
from data_pipeline.sources.pairs import Pair
from infra import shown
from infra.errors import DataError

EXAMPLE_LENGTH = 200
"""Most characters of ``Dropped.example``."""

_VERSION = 1  # version of the filters' behaviour: raise it to have every record judged again


@dataclass(frozen=True)
class Accepted:
    """A pair to store."""

    pair: Pair
    """The pair, with only those captions that passed."""
    width: int
    """Width of ``image`` in pixels when it is shown upright."""
    height: int
    content_hash: int
    """64-bit hash of the original image file and the captions that passed: equal for exact duplicates."""
    perceptual_hash: int
    """64-bit hash that differs in few bits between near-duplicates (``perceptual_hash.py``)."""
    image: bytes = field(repr=False)
    """The original image file, or a new encoding if that exceeds the limits."""
    dropped_captions: Counter[str] = field(default_factory=Counter)
    """Reason -> number of captions left out."""


@dataclass(frozen=True)
class Dropped:
    """A pair that is not stored."""

    reason: str
    """One of a fixed set of short texts."""
    example: str
    """What failed, in at most ``EXAMPLE_LENGTH`` printable characters: the caption, the size, or the decoder's message."""
    dropped_captions: Counter[str] = field(default_factory=Counter)
    """Reason -> number of captions that failed."""


@dataclass(frozen=True)
class Header:
    """What is known about an image before it is decoded."""

    width: int
    height: int
    format: str
    """One of config.ImageFormat."""
    kinds: frozenset[str]
    """Some of config.ImageKind."""
    min_side: int
    """data.min_side, the shorter side that training needs."""


def fingerprint(config: FilterConfig) -> str:
    """A hash of everything that the judgement depends on besides the pair and ``min_side``: settings, the content of the word list, this code, its libraries.

    Raises:
        DataError: the list of blocked words cannot be read.
    """
    words = sorted(map(sorted, blocked_words(config.blocked_words))) if config.blocked_words else []
    parts = [_VERSION, config.model_dump_json(), words, identifier() if config.english or config.languages else "", f"pillow {version('pillow')}"]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def image_format(header: Header, config: FilterConfig) -> str | None:
    """Its format is not among ``formats``."""
    return None if header.format in config.formats else "image format"


def refused_kind(header: Header, config: FilterConfig) -> str | None:
    """It is of a kind that ``refuse`` names."""
    return next((f"{kind} image" for kind in config.refuse if kind in header.kinds), None)


def too_small(header: Header, config: FilterConfig) -> str | None:
    """The shorter side has fewer than ``min_side`` pixels."""
    return "image too small" if min(header.width, header.height) < header.min_side else None


def aspect_ratio(header: Header, config: FilterConfig) -> str | None:
    """The longer side is more than ``max_aspect`` times the shorter one."""
    limit = config.max_aspect
    return "aspect ratio" if limit and max(header.width, header.height) > limit * min(header.width, header.height) else None


HEADER_FILTERS: tuple[Callable[[Header, FilterConfig], str | None], ...] = (image_format, too_small, aspect_ratio, refused_kind)


def judge(pair: Pair, config: FilterConfig, min_side: int) -> Accepted | Dropped:
    """Run all filters on one pair. Nothing that a pair contains raises an error.

    Args:
        pair: a pair from a source.
        config: the section ``filters``.
        min_side: smallest shorter side of an image in pixels.

    Raises:
        DataError: the list of blocked words cannot be read.
    """
    broken = next((text for text in (pair.id, pair.source, pair.license, pair.group) if not _storable(text)), None)
    if broken is not None:
        return Dropped("broken metadata", printable(broken))
    captions, failed, counts = [], [], Counter[str]()
    for caption in pair.captions:
        reason = caption_reason(caption, config)
        if reason is None:
            captions.append(caption)
        else:
            failed.append((reason, caption))
            counts[reason] += 1
    if not captions:
        reason, caption = failed[0] if failed else ("empty caption", "")
        return Dropped(reason, printable(caption), counts)
    return _judge_image(replace(pair, captions=tuple(captions)), config, min_side, counts)


def _judge_image(pair: Pair, config: FilterConfig, min_side: int, counts: Counter[str]) -> Accepted | Dropped:
    """Judge the image of a pair whose captions passed."""
    try:
        file = open_file(pair.image, config.max_pixels)
        # An MPO, which phones write, is a JPEG with previews after it.
        form = "jpeg" if file.format == "MPO" else str(file.format).lower()
        header = Header(*shown_size(file), form, frozenset(kinds(file, pair.image)), min_side)
        for check in HEADER_FILTERS:
            reason = check(header, config)
            if reason is not None:
                return Dropped(reason, _describe(header), counts)
        image = load_file(file, DECODE_SIDE)
        if "transparent" in config.refuse and is_transparent(image):
            return Dropped("transparent image", _describe(header), counts)
        if is_invisible(image):
            return Dropped("invisible image", _describe(header), counts)
        prints = perceptual_hash(to_grey(image), pair.image)
        del image, file  # free memory before the image may be decoded again
        stored, (width, height) = shrink(pair.image, (header.width, header.height), form, config, min_side)
    except BombError as error:
        return Dropped("decompression bomb", printable(str(error)), counts)
    except DataError as error:
        return Dropped("undecodable image", printable(str(error)), counts)
    return Accepted(replace(pair, image=stored), width, height, content_hash(pair), prints, stored, counts)


def content_hash(pair: Pair) -> int:
    """64-bit hash of the image file and the captions. Each caption is hashed with its length, so that different lists of captions give different input."""
    digest = hashlib.blake2b(pair.image, digest_size=8)
    for caption in pair.captions:
        text = caption.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def printable(text: str) -> str:
    """Any text as one line of at most ``EXAMPLE_LENGTH`` printable characters."""
    return shown.printable(" ".join(text[: 4 * EXAMPLE_LENGTH].split()), EXAMPLE_LENGTH)


def _describe(header: Header) -> str:
    return f"{header.width} x {header.height} {header.format}" + "".join(f", {kind}" for kind in sorted(header.kinds))


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
