"""Raw data as strangers have it, odd or damaged, and what comes of each. ``python -m tests.support.odd_inputs`` writes its table into docs/data_faults.md."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.plan import make_plan
from tests.support.odd_rows import MORE, Odd, caption, picture
from tests.support.root import ROOT

PAGE = ROOT / "docs" / "data_faults.md"
HEADING = "## Odd and damaged raw data"
FILTERS = FilterConfig(english=False, near_duplicate_bits=-1, min_words=1, boilerplate=False)


def _pair(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(number)), (f"{key}.txt", caption(number).encode())]


def _tar(*keys: str, first: int = 0) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in (member for number, key in enumerate(keys) for member in _pair(key, first + number)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _files(**data: bytes) -> Callable[[Path], None]:
    """Files by name; '__' stands for a dot."""

    def write(place: Path) -> None:
        for name, content in data.items():
            (place / name.replace("__", ".")).write_bytes(content)

    return write


def _hole(place: Path) -> None:
    data = _tar("a", "b", "c")
    start = data.index(b"b.png") // 512 * 512
    (place / "x.tar").write_bytes(data[:start] + bytes(1024) + data[start + 1024 :])


def _mixed(place: Path) -> None:
    for name, data in (
        ("x.tar", _tar("a", "b")),
        ("y.tar.gz", gzip.compress(_tar("c", "d", "e", first=2))),
        ("z.tgz", gzip.compress(_tar("f", first=5))),
    ):
        (place / name).write_bytes(data)


def _table(lines: list[str], name: str = "t.csv", count: int = 12) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        for number in range(count):
            (place / f"{number:02d}.png").write_bytes(picture(number))
        data = "\n".join(["image,caption", *lines]) + "\n"
        (place / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())

    return write


def _rows(count: int = 12) -> list[str]:
    return [f"{number:02d}.png,{caption(number)}" for number in range(count)]


def _stray() -> list[str]:
    return [row.replace(",a red", ',"a red') if number == 2 else row for number, row in enumerate(_rows())]


def _shuffled() -> list[str]:
    rows = [f"{number:02d}.png,{caption(number)} {word}" for word in ("by day", "by night") for number in range(12)]
    return sorted(rows, key=lambda row: row[::-1])


def _outside(place: Path) -> None:
    (place.parent / "secret.txt").write_text("a password that nobody may read")
    for number in range(2):
        (place / f"{number}.png").write_bytes(picture(number))
    (place / "0.txt").write_text(caption(0))
    (place / "1.txt").symlink_to(place.parent / "secret.txt")


def _separators(place: Path) -> None:
    for number, word in enumerate(("\u2028", "\u2029", "\u0085", "\u000b", "\u001c")):
        (place / f"{number}.png").write_bytes(picture(number))
        (place / f"{number}.txt").write_bytes(f"a red cat{word}on a table".encode())


def _languages(place: Path) -> None:
    for number, words in enumerate(
        ("кошка на столе", "桌子上的猫", "قطة على الطاولة", "eine Katze auf dem Tisch", "मेज पर बिल्ली", "テーブルの上の猫")
    ):
        (place / f"{number}.png").write_bytes(picture(number))
        (place / f"{number}.txt").write_text(words)


def _names(place: Path) -> None:
    for number, name in enumerate(("[brackets] 1", "100% sure? no*", "plus+and&", " leading")):
        (place / f"{name}.png").write_bytes(picture(number))
        (place / f"{name}.txt").write_text(caption(number))


def _suffixes(place: Path) -> None:
    for number, name in enumerate(("a.tif", "b.jfif", "c.jpe", "d.jpg", "UPPER.JPG")):
        (place / name).write_bytes(picture(number, "TIFF" if name.endswith("tif") else "JPEG"))
        (place / (name.rpartition(".")[0] + (".TXT" if name == "UPPER.JPG" else ".txt"))).write_text(caption(number))


def _alpha(place: Path) -> None:
    clear = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8), "RGBA")
    clear.putalpha(0)
    out = io.BytesIO()
    clear.save(out, "PNG")
    for name, data in (("clear.png", out.getvalue()), ("solid.png", picture(2))):
        (place / name).write_bytes(data)
        (place / f"{name[:-4]}.txt").write_text(caption(3))


def _structs(place: Path) -> None:
    said = [[{"raw": f"{caption(number)} {word}"} for word in ("by day", "by night")] for number in range(12)]
    table = pyarrow.table({"image": [picture(number) for number in range(12)], "sentences": said})
    pyarrow.parquet.write_table(table, place / "train.parquet")


def _twice(place: Path) -> None:
    columns = [pyarrow.array([picture(0)]), pyarrow.array([caption(0)]), pyarrow.array([caption(1)])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["image", "caption", "caption"]), place / "train.parquet")


def _astray(place: Path) -> None:
    table = pyarrow.table({"image": [picture(number) for number in range(3)], "caption": [caption(number) for number in range(3)]})
    with pyarrow.ipc.new_stream(place / "data.arrow", table.schema) as out:
        out.write_table(table)
    ends = np.cumsum([0, *(len(caption(number)) for number in range(3))]).astype(np.int32).tobytes()
    data = (place / "data.arrow").read_bytes()
    assert data.count(ends) == 1
    (place / "data.arrow").write_bytes(data.replace(ends, np.array([6060, 6100, 6140, 6180], np.int32).tobytes()))


def _sparse(place: Path) -> None:
    with tarfile.open(place / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in _pair("q"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name.endswith(".txt"):
                member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "600"}
            tar.addfile(member, io.BytesIO(data))


def _special(place: Path) -> None:
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    with tarfile.open(place / "x.tar", "w") as tar:
        for name, data in _pair("a"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)


def _itself(place: Path) -> None:
    (place / "good.png").write_bytes(picture(0))
    (place / "good.txt").write_text(caption(0))
    (place / "self.txt").write_text(caption(1))
    for name in ("self.png", "self"):
        (place / name).symlink_to(place / name)


def _no_calendar(place: Path) -> None:
    moments = pyarrow.array([0, 1 << 62, 1], pyarrow.timestamp("us"))
    said = pyarrow.StructArray.from_arrays([pyarrow.array([caption(number) for number in range(3)]), moments], ["raw", "written"])
    table = pyarrow.table({"image": [picture(number) for number in range(3)], "sentences": said, "taken": moments})
    pyarrow.parquet.write_table(table, place / "train.parquet")


def _bomb(place: Path) -> None:
    with gzip.open(place / "t.csv.gz", "wb", 9) as file:
        file.write(b"image,caption\n")
        for _ in range(80):
            file.write(bytes(1 << 20))


def _lines(text: str, name: str, count: int = 2) -> Callable[[Path], None]:
    """A file of this text, beside pictures."""

    def write(place: Path) -> None:
        for number in range(count):
            (place / f"{number:02d}.png").write_bytes(picture(number))
        (place / name).write_text(text, newline="")

    return write


def _coco_secret(place: Path) -> None:
    _coco(place)
    file = place / "annotations" / "captions_val2017.json"
    file.write_text("\ufeff" + file.read_text().replace('"003.png"', '"s3://AKIA:SECRET@bucket/003.png"'))


def _coco(place: Path) -> None:
    (place / "annotations").mkdir()
    (place / "val2017").mkdir()
    images = [{"id": number, "file_name": f"{number:03d}.png"} for number in range(12)]
    for number, image in enumerate(images):
        (place / "val2017" / str(image["file_name"])).write_bytes(picture(number))
    said = [{"image_id": number % 12, "caption": f"{caption(number)} {number // 12}"} for number in range(24)]
    (place / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": said}))


def _elsewhere(place: Path) -> None:
    with (place / "t.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for path in ("00.png", "../secret.png", "/etc/hostname", "file:///etc/hostname", "s3://other/a.png", "https://example.com/a.png", "none.png"):
            rows.writerow([path, caption(0)])
    (place / "00.png").write_bytes(picture(0))


INPUTS = (
    Odd("names of tar members with dots", _files(x__tar=_tar("plain", "photo 1.2", "www.example.com_1", "v1.0 (final)")), 4),
    Odd("two tars joined by cat", _files(x__tar=_tar("a", "b") + _tar("c", "d", "e", first=2)), 0, damaged=True),
    Odd("a block of zeros in the middle of a tar", _hole, 0, damaged=True),
    Odd("a gzipped tar that breaks off", _files(x__tgz=gzip.compress(_tar("a", "b"))[:-40]), 0, damaged=True),
    Odd("a key twice in a tar", _files(x__tar=_tar("a", "b", "b", "c")), 3, lost=1),
    Odd("plain and gzipped tars together", _mixed, 6),
    Odd("pairs of files beside a tar", _files(x__tar=_tar("a"), b__png=picture(1), b__txt=b"a red cat"), 1),
    Odd("a stray quote in a CSV of 12 rows", _table(_stray()), 11, lost=1),
    Odd("the rows of an image do not stand together", _table(_shuffled()), 12, captions=24),
    Odd("a gzipped table", _table(_rows(), "t.csv.gz"), 12),
    Odd("paths that lead elsewhere, to the web or nowhere", _elsewhere, 1, lost=6),
    Odd("a caption file that is a link out of the source", _outside, 1, lost=1),
    Odd("U+2028, U+2029, U+0085, U+000B, U+001C inside captions, control characters allowed", _separators, 5, filters={"broken_text": False}),
    Odd("the same, control characters refused (the default)", _separators, 2, lost=3),
    Odd("captions in six languages, any allowed", _languages, 6),
    Odd("brackets, *, ?, %, & and spaces in names", _names, 4),
    Odd("suffixes of any case and age, TIFF accepted", _suffixes, 5, filters={"formats": ("jpeg", "tiff")}),
    Odd("the same, TIFF not accepted", _suffixes, 4, lost=1),
    Odd("a picture of which nothing would be seen", _alpha, 1, lost=1),
    Odd("Parquet with captions in structs", _structs, 12, captions=24),
    Odd("COCO's annotations, two captions a picture", _coco, 12, captions=24),
    Odd("Parquet with two columns called caption", _twice, 0, damaged=True),
    Odd("Arrow whose captions lie beyond their buffer", _astray, 0, damaged=True),
    Odd("a sparse member of a pax archive", _sparse, 0, damaged=True),
    Odd("links, devices and pipes among the members of a tar", _special, 1),
    Odd("rows that end at lone carriage returns", _lines("\r".join(["image,caption", *_rows()]), "t.csv", 12), 12),
    Odd("a CSV with two columns called caption", _lines("image,caption,caption\n00.png,a cat,a dog\n", "t.csv"), 0, damaged=True),
    Odd(
        "a JSON row with a key twice",
        _lines('{"image": "00.png", "caption": "a", "caption": "b"}\n{"image": "01.png", "caption": "a cat"}\n', "t.jsonl"),
        1,
        lost=1,
    ),
    Odd(
        "captions in lists of lists",
        _lines('{"image": "00.png", "captions": [["a cat"]]}\n{"image": "01.png", "captions": ["a cat"]}\n', "t.jsonl"),
        1,
        lost=1,
    ),
    Odd("a gzipped table of 80 MB of zeros", _bomb, 0, damaged=True),
    Odd("COCO's annotations after a byte order mark, with a password in the address of an image", _coco_secret, 11, captions=22, lost=1),
    Odd("links to themselves, as an image and as nothing", _itself, 1, lost=1),
    Odd("Parquet with dates that no calendar has, in captions and in a column that is not read", _no_calendar, 2, lost=1),
    *MORE,
)


def outcome(odd: Odd) -> str:
    """What the stage prepare makes of it, in words; what is wrong about that is an AssertionError."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "set")
        place.mkdir()
        odd.write(place)
        data = DataConfig.model_validate({"sources": [{"url": str(place)}]}, strict=False)
        plan = make_plan(data, FILTERS.model_copy(update=odd.filters), 8, 0)
        tally, kept, damage = Tally(), list[tuple[str, ...]](), list[str]()
        for unit in plan.units:
            try:
                kept += [tuple(record.captions) for record in parts.accepted(plan, unit, tally)]
            except parts._Poisoned as error:
                damage.append(re.sub(r"byte \d[\d,]*", "byte N", str(error)).replace(f"{place}/", "").partition(";")[0])
        lost = sum(entry["count"] for entry in tally.dropped.values())
        passed_over = tally.not_read + sum((source.census.not_read for source in plan.sources), type(tally.not_read)())
        assert (len(kept), lost, bool(damage)) == (odd.pairs, odd.lost, odd.damaged), (odd.what, len(kept), tally.to_json(), damage)
        assert sum(map(len, kept)) == (odd.captions or odd.pairs) and (damage or tally.seen == len(kept) + lost), odd.what
    words = [f"{len(kept)} pairs" + (f" with {odd.captions} captions" if odd.captions else "")] if not damage else []
    words += [f"quarantined, and nothing of it is taken: {'; '.join(damage)}"] if damage else []
    words += [f"{entry['count']} {reason}" for reason, entry in sorted(tally.dropped.items())]
    words += [f"{count} not read: {suffix}" for suffix, count in sorted(passed_over.items())]
    return "; ".join(words).replace("|", "/")


def section() -> str:
    """The table."""
    rows = [f"| {odd.what} | {outcome(odd)} |" for odd in INPUTS]
    head = f"{HEADING}\n\nMade by `python -m tests.support.odd_inputs`, which writes each input and prepares it; `tests/data_pipeline/sources/test_odd_inputs.py` compares.\n"
    return "\n".join([head, "| input | what comes of it |", "|---|---|", *rows]) + "\n"


def main() -> None:
    """Write the table into the page, after the faults of the network."""
    PAGE.write_text(f"{PAGE.read_text().partition(HEADING)[0].rstrip()}\n\n{section()}")


if __name__ == "__main__":
    main()
