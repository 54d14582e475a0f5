"""From a pair to a record worth storing, or to the reason why it is dropped (paper, appendix C; Sharma et al. 2018).

Captions are judged one by one: those that fail are left out, and the record goes when none is left. Then the image is judged by its header, and
decoded last. Each filter is a pure function with a fixed reason, on or off by ``FilterConfig``. Duplicates are not judged here: they need the other
records, and are found by the two hashes of ``Accepted``.
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
"""Characters of ``Dropped.example``."""

_VERSION = 1  # version of the filters' behaviour: raising it makes every record be judged again


@dataclass(frozen=True)
class Accepted:
    """A pair to store."""

    pair: Pair
    """Its captions are those that passed."""
    width: int
    """Of ``image`` in pixels, as it is shown (upright)."""
    height: int
    content_hash: int
    """Unsigned 64 bits of the image file as found and the captions that passed: equal for exact duplicates."""
    perceptual_hash: int
    """Unsigned 64 bits; few of them differ between near-duplicates (perceptual.py)."""
    image: bytes = field(repr=False)
    """The image file as found, or encoded again where it is larger than the limits."""
    dropped_captions: Counter[str] = field(default_factory=Counter)
    """Reason -> number of captions left out."""


@dataclass(frozen=True)
class Dropped:
    """A pair that is not stored."""

    reason: str
    """Short and fixed."""
    example: str
    """What failed, in at most ``EXAMPLE_LENGTH`` printable characters: the caption, the size, the decoder's complaint."""
    dropped_captions: Counter[str] = field(default_factory=Counter)
    """Reason -> number of captions that failed."""


@dataclass(frozen=True)
class Header:
    """What is known of an image before it is decoded."""

    width: int
    height: int
    format: str
    """One of config.ImageFormat."""
    kinds: frozenset[str]
    """Some of config.ImageKind."""
    min_side: int
    """data.min_side: what training needs."""


def fingerprint(config: FilterConfig) -> str:
    """Everything that judging depends on besides the pair and ``min_side``: the settings, the word list's content, this code, its libraries.

    Raises:
        DataError: the list of blocked words cannot be read.
    """
    words = sorted(map(sorted, blocked_words(config.blocked_words))) if config.blocked_words else []
    parts = [_VERSION, config.model_dump_json(), words, identifier() if config.english or config.languages else "", f"pillow {version('pillow')}"]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def image_format(header: Header, config: FilterConfig) -> str | None:
    """Not one of ``formats``."""
    return None if header.format in config.formats else "image format"


def refused_kind(header: Header, config: FilterConfig) -> str | None:
    """One of ``refuse``."""
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
    """Run all filters on one pair. Never raises on what a pair holds.

    Args:
        pair: from a source.
        config: the section.
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
        # An MPO of a phone is a JPEG with previews behind it.
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
        del image, file  # memory, should the image be decoded once more
        stored, (width, height) = shrink(pair.image, (header.width, header.height), form, config, min_side)
    except BombError as error:
        return Dropped("decompression bomb", printable(str(error)), counts)
    except DataError as error:
        return Dropped("undecodable image", printable(str(error)), counts)
    return Accepted(replace(pair, image=stored), width, height, content_hash(pair), prints, stored, counts)


def content_hash(pair: Pair) -> int:
    """Unsigned 64 bits of the image file and the captions. No two lists of captions run into each other."""
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
