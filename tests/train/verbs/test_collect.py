"""Collecting: what is unfinished or superseded and old goes, and nothing that a run names. Local folders below tmp_path, and a real S3 server. About 10 s."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards.deletion import plan_superseded
from data_pipeline.shards.shard_set import CODES_SCHEMA, IMAGE_SCHEMA, CodeRecord, ShardSet, open_set
from data_pipeline.shards.versions import Part, collect, merge, write_part
from infra import storage, unfinished_writes
from infra.config import to_json
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from tests.infra.test_storage_weeks import begin_upload
from tests.support.made_sets import image
from train.config import load_run
from train.verbs import collect as verb

DAY = 86400.0
OLD = 30 * DAY


def age(path: Path, seconds: float = OLD) -> None:
    """Make files look old."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        os.utime(file, (time.time() - seconds,) * 2)


def code(number: int) -> CodeRecord:
    import numpy as np

    return CodeRecord(f"id-{number}", ["a caption"], np.full(4, number, np.uint16), {}, 0, 0)


def version(url: str, parts: list[str], schema: str = CODES_SCHEMA, parents: dict[str, str] | None = None) -> ShardSet:
    """A version of these parts, which are written where they are not there."""
    targets = [Part(name, "") for name in parts]
    for target in targets:
        if not storage.exists(storage.join(url, f"part-{target.inputs[:16]}", "done.json")):
            number = int(target.inputs, 16) % 100
            write_part(url, target.inputs, [image(number) if schema == IMAGE_SCHEMA else code(number)], 1 << 20)
    return merge(url, targets, collect(url, targets, "encode"), schema, {"parts": parts}, parents)


def names(*letters: str) -> list[str]:
    return [letter * 64 for letter in letters]


def run_at(root: str, name: str = "tiny", **data: str) -> RunFolder:
    """A run folder with its configuration."""
    run = RunFolder(storage.join(root, name))
    cfg = load_run("tiny", [f"run.root={root}", f"run.name={name}", *(f"data.{key}={value}" for key, value in data.items())])
    run.claim(json.loads(to_json(cfg)), "test")
    return run


def sha(found: ShardSet) -> str:
    return found.content_hash


def test_a_version_that_nobody_names_goes_with_the_parts_that_only_it_has(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    first, second, third = version(url, names("a", "b")), version(url, names("b", "c")), version(url, names("c", "d"))
    later = time.time() + DAY
    assert plan_superseded(url, frozenset(), before=time.time() - DAY) is None, "too young"
    assert plan_superseded(url, frozenset([sha(first), sha(second)]), later) is None
    found = plan_superseded(url, frozenset([sha(second)]), later)
    assert found is not None and (found.versions, found.parts) == ([sha(first)[:16]], [f"part-{'a' * 16}"])
    unmerged = tmp_path / "set" / f"part-{'e' * 16}"
    write_part(url, names("e")[0], [code(5)], 1 << 20)
    found.carry_out()
    assert unmerged.is_dir(), "a part that is not merged yet belongs to somebody"
    for kept in (second, third):
        assert len(list(open_set(url, CODES_SCHEMA, version=sha(kept)).records())) == 2
    with pytest.raises(DataError, match="no version"):
        open_set(url, CODES_SCHEMA, version=sha(first))
    assert not (tmp_path / "set" / f"part-{'a' * 16}").exists() and sorted(os.listdir(tmp_path / "set" / "versions")) == sorted(
        each[:16] for each in (sha(second), sha(third))
    )


def test_an_interrupted_collection_is_finished_by_the_next(tmp_path: Path) -> None:
    url, later = str(tmp_path / "set"), time.time() + DAY
    version(url, names("a", "b"))
    version(url, names("b"))
    planned = plan_superseded(url, frozenset(), later)
    assert planned is not None
    storage.delete_prefix(storage.join(url, planned.parts[0]))  # as far as it came
    assert plan_superseded(url, frozenset(), later) == planned
    planned.carry_out()
    assert plan_superseded(url, frozenset(), later) is None and len(list(open_set(url, CODES_SCHEMA).records())) == 1


@pytest.mark.parametrize("name", ["", "..", "part-", "part-xyz", "../other/part-aa", "part-aa/../.."])
def test_a_manifest_that_names_something_else_than_a_part_deletes_nothing(tmp_path: Path, name: str) -> None:
    url, later = str(tmp_path / "set"), time.time() + DAY
    first = version(url, names("a"))
    version(url, names("b"))
    place = tmp_path / "set" / "versions" / sha(first)[:16] / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["parts"][0]["name"] = name
    place.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"expected part-<hexadecimal digits>: it was changed by hand, or is damaged"):
        plan_superseded(url, frozenset(), later)
    assert len(list(open_set(url, CODES_SCHEMA).records())) == 1


def test_a_set_without_its_newest_manifest_is_left_alone(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    version(url, names("a"))
    version(url, names("b"))
    (tmp_path / "set" / "manifest.json").unlink()
    assert plan_superseded(url, frozenset(), time.time() + DAY) is None
    assert plan_superseded(str(tmp_path / "nowhere"), frozenset(), time.time() + DAY) is None


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_what_runs_name_stays_and_the_rest_is_shown_and_then_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, neighbour = run_at(str(tmp_path)), run_at(str(tmp_path), "neighbour")
    images, codes = run.at("images", "train"), run.at("codes", "crop-0", "train")
    seen = [version(images, names(letter), IMAGE_SCHEMA) for letter in "abcdef"]
    made = [version(codes, names(letter), CODES_SCHEMA, {"dvae": "0" * 64, "images": sha(seen[at])}) for letter, at in (("1", 0), ("2", 1), ("3", 5))]
    run.finish("prepare", versions={"train": sha(seen[2])})  # pinned by the run itself
    neighbour.finish("prepare", versions={"train": sha(seen[3])})  # by another run, which reads from here
    run.finish("encode", versions={"0/train": sha(made[1])})  # codes, and with them the images that they were made from
    run.finish("dvae", parents={"images": sha(seen[4])})
    age(tmp_path)
    before = everything(tmp_path)
    verb.main(run.url, verb.DAYS, [], delete=False)
    out = capsys.readouterr().out
    assert f"{images}: 1 superseded version ({sha(seen[0])[:16]}), 1 part" in out
    assert f"{codes}: 1 superseded version ({sha(made[0])[:16]}), 1 part" in out and "2 to delete: run again with --delete" in out
    assert everything(tmp_path) == before, "it shows first"
    verb.main(run.url, verb.DAYS, [], delete=True)
    assert "2 deleted" in capsys.readouterr().out
    for kept in seen[1:]:
        assert open_set(images, IMAGE_SCHEMA, version=sha(kept))
        assert len(list(open_set(images, IMAGE_SCHEMA, version=sha(kept)).records())) == 1
    for kept in made[1:]:
        assert len(list(open_set(codes, CODES_SCHEMA, version=sha(kept)).records())) == 1
    verb.main(run.url, verb.DAYS, [], delete=True)
    assert "nothing of" in capsys.readouterr().out


def test_shared_places_are_left_alone_unless_all_roots_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = str(tmp_path / "shared" / "images")
    seen = [version(f"{shared}/train", names(letter), IMAGE_SCHEMA) for letter in "abc"]
    run, other = run_at(str(tmp_path / "mine"), images=shared), run_at(str(tmp_path / "theirs"), images=shared)
    other.finish("prepare", versions={"train": sha(seen[0])})
    age(tmp_path)
    verb.main(run.url, verb.DAYS, [], delete=True)
    assert "nothing of" in capsys.readouterr().out
    verb.main(run.url, verb.DAYS, [str(tmp_path / "theirs")], delete=True)
    assert sha(seen[1])[:16] in capsys.readouterr().out
    assert sorted(os.listdir(f"{shared}/train/versions")) == sorted(each[:16] for each in (sha(seen[0]), sha(seen[2])))


def checkpoint(run: RunFolder, step: int, *, whole: bool) -> Path:
    folder = Path(run.at("dvae", "checkpoints", f"step-{step:08d}"))
    folder.mkdir(parents=True)
    for name in ("rank-0.bin", "index.json", *(["meta.json"] if whole else [])):
        (folder / name).write_text("{}")
    return folder


def test_checkpoints_without_a_marker_go_when_they_are_old_and_a_newer_one_is_whole(tmp_path: Path) -> None:
    run = run_at(str(tmp_path))
    left, young, whole, newest, ahead = (
        checkpoint(run, step, whole=whole) for step, whole in ((5, False), (7, False), (10, True), (20, True), (25, False))
    )
    (newest.parent / "notes").mkdir()
    (newest.parent / "notes" / "mine.txt").write_text("not ours")
    age(tmp_path)
    (young / "rank-0.bin").write_text("being written: this step again, after a fall back")
    verb.main(run.url, verb.DAYS, [], delete=True)
    assert not left.exists() and all(path.is_dir() for path in (young, whole, newest, ahead, newest.parent / "notes"))


def test_temporary_files_of_killed_writers_go_when_they_are_old(tmp_path: Path) -> None:
    run = run_at(str(tmp_path))
    old, young = Path(run.at("images", ".tmp-1-aa")), Path(run.at(".tmp-2-bb"))
    old.parent.mkdir(parents=True, exist_ok=True)
    for path in (old, young, tmp_path / ".tmp-3-cc"):
        path.write_text("half")
    age(old)
    age(tmp_path / ".tmp-3-cc")
    assert [each.url for each in unfinished_writes.find(run.url, time.time() - DAY)] == [str(old)]
    verb.main(run.url, verb.DAYS, [], delete=True)
    assert not old.exists() and young.exists() and (tmp_path / ".tmp-3-cc").exists(), "only below the run, only the old"


def test_uploads_that_nobody_finished_are_aborted_on_s3(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_at(s3)
    for name in ("tiny/dvae/checkpoints/step-00000005/rank-0.bin", "tiny-2/x"):
        begin_upload(f"{s3}/{name}")
    verb.main(run.url, 1.0, [], delete=True)
    assert "nothing of" in capsys.readouterr().out, "younger than a day"
    found = verb.look(verb.open_run(run.url), time.time() + DAY, [])
    assert [line.split(":")[1].split("/")[-1] for line in found.lines()] == ["rank-0.bin"] and "unfinished upload, " in next(found.lines())
    found.delete()
    assert unfinished_writes.find(run.url, time.time() + DAY) == [] and len(unfinished_writes.find(s3, time.time() + DAY)) == 1


def test_nothing_is_collected_where_a_stage_runs_or_neighbours_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_at(str(tmp_path))
    for label in ("encode", "encode.1-of-4", "prepare"):
        with run.lock(label), pytest.raises(ConfigError, match=f"another launcher runs '{label}'"):
            verb.main(run.url, verb.DAYS, [], delete=True)
    with pytest.raises(ConfigError, match="no run folder"):
        verb.main(str(tmp_path), verb.DAYS, [], delete=True)
    glob: Any = storage.glob
    monkeypatch.setattr(storage, "glob", lambda url: (glob(url)[0], iter(())))
    with pytest.raises(ConfigError, match="cannot be listed, so it is not known what they need"):
        verb.main(run.url, verb.DAYS, [], delete=True)
