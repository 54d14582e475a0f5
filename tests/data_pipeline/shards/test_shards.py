"""Shard sets: parts, versions, exclusions, take-down, and what a consumer refuses."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.audit import check_set
from data_pipeline.shards import deletion, schema, versions
from data_pipeline.shards import index as shard_index
from data_pipeline.shards.part_writer import write_part
from data_pipeline.shards.shard_set import CODES_SCHEMA, IMAGE_SCHEMA, CodeRecord, ImageRecord, ShardSet, open_set, part_done, read_marker
from data_pipeline.shards.versions import Part
from infra import storage
from infra.digests import id_hash
from infra.errors import DataError
from tests.support.made_sets import as_dict


def image(number: int, size: int = 20) -> ImageRecord:
    pixels = bytes([number % 256]) * size
    return ImageRecord(f"id-{number}", [f"caption {number}", "ä"], pixels, 4, 5, "source", "CC-BY-4.0", "group", "train", (number, number + 1))


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def parts(count: int) -> list[Part]:
    return [Part(f"{part:05d}", "here") for part in range(count)]


def merge(url: str, count: int, settings: dict[str, int], schema: str = IMAGE_SCHEMA, **fields: Any) -> ShardSet:
    return versions.merge(url, parts(count), versions.collect(url, parts(count), "prepare"), schema, settings, **fields)


def make_set(url: str, counts: tuple[int, ...], **fields: Any) -> ShardSet:
    number = 0
    for part, count in enumerate(counts):
        write_part(url, f"{part:05d}", [image(number + index) for index in range(count)], shard_bytes=300)
        number += count
    return merge(url, len(counts), {"k": 1}, **fields)


def ids(shard_set: ShardSet) -> list[str]:
    return [record["id"] for record in shard_set.records()]


def test_records_come_back_in_order_with_all_columns(tmp_path: Path) -> None:
    make_set(str(tmp_path), (7, 0, 3))
    opened = open_set(str(tmp_path), IMAGE_SCHEMA)
    records = list(opened.records())
    assert [record["id"] for record in records] == [f"id-{number}" for number in range(10)]
    assert records[9] == as_dict(image(9)) and "prints" not in records[9]
    assert list(opened.captions()) == [record["captions"] for record in records]
    assert np.concatenate(opened.id_hashes()).tolist() == [id_hash(record["id"]) for record in records]
    assert np.concatenate(opened.prints()).tolist() == [[number, number + 1, id_hash("group")] for number in range(10)]
    assert len(opened.shards) > 3, "the size limit cuts parts into shards"
    assert {shard.source for shard in opened.shards} == {"here"} and sum(shard.samples for shard in opened.shards) == 10
    assert all((tmp_path / shard.basename).is_file() for shard in opened.shards)
    assert [row["id"] for row in opened.rows_at([9, 0, 7])] == ["id-9", "id-0", "id-7"]


def test_code_records_keep_their_codes_exactly(tmp_path: Path) -> None:
    codes = np.array([0, 65535, 7, 8], np.uint16)
    crop = {"box": [0, 1, 2, 3], "resize": 2, "offset": [0, 0], "flip": False}
    write_part(str(tmp_path), "00000", [CodeRecord("a", ["x"], codes, crop, 2, 2**62)])
    (record,) = merge(str(tmp_path), 1, {}, CODES_SCHEMA).records()
    assert record["codes"].dtype == np.uint16 and record["codes"].tolist() == codes.tolist()
    assert (record["crop"], record["crop_index"], record["seed"]) == (crop, 2, 2**62)


def test_writing_twice_is_byte_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_set(str(tmp_path / name), (9, 0, 4))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = tree(tmp_path / "a")
    make_set(str(tmp_path / "a"), (9, 0, 4))
    assert tree(tmp_path / "a") == before


def test_a_version_whose_parts_are_gone_names_those_of_equal_content_that_were_made_again(tmp_path: Path) -> None:
    url, old, new = str(tmp_path), ("a1", "b2"), ("a1", "c3")
    for inputs, number in (("a1", 1), ("b2", 2), ("c3", 2)):
        write_part(url, inputs, [image(number)])

    def merged(names: tuple[str, ...], producer: str) -> ShardSet:
        parts = [Part(name, "here") for name in names]
        return versions.merge(url, parts, versions.collect(url, parts, "prepare"), IMAGE_SCHEMA, {"k": 1}, producer={"commit": producer})

    def places(of: ShardSet) -> list[str]:
        return [shard.basename.partition("/")[0] for shard in of.shards]

    first = merged(old, "first")
    again = merged(new, "second")
    assert again.content_hash == first.content_hash and places(again) == ["part-a1", "part-b2"], "a version stays as it is while its parts are there"
    shutil.rmtree(tmp_path / "part-b2")
    mended = merged(new, "third")
    assert mended.content_hash == first.content_hash and places(mended) == places(open_set(url, IMAGE_SCHEMA)) == ["part-a1", "part-c3"]
    assert ids(open_set(url, IMAGE_SCHEMA)) == ["id-1", "id-2"] and mended.manifest["producer"] == {"commit": "first"}
    assert ids(open_set(url, IMAGE_SCHEMA, version=first.content_hash)) == ["id-1", "id-2"]
    write_part(url, "d4", [image(3)])
    merged(("d4",), "another version")
    write_part(url, "b2", [image(2)])
    merged(old, "and back")
    assert check_set.read_layout(url).problems == [], "the copies at the top are the version's"
    assert storage.read_json(f"{url}/index.json")["version"] == 2, "the form that mosaicml-streaming reads"


def test_a_part_is_done_for_its_inputs_only(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert not part_done(url, "x")
    write_part(url, "x", [image(1)], extra={"reasons": {"a": 1}})
    assert part_done(url, "x")
    assert not part_done(url, "y")
    marker = read_marker(url, "x")
    assert marker is not None and marker["extra"] == {"reasons": {"a": 1}} and marker["count"] == 1


def test_a_part_that_fails_midway_is_not_done_and_leaves_no_file(tmp_path: Path) -> None:
    url = str(tmp_path)
    before = make_set(url, (3,))
    files = tree(tmp_path)

    def failing() -> Iterator[ImageRecord]:
        yield image(1)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_part(url, "other inputs", failing())
    assert not part_done(url, "other inputs")
    assert tree(tmp_path) == files and open_set(url, IMAGE_SCHEMA) == before, "what was there stays readable"


def test_a_version_is_whole_when_its_manifest_is_there_wherever_the_merge_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    hidden = np.array([1, 4])
    whole = make_set(str(tmp_path / "whole"), (3, 2), excluded=hidden)
    expected, plain = tree(tmp_path / "whole"), storage.write_bytes
    for survived in range(20):
        folder = tmp_path / str(survived)
        left = [survived]

        def write(url: str, data: bytes, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            plain(url, data)

        shutil.copytree(
            tmp_path / "whole",
            folder,
            ignore=lambda place, names: [name for name in names if place == str(tmp_path / "whole") and not name.startswith("part-")],
        )
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(storage, "write_bytes", write)
            merge(str(folder), 2, {"k": 1}, excluded=hidden)
        for version in ("", whole.content_hash):
            with contextlib.suppress(DataError):  # there is none yet
                assert ids(open_set(str(folder), IMAGE_SCHEMA, version=version)) == ids(whole) == ["id-0", "id-2", "id-3"]
        finished = tree(folder) == expected
        merge(str(folder), 2, {"k": 1}, excluded=hidden)
        assert tree(folder) == expected
        if finished:
            break
    assert survived == 5, "each of five files was the first that was not written"


def test_merging_again_changes_nothing_and_the_producer_is_not_content(tmp_path: Path) -> None:
    url = str(tmp_path)
    opened = make_set(url, (3, 2), parents={"images": "abc"}, producer={"commit": "one"})
    before = tree(tmp_path)
    again = merge(url, 2, {"k": 1}, parents={"images": "abc"}, producer={"commit": "two"})
    assert tree(tmp_path) == before and again == opened == open_set(url, IMAGE_SCHEMA)
    assert (opened.count, len(opened.parts), opened.manifest["producer"]) == (5, 2, {"commit": "one"})
    others = [
        merge(url, 2, {"k": 2}, parents={"images": "abc"}).content_hash,
        merge(url, 2, {"k": 1}, parents={"images": "abd"}).content_hash,
        merge(url, 1, {"k": 1}, parents={"images": "abc"}).content_hash,
        merge(url, 2, {"k": 1}, parents={"images": "abc"}, excluded=np.array([1])).content_hash,
    ]
    assert len({opened.content_hash, *others}) == 5


def test_the_content_hash_sees_every_byte_of_a_record_and_not_where_it_lies(tmp_path: Path) -> None:
    hashes = []
    for name, record, inputs in (("a", image(1), "00000"), ("b", image(2), "00000"), ("c", image(1), "elsewhere")):
        url = str(tmp_path / name)
        write_part(url, inputs, [record])
        where = [Part(inputs, "here")]
        hashes.append(versions.merge(url, where, versions.collect(url, where, "prepare"), IMAGE_SCHEMA, {}).content_hash)
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]


def test_old_versions_stay_readable_when_a_set_grows_and_shrinks(tmp_path: Path) -> None:
    url = str(tmp_path)
    two = make_set(url, (2, 2))
    files = tree(tmp_path)
    three = make_set(url, (2, 2, 2))
    assert {name for name in files if name.startswith("part-")} <= tree(tmp_path).keys()
    assert ids(open_set(url, IMAGE_SCHEMA)) == [f"id-{number}" for number in range(6)]
    assert ids(open_set(url, IMAGE_SCHEMA, version=two.content_hash)) == [f"id-{number}" for number in range(4)]
    one = merge(url, 1, {"k": 1})
    assert ids(open_set(url, IMAGE_SCHEMA)) == ["id-0", "id-1"]
    assert open_set(url, IMAGE_SCHEMA, version=three.content_hash).count == 6
    merge(url, 2, {"k": 1})
    assert open_set(url, IMAGE_SCHEMA) == two, "a version that comes back is the same one"
    assert one.content_hash not in (two.content_hash, three.content_hash)


def test_excluded_records_are_not_read_by_anyone(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_set(url, (4, 0, 3), excluded=np.array([1, 4]))
    opened = open_set(url, IMAGE_SCHEMA)
    assert (opened.count, opened.stored, opened.manifest["count"]) == (5, 7, 5)
    assert ids(opened) == ["id-0", "id-2", "id-3", "id-5", "id-6"]
    assert [captions[0] for captions in opened.captions()] == [f"caption {number}" for number in (0, 2, 3, 5, 6)]
    assert [opened.removed_rows(part).tolist() for part in range(3)] == [[1], [], [0]]


def test_a_take_down_hides_records_at_once_and_a_missing_list_is_an_error(tmp_path: Path) -> None:
    url, takedown = str(tmp_path / "set"), tmp_path / "takedown.txt"
    make_set(url, (4, 3), excluded=np.array([1]))
    takedown.write_text("id-6\n\n id-0 \nnobody\nid-1\n")
    opened = open_set(url, IMAGE_SCHEMA, takedown=str(takedown))
    assert opened.taken_down.tolist() == [0, 1, 6] and opened.removed.tolist() == [0, 1, 6]
    assert (opened.count, ids(opened)) == (4, ["id-2", "id-3", "id-4", "id-5"])
    assert opened.content_hash == open_set(url, IMAGE_SCHEMA).content_hash, "the version is the same, its readers see less of it"
    with pytest.raises(DataError, match=r"missing.txt"):
        open_set(url, IMAGE_SCHEMA, takedown=str(tmp_path / "missing.txt"))


def test_an_unfinished_part_is_named_when_merging(tmp_path: Path) -> None:
    write_part(str(tmp_path), "00000", [image(0)])
    with pytest.raises(DataError, match=r"1 of 2 parts are not finished \(part-00001\); run the stage 'prepare' again, it skips"):
        merge(str(tmp_path), 2, {})
    assert not storage.exists(storage.join(str(tmp_path), "manifest.json"))


def test_a_consumer_refuses_what_it_did_not_expect(tmp_path: Path) -> None:
    url = str(tmp_path)
    with pytest.raises(DataError, match=r"no shard set here \(manifest.json is missing\); run the stage 'encode' first"):
        open_set(url, CODES_SCHEMA)
    make_set(url, (1,), parents={"dvae": "a" * 64})
    with pytest.raises(DataError, match=r"no version cccccccccccccccc of a shard set here"):
        open_set(url, IMAGE_SCHEMA, version="c" * 64)
    with pytest.raises(DataError, match=r"holds schema 'image/1', this stage reads 'codes/1'; point data.images or data.codes"):
        open_set(url, CODES_SCHEMA)
    with pytest.raises(DataError, match=r"made from dvae aaaaaaaaaaaa, but this run uses dvae bbbbbbbbbbbb; run 'prepare' again"):
        open_set(url, IMAGE_SCHEMA, {"dvae": "b" * 64})
    with pytest.raises(DataError, match=r"made from clip none, but this run uses clip c"):
        open_set(url, IMAGE_SCHEMA, {"clip": "c"})
    assert open_set(url, IMAGE_SCHEMA, {"dvae": "a" * 64}).count == 1


@pytest.mark.parametrize("name", ["shard.00000.mds", "captions.jsonl.gz", "ids.u64", "prints.u64"])
def test_a_damaged_file_is_not_read(tmp_path: Path, name: str) -> None:
    opened = make_set(str(tmp_path), (3, 3))
    path = tmp_path / "part-00001" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(list(opened.read_part(0))) == 3
    read = {"shard.00000.mds": lambda: list(opened.read_part(1)), "captions.jsonl.gz": lambda: list(opened.captions())}
    with pytest.raises(DataError, match=rf"part-00001/{name}: damaged, .* delete .*part-00001 and run the stage that wrote it again"):
        read.get(name, opened.id_hashes if name == "ids.u64" else opened.prints)()


def test_a_set_on_s3_holds_the_same_bytes(s3: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("id-3\n")
    for url in (s3, str(tmp_path / "set")):
        make_set(url, (5, 0, 2), excluded=np.array([2]))
    remote, local = (open_set(url, IMAGE_SCHEMA, takedown=str(tmp_path / "list")) for url in (s3, str(tmp_path / "set")))
    assert remote.manifest == local.manifest
    assert list(remote.records()) == list(local.records()) and remote.count == 5
    assert list(remote.captions()) == list(local.captions())
    assert remote.rows_at([6])[0]["id"] == "id-6"
    with pytest.raises(DataError, match="ends after"):
        storage.read_range(storage.join(s3, remote.shards[0].basename), 0, 1 << 20)
    with pytest.raises(DataError, match="ends after"):
        storage.read_range(storage.join(local.url, local.shards[0].basename), 0, 1 << 20)


def test_a_purge_deletes_the_parts_of_taken_down_records_and_nothing_else(tmp_path: Path) -> None:
    url = str(tmp_path)
    old = make_set(url, (3, 3))
    make_set(url, (3, 3, 2))
    assert deletion.plan_purge(url, frozenset({"nobody"})) is None
    purge = deletion.plan_purge(url, frozenset({"id-7", "nobody"}))
    assert purge is not None and (purge.records, purge.parts, len(purge.versions)) == (1, ["part-00002"], 1)
    before = tree(tmp_path)
    purge.carry_out()
    gone = before.keys() - tree(tmp_path).keys()
    assert "manifest.json" in gone and all(name.startswith(("part-00002/", "versions/")) or name == "manifest.json" for name in gone)
    assert not part_done(url, "00002") and ids(open_set(url, IMAGE_SCHEMA, version=old.content_hash)) == [f"id-{number}" for number in range(6)]
    both = deletion.plan_purge(url, frozenset({"id-1", "id-4"}))
    assert both is not None and (both.records, both.parts) == (2, ["part-00000", "part-00001"])


@pytest.mark.parametrize("name", ["", "..", "part-", "part-xyz", "../other/part-aa", "part-aa/../.."])
def test_a_manifest_that_names_something_else_than_a_part_is_no_plan_of_a_purge(tmp_path: Path, name: str) -> None:
    place = storage.join(make_set(str(tmp_path), (3, 3)).version_url, "manifest.json")
    manifest = storage.read_json(place)
    manifest["parts"][1]["name"] = name
    storage.write_json(place, manifest)
    with pytest.raises(DataError, match=r"expected part-<hexadecimal digits>: it was changed by hand, or is damaged"):
        deletion.plan_purge(str(tmp_path), frozenset({"id-1"}))


def test_a_purge_that_is_killed_anywhere_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    for calls in range(1, 9):
        url = str(tmp_path / str(calls))
        make_set(url, (3, 3))
        purge = deletion.plan_purge(url, frozenset({"id-4"}))
        assert purge is not None
        left = [calls]

        def mortal(name: str, left: list[int] = left) -> Any:
            real = getattr(storage, name)

            def act(place: str) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                real(place)

            return act

        with monkeypatch.context() as patch:
            for name in ("delete", "delete_prefix"):
                patch.setattr(storage, name, mortal(name))
            with contextlib.suppress(Killed):
                purge.carry_out()
        again = deletion.plan_purge(url, frozenset({"id-4"}))
        if again is not None:
            again.carry_out()
        files = storage.list_files(url)
        assert not [name for name in files if name.startswith("part-00001")] and "part-00000/done.json" in files
        assert not [name for name in files if name.endswith("manifest.json")], "no version is left that could be read"
        assert deletion.plan_purge(url, frozenset({"id-4"})) is None


def test_parts_of_a_set_that_is_written_at_once_are_of_the_sources_that_are_named(tmp_path: Path) -> None:
    records = [[image(0)], [image(1)]]
    named = versions.write_set(str(tmp_path / "named"), records, IMAGE_SCHEMA, sources=["a", "b"])
    assert [part["source"] for part in named.parts] == ["a", "b"]
    assert [part["source"] for part in versions.write_set(str(tmp_path / "plain"), records, IMAGE_SCHEMA).parts] == ["", ""]


def test_rows_of_a_large_set_are_checked_in_pieces_and_equal_lists_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "PIECE", 2)
    monkeypatch.setattr(shard_index, "PIECE", 2)
    made = make_set(str(tmp_path), (1, 1, 1, 1, 1))
    found = open_set(str(tmp_path), IMAGE_SCHEMA, version=made.content_hash)
    assert found.shards == made.shards and len(found.shards) >= 5
    first, last = found.shards[0].entry, found.shards[-1].entry
    assert first["column_names"] is last["column_names"] and first["raw_data"] is not last["raw_data"]
    url = f"{made.version_url}/index.json"
    index = storage.read_json(url)
    assert [shard.entry for shard in found.shards] == index["shards"], "nothing of an entry is lost where it is packed"
    assert found.shards[0].hashes == index["shards"][0]["raw_data"]["hashes"]
    index["shards"][3]["samples"] = -1
    storage.write_json(url, index)
    with pytest.raises(
        DataError,
        match=r"index\.json: shards from 2 on: damaged, or not written by this project: shards\.1\.samples: .*; run 'launcher\.py validate' on the set",
    ):
        _ = open_set(str(tmp_path), IMAGE_SCHEMA, version=made.content_hash).shards


def test_entries_of_shards_outside_of_their_list_are_refused(tmp_path: Path) -> None:
    made = make_set(str(tmp_path), (1, 1))
    url = f"{made.version_url}/index.json"
    index = storage.read_json(url)
    for changed in (index | {"more": index["shards"][:1]}, {"more": index["shards"], "shards": [*index["shards"][1:]]}):
        storage.write_json(url, changed)
        with pytest.raises(DataError, match=r"index\.json: damaged, it has entries of shards outside of its list 'shards'; run '.*validate"):
            _ = open_set(str(tmp_path), IMAGE_SCHEMA, version=made.content_hash).shards
    for changed in ({"shards": [0, 1]}, {"shards": [*index["shards"], {"samples": 1}]}, [index["shards"][0]], {}):
        storage.write_json(url, changed)
        with pytest.raises(DataError, match=r"index\.json: damaged, or not written by this project"):
            _ = open_set(str(tmp_path), IMAGE_SCHEMA, version=made.content_hash).shards
