"""More raw data as strangers have it (``tests.support.odd_inputs``): records whose parts contradict each other, or could be given to the wrong image."""

from __future__ import annotations

import io
import json
import tarfile
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


def _coco_with_a_key_twice(place: Path) -> None:
    """In an image, and in an annotation of another one."""
    _coco(_named(1, 2, 3), [{"image_id": number, "caption": caption(number)} for number in (1, 2, 3)])(place)
    path = place / "annotations" / "captions_train.json"
    changed = path.read_text().replace('"id": 2,', '"id": 2, "id": 2,', 1).replace('{"image_id": 3,', '{"image_id": 1, "image_id": 3,', 1)
    path.write_text(changed)


def _lines(*lines: str, name: str = "t.jsonl") -> Callable[[Path], None]:
    def write(place: Path) -> None:
        for number in range(6):
            (place / f"{number}.png").write_bytes(picture(number))
        (place / name).write_text("\n".join(lines) + "\n")

    return write


def tar_of(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        with tarfile.open(place / "x.tar", mode="w") as file:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    return write


def _about(place: Path, *lines: tuple[str, str]) -> None:
    said = [{"shard": "x.tar", "file_name": name, "caption": words} for name, words in lines]
    (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))


def _described(place: Path) -> None:
    tar_of(*((name, picture(number)) for number, name in enumerate(("u/a.png", "v/a.png", "v/b.png", "c.png", "v/c.png"))))(place)
    _about(place, ("a.png", caption(0)), ("b.png", caption(2)), ("c.png", caption(3)), ("v/c.png", ""))


def _described_twice(place: Path) -> None:
    tar_of(("c.png", picture(0)))(place)
    _about(place, ("c.png", caption(0)), ("none.png", caption(1)), ("./c.png", caption(2)))


def _two_jsons(place: Path) -> None:
    (place / "a.png").write_bytes(picture(0))
    for name in ("a.json", "a.JSON"):
        (place / name).write_text(json.dumps({"caption": caption(0)}))


def _links(place: Path) -> None:
    for number in range(40):
        (place / f"d{number:02d}").mkdir()
        for name in ("a", "b"):
            (place / f"d{number:02d}" / name).symlink_to(f"../d{(number + 1) % 40:02d}")
    (place / "d39" / "x.png").write_bytes(picture(0))
    (place / "d39" / "x.txt").write_text(caption(0))


def _deep(place: Path) -> None:
    for _ in range(600):
        place /= "a"
    place.mkdir(parents=True)
    (place / "b.png").write_bytes(picture(0))
    (place / "b.txt").write_text(caption(0))


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
    Odd("COCO's annotations, in which an image and an annotation hold a key twice", _coco_with_a_key_twice, 1, lost=3),
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
    Odd("lines beside a tar, for members of one name in two folders and in one", _described, 2, lost=3),
    Odd("two lines about one image of a tar, one about none", _described_twice, 1, captions=2),
    Odd("two images of one key in a tar", tar_of(("a.png", picture(0)), ("a.jpg", picture(1)), ("a.txt", caption(0).encode())), 1, lost=1),
    Odd("a.json and a.JSON beside an image", _two_jsons, 1),
    Odd(
        "rows of one image that name different splits, licences and groups",
        _lines(
            "image,caption,split,license,group",
            *(
                "0.png,a red cat,train,,",
                "0.png,a blue cat,validation,,",
                "1.png,a cat,,MIT,",
                "1.png,a dog,,CC0,",
                "2.png,a cat,,,x",
                "2.png,a dog,,,y",
            ),
            *("3.png,a red cat,train,,", "3.png,a blue cat,,MIT,x"),
            name="t.csv",
        ),
        1,
        captions=2,
        lost=3,
    ),
    Odd("folders that link to each other, twice each, 40 deep", _links, 1),
    Odd("a pair 600 folders deep", _deep, 1),
    *(
        Odd(
            f"a {name[2:].upper()} file without a header whose rows are out of order, {what}",
            _lines(*(row.replace(",", mark) for row in rows), name=name),
            pairs,
            captions,
            lost,
        )
        for name, mark in (("t.csv", ","), ("t.tsv", "\t"))
        for what, rows, pairs, captions, lost in (
            ("with a bad row", ("0.png,red cat", "1.png,blue cat", "0.png,green cat", "2.png,a,b,c", "3.png,a tail"), 3, 4, 1),
            ("with a row of no image", ("0.png,red cat", "1.png,blue cat", "0.png,green cat", ",nothing", "3.png,a tail"), 3, 4, 1),
            ("after a byte order mark", ("\ufeff1.png,red cat", "0.png,blue cat", "1.png,green cat"), 2, 3, 0),
            ("with a caption that ends like a picture's name", ("1.png,red cat", "0.png,as in 5.png", "1.png,green cat"), 2, 3, 0),
        )
    ),
    Odd(
        "the first row of a CSV without a header has a stray quote",
        _lines('0.png,"red cat', "1.png,blue cat", "2.png,green cat", name="t.csv"),
        2,
        lost=1,
    ),
    Odd(
        "rows of objects after a byte order mark, out of order",
        _lines(
            *(
                f'{mark}{{"image": "{number}.png", "caption": "{word} cat"}}'
                for mark, number, word in (("\ufeff", 1, "red"), ("", 0, "blue"), ("", 1, "green"))
            )
        ),
        2,
        captions=3,
    ),
)
