import hashlib
from collections import Counter
from dataclasses import dataclass, field

from data_pipeline.images import decode
from infra.errors import DataError


@dataclass
class Accepted:
    pair: object
    width: int
    height: int
    content_hash: int
    perceptual_hash: int
    image: bytes
    dropped_captions: Counter = field(default_factory=Counter)


@dataclass
class Dropped:
    reason: str
    example: str
    dropped_captions: Counter = field(default_factory=Counter)


def judge(pair, config, min_side):
    if not any(c.strip() for c in pair.captions):
        return Dropped("empty caption", "")
    try:
        p = decode(pair.image)
    except DataError as e:
        return Dropped("undecodable image", str(e))
    h, w = p.shape[:2]
    if min(h, w) < min_side:
        return Dropped("image too small", f"{w} x {h}")
    if max(h, w) > 2 * min(h, w):
        return Dropped("aspect ratio", f"{w} x {h}")
    c = int.from_bytes(hashlib.blake2b(pair.image + repr(pair.captions).encode(), digest_size=8).digest(), "little")
    return Accepted(pair, w, h, c, int(p.mean()), pair.image)
