"""Sets that somebody else made: nothing in them is executed, and no name in them leads out of them. About 10 s, half of it the S3 server."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streaming.base.format.mds.reader import MDSReader

from data_pipeline.audit.check_parts import Rules, check_part
from data_pipeline.audit.check_set import read_layout
from data_pipeline.audit.random_records import random_rows
from data_pipeline.loading.loaders import SequentialReader, ShardLoader
from data_pipeline.shards.deletion import plan_purge
from data_pipeline.shards.schema import IMAGE_COLUMNS
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ShardSet, open_set, version_url
from infra import storage
from infra.errors import DataError
from infra.world import World
from tests.support.forged_sets import Payload, publish, rehash, with_columns
from tests.support.made_sets import image, make_images

OUTSIDE = ("../victim", "/victim", "..", ".", "", "a/../../victim", "part-aa/../../victim", "sub/victim", "vic\0tim", "victim\n", ".tmp-x", "v" * 300)


def read_all(url: str, cache: str = "") -> None:
    """Whatever a stage or a verb does with an image set."""
    made = open_set(url, IMAGE_SCHEMA)
    list(made.records())
    list(made.captions())
    made.rows_at([0])
    random_rows(made, 3)
    list(SequentialReader(made, World.single(), 9, 2, lambda record, _: dict(record), lambda samples: samples, cache))


def validated(url: str) -> list[str]:
    """What ``validate`` finds wrong."""
    layout = read_layout(url)
    rules = Rules(IMAGE_SCHEMA, layout.manifest.get("settings") or {})
    problems = [*layout.problems, *(problem for job in layout.jobs(rules) for problem in check_part(job).problems)]
    return [problem.what for problem in problems]


def test_a_pickled_column_is_refused_by_every_reader_and_runs_nothing(tmp_path: Path) -> None:
    sign = tmp_path / "executed"
    made = make_images(str(tmp_path / "set"), [[image(number) for number in range(4)]])
    with_columns(made, IMAGE_COLUMNS | {"image": "pkl"}, {"image": Payload(sign)})
    entry = json.loads((tmp_path / "set" / made.parts[0]["name"] / "index.json").read_text())["shards"][0]
    MDSReader.from_json(str(tmp_path / "set" / made.parts[0]["name"]), None, entry).decode_sample(
        MDSReader.from_json(str(tmp_path / "set" / made.parts[0]["name"]), None, entry).get_sample_data(0)
    )
    assert sign.exists(), "streaming's own reader runs it, so the set is a real attack"
    sign.unlink()
    opened = open_set(made.url, IMAGE_SCHEMA)
    readers: list[Callable[[], object]] = [
        lambda: list(opened.records()),
        lambda: opened.rows_at([0]),
        lambda: random_rows(opened, 2),
        lambda: SequentialReader(opened, World.single(), 2, 2, lambda record, _: dict(record), list),
        lambda: ShardLoader([opened], tmp_path, World.single(), 2, 0, lambda record, _: dict(record), list),
    ]
    for reader in readers:
        with pytest.raises(DataError, match=r"index\.json: damaged, or not written by this project: shards\.0\.column_encodings\.\d: .* found 'pkl'"):
            reader()
    assert any("found 'pkl'" in what for what in validated(made.url))
    assert not sign.exists()


def test_a_pickled_column_that_only_the_index_of_the_part_names_is_refused_too(tmp_path: Path) -> None:
    made = make_images(str(tmp_path / "set"), [[image(0)]])
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    with_columns(made, IMAGE_COLUMNS | {"image": "pkl"}, {"image": Payload(tmp_path / "executed")})
    publish(made, json.loads((tmp_path / "set" / "manifest.json").read_text()), index)
    opened = open_set(made.url, IMAGE_SCHEMA)
    assert opened.shards, "the set's own index is harmless"
    with pytest.raises(DataError, match="found 'pkl'"):
        list(opened.records())
    assert any("found 'pkl'" in what for what in validated(made.url))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("column_encodings", ["ndarray:object:4"], "column_encodings.0: string should match"),
        ("column_encodings", ["jpeg"], "found 'jpeg'"),
        ("compression", "zstd", "compression: input should be None, found 'zstd'"),
        ("format", "json", "format: input should be 'mds', found 'json'"),
        ("samples", 10**12, "do not fit into"),
        ("samples", -1, "samples: input should be greater than or equal to 0, found -1"),
        ("samples", True, "samples: input should be a valid integer, found True"),
    ],
)
def test_what_else_streaming_would_decode_or_unpack_is_refused(tmp_path: Path, field: str, value: Any, words: str) -> None:
    made = make_images(str(tmp_path), [[image(0)]])
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0][field] = value
    publish(made, json.loads((tmp_path / "manifest.json").read_text()), index)
    with pytest.raises(DataError) as caught:
        _ = open_set(made.url, IMAGE_SCHEMA).shards
    assert words in str(caught.value)


def test_columns_of_another_schema_are_refused_before_a_record_is_read(tmp_path: Path) -> None:
    made = make_images(str(tmp_path), [[image(0)]])
    with_columns(made, {name: kind for name, kind in IMAGE_COLUMNS.items() if name != "captions"}, {})
    with pytest.raises(DataError, match="column 'captions' is None, the schema has json"):
        _ = open_set(made.url, IMAGE_SCHEMA).shards
    with pytest.raises(DataError, match="column 'captions' is None, the schema has json"):
        list(open_set(made.url, IMAGE_SCHEMA).records())


@pytest.mark.parametrize("captions", [[], "text", [1], {"a": 1}, [["a"]], None])
def test_captions_that_are_no_texts_are_damage(tmp_path: Path, captions: Any) -> None:
    made = make_images(str(tmp_path), [[image(0)]])
    with_columns(made, IMAGE_COLUMNS, {"captions": captions})
    with pytest.raises(DataError, match="column 'captions' of a row does not decode"):
        list(open_set(made.url, IMAGE_SCHEMA).records())


def _forge(made: ShardSet, where: str, name: str) -> None:
    root = Path(made.url)
    manifest, index = (json.loads((root / file).read_text()) for file in ("manifest.json", "index.json"))
    if where == "part":
        manifest["parts"][0]["name"] = name
    elif where == "file":
        manifest["parts"][0]["files"][0] = copy.deepcopy(manifest["parts"][0]["files"][0]) | {"name": name}
    elif where == "shard":
        index["shards"][0]["raw_data"]["basename"] = name
    elif where == "shard of the part":
        index["shards"][0]["raw_data"]["basename"] = f"{made.parts[0]['name']}/{name}"
    publish(made, manifest, index)


@pytest.mark.parametrize("where", ["part", "file", "shard", "shard of the part"])
def test_a_name_that_leads_out_of_the_set_is_refused_by_readers_validate_and_purge(tmp_path: Path, where: str) -> None:
    for number, name in enumerate(OUTSIDE):
        (tmp_path / str(number)).mkdir()
        victim = tmp_path / str(number) / "victim"
        victim.write_text("mine")
        made = make_images(str(tmp_path / str(number) / "set"), [[image(0)]])
        _forge(made, where, name)
        with pytest.raises(DataError, match="damaged, or not written by this project"):
            read_all(made.url)
        assert validated(made.url), f"{name!r} is found"
        if where == "part":
            with pytest.raises(DataError, match="expected part-<hexadecimal digits>"):
                plan_purge(made.url, frozenset({"id-0"}))
        assert victim.read_text() == "mine"


def test_on_s3_nothing_is_written_outside_of_the_folder_of_copies(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    written: list[Path] = []
    download = storage.download_file

    def seen(url: str, local: Path, sha256: str = "") -> None:
        written.append(local.resolve())
        download(url, local, sha256)

    monkeypatch.setattr(storage, "download_file", seen)
    for where in ("file", "shard of the part"):
        made = make_images(str(tmp_path / where / "set"), [[image(0)]])
        url = storage.join(s3, where.replace(" ", "-"), "set")
        storage.upload_folder(tmp_path / where / "set", url)
        read_all(url, str(scratch))
        assert validated(url) == [] and len(written) > 3
        _forge(made, where, "../../victim")
        storage.upload_folder(tmp_path / where / "set", url)
        with pytest.raises(DataError, match="damaged, or not written by this project"):
            read_all(url, str(scratch))
        assert validated(url)
    assert all(path.is_relative_to(scratch) and path.parent != scratch for path in written)


@pytest.mark.parametrize("version", ["../..", "..", "/etc", "ABC", "a/b", "g" * 16])
def test_a_version_is_the_digits_of_a_hash(tmp_path: Path, version: str) -> None:
    with pytest.raises(DataError, match="expected the hexadecimal digits of a content hash"):
        version_url(str(tmp_path), version)


def test_captions_that_unpack_to_more_than_their_part_has_are_refused_line_by_line(tmp_path: Path) -> None:
    made = make_images(str(tmp_path), [[image(0)]])
    place = tmp_path / made.parts[0]["name"] / "captions.jsonl.gz"
    for data in (
        gzip.compress(b'["a"]\n' * 3),
        gzip.compress(b'["' + b"a" * (17 << 20)),
        gzip.compress(b"[1]\n"),
        b"\x1f\x8b garbage",
        gzip.compress(b""),
    ):
        place.write_bytes(data)
        rehash(made)
        with pytest.raises(DataError, match="is no gzipped file of JSON lines"):
            list(open_set(made.url, IMAGE_SCHEMA).captions())


def test_names_of_objects_that_lead_out_of_a_folder_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "list_files", lambda url: ["a", "../victim"])
    with pytest.raises(DataError, match=r"'\.\./victim' leads out of it"):
        storage.download_folder("s3://bucket/x", tmp_path / "copy")
    assert not (tmp_path / "victim").exists()
