"""Reads the members of a tar in one pass over a stream without seeking, and tells a damaged archive from a complete one.

Python's tarfile takes a damaged header, zeros in the middle, or a missing end for the end of the archive. Here the end marker must be there, followed by
nothing but the zeros that fill up a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from infra.errors import DataError

BLOCK = 512
_MAX_HEADER_BYTES = 1 << 20  # longest long-name or pax header that is accepted
_FILES = (b"0", b"\0", b"7")
_FOLDER = b"5"
_WITHOUT_DATA = {b"1": "(hard link)", b"2": "(link)", b"3": "(device)", b"4": "(device)", b"6": "(pipe)"}
_UNKNOWN = "(of an unknown kind)"
_SKIPPED_BYTES = 1 << 20
_RECORD = 20 * BLOCK
"""tar fills up an archive with zeros to a multiple of this many bytes, by default."""


class Member(NamedTuple):
    """A member of a tar that is no folder."""

    name: str
    size: int
    content: bytes | None
    """Of a regular file; None if it is larger than the limit, or no regular file."""
    kind: str = ""
    """What it is instead of a regular file: a link, a device, a pipe."""


def members(stream: BinaryIO, origin: str, limit: Callable[[str], int]) -> Iterator[Member]:
    """Each member, in order, but for folders. Old, ustar, GNU and pax archives are read.

    Args:
        stream: the archive; read once, from its start.
        origin: its name, for messages.
        limit: returns, for the name of a member, the most bytes to read; the content of a larger member is None.

    Raises:
        DataError: it is not a tar, is damaged, or truncated (the end marker is missing).
    """
    position, long_name, long_size = 0, "", -1
    while True:
        header = _exactly(stream, BLOCK, origin, position)
        position += BLOCK
        if not header.strip(b"\0"):
            _check_end(stream, origin, position)
            return
        if not _checksum_is_right(header):
            what = "not a tar archive" if position == BLOCK else "damaged"
            raise DataError(f"{origin}: {what}: no header at byte {position - BLOCK}.")
        kind, size = header[156:157], _number(header[124:136], origin, position)
        name = long_name or _name(header)
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _MAX_HEADER_BYTES:
                raise DataError(f"{origin}: damaged: a header of {size} bytes at byte {position - BLOCK}.")
            data = _content(stream, size, origin, position)
            position += _padded(size)
            if kind == b"L":
                long_name = _decode(data.rstrip(b"\0"))
            elif kind == b"x":
                long_name, long_size = _pax(data, long_name, long_size, origin, position)
            continue
        size = long_size if long_size >= 0 else size
        long_name, long_size = "", -1
        if kind == _FOLDER:
            continue
        if kind in _WITHOUT_DATA:
            yield Member(name, 0, None, _WITHOUT_DATA[kind])
            continue
        if kind == b"S":
            raise DataError(f"{origin}: '{name}' is a sparse file of GNU tar, which is not supported; write the archive without --sparse.")
        if kind in _FILES and not name.endswith("/") and size <= limit(name):
            content: bytes | None = _content(stream, size, origin, position)
        else:
            content = None
            _skip(stream, _padded(size), origin, position)
        position += _padded(size)
        if not name.endswith("/"):
            yield Member(name, size, content, "" if kind in _FILES else _UNKNOWN)


def _check_end(stream: BinaryIO, origin: str, position: int) -> None:
    """Check that only zeros follow a block of zeros, and no more of them than needed to fill up the archive.

    A header after zeros may begin a second archive, or follow a hole in this one. No reader can tell these apart, and in both cases records would be lost.
    """
    zeros = BLOCK
    while data := stream.read(_SKIPPED_BYTES):
        if data.strip(b"\0"):
            at = position - BLOCK + zeros + next(number for number, byte in enumerate(data) if byte)
            raise DataError(
                f"{origin}: damaged: zeros from byte {position - BLOCK} on, and more data from byte {at} on: a hole, or tars that were joined by "
                "cat. Fetch it again, or unpack it (tar --ignore-zeros) and pack it again."
            )
        zeros += len(data)
    if zeros > _RECORD + 2 * BLOCK:
        raise DataError(
            f"{origin}: damaged: it ends in {zeros} bytes of zeros from byte {position - BLOCK} on, more than an archive is filled up with: a copy that "
            "broke off. Fetch it again; if it was written with --blocking-factor, pack it again without."
        )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _exactly(stream: BinaryIO, size: int, origin: str, position: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise DataError(f"{origin}: truncated: it ends at byte {position + len(data)}, without the end marker of a tar archive.")
    return data


def _content(stream: BinaryIO, size: int, origin: str, position: int) -> bytes:
    return _exactly(stream, _padded(size), origin, position)[:size]


def _skip(stream: BinaryIO, size: int, origin: str, position: int) -> None:
    while size:
        piece = min(size, _SKIPPED_BYTES)
        _exactly(stream, piece, origin, position)
        size, position = size - piece, position + piece


def _checksum_is_right(header: bytes) -> bool:
    field = header[148:156].strip(b" \0")
    try:
        expected = int(field, 8)
    except ValueError:
        return False
    blanked = header[:148] + b" " * 8 + header[156:]
    # Some old programs add up signed bytes.
    return expected == sum(blanked) or expected == sum(blanked) - 256 * sum(byte > 127 for byte in blanked)


def _number(field: bytes, origin: str, position: int) -> int:
    """A number in octal digits, or in base 256 if the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if digits.isdigit() and not set(digits) & set(b"89"):
        return int(digits, 8)
    raise DataError(f"{origin}: damaged: a size that is not a number at byte {position - BLOCK}.")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _decode(prefix + b"/" + name if prefix else name)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")


def _pax(data: bytes, name: str, size: int, origin: str, position: int) -> tuple[str, int]:
    """Name and size from a pax header ('length key=value' lines); the given ones if it does not set them."""
    at = 0
    while at < len(data):
        digits, space, _ = data[at : at + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        line = data[at + len(digits) + 1 : at + length]
        key, equals, value = line[:-1].partition(b"=")
        if not equals or line[-1:] != b"\n" or at + length > len(data):
            raise DataError(f"{origin}: damaged: a pax header that cannot be read before byte {position}.")
        if key.startswith(b"GNU.sparse."):
            raise DataError(f"{origin}: a sparse file of GNU tar before byte {position}, which is not supported; write the archive without --sparse.")
        if key == b"path":
            name = _decode(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise DataError(f"{origin}: damaged: a size that is not a number before byte {position}.")
            size = int(value)
        at += length
    return name, size
