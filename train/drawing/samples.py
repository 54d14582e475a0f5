"""How drawings are stored: a folder for each caption, with its pictures and samples.jsonl, from which each of them can be drawn again by itself."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import ConfigDict, Field

from infra import storage, stored, strict_json, text
from infra.errors import DataError, MissingError
from infra.text import counted
from train.drawing.draw import Picture
from train.drawing.settings import MOST_PICTURES
from train.report.images import png_bytes

SCHEMA = "sample/2"
SAMPLES = "samples.jsonl"
FORMATS = ("png", "webp")
_KEY_LETTERS, _NAME_LETTERS = 12, 40
_MOST_THREADS = 512
MOST_LETTERS = 1 << 16
"""Characters of a caption."""
_MOST_DIGITS = 12

Line = dict[str, Any]


_Few = Annotated[int, Field(ge=0, le=MOST_PICTURES)]
_Some = Annotated[int, Field(ge=1, le=MOST_PICTURES)]
_Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
_Text = Annotated[str, Field(max_length=MOST_LETTERS)]


class _ShapedBy(stored.Stored):
    """Everything on which the last bits of a picture depend. A picture is drawn again with these values, so their sizes are limited."""

    captions: _Some
    each: _Some
    place: _Few
    window: _Some
    threads: Annotated[int, Field(ge=1, le=_MOST_THREADS)]
    deterministic: bool
    device: _Text
    precision: _Text
    torch: _Text
    ancestry: Annotated[list[Annotated[list[_Seed], Field(min_length=2, max_length=2)]], Field(max_length=8)] = Field(default_factory=list)
    """Of a picture of a search: from which position on its codes have which seed."""


class _Settings(stored.Stored):
    """The settings of a picture. What the model has to say to them is asked when it is loaded; see ``again``."""

    model_config = ConfigDict(extra="forbid")

    n: _Some
    seed: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    search: bool = False
    prefix: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 20)]], Field(max_length=1 << 16)] = Field(default_factory=list)


class _Drawn(stored.Stored):
    """A line of samples.jsonl. A line may come from a stranger, so the patterns of ``key`` and ``file`` allow only names that ``folder`` and ``put`` give: no
    other file is read or written."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    caption: _Text
    candidate: _Few
    seed: int
    score: stored.Number | None
    file: Annotated[str, Field(pattern=r"^[0-9]{3,6}\.(png|webp)$")]
    sha256: _Text
    codes_sha256: _Text
    settings: _Settings
    shaped_by: _ShapedBy
    weights: dict[str, _Text]
    source: _Text


@dataclass(frozen=True)
class Folder:
    """The folder of one caption's pictures."""

    url: str
    key: str
    """Digest of everything on which the pictures depend."""

    def lines(self) -> list[Line]:
        """The lines of the pictures that exist, by candidate.

        Raises:
            DataError: the file was not written by this program, or is damaged.
        """
        place = storage.join(self.url, SAMPLES)
        if not storage.exists(place):
            return []
        found = [line for line in read_lines(place) if line["key"] == self.key]
        candidates = [line["candidate"] for line in found]
        if len(set(candidates)) < len(candidates) or any(line["candidate"] >= line["settings"]["n"] for line in found):
            raise DataError(
                f"{place}: names a candidate twice, or one beyond those that were asked for; delete it, and its pictures are drawn again."
            )
        return found

    def write(self, lines: Sequence[Line]) -> None:
        """Replace samples.jsonl. The pictures must have been written before."""
        content = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for line in lines)
        storage.write_text(storage.join(self.url, SAMPLES), content)


def folder(out: str, caption: str, key: str) -> Folder:
    """The folder of a caption's pictures, named by the caption, so that people find it, and by the key."""
    name = re.sub(r"[^a-z0-9]+", "-", caption.lower())[:_NAME_LETTERS].strip("-") or "caption"
    return Folder(storage.join(out, f"{name}-{key[:_KEY_LETTERS]}"), key)


def encoded(picture: Picture, form: str) -> bytes:
    """Encode a picture as a file. Both formats are lossless."""
    if form == "png":
        return png_bytes(picture.pixels_YXC)
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels_YXC).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def put(place: Folder, picture: Picture, form: str, shape: dict[str, Any], score: float | None, lineage: dict[str, str], source: str) -> Line:
    """Write a picture, and return its line."""
    name, data = f"{picture.candidate:03d}.{form}", encoded(picture, form)
    storage.write_bytes(storage.join(place.url, name), data)
    return {
        "schema": SCHEMA,
        "key": place.key,
        "caption": picture.caption,
        "candidate": picture.candidate,
        "seed": picture.seed,
        "score": score,
        "file": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "codes_sha256": picture.codes_hash,
        "settings": shape,
        "shaped_by": picture.shaped_by,
        "weights": lineage,
        "source": source,
    }


def read_lines(url: str) -> list[Line]:
    """The lines of a samples.jsonl.

    Raises:
        MissingError: the file does not exist.
        DataError: it is not a samples.jsonl.
    """
    return [parse_line(line, f"{url}, line {number}") for number, line in enumerate(text.lines(_text(url)), 1)]


def _text(url: str) -> str:
    try:
        return storage.read_at_most(url, strict_json.MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not UTF-8 text ({error}).") from error


def parse_line(given: str, where: str) -> Line:
    """Parse one line of a samples.jsonl.

    Raises:
        DataError: it is not such a line.
    """
    try:
        line = strict_json.loads(given)
    except ValueError as error:
        raise DataError(f"{where}: not a line of a {SAMPLES} ({error}).") from error
    if not isinstance(line, dict) or line.get("schema") != SCHEMA:
        raise DataError(
            f"{where}: not a line of a {SAMPLES}: its schema is {line.get('schema') if isinstance(line, dict) else None!r}, not '{SCHEMA}'; "
            "draw the picture again, into another --out."
        )
    stored.check(line, _Drawn, where, f"give one exactly as a {SAMPLES} has it")
    return line


def find_line(given: str) -> Line:
    """Find the line that the command line names: by its text, as FILE:NUMBER of a samples.jsonl (counted from 1), or as FILE if it has only one line.

    Raises:
        DataError: there is no such line.
    """
    if given.lstrip().startswith("{"):
        return parse_line(given, "--again")
    head, _, number = given.rpartition(":")
    url, at = (head, int(number)) if head and number.isdecimal() and len(number) <= _MOST_DIGITS else (given, 0)
    try:
        lines = read_lines(url)
    except MissingError as error:
        raise DataError(
            f"--again {given}: neither a line of a {SAMPLES} nor a file; name one, such as drawings/a-red-fox-5d2c/{SAMPLES}:2."
        ) from error
    if at > len(lines) or (not at and len(lines) != 1):
        raise DataError(f"--again {given}: {url} has {counted(len(lines), 'line')}; name one as {url}:NUMBER, 1 to {len(lines)}.")
    return lines[(at or 1) - 1]
