"""``inspect``: random records without reading the rest, statistics, contact sheets, and the tables of the command. Seconds: about 20."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.audit import random_records
from data_pipeline.images.crops import decode
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, open_set
from data_pipeline.sources import open_source
from data_pipeline.sources.pairs import Census, InputShard, Pair, Unreadable
from infra import storage
from infra.errors import ConfigError, DataError
from tests.support.made_sets import VOCAB, code, image, make_codes, make_images, png
from tests.support.root import ROOT
from train.config import load_run
from train.report.contact_sheet import TILE
from train.report.images import read_png
from train.verbs import inspect
from train.verbs.inspect import Options
from train.weights import export


def shown(url: str | Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """What ``inspect`` prints, spaces made one."""
    inspect.main(str(url), Options(**options))
    return " ".join(capsys.readouterr().out.split())


def test_an_image_set_shows_counts_sizes_sources_captions_lineage_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "set")
    old = make_images(url, [[image(number) for number in range(3)]])
    make_images(url, [[image(number) for number in range(3)], [image(3), image(4, image=b"broken")]])
    out = shown(url, capsys, out=str(tmp_path / "sheet.png"))
    for words in (
        "schema image/1",
        "records 5 to be read, 5 stored",
        "records per part 2 to 2 to 3",
        "from photos 3 stored from emoji 2 stored",
        f"other versions {old.content_hash[:16]}",
        "commit " + "c" * 40,
        "setting split train",
        "of 5 sampled records source records share photos 3 60.0 % emoji 2 40.0 %",
        "CC-BY-4.0 5 100.0 %",
        "width (pixels) 24 24 24 24 24 24",
        "per record 2 2 2 2 2 2",
        "picture 50 %",
        f"contact sheet {tmp_path / 'sheet.png'}",
    ):
        assert words in out, words
    assert read_png((tmp_path / "sheet.png").read_bytes()).shape[1] > 5 * TILE
    assert "records 3 to be read" in shown(url, capsys, version=old.content_hash, pictures=0)


def test_a_folder_of_sets_gives_each_its_sheet_and_the_sample_is_seeded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        make_images(f"images/{split}", [[image(number, split) for number in range(9)]], split=split)
    out = shown("images", capsys, samples=4, pictures=2, out="sheet.png")
    assert out.count("of 4 sampled records") == 6
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert sorted(first) == ["sheet-images-train.png", "sheet-images-validation.png"]
    shown("images", capsys, samples=4, pictures=2, out="sheet.png")
    assert first == {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    shown("images", capsys, samples=4, pictures=2, out="sheet.png", seed=3)
    assert first != {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    shown("images/train", capsys, samples=4)
    assert (tmp_path / "inspect-images-train.png").exists()


def made_run(place: Path) -> Path:
    """A run with images, codes, a tokenizer and an untrained dVAE."""
    import torch

    from data_pipeline import tokenizer
    from model.dvae import DVAE

    cfg = load_run("tiny", [f"run.root={place}"])
    run = place / "tiny"
    storage.write_text(str(run / "config.json"), cfg.model_dump_json())
    storage.write_json(str(run / "provenance.json"), {})
    torch.manual_seed(0)
    weights = export.write(str(run / "dvae/export"), DVAE(cfg.dvae).state_dict(), cfg.dvae, parents={})
    made = make_images(str(run / "images/train"), [[image(number) for number in range(5)]])
    make_codes(str(run / "codes/crop-0/train"), [[code(number) for number in range(5)]], {"dvae": weights, "images": made.content_hash})
    tokenizer.run(cfg.tokenizer, made, str(run / "tokenizer"))
    return run


def test_a_run_shows_its_sets_its_tokenizer_and_its_codes_as_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = made_run(tmp_path)
    out = shown(run, capsys)
    for words in (
        "tokenizer/1",
        "setting vocab 400",
        "schema image/1",
        "schema codes/1",
        "records x codes 5 x 16",
        "of 32 (",
        "truncated at 16 tokens",
    ):
        assert words in out, words
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["inspect-crop-0-train.png", "inspect-images-train.png"]
    # A code set alone says what it lacks, and draws once it has a run.
    out = shown(run / "codes/crop-0/train", capsys, out="codes.png")
    assert "no contact sheet: name a run with an exported dVAE (--run)" in out and "the largest is" in out and not Path("codes.png").exists()
    shown(run / "codes/crop-0/train", capsys, out="codes.png", run=str(run))
    assert Path("codes.png").read_bytes() == Path("inspect-crop-0-train.png").read_bytes()
    assert "tokens" in shown(run / "images/train", capsys, tokenizer=str(run / "tokenizer"), pictures=0)


def test_codes_of_another_dvae_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    weights = export.describe(str(run / "dvae/export"))["content_hash"]
    make_codes(str(tmp_path / "foreign"), [[code(0)]], {"dvae": "f" * 64})
    with pytest.raises(DataError, match=rf"codes of dvae ffffffffffff, but .*tiny exports dvae {weights[:12]}; name the run that encoded them"):
        inspect.main(str(tmp_path / "foreign"), Options(run=str(run)))
    make_codes(str(tmp_path / "large"), [[code(0, codes=np.full(16, VOCAB, np.uint16))]], {"dvae": weights})
    with pytest.raises(DataError, match=r"holds 16 codes up to 32, the run's dVAE has 16 codes below 32; run 'launcher.py validate"):
        inspect.main(str(tmp_path / "large"), Options(run=str(run)))
    assert "outside the codebook 16 codes of 32 and above" in " ".join(capsys.readouterr().out.split())


class FakeSource:
    """Ten input shards of ten records; the fifth of each cannot be read, and the sixth's image cannot be decoded."""

    name = "fake"

    def __init__(self, sound: bool = True) -> None:
        self.census = Census()
        self.sound, self.read_shards, self.yielded = sound, [], 0  # type: tuple[bool, list[str], int]

    def credits(self) -> dict[str, str]:
        return {}

    def url(self, name: str) -> str:
        return name

    def version(self) -> str:
        return "fake"

    def shards(self) -> Iterator[InputShard]:
        return (InputShard(f"{number}.tar", "v") for number in range(10))

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        return iter(())

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        self.read_shards.append(shard.name)
        for row in range(10):
            name = f"{shard.name}/{row}"
            if row == 4 or not self.sound:
                yield Unreadable(name, "missing image")
            elif wanted(name):
                self.yielded += 1
                data = b"broken" if row == 5 else png(row, 24 + row)
                yield Pair(name, (f"a dog \x1b[31m {row}", "ein Hund"), data, "fake", "CC0-1.0", name, "train" if row else "validation")


def use(source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    monkeypatch.setattr(open_source, "open_source", lambda config, data: source)
    return source


def test_raw_data_are_read_by_few_records_of_few_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = use(FakeSource(), monkeypatch)
    out = shown(tmp_path, capsys, samples=16, out=str(tmp_path / "sheet.png"), pictures=9)
    assert len(source.read_shards) == random_records.SOURCE_SHARDS and source.yielded <= 2 * 16
    for words in (
        "input shards 10, 8 of them looked into",
        "not counted; --count",
        "of 16 records, as many from each of 8 input shards source records share fake 16 100.0 %",
        "CC0-1.0 16",
        "per record 2 2 2",
        "dog 50 %",
        "hund 50 %",
    ):
        assert words in out, words
    assert "\x1b" not in out
    assert read_png((tmp_path / "sheet.png").read_bytes()).shape[1] == 8 + 8 * (TILE + 8)


def test_raw_data_are_counted_on_demand_without_reading_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = use(FakeSource(), monkeypatch)
    out = shown(tmp_path, capsys, samples=100, count=True, pictures=0)
    assert "records 90 unreadable: missing image 10" in out
    assert source.yielded <= 8 * 9, "counting reads no image"
    assert "8 of 72 sampled images cannot be decoded" in out


def test_a_source_of_short_shards_still_fills_the_sample() -> None:
    class Uneven(FakeSource):
        def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
            for row in range(1 if shard.name < "9" else 50):
                yield Pair(f"{shard.name}/{row}", ("a",), b"", "fake", "", "", "")

    found = random_records.sample_source(Uneven(), 20, seed=1)
    assert found.shards == 10 and (len(found.pairs) == 20) == any(pair.id.startswith("9") for pair in found.pairs)
    assert random_records.sample_source(Uneven(), 20, seed=1).pairs == found.pairs
    assert len({pair.id for pair in found.pairs}) == len(found.pairs)


def test_what_cannot_be_inspected_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeSource(sound=False), monkeypatch)
    with pytest.raises(DataError, match=r"none of the first records of 8 input shards can be read"):
        inspect.main(str(tmp_path), Options())
    assert "unreadable: missing image 80" in " ".join(capsys.readouterr().out.split())
    for options, words in (
        (Options(samples=0), "--samples 0: at least 1 record is needed"),
        (Options(out="sheet.jpg"), r"--out sheet.jpg: the contact sheet is a PNG file; give a name that ends in .png"),
        (Options(version="abc"), r"--version abc: .* is no single shard set"),
        (Options(run=str(tmp_path)), r"no run folder \(config.json and provenance.json are missing\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            inspect.main(str(tmp_path), options)
    run = tmp_path / "run"
    storage.write_text(str(run / "config.json"), load_run("tiny", []).model_dump_json())
    storage.write_json(str(run / "provenance.json"), {})
    with pytest.raises(DataError, match=r"the run holds no data yet; run 'launcher.py prepare"):
        inspect.main(str(run), Options())


def test_an_empty_set_has_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(str(tmp_path), [[]])
    assert shown(tmp_path, capsys).endswith("no records")


def test_a_set_on_s3_is_shown_alike(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (storage.join(s3, "a/train"), str(tmp_path / "a/train")):
        make_images(url, [[image(number) for number in range(4)]])
    remote = shown(storage.join(s3, "a"), capsys, out=storage.join(s3, "sheet.png"))
    local = shown(tmp_path / "a", capsys, out=str(tmp_path / "sheet.png"))
    assert remote.replace(s3, str(tmp_path)) == local
    assert storage.read_bytes(storage.join(s3, "sheet.png")) == (tmp_path / "sheet.png").read_bytes()


def test_the_command_prints_plain_tables_and_writes_the_sheet(tmp_path: Path) -> None:
    make_images(str(tmp_path / "set"), [[image(number) for number in range(4)]])
    words = [sys.executable, str(ROOT / "launcher.py"), "inspect", str(tmp_path / "set"), "--samples", "3", "--out", str(tmp_path / "x.png")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "of 3 sampled records" in done.stdout, done.stderr
    assert decode((tmp_path / "x.png").read_bytes()).shape[1] > 3 * TILE


def test_records_that_were_taken_down_are_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(str(tmp_path / "set"), [[image(number) for number in range(6)]], excluded=[0, 5])
    listed = tmp_path / "takedown.txt"
    listed.write_text("id-2\nid-5\nid-77\n")
    opened = open_set(str(tmp_path / "set"), IMAGE_SCHEMA, takedown=str(listed))
    assert [record["id"] for record in random_records.random_rows(opened, 10)] == ["id-1", "id-3", "id-4"]
    out = shown(tmp_path / "set", capsys, takedown=str(listed), pictures=0)
    assert "records 3 to be read, 6 stored" in out
    assert "excluded (duplicates, repeated ids) 2 taken down (1 of them excluded anyway) 2" in out
    assert not list(Path().glob("inspect-*.png")), "no picture was asked for"
