"""Drawings on disk: existing pictures are kept, missing ones are drawn and written as soon as they are finished, and a grid shows all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infra import storage
from infra.errors import StopRequested
from infra.signals import StopFlag
from infra.text import counted
from train.drawing import samples
from train.drawing.draw import Batch, Picture, draw, score
from train.drawing.samples import Folder, Line
from train.drawing.settings import Settings, key
from train.drawing.source import Models
from train.drawing.told import Told
from train.report.images import Pixels, grid, png_bytes, read_png


@dataclass(frozen=True)
class Gallery:
    """Drawings of one model with the same settings, in one folder."""

    models: Models
    settings: Settings
    out: str
    prefix: tuple[int, ...] = ()
    """Codes of the first rows of a given image."""
    format: str = "png"

    @property
    def _shape(self) -> dict[str, Any]:
        return self.settings.shape() | ({"prefix": list(self.prefix)} if self.prefix else {})

    def folder(self, caption: str) -> Folder:
        """The folder of a caption's pictures. Its name depends on everything that the pictures depend on."""
        judge = self.models.lineage.get("clip", "none")
        lineage = {kind: found for kind, found in self.models.lineage.items() if kind != "clip"}
        return samples.folder(
            self.out, caption, key(caption, self.settings, lineage, list(self.prefix), judge, format=self.format, precision=self.models.precision)
        )

    def draw(self, captions: Sequence[str], stop: StopFlag, drawn: Callable[[str, list[Line]], None], told: Told | None = None) -> int:
        """Draw the missing pictures of each caption; return how many there were.

        Args:
            drawn: called for each caption that is complete, with its lines.
            told: says how far a long drawing is.

        Raises:
            StopRequested: a signal came. Finished pictures have been written, and the same call draws the rest.
        """

        def listen(batch: Batch, codes_BI: Tensor, known_B: Tensor) -> None:
            if stop:
                which = f"{counted(count, 'new picture')}, which {'is' if count == 1 else 'are'} kept in {self.out}"
                raise StopRequested(f"stopped by a signal after {which}; the same command draws the rest.")
            if told is not None:
                before = count * each - batch.size * len(self.prefix)
                told.look(lambda: before + int(known_B.sum()), missing * each)

        lines = {caption: self._kept(caption) for caption in captions}
        count, each = 0, self.models.weights.shape.image_tokens - len(self.prefix)
        missing = sum(self.settings.n - len(found) for found in lines.values())
        for caption in [caption for caption in captions if len(lines[caption]) == self.settings.n]:
            drawn(caption, lines[caption])
        for several, candidates in self._missing(lines):
            for pictures in draw(self.models, several, self.settings, self.prefix, candidates=candidates, listen=listen):
                count += len(pictures)
                for caption in self._write(pictures, lines):
                    drawn(caption, lines[caption])
        return count

    def _kept(self, caption: str) -> list[Line]:
        place = self.folder(caption)
        return [line for line in place.lines() if storage.exists(storage.join(place.url, line["file"]))]

    def _missing(self, lines: dict[str, list[Line]]) -> Iterator[tuple[list[str], list[int]]]:
        """Groups of captions that lack the same candidates, with these candidates."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for caption, found in lines.items():
            left = tuple(sorted(set(range(self.settings.n)) - {line["candidate"] for line in found}))
            if left:
                groups.setdefault(left, []).append(caption)
        for left, several in groups.items():
            yield several, list(left)

    def _write(self, pictures: list[Picture], lines: dict[str, list[Line]]) -> list[str]:
        """Write pictures, then the lists of their captions; return the captions that are complete now."""
        models = self.models
        scores = score(models, pictures) if models.clip is not None else [None] * len(pictures)
        changed = dict.fromkeys(picture.caption for picture in pictures)
        for picture, worth in zip(pictures, scores, strict=True):
            place = self.folder(picture.caption)
            lines[picture.caption].append(samples.put(place, picture, self.format, self._shape, worth, models.lineage, models.url))
        for caption in changed:
            lines[caption].sort(key=lambda line: line["candidate"])
            self.folder(caption).write(lines[caption])
        return [caption for caption in changed if len(lines[caption]) == self.settings.n]

    def grid(self, captions: Sequence[str]) -> str:
        """Write a grid of all drawings, a row for each caption, the best first. Returns its URL, whose name depends on everything that is in the grid."""
        folders = [self.folder(caption) for caption in captions]
        rows = [[self._pixels(place, line) for line in ranked(place.lines())] for place in folders]
        name = hashlib.sha256("".join(place.key for place in folders).encode()).hexdigest()[:12]
        url = storage.join(self.out, f"grid-{name}.png")
        storage.write_bytes(url, png_bytes(grid(rows, labels=list(captions))))
        return url

    def _pixels(self, place: Folder, line: Line) -> Pixels:
        return read_png(storage.read_bytes(storage.join(place.url, line["file"])))


def ranked(lines: Sequence[Line]) -> list[Line]:
    """The lines with the best first; in the order of candidates if they were not ranked."""
    return sorted(lines, key=lambda line: (-(line["score"] or 0.0), line["candidate"]))
