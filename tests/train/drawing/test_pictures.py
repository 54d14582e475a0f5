"""Drawing from Python: what ``load`` opens, what it refuses, and the notebook that shows it. Seconds: about 8."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra import storage
from infra.errors import CheckpointError, ConfigError, DataError
from infra.run_folder import RunFolder
from tests.support import drawable_run
from tests.support.root import ROOT
from train.config import load_run
from train.drawing import package, prompt_image
from train.drawing.pictures import Artist, load
from train.verbs import export as export_verb
from train.weights import checkpoint, export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"), "dalle_fit.caption_dropout=0.1")


@pytest.fixture(scope="module")
def artist(run: RunFolder) -> Artist:
    return load(run.url)


def arrays(pictures: list[Image.Image]) -> list[Any]:
    return [np.asarray(picture).tolist() for picture in pictures]


def test_pictures_come_caption_by_caption_and_say_what_they_are(artist: Artist) -> None:
    pictures = artist.draw(["a red fox", "a blue house"], n=3, seed=1)
    assert [picture.info["caption"] for picture in pictures] == ["a red fox"] * 3 + ["a blue house"] * 3
    assert {picture.size for picture in pictures} == {(16, 16)} and pictures[0].mode == "RGB"
    assert arrays(pictures) == arrays(artist.draw(["a red fox", "a blue house"], n=3, seed=1))
    assert arrays(pictures)[3:] == arrays(artist.draw("a blue house", n=3, seed=1)), "whatever else is drawn"
    assert arrays(pictures)[:3] != arrays(artist.draw("a red fox", n=3, seed=2))
    assert len({str(array) for array in arrays(pictures)}) == 6


@pytest.mark.parametrize("settings", [{}, {"guidance": 3.0}, {"temperature": 0.5, "top_k": 5, "top_p": 0.9}])
def test_batches_and_windows_do_not_shape_pictures(artist: Artist, settings: dict[str, Any]) -> None:
    whole = arrays(artist.draw(["a red fox", "a blue house", "sea"], n=5, batch=100, window=1, **settings))
    for batch, window in ((1, 1), (2, 4), (7, 3)):
        assert arrays(artist.draw(["a red fox", "a blue house", "sea"], n=5, batch=batch, window=window, **settings)) == whole


def test_with_a_reranker_the_best_come_first(run: RunFolder) -> None:
    scores = [picture.info["score"] for picture in load(run.url, rerank="clip").draw("a red fox", n=6)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    other = load(run.url, rerank=run.at("clip", "export")).draw("a red fox", n=6)
    assert [picture.info["score"] for picture in other] == scores


def test_nothing_is_asked_for_that_is_not_needed(tmp_path: Path, run: RunFolder, artist: Artist) -> None:
    """No images, no clip, no codes, no marker of any stage."""
    for name in ("config.json", "provenance.json", "dalle", "dvae", "tokenizer"):
        source = storage.local_path(run.at(name))
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    assert arrays(load(str(tmp_path)).draw("a red fox")) == arrays(artist.draw("a red fox"))
    assert arrays(load(f"{tmp_path}/dalle/export/").draw("a red fox")) == arrays(artist.draw("a red fox"))
    with pytest.raises(DataError, match=r"clip/export: there is no clip here; run 'launcher.py clip"):
        load(str(tmp_path), rerank="clip")


def test_a_live_run_is_drawn_from_its_newest_averaged_checkpoint(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "live"), live=True)
    models = load(run.url).models
    assert models.description == "average weights after update 10, of a run under way"
    wanted = drawable_run.transformer(models.cfg, 10).state_dict()
    assert models.lineage["dalle"] == checkpoint.content_hash(wanted)
    # An export made by hand is taken as long as no newer checkpoint has come.
    export_verb.main(run.url, "dalle", "average", 5, "")
    assert load(run.url).models.description == "average weights after update 10, of a run under way"
    export_verb.main(run.url, "dalle", "average", 10, "")
    assert load(run.url).models.description == "average weights after update 10"
    drawable_run.save(run, models.cfg, 15, drawable_run.parents_of(run))
    assert load(run.url).models.description == "average weights after update 15, of a run under way"


def test_a_checkpoint_that_goes_while_it_is_read_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = drawable_run.make(str(tmp_path / "live"), live=True)
    cfg, parents, read = load_run(run.url, []), drawable_run.parents_of(run), checkpoint.read_tensors

    def drop(url: str, prefix: str) -> dict[str, torch.Tensor]:
        if url.endswith("step-00000010"):  # the run drops it, and has written another meanwhile
            shutil.rmtree(url)
            drawable_run.save(run, cfg, 15, parents)
        return read(url, prefix)

    monkeypatch.setattr(checkpoint, "read_tensors", drop)
    assert load(run.url).models.description.startswith("average weights after update 15")


def test_damaged_checkpoints_fall_back_and_in_the_end_say_so(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "live"), live=True)
    for step, wanted in ((10, "average weights after update 5"), (5, None)):
        file = Path(checkpoint.folder(run.at("dalle"), step), "rank-0.bin")
        file.write_bytes(file.read_bytes()[:-100] + bytes(100))
        if wanted:
            assert load(run.url).models.description.startswith(wanted)
    with pytest.raises(CheckpointError, match="step-0000000"):
        load(run.url)


def test_a_package_draws_the_same_pictures_anywhere_and_tells_of_no_place(tmp_path: Path, run: RunFolder, artist: Artist) -> None:
    export_verb.package(run.url, str(tmp_path / "package"))
    (tmp_path / "package").rename(tmp_path / "elsewhere")
    packed = load(str(tmp_path / "elsewhere"), rerank="clip")
    assert arrays(packed.draw("a red fox", n=1)) == arrays(artist.draw("a red fox", n=1))
    names = {str(path.relative_to(tmp_path / "elsewhere")) for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    weights = {f"{part}/{name}" for part in ("dalle", "dvae", "clip") for name in ("model.safetensors", "config.json")}
    assert names == weights | {"README.md", "config.json", "package.json", "tokenizer/tokenizer.model", "tokenizer/manifest.json"}
    card = (tmp_path / "elsewhere" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and "pipeline_tag: text-to-image" in card
    assert "drawings by nobody, CC0" in card and "10% of captions dropped" in card
    assert not [name for name in names if str(run.url) in (tmp_path / "elsewhere" / name).read_bytes().decode("latin-1")]
    assert set(json.loads((tmp_path / "elsewhere" / "config.json").read_text())) == {"run", "tokenizer", "dvae", "dalle", "dalle_fit", "clip"}


def test_a_package_of_a_live_run_on_s3_draws_from_there(tmp_path: Path, s3: str) -> None:
    run = drawable_run.make(f"{s3}/live", live=True)
    export_verb.package(run.url, f"{s3}/package")
    assert arrays(load(f"{s3}/package").draw("a red fox", n=2)) == arrays(load(run.url).draw("a red fox", n=2))


def test_what_cannot_be_packed_is_refused(tmp_path: Path, run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="--package needs a folder to write to"):
        package.write(run.url, "")
    with pytest.raises(ConfigError, match="a run folder; name one for the package"):
        package.write(run.url, run.url)
    package.write(run.url, str(tmp_path / "package"))
    with pytest.raises(ConfigError, match="a package already; copy the folder"):
        package.write(str(tmp_path / "package"), str(tmp_path / "other"))
    bare = drawable_run.make(str(tmp_path / "bare"))
    shutil.rmtree(bare.at("dvae"))
    with pytest.raises(DataError, match=r"there is no dvae here; run 'launcher.py dvae"):
        package.write(bare.url, str(tmp_path / "third"))
    assert not (tmp_path / "third" / "package.json").exists()


def test_what_does_not_belong_together_or_is_not_there_is_refused(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="neither a run folder nor a package"):
        load(str(tmp_path))
    export_verb.main(drawable_run.make(str(tmp_path / "live"), live=True).url, "dalle", "average", 0, str(tmp_path / "alone"))
    with pytest.raises(ConfigError, match=r"the weights of only one model; 'launcher.py export RUN --package"):
        load(str(tmp_path / "alone"))
    with pytest.raises(ConfigError, match="precision 'int3': accepted are auto, fp32"):
        load(run.url, precision="int3")
    with pytest.raises(ConfigError, match="device 'tpu': accepted are cpu and cuda"):
        load(run.url, device="tpu")
    with pytest.raises(ConfigError, match="rerank 'somewhere': accepted are none, clip, and a folder"):
        load(run.url, rerank="somewhere")
    with pytest.raises(ConfigError, match="no contrastive model"):
        load(run.url, rerank=run.at("dalle", "export"))
    other = drawable_run.make(str(tmp_path / "other"), "tokenizer.vocab=301")
    with pytest.raises((CheckpointError, DataError), match="clip"):
        load(run.url, rerank=other.at("clip", "export"))
    shutil.rmtree(run.at("dvae"))
    with pytest.raises(DataError, match=r"there is no dvae here; run 'launcher.py dvae"):
        load(run.url)
    shutil.copytree(other.at("dvae"), run.at("dvae"))
    tensors = {name: tensor + 1 for name, tensor in export.read_tensors(run.at("dvae", "export"))[1].items()}
    export.write(run.at("dvae", "export"), tensors, load_run(run.url, []).dvae, parents={})
    with pytest.raises(DataError, match=r"dalle was trained with dvae .*, and here is dvae"):
        load(run.url)
    shutil.rmtree(run.at("dalle"))
    with pytest.raises(DataError, match=r"the transformer has no weights yet; a checkpoint comes every dalle_fit.save_every updates"):
        load(run.url)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="device 'cuda': there is no GPU here"):
        load(run.url, device="cuda")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        ({"top_k": 33}, "top_k = 33: accepted are 1 to dvae.vocab = 32"),
        ({"top_p": 2.0}, "top_p = 2.0"),
        ({"n": 0}, "n = 0, batch = 0, seed = 0: accepted are n from 1"),
        ({"window": 5}, r"window = 5: accepted are 0 \(by the device\) to 4"),
        ({"keep_rows": 4}, "keep_rows = 4: accepted are 1 to 3 of the picture's 4 rows"),
        ({"fit": "stretch"}, "fit 'stretch': accepted are crop"),
        ({"temprature": 1.0}, "'temprature' is not a setting of drawing; accepted: n, seed, temperature"),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_refused(artist: Artist, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        artist.draw("a red fox", **({"n": 1} | settings))


def test_guidance_needs_a_model_that_saw_pictures_without_captions(tmp_path: Path) -> None:
    plain = load(drawable_run.make(str(tmp_path / "plain")).url)
    with pytest.raises(ConfigError, match=r"guidance = 3.0: this model was trained with dalle_fit.caption_dropout = 0.*draw with guidance 1"):
        plain.draw("a red fox", guidance=3.0)
    assert plain.draw("a red fox", guidance=1.0)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "mine"))
    _, tensors = export.read_tensors(run.at("dalle", "export"))
    tensors["resblocks.3.mlp_1.weight"] = torch.full_like(tensors["resblocks.3.mlp_1.weight"], float("nan"))
    export.write(run.at("dalle", "export"), tensors, load_run(run.url, []).dalle, parents=drawable_run.parents_of(run))
    with pytest.raises(CheckpointError, match=r"mine: the logits of image positions? 0.* are not finite: the weights \(average weights\) are broken"):
        load(run.url).draw("a red fox")


def test_the_upper_part_of_an_image_is_kept_whatever_its_size(tmp_path: Path, artist: Artist) -> None:
    for number, size in enumerate([(16, 16), (40, 30), (3, 2), (1, 1), (700, 900)]):
        file = drawable_run.picture_file(tmp_path / f"{number}.png", size)
        for fit in ("crop", "letterbox"):
            codes = prompt_image.codes(artist.models, prompt_image.read(file, 16, fit), 2)  # type: ignore[arg-type]
            assert len(codes) == 8
            one, two = artist.draw("a red fox", n=2, image=file, keep_rows=2, fit=fit)
            # Decoding mixes neighbours: the codes are compared, not the pixels.
            assert arrays([one]) != arrays([two])
    assert prompt_image.kept_rows(artist.models.cfg.dvae.grid, None) == 2  # 15 of 32, of 4


def test_letterboxing_shows_all_of_an_image_and_cropping_its_middle() -> None:
    wide = Image.new("RGB", (80, 20), (0, 0, 0))
    boxed, cropped = (np.asarray(prompt_image.square(wide, 16, fit)) for fit in ("letterbox", "crop"))  # type: ignore[arg-type]
    assert cropped.max() == 0
    assert boxed[0].min() == 255 and boxed[15].min() == 255 and boxed[8].max() == 0


def test_images_that_cannot_be_gone_on_from_are_named(tmp_path: Path, artist: Artist) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(DataError, match=r"broken.png: image cannot be decoded"):
        artist.draw("a red fox", image=str(broken))
    with pytest.raises(DataError, match=r"missing.png"):
        artist.draw("a red fox", image=str(tmp_path / "missing.png"))
    with pytest.raises(DataError, match=r"long.png: an image of 700 x 2 pixels is too long to be continued; at most 64 to 1 is accepted"):
        artist.draw("a red fox", image=drawable_run.picture_file(tmp_path / "long.png", (700, 2)))
    huge = tmp_path / "huge.png"
    header = b"\x00\x00\x00\rIHDR" + (50000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + header + zlib.crc32(header[4:]).to_bytes(4, "big") + b"\x00\x00\x00\x0aIDAT" + bytes(20))
    with pytest.raises(DataError, match=r"huge.png: image of 50000 x 50000 pixels: at most"):
        artist.draw("a red fox", image=str(huge))


def test_the_notebook_runs(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run.url)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    cells = [cell for cell in json.loads((ROOT / "docs" / "draw.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec("".join(cell["source"]), space)
    assert len(cells) == 4 and len(space["pictures"]) == 4 and len(space["completed"]) == 2
    assert [picture.info["score"] for picture in space["ranked"]] == sorted((p.info["score"] for p in space["ranked"]), reverse=True)
