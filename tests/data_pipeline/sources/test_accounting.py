"""Every record is accounted for: kept + dropped by reason = seen, and every file or member is read or counted as not read. Damage is no end."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import DataConfig, FilterConfig, SourceConfig
from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.plan import Plan, make_plan
from data_pipeline.sources.kinds import BY_NAME
from data_pipeline.sources.pairs import NotRead, Pair, Source, Unreadable, suffix_of
from infra.errors import DataError

_FILTERS = FilterConfig(english=False, near_duplicate_bits=-1, min_words=1, boilerplate=False)


def picture(number: int, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(out, form)
    return out.getvalue()


def plan_of(*urls: object, filters: dict[str, Any] | None = None, **fields: Any) -> Plan:
    data = DataConfig.model_validate({"sources": [url if isinstance(url, dict) else {"url": str(url)} for url in urls]} | fields, strict=False)
    return make_plan(data, FilterConfig.model_validate(_FILTERS.model_dump() | (filters or {}), strict=False), 8, 0)


def accounted(plan: Plan) -> tuple[int, Tally]:
    """Records kept, and the tally, after the identity of records has been checked."""
    tally, kept = Tally(), 0
    for unit in plan.units:
        kept += sum(1 for _ in parts.accepted(plan, unit, tally))
    assert kept + sum(entry["count"] for entry in tally.dropped.values()) == tally.seen and kept == tally.kept
    return kept, tally


def reasons(tally: Tally) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in tally.dropped.items()}


def archive(members: Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pair(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(number)), (f"{key}.txt", b"a red cat on a table")]


# --- Folders ------------------------------------------------------------------------------------------------------------------------------

_STEMS = st.sampled_from(["a", "b", "A", "c d", "x.y", "é", "sub/a", "sub/q.1"])
_SUFFIXES = st.sampled_from([".png", ".PNG", ".jpg", ".jfif", ".jpe", ".tif", ".txt", ".TXT", ".json", ".csv.gz", ".tgz", ".doc", ""])


@settings(max_examples=40, deadline=None)
@given(
    names=st.sets(st.tuples(_STEMS, _SUFFIXES), min_size=1, max_size=12), kind=st.sampled_from(["folder", "table", "webdataset", "parquet", "coco"])
)
def test_every_file_that_is_listed_is_read_or_counted(tmp_path_factory: pytest.TempPathFactory, names: set[tuple[str, str]], kind: str) -> None:
    folder = tmp_path_factory.mktemp("lies")
    for stem, suffix in names:
        place = folder / f"{stem}{suffix}"
        if place.is_dir():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"{}" if suffix == ".json" else b"a red cat")
    source: Source = BY_NAME[kind].opener(SourceConfig(url=str(folder)), DataConfig(records_per_part=2))
    shards = []
    with contextlib.suppress(DataError):  # nothing of this kind is there: the refusal says so, and what was listed is counted all the same
        shards = list(source.shards())
    assert source.census.listed == sum(1 for path in folder.rglob("*") if path.is_file())
    if kind == "folder":
        assert source.census.read == len({key for shard in shards for key in shard.keys}) or not shards
        images = sum(1 for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jfif", ".jpe", ".tif"))
        found = Counter(type(item) for shard in shards for item in source.read(shard, lambda group: True))
        assert not shards or found[Pair] + found[Unreadable] == images


def test_suffixes_of_any_case_and_age_are_read(tmp_path: Path) -> None:
    for number, name in enumerate(("a.tif", "b.jfif", "c.jpe", "d.jpg", "UPPER.JPG")):
        (tmp_path / name).write_bytes(picture(number, "TIFF" if name.endswith("tif") else "JPEG"))
        (tmp_path / name.rpartition(".")[0]).with_suffix(".TXT" if name == "UPPER.JPG" else ".txt").write_text("a red cat on a table")
    kept, tally = accounted(plan_of(tmp_path))
    assert kept == 4 and reasons(tally) == {"image format": 1}
    assert accounted(plan_of(tmp_path, filters={"formats": ("jpeg", "tiff")}))[0] == 5


def test_the_pairs_beside_tars_are_counted_as_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(archive(pair("a")))
    for name, data in pair("beside"):
        (tmp_path / name).write_bytes(data)
    plan = plan_of(tmp_path)
    assert plan.sources[0].census.to_json() == {"listed": 3, "read": 1, "pictures": 0, "not_read": {".png": 1, ".txt": 1}}
    assert accounted(plan)[0] == 1


def test_records_beyond_the_share_are_counted_once(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"jpg": [picture(number) for number in range(20)], "caption": ["a red cat on a table"] * 20})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    kept, tally = accounted(plan_of(tmp_path, share=0.5))
    assert 0 < kept < 20 and tally.seen == 20 and reasons(tally) == {"beyond data.share": 20 - kept}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a/b.CSV.gz", ".csv.gz"),
        ("x.tgz", ".tgz"),
        ("README", "(no suffix)"),
        (".png", "(no suffix)"),
        ("v1.0 (final)", "(no suffix)"),
        ("a.b.c", ".c"),
    ],
)
def test_what_is_not_read_is_counted_under_its_suffix(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


# --- Tars ---------------------------------------------------------------------------------------------------------------------------------


def in_tar(folder: Path, data: bytes, name: str = "x.tar") -> tuple[int, Tally]:
    (folder / name).write_bytes(data)
    return accounted(plan_of(folder / name))


def test_members_whose_names_carry_dots_are_records(tmp_path: Path) -> None:
    names = ("plain", "photo 1.2", "www.example.com_1", "v1.0 (final)")
    kept, tally = in_tar(tmp_path, archive(member for number, name in enumerate(names) for member in pair(name, number)))
    assert kept == tally.seen == 4 and not tally.not_read


def test_members_of_further_dots_belong_to_the_record_of_their_first_part(tmp_path: Path) -> None:
    members = [("j.mask.png", picture(1)), *pair("j"), ("j.de.txt", b"eine rote Katze"), ("j.cls", b"3"), ("k.depth.png", picture(2)), *pair("k", 3)]
    kept, tally = in_tar(tmp_path, archive(members))
    assert kept == tally.seen == 2 and tally.not_read == {".png": 2, ".txt": 1, ".cls": 1}


@pytest.mark.parametrize("order", ["abbc", "abcb", "abbbc", "aabbcc"])
def test_a_key_that_comes_twice_is_counted_wherever_it_comes(order: str, tmp_path: Path) -> None:
    kept, tally = in_tar(tmp_path, archive(member for number, key in enumerate(order) for member in pair(key, number)))
    assert kept == 3 and reasons(tally) == {"repeated key": len(order) - 3}


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.tuples(st.sampled_from(["a", "b", "a.1", "b.c", "d"]), st.sampled_from(["png", "txt", "jpg", "json", "cls"])), max_size=12))
def test_every_member_is_part_of_a_record_or_counted(tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("tar")
    (folder / "x.tar").write_bytes(archive((f"{key}.{suffix}", b"{}" if suffix == "json" else b"x") for key, suffix in keys))
    plan = plan_of(folder / "x.tar")
    found = list(plan.sources[0].read(plan.units[0].shard, lambda group: True))
    records = [item for item in found if not isinstance(item, NotRead)]
    passed_over = sum(item.count for item in found if isinstance(item, NotRead))
    assert passed_over >= sum(suffix == "cls" for _, suffix in keys)
    assert len(records) + passed_over <= len(keys), "nothing is counted twice"
    assert bool(records) or passed_over == len(keys), "and nothing is lost"


def test_gzipped_tars_are_read_and_their_damage_is_seen(tmp_path: Path) -> None:
    plain = archive([*pair("a"), *pair("b", 1)])
    for name in ("y.tar.gz", "z.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(plain))
    (tmp_path / "unpacked.tar.gz").write_bytes(plain)
    assert accounted(plan_of(tmp_path))[0] == 6
    (tmp_path / "z.tgz").write_bytes(gzip.compress(plain)[:-40])
    plan = plan_of(tmp_path / "z.tgz")
    with pytest.raises(DataError, match=r"z\.tgz: damaged or truncated gzip data \(.*\); fetch it again"):
        list(plan.sources[0].read(plan.units[0].shard, lambda group: True))


HOLES = {
    "joined by cat": (archive(pair("a")) + archive(pair("b", 1)), "a hole, or tars that were joined by cat"),
    "a zeroed block in the middle": (archive([*pair("a"), *pair("b"), *pair("c")]), "zeros from byte .* on, and more data from byte"),
    "a tail of zeros": (archive(pair("a")) + bytes(1 << 20), "ends in .* bytes of zeros .* a copy that broke off"),
}


@pytest.mark.parametrize(("data", "message"), HOLES.values(), ids=HOLES)
def test_damage_is_never_taken_for_the_end_of_a_tar(data: bytes, message: str, tmp_path: Path) -> None:
    if message.startswith("zeros"):
        start = data.index(b"b.png") // 512 * 512
        data = data[:start] + bytes(1024) + data[start + 1024 :]
    (tmp_path / "x.tar").write_bytes(data)
    plan = plan_of(tmp_path)
    with pytest.raises(DataError, match=rf"x\.tar: damaged: .*{message}"):
        list(plan.sources[0].read(plan.units[0].shard, lambda group: True))


# --- Tables -------------------------------------------------------------------------------------------------------------------------------


def csv_of(folder: Path, lines: list[str]) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """Captions of the records, and unreadable ones by reason."""
    for letter in "abcdefgh":
        (folder / f"{letter}.png").write_bytes(picture(ord(letter)))
    (folder / "t.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    plan = plan_of(folder / "t.csv")
    found = [item for unit in plan.units for item in plan.sources[0].read(unit.shard, lambda group: True)]
    return [item.captions for item in found if isinstance(item, Pair)], Counter(item.reason for item in found if isinstance(item, Unreadable))


@pytest.mark.parametrize(
    "stray",
    [
        ['c.png,"an open quote', "d.png,d", "e.png,e"],  # to the end of the file
        ['c.png,"an open quote', "d.png,d", 'e.png,"e"'],  # to the next quote
        ['c.png,"an open quote', "d.png,d", 'e.png,",e"'],  # to a quote that closes it, with a cell too many
        ['c.png,"an open quote', "d.png,d", 'e.png,e"'],  # to a quote that closes it rightly
    ],
)
def test_a_stray_quote_costs_its_own_row_alone(stray: list[str], tmp_path: Path) -> None:
    captions, bad = csv_of(tmp_path, ["a.png,a", "b.png,b", *stray, "f.png,f"])
    assert len(captions) == 5 and bad == {"bad row": 1}
    assert [caption[0].strip('",') for caption in captions] == ["a", "b", "d", "e", "f"]


def test_a_caption_of_several_lines_stays_whole(tmp_path: Path) -> None:
    captions, bad = csv_of(tmp_path, ['a.png,"one\nand two, ""quoted""\nand three"', "b.png,b"])
    assert captions == [('one\nand two, "quoted"\nand three',), ("b",)] and not bad


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.csv.gz", "t.tsv.gz"])
def test_gzipped_tables_are_read_in_ranges(name: str, tmp_path: Path) -> None:
    rows = [(f"{number}.png", f"a red cat number {number}") for number in range(12)]
    for number, (image, _) in enumerate(rows):
        (tmp_path / image).write_bytes(picture(number))
    if "jsonl" in name:
        text = "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows)
    else:
        mark = "," if "csv" in name else "\t"
        text = f"image{mark}caption\n" + "".join(f"{image}{mark}{caption}\n" for image, caption in rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    plan = plan_of(tmp_path, records_per_part=1)
    assert len(plan.units) > 1 or len(text) < 256
    assert accounted(plan)[0] == 12
    (tmp_path / name).write_bytes(gzip.compress(text.encode())[:-20])
    plan = plan_of(tmp_path)
    with pytest.raises(DataError, match=r"damaged or truncated gzip data"):
        list(plan.sources[0].read(plan.units[0].shard, lambda group: True))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_rows_of_an_image_that_do_not_stand_together_are_one_record(suffix: str, tmp_path: Path) -> None:
    rows = [(f"{number % 40}.png", f"caption {number} of it") for number in range(120)]
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    if suffix == "jsonl":
        text = "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows) + "{broken\n"
    else:
        mark = "," if suffix == "csv" else "\t"
        text = f"image{mark}caption\n" + "".join(f"{image}{mark}{caption}\n" for image, caption in rows) + "a cell alone\n"
    (tmp_path / f"t.{suffix}").write_text(text)
    plan = plan_of(tmp_path, records_per_part=1)
    kept, tally = accounted(plan)
    assert kept == 40 and sum(reasons(tally).values()) == 1
    found = [item for unit in plan.units for item in plan.sources[0].read(unit.shard, lambda group: True) if isinstance(item, Pair)]
    assert {item.captions for item in found} == {tuple(f"caption {number + 40 * turn} of it" for turn in range(3)) for number in range(40)}
    assert len({item.id for item in found}) == 40
