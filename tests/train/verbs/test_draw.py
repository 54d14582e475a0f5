"""``launcher.py draw``: what it draws, writes, prints, keeps and refuses. Seconds: about 12, 5 of them one real command line."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra import storage
from infra.errors import CheckpointError, ConfigError, DataError, NoRoomError, StopRequested, UsageError
from infra.run_folder import RunFolder
from infra.signals import STOP_SIGNALS, StopFlag
from tests.support import drawable_run
from tests.support.root import ROOT
from train.drawing import draw as drawing
from train.drawing.settings import Settings
from train.verbs import draw as verb
from train.verbs.export import package

Draw = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"), "dalle_fit.caption_dropout=0.1")


@pytest.fixture
def draw(run: RunFolder, tmp_path: Path) -> Draw:
    def call(*captions: str, stop: StopFlag | None = None, url: str = run.url, n: int = 0, **words: Any) -> None:
        names = {field.name for field in dataclasses.fields(Settings)}
        settings = Settings(n=n or (Settings().n if "again" in words else 2), **{name: value for name, value in words.items() if name in names})
        options = {name: value for name, value in words.items() if name not in names}
        verb.main(url, captions, verb.Options(settings, **({"out": str(tmp_path / "out")} | options)), StopFlag() if stop is None else stop)

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.rglob("samples.jsonl")) for line in path.read_text().splitlines()]


def test_pictures_lie_by_caption_and_say_what_shaped_them(draw: Draw, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox", "a blue house", rerank="clip")
    said = capsys.readouterr().out
    assert "average weights (" in said and "cpu, fp32; loaded in" in said and "drew 4 pictures in" in said
    assert said.count("   similarity ") == 4 and "score" not in said, "a cosine is no probability, and is not called what reads like one"
    found = lines(tmp_path / "out")
    assert len(found) == 4 and all(line["url"] in said for line in [{"url": line["file"]} for line in found])
    for line in found:
        (folder,) = (tmp_path / "out").glob(f"{line['caption'].replace(' ', '-')}-{line['key'][:12]}")
        with Image.open(folder / line["file"]) as picture:
            assert picture.size == (16, 16)
        assert set(line["weights"]) == {"dalle", "dvae", "tokenizer", "clip"} and -1 <= line["score"] <= 1
        assert line["shaped_by"] | {"place": 0} == {
            "precision": "fp32", "deterministic": False, "device": "cpu", "threads": 1, "torch": line["shaped_by"]["torch"], "captions": 2, "each": 2, "place": 0, "window": 1,
        }  # fmt: skip
        assert line["settings"] == {"n": 2, "seed": 0, "temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0}
    assert len({line["seed"] for line in found}) == 4


def test_what_is_drawn_is_not_drawn_again_and_other_values_draw_beside_it(
    draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw("a red fox")
    first = files(tmp_path / "out")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "begin", None)
        draw("a red fox")
    assert "drew 0 pictures" in (said := capsys.readouterr().out) and "2 were drawn before" in said and "000.png" in said
    assert files(tmp_path / "out") == first
    image = drawable_run.picture_file(tmp_path / "given.png")
    others: list[dict[str, Any]] = [
        {"seed": 1}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"guidance": 2.0}, {"rerank": "clip"}, {"n": 3},
        {"image": image}, {"image": image, "keep_rows": 1}, {"image": image, "fit": "letterbox"}, {"format": "webp"},
    ]  # fmt: skip
    for count, other in enumerate(others, 2):
        draw("a red fox", **other)
        assert len(list((tmp_path / "out").iterdir())) == count, other
    assert {name: data for name, data in files(tmp_path / "out").items() if name in first} == first


def test_a_run_of_other_weights_draws_beside(draw: Draw, tmp_path: Path) -> None:
    draw("a red fox")
    draw("a red fox", url=drawable_run.make(str(tmp_path / "live"), "dalle_fit.caption_dropout=0.1", live=True).url)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_picture_is_drawn_again_alone_with_the_same_codes_and_the_same_file(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = drawable_run.picture_file(tmp_path / "given.png")
    draw("a red fox", "a blue house", "sea", n=3, guidance=2.5, temperature=0.8, image=image, batch=6, format="webp")
    drawn = lines(tmp_path / "out")
    Path(image).unlink()
    for number, line in enumerate(drawn):
        capsys.readouterr()
        draw(url="", again=json.dumps(line), out=str(tmp_path / f"again-{number}"))
        assert "the same codes and the same file" in capsys.readouterr().out
        (folder,) = (tmp_path / "out").glob(f"*-{line['key'][:12]}")
        assert (tmp_path / f"again-{number}" / line["file"]).read_bytes() == (folder / line["file"]).read_bytes()
    (folder,) = (tmp_path / "out").glob("sea-*")
    draw(url="", again=f"{folder}/samples.jsonl:3", out=str(tmp_path / "again"), json=True)
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["verdict"] == "the same codes and the same file" and Path(answer["url"]).name == "002.webp"


def test_a_picture_that_comes_out_otherwise_is_said_to(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox", n=1)
    (line,) = lines(tmp_path / "out")
    draw(url="", again=json.dumps(line | {"sha256": "0"}))
    assert "the same codes, but another file" in capsys.readouterr().out
    moved = line | {"sha256": "0", "codes_sha256": "0", "shaped_by": line["shaped_by"] | {"torch": "0.1"}}
    draw(url="", again=json.dumps(moved))
    assert "other codes: rounding turned a code (torch 0.1 then," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", r"--again: not a line of a samples.jsonl"),
        ('{"schema": "other"}', "its schema is 'other', not 'sample/2'"),
        ("nowhere.jsonl:2", r"--again nowhere.jsonl:2: neither a line of a samples.jsonl nor a file"),
        ("{out}/samples.jsonl:9", r"has 2 lines; name one as .*:NUMBER, 1 to 2"),
        ("{out}/samples.jsonl", r"has 2 lines; name one as"),
    ],
)
def test_lines_that_are_none_are_refused(draw: Draw, tmp_path: Path, given: str, message: str) -> None:
    draw("a red fox")
    (folder,) = (tmp_path / "out").iterdir()
    with pytest.raises(DataError, match=message):
        draw(again=given.replace("{out}", str(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../000.png"}, "file: string should match pattern"),
        ({"file": "/000.png"}, "file: string should match pattern"),
        ({"key": "/../../../tmp"}, "key: string should match pattern"),
        ({"shaped_by": {"captions": 1 << 40}}, "shaped_by.captions: input should be less than or equal to 65536"),
        ({"score": "high"}, "score: input should be a valid number"),
        ({"weights": None}, "weights: input should be a valid dictionary"),
    ],
)
def test_a_line_of_somebody_else_leads_nowhere_and_costs_no_more_than_ours(
    change: dict[str, object], message: str, draw: Draw, tmp_path: Path
) -> None:
    draw("a red fox", n=1)
    (line,) = lines(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        draw(url="", again=json.dumps(line | change), out=str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()


def test_again_needs_the_same_weights_precision_and_nothing_else(draw: Draw, tmp_path: Path) -> None:
    draw("a red fox", n=1)
    (line,) = lines(tmp_path / "out")
    other = drawable_run.make(str(tmp_path / "other"), live=True)
    with pytest.raises(DataError, match=r"other: its dalle is .*, and the picture was drawn with"):
        draw(again=json.dumps(line), url=other.url)
    with pytest.raises(ConfigError, match="--precision bf16: the picture was drawn in fp32"):
        draw(again=json.dumps(line), precision="bf16")
    with pytest.raises(UsageError, match="--again draws one recorded picture"):
        draw("a blue house", again=json.dumps(line))
    with pytest.raises(DataError, match=r"--again: damaged, or not written by this project: shaped_by\.window: field required"):
        del line["shaped_by"]["window"]
        draw(again=json.dumps(line))
    with pytest.raises(DataError, match=r"--again: damaged, or not written by this project: shaped_by: field required"):
        draw(again=json.dumps({name: value for name, value in line.items() if name != "shaped_by"}))


def test_what_is_drawn_deterministically_is_drawn_again_without_its_batch(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox", n=5, batch=3, window=2, deterministic=True)
    drawn = lines(tmp_path / "out")
    assert all(line["shaped_by"]["deterministic"] for line in drawn)
    draw("a red fox", n=5, batch=5, window=1, deterministic=True, out=str(tmp_path / "other"))
    assert [line["sha256"] for line in lines(tmp_path / "other")] == [line["sha256"] for line in drawn]
    draw(url="", again=json.dumps(drawn[4]))
    assert "the same codes and the same file" in capsys.readouterr().out
    for given in ({"precision": "bf16"}, {"precision": "fp16"}):
        with pytest.raises(
            ConfigError, match=r"--deterministic with device cpu and precision .*: it needs --device cpu and --precision fp32 or int8"
        ):
            draw("a red fox", deterministic=True, **given)


def test_weights_of_eight_bits_are_recorded_and_drawn_again(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox", n=1, precision="int8")
    (line,) = lines(tmp_path / "out")
    assert line["shaped_by"]["precision"] == "int8"
    draw(url="", again=json.dumps(line))
    assert "cpu, int8" in capsys.readouterr().out
    draw("a red fox", n=1)
    assert "drew 1 picture in" in capsys.readouterr().out, "rounded weights are other weights"


def test_a_signal_keeps_what_is_drawn_and_the_same_command_draws_the_rest(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw("a red fox", "a blue house", "sea", n=3, batch=2, out=str(tmp_path / "whole"))
    stop, begin, calls = StopFlag(), drawing.begin, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            stop.handle(STOP_SIGNALS[-1], None)
        return begin(*arguments, **options)

    monkeypatch.setattr(drawing, "begin", interrupted)
    with pytest.raises(StopRequested, match=r"stopped by a signal after 3 new pictures, which are kept in .*; the same command draws the rest"):
        draw("a red fox", "a blue house", "sea", n=3, batch=2, stop=stop)
    assert len(lines(tmp_path / "out")) == 3
    kept = {name: data for name, data in files(tmp_path / "out").items() if name.endswith(".png")}
    monkeypatch.setattr(drawing, "begin", begin)
    capsys.readouterr()
    draw("a red fox", "a blue house", "sea", n=3, batch=2)
    assert "drew 6 pictures" in (said := capsys.readouterr().out) and "3 were drawn before" in said
    whole, resumed = ({name: data for name, data in files(tmp_path / name).items() if name.endswith(".png")} for name in ("whole", "out"))
    assert resumed == whole and kept.items() <= resumed.items()
    assert len(lines(tmp_path / "out")) == 9


def test_a_full_disk_loses_nothing_and_the_same_command_completes(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = storage.write_bytes, 0

    def full(url: str, data: bytes) -> None:
        nonlocal count
        count += url.endswith(".png")
        if count == 3:
            raise NoRoomError(f"{url}: no room.")
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(NoRoomError, match="no room"):
        draw("a red fox", "a blue house", n=2, batch=2)
    assert len(lines(tmp_path / "out")) == 2
    monkeypatch.setattr(storage, "write_bytes", write)
    draw("a red fox", "a blue house", n=2, batch=2)
    assert len(lines(tmp_path / "out")) == 4


def test_a_picture_that_was_deleted_is_drawn_anew(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox", n=3)
    before = files(tmp_path / "out")
    next((tmp_path / "out").rglob("001.png")).unlink()
    draw("a red fox", n=3)
    assert "drew 1 picture in" in capsys.readouterr().out
    assert {name: data for name, data in files(tmp_path / "out").items() if name.endswith(".png")} == {
        name: data for name, data in before.items() if name.endswith(".png")
    }


def test_captions_come_from_the_command_line_a_file_or_standard_input_each_once(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions.txt").write_text("a red fox\n\na blue house\na red fox\n")
    draw("sea", "a red fox", file=str(tmp_path / "captions.txt"), n=1)
    assert sorted(line["caption"] for line in lines(tmp_path / "out")) == ["a blue house", "a red fox", "sea"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a café\n".encode())))
    draw(file="-", n=1, out=str(tmp_path / "piped"))
    assert [line["caption"] for line in lines(tmp_path / "piped")] == ["a café"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(DataError, match="--file -: not UTF-8 text"):
        draw(file="-")
    with pytest.raises(DataError, match=r"missing.txt"):
        draw(file=str(tmp_path / "missing.txt"))


@pytest.mark.parametrize(
    ("caption", "note"),
    [
        ("", "the caption '' is empty"),
        ("  ", "the caption '  ' is empty"),
        ("a red fox 狐狸", "'a red fox 狐狸': rare or unknown in training, and spelled in bytes: 狐狸"),
        ("fox " * 2500, "5000 tokens, of which the first 16 are read (tokenizer.max_tokens)"),
        ("a red\0fox", r"'a red\x00fox': holds control characters"),
    ],
)
def test_odd_captions_are_drawn_and_noted(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str], caption: str, note: str) -> None:
    draw(caption, n=1, grid=True)
    captured = capsys.readouterr()
    assert note in captured.err if "tokens" not in note else "of which the first 16 are read" in captured.err
    (line,) = lines(tmp_path / "out")
    assert line["caption"] == caption and "\0" not in captured.out
    assert len(list((tmp_path / "out").glob("grid-*.png"))) == 1


def test_ordinary_captions_are_not_noted(draw: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox", n=1)
    assert capsys.readouterr().err == ""


def test_json_lines_alone_go_to_standard_output(draw: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox", "", json=True, grid=True)
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert len(found) == 4 and all(Path(line["url"]).is_file() for line in found)
    assert "loaded in" in captured.err and "grid-" in captured.err


def test_a_grid_shows_a_row_for_each_caption_best_first(draw: Draw, tmp_path: Path) -> None:
    draw("a red fox", "a blue house", rerank="clip", n=3, grid=True)
    (sheet,) = (tmp_path / "out").glob("grid-*.png")
    pixels = np.asarray(Image.open(sheet))
    (folder,) = (tmp_path / "out").glob("a-red-fox-*")
    best = max(lines(folder), key=lambda line: line["score"])
    picture = np.asarray(Image.open(folder / best["file"]))
    assert (pixels[24:40, 4:20] == picture).all()
    draw("a red fox", rerank="clip", n=3, grid=True)
    assert len(list((tmp_path / "out").glob("grid-*.png"))) == 2, "another set of drawings is another grid"


def test_webp_keeps_every_bit(draw: Draw, tmp_path: Path) -> None:
    draw("a red fox", n=1)
    draw("a red fox", n=1, format="webp")
    png, webp = (np.asarray(Image.open(next((tmp_path / "out").rglob(f"000.{form}"))).convert("RGB")) for form in ("png", "webp"))
    assert (png == webp).all()


def test_pictures_lie_in_a_local_run_and_beside_nothing_else(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verb.main(run.url, ["a red fox"], verb.Options(Settings(n=1)), StopFlag())
    assert len(list(Path(run.at("drawings")).glob("a-red-fox-*/000.png"))) == 1
    package(run.url, "package")
    verb.main("package", ["a red fox"], verb.Options(Settings(n=1)), StopFlag())
    assert len(list((tmp_path / "drawings").glob("a-red-fox-*/000.png"))) == 1


def test_options_of_the_block_are_stored_with_the_weights_and_a_package_draws_what_its_run_does(draw: Draw, tmp_path: Path) -> None:
    options = ("dalle.qk_norm=true", "dalle.rotary_positions=true")
    run, out = drawable_run.make(str(tmp_path / "with"), *options), str(tmp_path / "package")
    package(run.url, out)
    stored = json.loads((tmp_path / "package" / "dalle" / "config.json").read_text())["model"]
    assert all(stored[word.removeprefix("dalle.").removesuffix("=true")] is True for word in options)
    drawn = []
    for url in (run.url, out):
        draw("a red fox", url=url, out=str(tmp_path / "out" / Path(url).name))
        drawn.append([path.read_bytes() for path in sorted((tmp_path / "out" / Path(url).name).rglob("0*.png"))])
    assert len(drawn[0]) == 2 and drawn[0] == drawn[1]
    config = Path(run.config_url)
    config.write_text(config.read_text().replace('"qk_norm": true', '"qk_norm": false'))
    with pytest.raises(CheckpointError, match=r"weights of another model: 'resblocks.0.k_norm.weight' is \[16\], this configuration builds None"):
        draw("a red fox", url=run.url)


@pytest.mark.parametrize(
    ("captions", "options", "error", "message"),
    [
        ((), {}, UsageError, "nothing to draw: give a run and a caption"),
        (("a red fox",), {"url": ""}, UsageError, "nothing to draw"),
        (("a red fox",), {"format": "bmp"}, UsageError, "--format bmp: accepted are png, webp"),
        (("a red fox",), {"keep_rows": 2}, UsageError, "--keep-rows needs an image"),
        (("a red fox",), {"rerank": "somewhere"}, ConfigError, "rerank 'somewhere': accepted are none, clip, and a folder"),
        (("a red fox",), {"temperature": -1.0}, ConfigError, r"temperature = -1.0: must be above 0"),
    ],
)
def test_commands_that_ask_for_nothing_drawable_are_refused(
    draw: Draw, captions: tuple[str, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(*captions, **options)


def test_the_readmes_third_command_draws_your_own_caption(tmp_path: Path) -> None:
    """As it stands in the README, on a run of its name; and what a user sees of mistakes: one last line, and the exit code."""
    readme = (ROOT / "README.md").read_text()
    (command,) = [line.strip() for line in readme.splitlines() if line.strip().startswith(".venv/bin/python launcher.py draw runs/demo")]
    drawable_run.make(str(tmp_path / "runs" / "demo"))

    def launch(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(ROOT / "launcher.py"), *given], cwd=tmp_path, capture_output=True, text=True, check=False)

    done = launch(*shlex.split(command.split("#")[0])[2:])
    assert done.returncode == 0, done.stderr
    assert "drew 4 pictures" in done.stdout and len(list(tmp_path.glob("runs/demo/drawings/*/*.png"))) == 4
    refused = launch("draw", "runs/demo", "a red fox", "--guidance", "3")
    assert refused.returncode == 78 and "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("config error: guidance = 3.0: this model was trained with dalle_fit.caption_dropout = 0")
