"""Links inside of a set on disk: whatever leads out of it is neither read, written nor deleted. About 5 s."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.prepare.tries import Tries
from data_pipeline.shards.deletion import plan_purge
from data_pipeline.shards.part_writer import write_part
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, open_set, part_name, read_marker
from data_pipeline.shards.versions import Part, collect, merge
from infra.errors import DataError
from tests.data_pipeline.shards.test_foreign_sets import read_all, validated
from tests.support.made_sets import image, make_images
from tests.support.shelf import tree


def linked(place: Path, outside: Path) -> None:
    """Put a file or folder elsewhere, and a link in its place."""
    outside.mkdir(exist_ok=True)
    shutil.move(place, outside / place.name)
    place.symlink_to(outside / place.name)


@pytest.mark.parametrize(
    "what", ["shard.00000.mds", "index.json", "ids.u64", "captions.jsonl.gz", "done.json", ".", "versions", "versions/manifest.json"]
)
def test_a_link_that_leads_out_of_a_set_is_refused_by_readers_validate_and_purge(what: str, tmp_path: Path) -> None:
    made = make_images(str(tmp_path / "set"), [[image(number) for number in range(4)]], excluded=[1])
    part = tmp_path / "set" / made.parts[0]["name"]
    place = {".": part, "versions": tmp_path / "set" / "versions", "versions/manifest.json": Path(made.version_url) / "manifest.json"}.get(
        what, part / what
    )
    linked(place, tmp_path / "outside")
    before = tree(tmp_path / "outside")
    try:
        assert any("a link that leads out of its set" in problem for problem in validated(made.url))
    except DataError as error:
        assert "a link that leads out of its set" in str(error)
    readers: list[Callable[[], object]] = [
        lambda: read_all(made.url),
        lambda: open_set(made.url, IMAGE_SCHEMA, version=made.content_hash).id_hashes(),
        lambda: read_marker(made.url, part.name.removeprefix("part-")),
    ]
    refused = 0
    for read in readers:
        try:
            read()
        except DataError as error:
            refused += 1
            assert "a link that leads out of its set" in str(error) and "cp -rL" in str(error)
    assert refused >= 1
    with contextlib.suppress(DataError):  # what is a link itself goes, and nothing behind it
        for plan in [plan_purge(made.url, frozenset({"id-0"}))]:
            assert plan is not None
            plan.carry_out()
    assert tree(tmp_path / "outside") == before


def test_nothing_is_written_through_a_link_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "set").mkdir()
    inputs = "a" * 64
    (tmp_path / "set" / part_name(inputs)).symlink_to(tmp_path / "outside")
    (tmp_path / "set" / "tries").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="a link that leads out of its set"):
        write_part(str(tmp_path / "set"), inputs, [image(0)])
    with pytest.raises(DataError, match="a link that leads out of its set"):
        Tries(str(tmp_path / "set"), inputs).begin(0)
    write_part(str(tmp_path / "set"), "b" * 64, [image(0)])
    (tmp_path / "set" / "versions").symlink_to(tmp_path / "outside")
    parts = [Part("b" * 64, "")]
    with pytest.raises(DataError, match="a link that leads out of its set"):
        merge(str(tmp_path / "set"), parts, collect(str(tmp_path / "set"), parts, "prepare"), IMAGE_SCHEMA, {})
    assert not list((tmp_path / "outside").iterdir())


def test_links_within_a_set_and_a_set_that_is_named_by_a_link_are_read(tmp_path: Path) -> None:
    made = make_images(str(tmp_path / "set"), [[image(number) for number in range(4)]])
    part = tmp_path / "set" / made.parts[0]["name"]
    part.rename(tmp_path / "set" / "kept")
    part.symlink_to(tmp_path / "set" / "kept")
    (tmp_path / "name").symlink_to(tmp_path / "set")
    for url in (made.url, str(tmp_path / "name")):
        read_all(url)
        assert not validated(url)
