"""Shard sets: parts, markers, merging, and what a consumer refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards import (
    CODES_SCHEMA,
    IMAGE_SCHEMA,
    CodeRecord,
    ImageRecord,
    merge,
    open_set,
    part_done,
    read_marker,
    read_part,
    write_part,
)
from infra import storage
from infra.errors import DataError


def image(number: int, size: int = 20) -> ImageRecord:
    return ImageRecord(f"id-{number}", [f"caption {number}", "ä"], bytes([number % 256]) * size, 4, 5, "source", "CC-BY-4.0", "group", "train")


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def make_set(url: str, counts: tuple[int, ...], **fields: Any) -> None:
    number = 0
    for part, count in enumerate(counts):
        write_part(url, part, [image(number + index) for index in range(count)], f"inputs-{part}", shard_bytes=300)
        number += count
    merge(url, len(counts), IMAGE_SCHEMA, {"k": 1}, **fields)


def test_records_come_back_in_order_with_all_columns(tmp_path: Path) -> None:
    make_set(str(tmp_path), (7, 0, 3))
    records = list(open_set(str(tmp_path), IMAGE_SCHEMA).records())
    assert [record["id"] for record in records] == [f"id-{number}" for number in range(10)]
    assert records[9] == {name: getattr(image(9), name) for name in image(9).columns()}
    assert len([name for name in storage.list_files(str(tmp_path)) if name.endswith(".mds")]) > 3, "the size limit cuts parts into shards"


def test_code_records_keep_their_codes_exactly(tmp_path: Path) -> None:
    codes = np.array([0, 65535, 7, 8], np.uint16)
    crop = {"box": [0, 1, 2, 3], "resize": 2, "offset": [0, 0], "flip": False}
    write_part(str(tmp_path), 0, [CodeRecord("a", ["x"], codes, crop, 2, 2**62)], "inputs")
    (record,) = read_part(str(tmp_path), 0)
    assert record["codes"].dtype == np.uint16 and record["codes"].tolist() == codes.tolist()
    assert (record["crop"], record["crop_index"], record["seed"]) == (crop, 2, 2**62)


def test_writing_twice_is_byte_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_set(str(tmp_path / name), (9, 0, 4))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = tree(tmp_path / "a")
    make_set(str(tmp_path / "a"), (9, 0, 4))
    assert tree(tmp_path / "a") == before


def test_a_part_is_done_for_its_inputs_only(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert not part_done(url, 3, "x")
    write_part(url, 3, [image(1)], "x", extra={"reasons": {"a": 1}})
    assert part_done(url, 3, "x")
    assert not part_done(url, 3, "y")
    marker = read_marker(url, 3)
    assert marker is not None and marker["extra"] == {"reasons": {"a": 1}} and marker["count"] == 1


def test_a_part_that_fails_midway_is_not_done_and_leaves_no_set(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_set(url, (3,))

    def failing() -> Iterator[ImageRecord]:
        yield image(1)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_part(url, 0, failing(), "other inputs")
    assert not part_done(url, 0, "inputs-0")
    with pytest.raises(DataError, match="no shard set here"):
        open_set(url, IMAGE_SCHEMA)


def test_merging_again_changes_nothing_and_the_producer_is_not_content(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_set(url, (3, 2), parents={"images": "abc"}, producer={"commit": "one"})
    before, opened = tree(tmp_path), open_set(url, IMAGE_SCHEMA)
    again = merge(url, 2, IMAGE_SCHEMA, {"k": 1}, {"images": "abc"}, {"commit": "two"})
    assert tree(tmp_path) == before and again == opened
    assert (opened.count, opened.num_parts, opened.manifest["producer"]) == (5, 2, {"commit": "one"})
    others = [
        merge(url, 2, IMAGE_SCHEMA, {"k": 2}, {"images": "abc"}).content_hash,
        merge(url, 2, IMAGE_SCHEMA, {"k": 1}, {"images": "abd"}).content_hash,
        merge(url, 1, IMAGE_SCHEMA, {"k": 1}, {"images": "abc"}).content_hash,
    ]
    assert len({opened.content_hash, *others}) == 4


def test_the_content_hash_sees_every_byte_of_a_record(tmp_path: Path) -> None:
    hashes = []
    for name, record in (("a", image(1)), ("b", image(2))):
        write_part(str(tmp_path / name), 0, [record], "inputs")
        hashes.append(merge(str(tmp_path / name), 1, IMAGE_SCHEMA, {}).content_hash)
    assert hashes[0] != hashes[1]


def test_merging_fewer_parts_deletes_the_leftovers(tmp_path: Path) -> None:
    make_set(str(tmp_path), (2, 2, 2))
    merge(str(tmp_path), 2, IMAGE_SCHEMA, {})
    assert sorted({name.split("/")[0] for name in storage.list_files(str(tmp_path))}) == ["index.json", "manifest.json", "part-00000", "part-00001"]
    assert [record["id"] for record in open_set(str(tmp_path), IMAGE_SCHEMA).records()] == ["id-0", "id-1", "id-2", "id-3"]


def test_an_unfinished_part_is_named_when_merging(tmp_path: Path) -> None:
    write_part(str(tmp_path), 0, [image(0)], "x")
    with pytest.raises(DataError, match=r"1 of 2 parts are not finished \(part-00001\); run the stage again"):
        merge(str(tmp_path), 2, IMAGE_SCHEMA, {})
    assert not storage.exists(storage.join(str(tmp_path), "manifest.json"))


def test_a_consumer_refuses_what_it_did_not_expect(tmp_path: Path) -> None:
    url = str(tmp_path)
    with pytest.raises(DataError, match=r"no shard set here \(manifest.json is missing\); run the stage 'encode' first"):
        open_set(url, CODES_SCHEMA)
    make_set(url, (1,), parents={"dvae": "a" * 64})
    with pytest.raises(DataError, match=r"holds schema 'image/1', this stage reads 'codes/1'; point data.images or data.codes"):
        open_set(url, CODES_SCHEMA)
    with pytest.raises(DataError, match=r"made from dvae aaaaaaaaaaaa, but this run uses dvae bbbbbbbbbbbb; delete .* run 'prepare' again"):
        open_set(url, IMAGE_SCHEMA, {"dvae": "b" * 64})
    with pytest.raises(DataError, match=r"made from clip none, but this run uses clip c"):
        open_set(url, IMAGE_SCHEMA, {"clip": "c"})
    assert open_set(url, IMAGE_SCHEMA, {"dvae": "a" * 64}).count == 1


def test_a_damaged_or_unfinished_part_is_not_read(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_set(url, (3, 3))
    shard = tmp_path / "part-00001" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert len(list(read_part(url, 0))) == 3
    with pytest.raises(DataError, match=r"part-00001/shard.00000.mds: damaged, .* delete .*part-00001 and run its stage again"):
        list(read_part(url, 1))
    with pytest.raises(DataError, match=r"part-00002: not finished; run the stage that writes"):
        list(read_part(url, 2))


def test_a_set_on_s3_holds_the_same_bytes(s3: str, tmp_path: Path) -> None:
    for url in (s3, str(tmp_path)):
        make_set(url, (5, 0, 2))
    remote, local = open_set(s3, IMAGE_SCHEMA), open_set(str(tmp_path), IMAGE_SCHEMA)
    assert remote.manifest == local.manifest
    assert list(remote.records()) == list(local.records())
