"""More raw data as strangers have it (``tests.support.odd_inputs``): records whose parts contradict each other, or could be given to the wrong image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Odd:
    """One input, and what is right."""

    what: str
    write: Callable[[Path], None]
    pairs: int
    captions: int = 0
    """Of all pairs; 0: one each."""
    lost: int = 0
    """Records that are dropped under a reason."""
    damaged: bool = False
    """Whether a file is quarantined."""
    filters: dict[str, object] = field(default_factory=dict)
    """Keys of the section filters that are not as for the others."""


def picture(number: int, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(out, form)
    return out.getvalue()


def caption(number: int) -> str:
    return f"a red cat number {number} on a table"


def _coco(images: list[dict[str, object]], said: list[dict[str, object]]) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        (place / "annotations").mkdir()
        (place / "images").mkdir()
        for number in range(3):
            (place / "images" / f"{number}.png").write_bytes(picture(number))
        (place / "annotations" / "captions_train.json").write_text(json.dumps({"images": images, "annotations": said}))

    return write


def _lines(*lines: str, name: str = "t.jsonl") -> Callable[[Path], None]:
    def write(place: Path) -> None:
        for number in range(6):
            (place / f"{number}.png").write_bytes(picture(number))
        (place / name).write_text("\n".join(lines) + "\n")

    return write


def _named(*ids: object) -> list[dict[str, object]]:
    return [({} if identity is None else {"id": identity}) | {"file_name": f"{number}.png"} for number, identity in enumerate(ids)]


MORE = (
    Odd("COCO's images and annotations without ids", _coco(_named(None, None), [{"caption": caption(0)}, {"caption": caption(1)}]), 0, lost=4),
    Odd(
        "COCO's annotations, two images of one id and one of its own",
        _coco(_named(1, 1, 2), [{"image_id": number, "caption": caption(number)} for number in (1, 1, 2)]),
        1,
        lost=2,
    ),
    Odd(
        "COCO's annotations, of which one is no text",
        _coco(_named(1, 2), [{"image_id": 1, "caption": caption(1)}, {"image_id": 1, "caption": ["a"]}, {"image_id": 2, "caption": caption(2)}]),
        1,
        lost=1,
    ),
    Odd(
        "lists of captions with a number, with nothing, and a caption in brackets",
        _lines(*(json.dumps({"image": f"{number}.png", "captions": said}) for number, said in enumerate((["a", 3], ["a cat", None], "[1]")))),
        2,
        lost=1,
    ),
)
