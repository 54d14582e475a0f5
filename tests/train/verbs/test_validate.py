"""``validate``: sound sets pass; every kind of damage is named with its file and what to run. Seconds: about 25."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.audit import check_parts, check_set
from data_pipeline.audit.check_parts import Rules, check_part
from data_pipeline.shards.rows import row_decoder
from data_pipeline.shards.shard_set import IMAGE_SCHEMA
from infra import storage
from infra.errors import ConfigError, DataError, StopRequested
from infra.signals import StopFlag
from tests.support.made_sets import image, make_images
from tests.support.root import ROOT
from tests.support.validated_sets import DVAE, codes, cut, edit, first_part, flip, forge, images, passes, problems_of, run_folder
from train.verbs import validate
from train.verbs.validate import Options


def test_a_sound_run_passes_and_the_table_says_what_was_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path)
    out = passes(run, capsys)
    for words in ("images/train", "codes/crop-0/validation", "tokenizer 2 files", "9 records 0", "lineage of exports"):
        assert words in out, words
    assert "not compared" not in out


def test_a_set_alone_passes_and_says_what_could_not_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = images(str(tmp_path / "images"), 5, 0, 4)
    codes(str(tmp_path / "codes"), 5, 0, 4, dvae=DVAE, images=made.content_hash)
    assert "9 records" in passes(tmp_path / "images", capsys, decode=True)
    out = passes(tmp_path / "codes", capsys)
    assert "not compared with a dVAE (--run)" in out and "not compared with images (--images)" in out
    assert "not compared with images" not in passes(tmp_path / "codes", capsys, images=str(tmp_path / "images"))


def test_two_processes_find_what_one_finds_and_an_older_version_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = images(str(tmp_path), 5)
    new = images(str(tmp_path), 5, 3, 2)
    assert "10 records" in passes(tmp_path, capsys, workers=2)
    assert "5 records" in passes(tmp_path, capsys, version=old.content_hash[:16])
    shard = next((tmp_path / new.parts[2]["name"]).glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in problems_of(tmp_path, capsys)
    with pytest.raises(DataError, match=re.escape(shard.parent.name)):
        validate.main(str(tmp_path), Options(workers=2), StopFlag())
    passes(tmp_path, capsys, version=old.content_hash)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("shard.00000.mds", flip, "damaged: its SHA-256 is not the manifest's"),
        ("shard.00000.mds", cut, r"damaged: \d+ bytes instead of \d+"),
        ("shard.00000.mds", Path.unlink, "does not exist"),
        ("ids.u64", flip, "damaged: its SHA-256"),
        ("index.json", cut, "bytes instead of"),
        ("captions.jsonl.gz", flip, "damaged: its SHA-256"),
        ("done.json", Path.unlink, "does not exist"),
        ("done.json", cut, "not valid JSON"),
        ("done.json", lambda path: path.write_text('{"count": 1}'), r"damaged, or not written by this project: \w+: field required"),
    ],
)
def test_a_damaged_file_of_a_part_is_named_with_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], Any], words: str
) -> None:
    images(str(tmp_path), 6, 3)
    path = first_part(tmp_path) / name
    damage(path)
    found = problems_of(tmp_path, capsys)
    assert re.search(words, found) and found.startswith(f"{tmp_path}: 1 problem in 1 file: {path}. "), found
    assert f"delete {path.parent} and RUN/prepare/done.json, then run 'launcher.py prepare RUN'" in found


def test_every_damaged_file_is_in_the_table_and_the_first_five_in_the_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(str(tmp_path), *[2] * 7)
    for path in tmp_path.glob("part-*/shard.00000.mds"):
        flip(path)
    found = problems_of(tmp_path, capsys)
    message, table = found.split("\n")
    assert "7 problems in 7 files" in message and "and 2 more" in message and message.count("shard.00000.mds") == 5
    assert table.count("shard.00000.mds") == 7


@pytest.mark.parametrize(
    "name",
    ["shard.00000.mds", "index.json", "ids.u64", "done.json", "../manifest.json", "../index.json", "version/index.json", "version/excluded.u64"],
)
def test_what_is_told_to_do_mends_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    made = images(str(tmp_path), 6, 3, excluded=[2])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    path = Path(made.version_url, name[8:]) if name.startswith("version/") else first_part(tmp_path) / name
    if name.endswith("manifest.json"):
        edit(path, lambda tree: tree["settings"].update(seed=5))
    elif name.endswith("index.json"):
        edit(path, lambda tree: tree["shards"][0].update(samples=1))
    else:
        flip(path)
    listed = re.findall(r"delete (\S+)(?: and (\S+))? and RUN/prepare/done.json, then run", problems_of(tmp_path, capsys))
    assert listed
    for each in {place for places in listed for place in places if place}:
        assert Path(each).is_relative_to(tmp_path)
        storage.delete_prefix(each) if Path(each).is_dir() else storage.delete(each)
    images(str(tmp_path), 6, 3, excluded=[2])  # as the stage does: finished parts and versions are kept
    passes(tmp_path, capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["files"][0].update(sha256="0" * 64), "has another hash of captions.jsonl.gz than the manifest"),
        (lambda tree: tree.update(inputs="0" * 64), "marks part-0000000000000000, not part-"),
        (lambda tree: tree.update(count=2), "counts 2 records, the manifest 6"),
    ],
)
def test_a_marker_that_does_not_fit_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    images(str(tmp_path), 6, 3)
    edit(first_part(tmp_path) / "done.json", change)
    found = problems_of(tmp_path, capsys)
    assert words in found and "1 problem in 1 file" in found


def test_a_part_with_other_records_than_counted_is_told(tmp_path: Path) -> None:
    images(str(tmp_path), 6)
    (job,) = check_set.read_layout(str(tmp_path)).jobs(Rules(IMAGE_SCHEMA, {}))
    result = check_part(replace(job, part={**job.part, "count": 5}))
    assert "names shards of 6 records, the manifest counts 5" in [problem.what for problem in result.problems]


def test_exclusions_that_cannot_be_read_do_not_look_like_repeated_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_images(str(tmp_path), [[image(0), image(1)], [image(1), image(2)]], excluded=[2])
    Path(made.version_url, "index.json").unlink()
    found = problems_of(tmp_path, capsys)
    assert "index.json\n" not in found and "does not exist" in found and "shown twice" not in found


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("manifest.json", lambda tree: tree["settings"].update(seed=5), "its content hash is not that of its content"),
        ("manifest.json", lambda tree: tree["producer"].update(commit="x"), "is not the manifest of version"),
        ("manifest.json", lambda tree: tree.update(count=7), r"its parts hold 9 records, it counts 9 stored, 1 excluded and 7 to be read"),
        ("manifest.json", lambda tree: tree.pop("excluded"), "damaged, or not written by this project: excluded: field required"),
        ("manifest.json", lambda tree: tree["parts"][0].update(count=5), "counts 6 records, the manifest 5"),
        ("manifest.json", lambda tree: tree["parts"][0].update(name="part-0123456789abcdef"), "which is no part in the manifest"),
        ("index.json", lambda tree: tree["shards"].pop(), "is not the index of version"),
        (
            "version/index.json",
            lambda tree: tree["shards"][1].pop("samples"),
            r"damaged, or not written by this project: shards\.1\.samples: field required",
        ),
    ],
)
def test_a_changed_file_of_a_set_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    made = images(str(tmp_path), 6, 3, excluded=[4])
    passes(tmp_path, capsys)
    edit(Path(made.version_url, name[8:]) if name.startswith("version/") else tmp_path / name, change)
    found = problems_of(tmp_path, capsys)
    assert re.search(words, found), found
    assert "RUN/prepare/done.json, then run 'launcher.py prepare RUN'" in found


def test_a_damaged_index_of_a_version_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = images(str(tmp_path), 6, 3)
    edit(Path(made.version_url, "index.json"), lambda tree: tree["shards"][0].update(samples=1))
    found = problems_of(tmp_path, capsys, version=made.content_hash)
    assert re.search(r"index.json lists \d records, the manifest 9", found)
    assert f"lists other shards of {first_part(tmp_path).name} than the part's own index" in found
    Path(made.version_url, "index.json").unlink()
    assert "does not exist" in problems_of(tmp_path, capsys)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.array([4, 2], "<u8").tobytes(), "its positions do not rise, or leave 0 to 8"),
        (np.array([4, 9], "<u8").tobytes(), "its positions do not rise, or leave 0 to 8"),
        (np.array([4], "<u8").tobytes(), "8 bytes; the manifest counts 2 positions of 8"),
    ],
)
def test_damaged_exclusions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, words: str) -> None:
    made = images(str(tmp_path), 6, 3, excluded=[2, 4])
    Path(made.version_url, "excluded.u64").write_bytes(data)
    found = problems_of(tmp_path, capsys)
    assert words in found and "excluded.u64 damaged: its SHA-256 is not the manifest's" in found


def test_a_repeated_id_must_be_excluded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [[image(0), image(1)], [image(1), image(2)]]
    make_images(str(tmp_path / "sound"), parts, excluded=[2])
    passes(tmp_path / "sound", capsys)
    make_images(str(tmp_path / "twice"), parts)
    assert "1 records would be shown twice" in problems_of(tmp_path / "twice", capsys)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("ids.u64", lambda data: data[8:], "is not the ids of the records: it holds 5, the shards 6 records"),
        ("ids.u64", lambda data: data[:8] + data[16:24] + data[8:16] + data[24:], "is not the ids of the records: row 1 is the first that differs"),
        ("prints.u64", lambda data: data[:16] + bytes(8) + data[24:], "three numbers a record, the third of its group: row 0"),
    ],
)
def test_side_files_that_do_not_fit_the_records_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, make: Callable[[bytes], bytes], words: str
) -> None:
    images(str(tmp_path), 6, 3)
    forge(tmp_path, name, make((first_part(tmp_path) / name).read_bytes()))
    assert words in problems_of(tmp_path, capsys)


def test_captions_beside_the_shards_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gzip

    images(str(tmp_path), 6, 3)
    packed = first_part(tmp_path) / "captions.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()).splitlines()
    forge(tmp_path, packed.name, gzip.compress(b"\n".join([*lines[:3], b'["another"]', *lines[4:]])))
    assert "is not the captions of the records: row 3 is the first that differs" in problems_of(tmp_path, capsys)
    for data in (b"x", gzip.compress(b"[")):
        forge(tmp_path, packed.name, data)
        assert "is no gzipped file of JSON lines" in problems_of(tmp_path, capsys)


def test_a_shard_whose_hash_is_right_but_whose_rows_are_not_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(str(tmp_path), 2)
    shard = first_part(tmp_path) / "shard.00000.mds"
    data = shard.read_bytes()
    forge(tmp_path, shard.name, (3).to_bytes(4, "little") + data[4:])
    found = problems_of(tmp_path, capsys)
    assert "it is no MDS file of 2 rows" in found and "ids.u64" not in found, "what follows from it is not told"
    forge(tmp_path, shard.name, data[:4] + data[8:12] + data[4:8] + data[12:])
    assert "it is no MDS file of 2 rows" in problems_of(tmp_path, capsys)
    begin = int.from_bytes(data[4:8], "little")
    forge(tmp_path, shard.name, data[:begin] + b"\xff" * (len(data) - begin))
    assert "row 0: damaged, the columns of a row are" in problems_of(tmp_path, capsys)


def test_pickled_or_foreign_columns_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    made = images(str(tmp_path), 1)
    entry = made.shards[0].entry
    path = tmp_path / made.shards[0].basename
    pickled = entry | {"column_encodings": ["pkl", *entry["column_encodings"][1:]]}
    with pytest.raises(DataError, match=r"here: column 'captions' is pkl, the schema has json"):
        list(check_parts.read_shard(path, pickled, IMAGE_SCHEMA, "here"))
    with pytest.raises(DataError, match=r"here: column 'captions' has encoding 'pkl'"):
        row_decoder(pickled, "here")


def test_what_cannot_be_validated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"nothing: neither a shard set, nor .* raw data are read with 'inspect'"):
        validate.main(str(tmp_path / "nothing"), Options(), StopFlag())
    images(str(tmp_path / "train"), 2)
    with pytest.raises(ConfigError, match=r"--version abc: .* is no single shard set; name one, for example .*/train"):
        validate.main(str(tmp_path), Options(version="abc"), StopFlag())
    with pytest.raises(ConfigError, match=r"--images .*none: no image set there"):
        validate.main(str(tmp_path), Options(images=str(tmp_path / "none")), StopFlag())
    with pytest.raises(ConfigError, match=r"train: no run folder \(config.json and provenance.json are missing\)"):
        validate.main(str(tmp_path), Options(run=str(tmp_path / "train")), StopFlag())
    assert "versions/abc/manifest.json does not exist" in problems_of(tmp_path / "train", capsys, version="abc")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_between_parts(tmp_path: Path, workers: int) -> None:
    images(str(tmp_path), 2, 2)
    stop = StopFlag()
    stop.handle(15, None)
    with pytest.raises(StopRequested, match="validate: stopped by a signal; nothing was changed"):
        validate.main(str(tmp_path), Options(workers=workers), stop)


def test_sets_on_s3_are_checked_alike(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = images(storage.join(s3, "images"), 3, 2)
    codes(storage.join(s3, "codes"), 3, 2, dvae=DVAE, images=made.content_hash)
    passes(storage.join(s3, "images"), capsys)
    passes(storage.join(s3, "codes"), capsys, images=storage.join(s3, "images"))
    shard = storage.join(s3, "images", made.shards[-1].basename)
    storage.write_bytes(shard, storage.read_bytes(shard)[:-1] + b"x")
    storage.delete(storage.join(s3, "images", made.parts[0]["name"], "ids.u64"))
    found = problems_of(storage.join(s3, "images"), capsys)
    assert f"{shard} damaged: its SHA-256" in found and re.search(r"ids.u64 does not exist", found) and "2 problems in 2 files" in found


def test_the_command_ends_with_0_or_65(tmp_path: Path) -> None:
    images(str(tmp_path), 4)

    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(ROOT / "launcher.py"), *words], capture_output=True, text=True, env=os.environ, check=False)

    good = launch("validate", str(tmp_path))
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "no problems found"), good.stderr
    assert "records" in good.stderr, "progress goes to stderr"
    flip(first_part(tmp_path) / "shard.00000.mds")
    bad = launch("validate", str(tmp_path), "--workers", "1")
    assert bad.returncode == 65 and "shard.00000.mds" in bad.stdout and bad.stderr.splitlines()[-1].startswith("data error: "), bad.stderr
