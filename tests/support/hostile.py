"""A seeded generator of hostile image files and captions: what a crawl of the web brings, and worse."""

from __future__ import annotations

import gzip
import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin


def picture(rng: np.random.Generator, width: int = 96, height: int = 80, mode: str = "RGB") -> Image.Image:
    """A smooth random picture."""
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, bits: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    """A PNG file with any header and any compressed data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_of_many_scans(rng: np.random.Generator, scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encode(picture(rng, 256, 256), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * scans + b"\xff\xd9"


def with_orientation(image: Image.Image, orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, form, exif=exif)


def _zeros(size: int) -> bytes:
    """Zeros, a thousandfold compressed."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


def _bombs(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    yield "png bomb of 10 gigapixels", png(100_000, 100_000, _zeros(64 << 20))
    yield "png of the largest size", png(2**31 - 1, 2**31 - 1, b"")
    yield "png just below the limit", encode(Image.new("RGB", (5000, 4999), (1, 200, 30)))
    yield "png with alpha just below the limit", encode(Image.new("RGBA", (5000, 4999), (1, 200, 30, 90)))
    yield "16-bit png just below the limit", encode(Image.new("I;16", (5000, 4999), 700))
    yield "webp just below its limit", encode(Image.new("RGB", (3535, 3535), (1, 200, 30)), "WEBP", lossless=True, method=0)
    yield (
        "animated webp just below its limit",
        encode(
            Image.new("RGB", (3535, 3535), (1, 200, 30)),
            "WEBP",
            lossless=True,
            method=0,
            save_all=True,
            append_images=[Image.new("RGB", (3535, 3535))],
        ),
    )
    yield "webp above its limit", encode(Image.new("RGB", (5000, 4999), (1, 200, 30)), "WEBP", lossless=True, method=0)
    yield "progressive jpeg just below the limit", encode(Image.new("RGB", (5000, 4999), (1, 2, 3)), "JPEG", progressive=True, subsampling=0)
    yield "jpeg just below the limit", encode(Image.new("RGB", (5000, 4999), (1, 2, 3)), "JPEG")
    yield "cmyk jpeg just below the limit", encode(Image.new("CMYK", (5000, 4999), (1, 2, 3, 4)), "JPEG")
    yield "tiff just below the limit", encode(Image.new("RGB", (5000, 4999), (1, 2, 3)), "TIFF", compression="tiff_adobe_deflate")
    yield "gif just below the limit", encode(Image.new("P", (5000, 4999), 1), "GIF")
    yield "rotated png just below the limit", with_orientation(Image.new("RGB", (5000, 4999), (9, 2, 3)), 6, "PNG")
    yield "jpeg of a thousand scans", jpeg_of_many_scans(rng, 1000)
    yield "png with a text of 100 MB", png(64, 64, zlib.compress(bytes(64 * 193)), extra=chunk(b"zTXt", b"Comment\0\0" + _zeros(100 << 20)))
    yield "png with a profile of 100 MB", png(64, 64, zlib.compress(bytes(64 * 193)), extra=chunk(b"iCCP", b"p\0\0" + _zeros(100 << 20)))
    yield "png with more pixels than its header says", png(64, 64, _zeros(64 << 20))
    yield "gif of 65535 x 65535", b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    yield "gif of 20000 frames", encode(Image.new("P", (64, 64), 1), "GIF")[:-1] + _gif_frame() * 20_000 + b";"
    yield "gif whose frame exceeds its screen", b"GIF89a\x40\0\x40\0\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    yield "webp that claims 16383 x 16383", _webp_claiming(16383)
    yield "bmp that claims 60000 x 60000", _bmp_claiming(60_000)
    yield "tiff that claims 100000 x 100000", _tiff_claiming(100_000)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(20 << 20))
    yield "zip bomb", archive.getvalue()
    yield "gzip bomb", gzip.compress(bytes(20 << 20))


def _gif_frame() -> bytes:
    return b",\0\0\0\0\x40\0\x40\0\0\x02\x02D\x01\0"


def _webp_claiming(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little") * 2
    body = (
        b"WEBPVP8X"
        + struct.pack("<I", 10)
        + bytes([2, 0, 0, 0])
        + size
        + b"ANIM"
        + struct.pack("<I", 6)
        + bytes(6)
        + b"ANMF"
        + struct.pack("<I", 16)
        + bytes(16)
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _bmp_claiming(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


def _tiff_claiming(side: int) -> bytes:
    tags = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, side),
        (279, 4, 1, 100),
    ]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


def _shapes(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    yield "1 x 100000", encode(Image.new("RGB", (1, 65_000)), "PNG")
    yield "100000 x 1", encode(Image.new("RGB", (100_000, 1)), "PNG")
    yield "1 x 1", encode(Image.new("RGB", (1, 1)), "GIF")
    yield "no pixels", png(0, 0, zlib.compress(b""))
    yield "one colour", encode(Image.new("RGB", (96, 96), (7, 7, 7)))


def _kinds(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    image = picture(rng)
    for mode, form in [
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGBA", "WEBP"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ]:
        yield f"{mode} as {form}", encode(image.convert(mode) if mode != "LAB" else Image.new("LAB", (64, 64), (9, 9, 9)), form)
    yield "16-bit grey", encode(Image.fromarray(rng.integers(0, 2**16, (70, 80), dtype=np.uint16)))
    yield "16-bit colour", png(64, 64, zlib.compress(rng.integers(0, 256, 64 * (1 + 64 * 6), dtype=np.uint8).tobytes()), bits=16)
    yield "32-bit float", encode(Image.fromarray(rng.random((64, 64), dtype=np.float32)), "TIFF")
    yield "32-bit integer", encode(Image.fromarray(rng.integers(0, 2**31, (64, 64), dtype=np.int32)), "TIFF")
    frames = [picture(rng, 64, 64) for _ in range(3)]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        yield f"animated {form}", encode(frames[0], form, save_all=True, append_images=frames[1:])
    for turn in range(10):
        yield f"orientation {turn}", with_orientation(image, turn)


def _garbage_metadata(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    image = picture(rng)
    for size in (1, 10, 1000, 60_000):
        noise = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        yield f"exif of {size} random bytes", encode(image, "JPEG", exif=b"Exif\0\0MM\0*" + noise)
        yield f"profile of {size} random bytes", encode(image, "JPEG", icc_profile=noise)
        yield f"png profile of {size} random bytes", encode(image, "PNG", icc_profile=noise)
        yield f"png exif of {size} random bytes", encode(image, "PNG", exif=b"II*\0\x08\0\0\0" + noise)
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n  9\nzz")
    yield "exif in a text that is no hexadecimal", encode(image, "PNG", pnginfo=info)
    yield "exif that points at itself", encode(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0")
    loop = bytearray(encode(image, "TIFF"))
    yield "tiff whose pages form a loop", bytes(loop[:-4]) + struct.pack("<I", 8)


def _not_images(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "one NUL", b"\0"
    yield "NULs", bytes(5000)
    yield "HTML", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"><image href="file:///etc/passwd"/></svg>'
    yield "JSON", b'{"error": "gone"}'
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(/etc/passwd) (r) file\n%%EOF"
    yield "PDF", b"%PDF-1.4\n%%EOF"
    yield "PPM", b"P6 64 64 255\n" + bytes(64 * 64 * 3)
    yield "random bytes", rng.integers(0, 256, 3000, dtype=np.uint8).tobytes()
    for magic in (
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"RIFF\0\0\0\0WEBPVP8X",
        b"RIFF\0\0\0\0WEBPVP8L",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"MM\0+",
    ):
        yield f"{magic!r} and nothing", magic
        yield f"{magic!r} and noise", magic + rng.integers(0, 256, 500, dtype=np.uint8).tobytes()


def _damaged(rng: np.random.Generator, count: int) -> Iterator[tuple[str, bytes]]:
    forms: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
    ]
    for number in range(count):
        form, options = forms[number % len(forms)]
        data = bytearray(encode(picture(rng), form, **options))
        if number % 3 == 0:
            yield f"{number}: {form} truncated", bytes(data[: rng.integers(1, len(data))])
            continue
        near = len(data) if number % 3 == 1 else min(len(data), 64)  # anywhere, or in the header
        for place in rng.integers(0, near, 1 + number % 7):
            data[place] ^= 1 << int(rng.integers(0, 8))
        yield f"{number}: {form} with flipped bits", bytes(data)


def hostile_images(seed: int, damaged: int) -> Iterator[tuple[str, bytes]]:
    """(what it is, file) of every kind above, made one at a time."""
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in (_not_images, _shapes, _kinds, _garbage_metadata, _bombs):
            yield from kind(rng)
        yield from _damaged(rng, damaged)


def hostile_captions(seed: int, random: int) -> Iterator[tuple[str, str]]:
    """(what it is, caption)."""
    rng = np.random.default_rng(seed)
    plain = "a brown dog runs across the green field"
    yield "empty", ""
    yield "spaces", " \t\n\u00a0\u3000"
    yield "invisible", "\u200b\u200d\ufeff\u2060\u00ad"
    yield "NUL", "a dog\0 runs across the field"
    yield "only NULs", "\0" * 50
    yield "lone surrogate", plain + " \ud83d"
    yield "reversed surrogates", "\udc00\ud800 " + plain
    yield "escape sequences", "\x1b[31ma red dog runs\x1b[0m across"
    yield "bidirectional overrides", "\u202ea dog runs across the field\u202c and \u2066home\u2069"
    yield "emoji", "a dog \U0001f415\u200d\U0001f9ba runs with a \U0001f3f3\ufe0f\u200d\U0001f308 flag"
    yield "only emoji", "\U0001f415" * 30
    yield "combining marks", "z" + "\u0301" * 5000 + " a\u0300 dog"
    yield "HTML entities", "a dog &amp; a cat &lt;b&gt;run&lt;/b&gt; &#x41;"
    yield "HTML tags", "<p>a dog <script>alert(1)</script> runs</p>"
    yield "open tags", "<a" * 5000
    yield "lost characters", "a caf\ufffd in the old town of Li\ufffdge"
    yield "non-characters", "a dog \ufdd0 runs \uffff across \U0010ffff fields"
    yield "private use", "a dog \ue000 runs \U000f0000 home again"
    yield "title case digits", "１２３ ａ ｄｏｇ ｒｕｎｓ"
    yield "format strings", "%s%n {0.__class__} ${jndi:ldap://x} '; DROP TABLE pairs; --"
    for name, unit in [
        ("words", "dog runs "),
        ("a", "a"),
        ("spaces", " "),
        ("digits", "1"),
        ("dots", "a."),
        ("underscores", "a_1"),
        ("dates", "12/"),
        ("months", "may "),
        ("clicks", "click to "),
        ("amps", "&a"),
        ("Chinese", "狗"),
        ("emoji", "\U0001f415"),
        ("NUL", "\0"),
    ]:
        yield f"1 MB of {name}", unit * (1_000_000 // len(unit.encode()))
    for number in range(random):
        codes = [rng.choice([rng.integers(0, 128), rng.integers(0, 0x3000), rng.integers(0, 0x110000)]) for _ in range(int(rng.integers(1, 80)))]
        yield f"random {number}", "".join(chr(int(code)) for code in codes)
