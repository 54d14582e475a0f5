"""Links, permissions, names and addresses in strangers' sources: each costs its own record or file, is counted with its reason, and nothing more. About 3 s."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.pairs import Pair
from infra import storage
from infra.errors import DataError
from tests.data_pipeline.sources.test_accounting import accounted, archive, pair, plan_of
from tests.data_pipeline.sources.test_strangers import found_in, pictures, table

# --- Names, links and permissions -----------------------------------------------------------------------------------------------------------


def test_a_link_to_itself_is_a_counted_entry(tmp_path: Path) -> None:
    for name, data in pair("good"):
        (tmp_path / name).write_bytes(data)
    for name in ("self.png", "self", "self.csv"):
        (tmp_path / name).symlink_to(tmp_path / name)
    (tmp_path / "self.txt").write_text("a cat")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    found, bad, passed = found_in(tmp_path)
    assert [item.id for item in found] == ["good.png"]
    assert bad == {"image cannot be opened": 1} and passed == {"(no suffix)": 3, ".csv": 1}


@pytest.mark.parametrize("name", ["x.csv", "x.tar", "x.parquet", "x.jsonl.gz", "captions_val.json"])
def test_a_table_or_tar_that_links_to_itself_is_one_damaged_file_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    rows = {
        ".csv": b"image,caption\n0.png,a cat\n",
        ".tar": archive(pair("a")),
        ".gz": gzip.compress(b'{"image": "0.png", "caption": "a cat"}\n'),
        ".json": json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}).encode(),
    }
    good = tmp_path / f"captions_a{name}" if name.endswith("json") else tmp_path / f"good{name[1:]}"
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"], "caption": ["a cat"]}), good)
    else:
        good.write_bytes(next(data for suffix, data in rows.items() if name.endswith(suffix)))
    (tmp_path / name).symlink_to(tmp_path / name)
    source = open_source(SourceConfig(url=str(tmp_path)), DataConfig())
    pairs = damaged = 0
    for shard in source.shards():
        try:
            pairs += sum(isinstance(item, Pair) for item in source.read(shard, lambda group: True))
        except DataError as error:
            assert name in str(error)
            damaged += 1
    assert (pairs, damaged) == (1, 1)


def test_metadata_beside_tars_that_cannot_be_opened_are_named_and_the_tars_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.tar").write_bytes(archive(pair("a")))
    (tmp_path / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    assert len(found_in(tmp_path)[0]) == 1 and "metadata.jsonl: cannot be read" in caplog.text


@pytest.fixture
def nobody() -> Iterator[None]:
    """Permissions hold for this process, whoever runs the tests."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_or_file_without_permission_is_a_counted_entry(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for folder in ("open", "closed"):
        (tmp_path / folder).mkdir()
        for name, data in pair("a"):
            (tmp_path / folder / name).write_bytes(data)
    for name, data in pair("b"):
        (tmp_path / "open" / name).write_bytes(data)
    (tmp_path / "open" / "b.png").chmod(0)
    for above in [each for each in (tmp_path, *tmp_path.parents) if each.name.startswith(("pytest", "popen", "test"))]:
        above.chmod(0o755)  # so that somebody else gets here
    (tmp_path / "closed").chmod(0)
    request.getfixturevalue("nobody")
    found, bad, passed = found_in(tmp_path)
    assert [item.id for item in found] == ["open/a.png"]
    assert bad == {"image cannot be opened": 1} and passed == {"(folder that cannot be opened)": 1}


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl", "tar", "parquet", "coco"])
def test_names_that_are_not_utf8_are_read_and_their_ids_can_be_written(kind: str, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    if kind == "folder":
        for name, data in pair("a"):
            Path(os.fsdecode(odd + name[1:].encode())).write_bytes(data)
    pictures(tmp_path, 0 if kind in ("folder", "tar") else 1)
    table = {"csv": b"image,caption\n0.png,a cat\n", "jsonl": b'{"image": "0.png", "caption": "a cat"}\n', "tar": archive(pair("a"))}
    if kind in table:
        Path(os.fsdecode(odd + f".{kind}".encode())).write_bytes(table[kind])
    elif kind == "parquet":
        with open(odd + b".parquet", "wb") as file:
            pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"], "caption": ["a cat"]}), file)
    elif kind == "coco":
        rows = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/captions_caf\xe9.json")).write_text(json.dumps(rows))
    kept, tally = accounted(plan_of(tmp_path))
    assert kept == tally.seen == 1
    found, _, _ = found_in(tmp_path)
    for item in found:
        for text in (item.id, item.group, item.source):
            text.encode()


def test_a_path_beyond_every_limit_is_a_counted_entry(tmp_path: Path) -> None:
    for name, data in pair("good"):
        (tmp_path / name).write_bytes(data)
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # 20 x 250 characters: longer than a path may be
        os.mkdir("d" * 250, dir_fd=at)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "t.csv").write_text(f"image,caption\n{'x' * 300}.png,a cat\n{'y/' * 600}z.png,a dog\n../good.png,a fish\n")
    found, bad, passed = found_in(tmp_path)
    assert [item.id for item in found] == ["good.png"] and not bad
    assert passed == {"(folder that cannot be opened)": 1, ".csv": 1}
    found, bad, _ = found_in(tmp_path / "t" / "t.csv", roots=(str(tmp_path),))
    assert len(found) == 1 and bad == {"image cannot be opened": 1, "bad image path": 1}


@pytest.mark.parametrize("pattern", ["*/*.tar", "**/*.tar", "*/sub/*.tar"])
def test_a_pattern_does_not_list_what_lies_behind_links_outside(pattern: str, tmp_path: Path) -> None:
    inside, outside = tmp_path / "set", tmp_path / "elsewhere"
    for folder in (inside / "own" / "sub", outside / "sub"):
        folder.mkdir(parents=True)
    for place in (inside / "own", inside / "own" / "sub", outside, outside / "sub"):
        (place / "x.tar").write_bytes(archive(pair("a")))
    (inside / "linked").symlink_to(outside)
    (inside / "again").symlink_to(inside / "own")
    found, _, passed = found_in(f"{inside}/{pattern}")
    again = {"(link to a folder that is listed)": 1} if pattern.startswith("**") else {}
    assert found and not any("linked" in item.id for item in found) and passed == {"(link to a folder outside)": 1} | again
    more, _, passed = found_in(f"{inside}/{pattern}", roots=(str(outside),))
    assert any("linked" in item.id for item in more) and passed == again


# --- URLs ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["coco", "csv", "tsv", "jsonl", "parquet"])
def test_an_image_address_with_a_password_or_without_a_place_is_one_counted_record(form: str, tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    secret = "wJalrXUtnFEMI"
    paths = [f"s3://AKIAEXAMPLE:{secret}@bucket/a.png", f"file://u:{secret}@host/a.png", "file://host/a.png", "s3://", "0.png"]
    if form == "coco":
        images = [{"id": number, "file_name": path} for number, path in enumerate(paths)]
        said = [{"image_id": number, "caption": f"cat {number}"} for number in range(len(paths))]
        (tmp_path / "captions_val.json").write_text("\ufeff" + json.dumps({"images": images, "annotations": said}))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"image": paths, "caption": [f"cat {n}" for n in range(len(paths))]}), tmp_path / "t.parquet")
    else:
        (tmp_path / f"t.{form}").write_text(table(form, [(path, f"cat {n}") for n, path in enumerate(paths)], "\n"))
    found, bad, _ = found_in(tmp_path)
    assert [item.captions for item in found] == [("cat 4",)]
    assert bad == {"image address with a password": 2, "bad image path": 1, "outside the source": 1}


def test_a_coco_file_of_a_stranger_is_never_to_be_deleted(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "captions_val.json").write_text('{"images": [], "images": [], "annotations": []}')
    with pytest.raises(
        DataError, match=r"captions_val\.json: a key of the outermost object occurs twice, so one of two lists .*mend the file"
    ) as caught:
        found_in(tmp_path)
    assert "delete" not in str(caught.value)


def test_escapes_are_decoded_in_a_file_url_and_nowhere_else(tmp_path: Path) -> None:
    place = tmp_path / "a b%20c"
    place.mkdir()
    for name, data in pair("x%20y"):
        (place / name).write_bytes(data)
    url = f"file://{tmp_path}/a%20b%2520c"
    assert storage.local_path(url) == place and storage.local_path(str(place)) == place
    assert storage.local_path(storage.join(url, "x%20y.png")) == place / "x%20y.png", "names that are joined to it are literal"
    assert storage.exists(storage.join(url, "x%20y.png")) and storage.list_files(url) == ["x%20y.png", "x%20y.txt"]
    assert len(found_in(url)[0]) == len(found_in(f"{url}/x*.png")[0]) == len(found_in(str(place))[0]) == 1
    (place / "t.csv").write_text(
        "image,caption\nx%20y.png,a cat\nfile:///" + str(place).lstrip("/").replace("%", "%25") + "/x%2520y.png,a dog\nx y.png,a fish\n"
    )
    found, bad, _ = found_in(f"{url}/t.csv")
    assert len(found) == 2 and bad == {"missing image": 1}
