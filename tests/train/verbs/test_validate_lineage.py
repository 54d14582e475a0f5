"""``launcher.py validate``: sets, tokenizers and exports that must belong together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.made_sets import code, image, make_codes, make_images
from tests.support.validated_sets import DVAE, codes, edit, flip, forge, images, numbers, passes, problems_of, run_folder, write


def test_codes_of_another_dvae_or_of_other_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path, dvae="e" * 64)
    assert f"codes of dvae eeeeeeeeeeee, {run} exports dddddddddddd" in problems_of(run, capsys)
    images(str(tmp_path / "others"), 2)
    found = problems_of(run / "codes/crop-0/train", capsys, images=str(tmp_path / "others"))
    assert re.search(r"made from images \w{12}, which is no version of", found) and "launcher.py encode RUN" in found


def test_codes_are_compared_with_the_version_of_images_that_they_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = images(str(tmp_path / "images"), 5)
    images(str(tmp_path / "images"), 5, 4)
    codes(str(tmp_path / "codes"), 5, dvae=DVAE, images=old.content_hash)
    passes(tmp_path / "codes", capsys, images=str(tmp_path / "images"))
    codes(str(tmp_path / "few"), 4, dvae=DVAE, images=old.content_hash)
    found = problems_of(tmp_path / "few", capsys, images=str(tmp_path / "images"))
    assert "1 images of" in found and "0 codes have no image there" in found
    passes(tmp_path / "few", capsys)


def test_images_that_were_taken_down_need_no_codes_and_excluded_ones_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = images(str(tmp_path / "images"), 5, 4, excluded=[6])
    parts = [[code(0), code(1), code(3), code(4)], [code(5), code(7), code(8)]]
    make_codes(str(tmp_path / "codes"), parts, {"dvae": DVAE, "images": made.content_hash})
    place = str(tmp_path / "images")
    assert "1 images of" in problems_of(tmp_path / "codes", capsys, images=place)
    listed = tmp_path / "takedown.txt"
    listed.write_text("id-2\n")
    passes(tmp_path / "codes", capsys, images=place, takedown=str(listed))
    make_codes(str(tmp_path / "codes"), [[*parts[0], *parts[1]]], {"dvae": DVAE, "images": made.content_hash})
    assert "has 1 parts, the images that it names have 2" in problems_of(tmp_path / "codes", capsys, images=place)


def test_a_run_is_checked_in_the_versions_that_its_stages_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path)
    version = json.loads((run / "images/train/manifest.json").read_text())["content_hash"]
    write(run / "prepare/done.json", {"versions": {"train": version}})
    newest = make_images(str(run / "images/train"), [[image(number) for number in some] for some in numbers(6, 3, 4)])
    Path(newest.version_url, "excluded.u64").write_bytes(b"x")
    out = passes(run, capsys)
    assert "13 records" not in out
    write(run / "prepare/done.json", {"versions": {"train": newest.content_hash}})
    assert "excluded.u64" in problems_of(run, capsys)


def test_codes_of_damaged_images_are_not_blamed_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = images(str(tmp_path / "images"), 3)
    codes(str(tmp_path / "codes"), 3, dvae=DVAE, images=made.content_hash)
    shard = tmp_path / "images" / made.shards[0].basename
    data = shard.read_bytes()
    begin = int.from_bytes(data[4:8], "little")
    forge(tmp_path / "images", shard.name, data[:begin] + b"\xff" * (len(data) - begin))
    passes(tmp_path / "codes", capsys, images=str(tmp_path / "images"))
    flip(shard)
    passes(tmp_path / "codes", capsys, images=str(tmp_path / "images"))


def test_crops_are_compared_with_the_sizes_of_their_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_images(str(tmp_path / "images"), [[image(number, width=18) for number in range(3)]])
    codes(str(tmp_path / "codes"), 3, dvae=DVAE, images=made.content_hash)
    passes(tmp_path / "codes", capsys)
    assert "reaches out of its image of 18 x 20 pixels" in problems_of(tmp_path / "codes", capsys, images=str(tmp_path / "images"))


def test_codes_beyond_the_codebook_of_the_run_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path)
    make_codes(str(tmp_path / "codes"), [[code(0, codes=np.full(16, 99, np.uint16))]], {"dvae": DVAE})
    passes(tmp_path / "codes", capsys)
    assert "holds code 99, the dVAE has 32" in problems_of(tmp_path / "codes", capsys, run=str(run))


def test_tokenizer_and_exports_belong_to_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path)
    passes(run / "tokenizer", capsys)
    flip(run / "tokenizer/tokenizer.model")
    edit(run / "tokenizer/manifest.json", lambda tree: tree.update(parents={"images": "f" * 64}))
    edit(run / "dalle/export/config.json", lambda tree: tree["parents"].update(dvae="0" * 64))
    (run / "clip/export/config.json").unlink()
    found = problems_of(run, capsys)
    assert "tokenizer.model damaged: its SHA-256" in found and "trained on images ffffffffffff, which is no version of" in found
    assert (
        "trained with dvae 000000000000, the run has dvae dddddddddddd " in found
        and f"delete {run / 'dalle'}, then run 'launcher.py dalle {run}'" in found
    )
    assert "3 problems in 3 files" in found
    (run / "tokenizer/tokenizer.model").unlink()
    assert "tokenizer.model: does not exist" in problems_of(run / "tokenizer", capsys)
