"""One set written in every form that people have: equal counts, captions, pixels, groups and splits; and the blocks of docs/data.md, which are run."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.plan import Plan, make_plan
from data_pipeline.sources import open_source
from data_pipeline.sources.columns import CAPTION_NAMES, IMAGE_NAMES
from data_pipeline.sources.kinds import KINDS
from infra.config import Section, load
from infra.errors import DataError

PICTURES = 300
ROOT = Path(__file__).parents[3]


class Whole(Section):
    data: DataConfig = DataConfig()
    filters: FilterConfig = FilterConfig(near_duplicate_bits=-1, english=False)


def pictures() -> list[tuple[str, bytes, list[str]]]:
    """Name, file and two captions of each picture; seeded."""
    rng, made = np.random.default_rng(7), []
    for number in range(PICTURES):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(out, "PNG")
        words = ["a red cat number", "a picture of the red cat number"]
        made.append((f"{number:03d}.png", out.getvalue(), [f"{some} {number} on a table" for some in words]))
    return made


SET = pictures()


def images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, data, _ in SET:
        (folder / name).write_bytes(data)


def rows(prefix: str = "") -> list[tuple[str, str]]:
    return [(prefix + name, caption) for name, _, captions in SET for caption in captions]


def lines(header: str, mark: str, found: list[tuple[str, str]]) -> str:
    return "".join(f"{line}\n" for line in ([header] if header else []) + [mark.join(row) for row in found])


def struct_table(captions: pyarrow.Array, name: str) -> pyarrow.Table:
    image = pyarrow.array([{"bytes": data, "path": file} for file, data, _ in SET])
    return pyarrow.table({"image": image, name: captions})


def folder_form(place: Path) -> None:
    images(place)
    for name, _, captions in SET:
        (place / name).with_suffix(".txt").write_text("\n".join(captions))


def imagefolder(place: Path) -> None:
    images(place / "train")
    (place / "train" / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": c}) + "\n" for n, _, c in SET))


def imagefolder_csv(place: Path) -> None:
    images(place / "train")
    (place / "train" / "metadata.csv").write_text(lines("file_name,text", ",", rows()))


def imagefolder_parquet(place: Path) -> None:
    images(place / "train")
    found = [{"file_name": name, "text": captions} for name, _, captions in SET]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), place / "train" / "metadata.parquet")


def hub(place: Path) -> None:
    (place / "data").mkdir(parents=True)
    table = struct_table(pyarrow.array([captions for _, _, captions in SET]), "captions")
    pyarrow.parquet.write_table(table, place / "data" / "train-00000-of-00001-0123456789abcdef.parquet", row_group_size=100)


def hub_structs(place: Path) -> None:
    (place / "data").mkdir(parents=True)
    said = pyarrow.array([[{"raw": text, "tokens": text.split()} for text in captions] for _, _, captions in SET])
    pyarrow.parquet.write_table(struct_table(said, "sentences"), place / "data" / "train-00000-of-00001.parquet")


def save_to_disk(place: Path) -> None:
    (place / "train").mkdir(parents=True)
    table = struct_table(pyarrow.array([captions for _, _, captions in SET]), "captions")
    with pyarrow.ipc.new_stream(place / "train" / "data-00000-of-00001.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=100)
    (place / "train" / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}')
    (place / "dataset_dict.json").write_text('{"splits": ["train"]}')


def coco(place: Path) -> None:
    images(place / "train2017")
    (place / "annotations").mkdir()
    said = [{"id": 10 * n + k, "image_id": n, "caption": text} for n, (_, _, captions) in enumerate(SET) for k, text in enumerate(captions)]
    listed = [{"id": n, "file_name": name} for n, (name, _, _) in enumerate(SET)]
    (place / "annotations" / "captions_train2017.json").write_text(json.dumps({"images": listed, "annotations": said}))
    (place / "annotations" / "instances_train2017.json").write_text("{}")


def flickr8k(place: Path) -> None:
    images(place / "Images")
    (place / "captions.txt").write_text(lines("image,caption", ",", rows()))


def flickr30k(place: Path) -> None:
    images(place / "flickr30k_images")
    found = [(name, f"{number % 2}| {caption}") for number, (name, caption) in enumerate(rows())]
    (place / "results.csv").write_text(lines("image_name| comment_number| comment", "| ", found))


def open_clip(place: Path) -> None:
    images(place / "images")
    (place / "train.tsv").write_text(lines("filepath\ttitle", "\t", rows("images/")))


def shuffled(place: Path) -> None:
    images(place / "images")
    found = rows("images/")
    order = np.random.default_rng(3).permutation(len(found))
    (place / "all.csv").write_text(lines("image,caption", ",", [found[number] for number in order]))


def gzip_table(place: Path) -> None:
    images(place / "images")
    (place / "all.tsv.gz").write_bytes(gzip.compress(lines("image\tcaption", "\t", rows("images/")).encode()))


def tars(place: Path) -> None:
    place.mkdir(parents=True)
    for number, name in enumerate(("00000.tar", "00001.tar.gz")):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as file:
            for image, data, captions in SET[number::2]:
                for member, content in ((image, data), (f"{image[:-4]}.txt", "\n".join(captions).encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
        (place / name).write_bytes(gzip.compress(out.getvalue()) if number else out.getvalue())


FORMS: dict[str, Callable[[Path], None]] = {
    "folder": folder_form,
    "imagefolder": imagefolder,
    "imagefolder-csv": imagefolder_csv,
    "imagefolder-parquet": imagefolder_parquet,
    "hub": hub,
    "hub-structs": hub_structs,
    "save_to_disk": save_to_disk,
    "coco": coco,
    "flickr8k": flickr8k,
    "flickr30k": flickr30k,
    "open_clip": open_clip,
    "shuffled": shuffled,
    "gzip-table": gzip_table,
    "tars": tars,
}


VARIANTS = {"hub-structs", "imagefolder-csv", "imagefolder-parquet"}
"""Read by the block of another form."""


def plan_of(url: object) -> Plan:
    whole = load(Whole, {}, "preset", [f"data.sources={url}"])
    return make_plan(whole.data, whole.filters, 8, 0)


def records(plan: Plan) -> tuple[set[tuple[str, frozenset[str], str, str]], Tally]:
    """Digest of the image, captions, group and split of each record, and what was dropped."""
    tally, found = Tally(), set()
    for unit in plan.units:
        for record in parts.accepted(plan, unit, tally):
            found.add((hashlib.sha256(record.image).hexdigest(), frozenset(record.captions), record.group, record.split))
    return found, tally


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, frozenset[str], str, str]]:
    place = tmp_path_factory.mktemp("forms") / "folder"
    folder_form(place)
    found, tally = records(plan_of(place))
    assert len(found) == tally.seen == PICTURES and not tally.dropped
    assert 5 <= sum(split == "validation" for *_, split in found) <= 30
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_set_gives_the_same_captions_pixels_groups_and_split(
    form: str, expected: set[tuple[str, frozenset[str], str, str]], tmp_path: Path
) -> None:
    FORMS[form](tmp_path / "set")
    plan = plan_of(tmp_path / "set")
    found, tally = records(plan)
    assert tally.seen == PICTURES and not tally.dropped
    assert found == expected
    assert plan.carves == (
        form in ("imagefolder", "imagefolder-csv", "imagefolder-parquet", "hub", "hub-structs", "save_to_disk", "coco", "open_clip")
    )


def test_a_set_that_moves_keeps_the_ids_of_its_records_and_the_names_of_its_parts(tmp_path: Path) -> None:
    flickr8k(tmp_path / "here")
    before = plan_of(tmp_path / "here")
    names = [before.inputs(unit) for unit in before.units]
    ids = [record.id for unit in before.units for record in parts.accepted(before, unit, Tally())]
    (tmp_path / "here").rename(tmp_path / "there")
    after = plan_of(tmp_path / "there")
    assert names == [after.inputs(unit) for unit in after.units]
    assert ids == [record.id for unit in after.units for record in parts.accepted(after, unit, Tally())]


def test_two_sources_of_equal_names_stay_distinct_and_names_that_are_given_are_used(tmp_path: Path) -> None:
    for name in ("one", "two"):
        place = tmp_path / name / "set"
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(SET[0][1])
        (place / "a.txt").write_text("a red cat on a table")
    urls = [f'"{tmp_path}/one/set"', f'"{tmp_path}/two/set"']
    plan = plan_of(f"[{', '.join(urls)}]")
    assert [record.id for unit in plan.units for record in parts.accepted(plan, unit, Tally())] == ["a.png", "1:a.png"]
    named = plan_of(f'[{urls[0]}, {{url={urls[1]}, name="second"}}]')
    assert [record.id for unit in named.units for record in parts.accepted(named, unit, Tally())] == ["a.png", "second:a.png"]


def test_a_set_that_was_told_its_split_is_not_cut(tmp_path: Path) -> None:
    open_clip(tmp_path / "set")
    told = plan_of(f'{{url="{tmp_path}/set", split="train"}}')
    assert not told.carves and {split for *_, split in records(told)[0]} == {"train"}
    by_hash = plan_of(f'{{url="{tmp_path}/set", split="hash"}}')
    assert not by_hash.carves and {split for *_, split in records(by_hash)[0]} == {"train", "validation"}


def test_a_table_behind_any_number_of_images_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_source, "LOOK", 10)
    imagefolder(tmp_path / "set")
    (tmp_path / "set" / "train" / "metadata.jsonl").rename(tmp_path / "set" / "train" / "zzz.jsonl")
    assert open_source.find_kind(str(tmp_path / "set")) == "table"


def test_structs_without_a_known_field_name_their_column(tmp_path: Path) -> None:
    table = struct_table(pyarrow.array([[{"foo": "x", "bar": 1}]] * PICTURES), "captions")
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    plan = plan_of(tmp_path)
    with pytest.raises(DataError, match=r"column 'captions' holds structs of foo, bar, none of which is known to hold a caption; .* as captions"):
        list(plan.sources[0].read(plan.units[0].shard, lambda group: True))


def test_an_arrow_stream_that_breaks_off_between_batches_is_damaged_and_a_selection_is_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set")
    place = tmp_path / "set" / "train" / "data-00000-of-00001.arrow"
    place.write_bytes(place.read_bytes()[:-8])
    plan = plan_of(tmp_path / "set")
    with pytest.raises(DataError, match=r"truncated: the end marker of an Arrow stream is missing; fetch it again"):
        list(plan.sources[0].read(plan.units[0].shard, lambda group: True))
    (tmp_path / "set" / "train" / "state.json").write_text('{"_indices_data_files": [{"filename": "indices.arrow"}]}')
    with pytest.raises(DataError, match=r"a selection of the rows .* call flatten_indices\(\) before save_to_disk"):
        plan_of(tmp_path / "set")


def test_coco_without_its_lists_is_refused_and_images_without_entries_are_counted(tmp_path: Path) -> None:
    coco(tmp_path / "set")
    place = tmp_path / "set" / "annotations" / "captions_train2017.json"
    tree = json.loads(place.read_text())
    tree["annotations"] += [{"image_id": 9999, "caption": "of no image that is listed"}]
    place.write_text(json.dumps(tree))
    (tmp_path / "set" / "train2017" / SET[3][0]).unlink()
    found, tally = records(plan_of(tmp_path / "set"))
    assert len(found) == PICTURES - 1 and {reason: entry["count"] for reason, entry in tally.dropped.items()} == {"missing image": 2}
    place.write_text("{}")
    plan = plan_of(tmp_path / "set")
    with pytest.raises(DataError, match=r"not captions in COCO's form: a JSON object with the lists 'images'"):
        list(plan.sources[0].read(plan.units[0].shard, lambda group: True))


# --- The page -----------------------------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = dict(re.findall(r"<!-- form: ([\w-]+) -->\n\n    (.+)\n", PAGE))


def test_the_page_has_a_block_for_every_form() -> None:
    assert set(BLOCKS) == set(FORMS) - VARIANTS


@pytest.mark.parametrize("form", sorted(set(FORMS) - VARIANTS))
def test_the_block_of_a_form_reads_it(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / "set")
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", BLOCKS[form])]
    assert words[:4] == ["python", "launcher.py", "prepare", "PRESET"]
    given = [word.replace("/data/set", str(tmp_path / "set")) for word in words if word.startswith("data.")]
    whole = load(Whole, {}, "preset", [*given])
    plan = make_plan(whole.data, whole.filters, 8, 0)
    found, _ = records(plan)
    assert len(found) == PICTURES and {split for *_, split in found} == {"train", "validation"}


def test_the_page_lists_kinds_and_usual_names() -> None:
    for kind in KINDS:
        assert re.search(rf"^\| {kind.name} \| .* \| {re.escape(kind.unit)} \|$", PAGE, re.MULTILINE), kind.name
    for name in (*IMAGE_NAMES, *(word for names in CAPTION_NAMES for word in names.replace("?", "").split("|"))):
        assert f"`{name}`" in PAGE, name


def test_a_source_kind_touches_the_places_that_the_architecture_names() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("To add a source")[2].partition("\n\n\n")[0]
    places = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(places) == 5
    for kind in KINDS:
        assert kind.name in DataConfig.model_fields["sources"].annotation.__args__[0].model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
    assert all((ROOT / place).exists() for place in places if "<" not in place)
