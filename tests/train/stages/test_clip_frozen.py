"""Stage clip on frozen towers: features once, stops and restarts, ranks. The towers are stand-ins (tests/support/frozen_towers.py). About 7 s, 3 of them two processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenizer import run as train_tokenizer
from infra import storage
from infra.config import to_json
from infra.errors import CheckpointError, ConfigError, DataError, StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.config import ClipConfig
from model.frozen_clip import IMAGE_FEATURES, TEXT_FEATURES, FrozenHeads
from tests.support import frozen_towers
from tests.support.contrastive import contrastive_loss
from tests.support.made_sets import image, make_images
from tests.support.ranks import run_in_ranks
from train.config import RunConfig, load_run
from train.run.data_inputs import open_images, open_tokenizer
from train.stages import clip, clip_features
from train.stages.clip_task import BothHeads, ClipTask
from train.weights import export, towers
from train.weights.contrastive import Contrastive, open_contrastive

CPU = torch.device("cpu")
COUNT = 30
WORDS = ["tokenizer.vocab=300", 'clip.towers="frozen"', "clip.embed=8", "clip_fit.steps=8", "clip_fit.save_every=4", "clip_fit.eval_every=4"]


def made(url: Path, *words: str) -> tuple[RunConfig, RunFolder]:
    """A run whose images, in two parts, and tokenizer are there."""
    cfg, run = load_run("tiny", [*WORDS, *words]), RunFolder(str(url))
    storage.write_json(run.config_url, json.loads(to_json(cfg)))
    storage.write_json(run.at("provenance.json"), {"command": "test"})
    parts = [[image(number) for number in range(20)], [image(number) for number in range(20, COUNT)]]
    training = make_images(run.at("images", "train"), parts, excluded=[3])
    validation = make_images(run.at("images", "validation"), [[image(number, "validation") for number in range(40, 52)]], split="validation")
    run.finish("prepare", versions={"train": training.content_hash, "validation": validation.content_hash})
    train_tokenizer(cfg.tokenizer, training, run.at("tokenizer"))
    run.finish("tokenizer")
    return cfg, run


@pytest.fixture
def towers_here(monkeypatch: pytest.MonkeyPatch) -> frozen_towers.Counted:
    monkeypatch.setattr(clip_features, "_CHUNK", 8)
    return frozen_towers.stand_in(monkeypatch)


def computed(cfg: RunConfig, run: RunFolder, stop: StopFlag | None = None) -> clip_features.Features:
    return clip_features.features(cfg, run, open_images(cfg, run, "train"), towers.open_towers(CPU), World.single(), stop or StopFlag())


def test_features_are_those_of_each_view_and_caption_and_are_computed_once(tmp_path: Path, towers_here: frozen_towers.Counted) -> None:
    cfg, run = made(tmp_path / "run", "clip_fit.views=2", "clip_fit.scale_max=1.5")
    found = computed(cfg, run)
    assert (towers_here.pictures, towers_here.captions) == (2 * (COUNT - 1), 2 * (COUNT - 1)), "record 3 is excluded"
    cut = clip_features.crop_transform(16, 1.5, cfg.run.seed)
    for record in open_images(cfg, run, "train").records():
        views_VF, captions_MF = found.of(record["id"])
        for view in range(2):
            pixels = clip_features.to_pixels(cut(record, view)["pixels"][None])
            torch.testing.assert_close(views_VF[view].float(), towers_here.image(pixels)[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(captions_MF.float(), towers_here.text(record["captions"]), rtol=2e-3, atol=1e-3)
    assert not torch.equal(views_VF[0], views_VF[1])
    towers_here.pictures = 0
    again = computed(cfg, run)
    assert towers_here.pictures == 0 and torch.equal(again.of("id-7")[0], found.of("id-7")[0])
    (folder,) = Path(run.at("clip", "features")).iterdir()
    assert sorted(place.name for place in folder.iterdir()) == ["00000-00000", "00000-00001", "00000-00002", "00001-00000", "00001-00001"]
    shutil.rmtree(folder / "00000-00001")
    assert torch.equal(computed(cfg, run).of("id-12")[0], found.of("id-12")[0]) and towers_here.pictures == 2 * 8
    with pytest.raises(DataError, match=r"record 'id-3' has no features: delete the folder clip/features of the run"):
        found.of("id-3")


def test_what_features_depend_on_names_their_folder(tmp_path: Path, towers_here: frozen_towers.Counted) -> None:
    cfg, run = made(tmp_path / "run")
    images, both = open_images(cfg, run, "train"), towers.open_towers(CPU)
    changed = [load_run("tiny", [*WORDS, word]) for word in ("run.seed=9", "clip_fit.views=2", "clip_fit.mirror=true", "clip_fit.scale_max=2.0")]
    keys = {clip_features._key(each, images, both) for each in (cfg, *changed)}
    keys.add(clip_features._key(cfg, images, towers.Towers(both.image, both.text, both.lineage | {"text_tower": "c" * 64}, CPU)))
    keys.add(clip_features._key(cfg, open_images(cfg, run, "validation"), both))
    assert len(keys) == 7
    same = load_run("tiny", [*WORDS, "clip_fit.lr=0.1", "clip_fit.steps=99"])
    assert clip_features._key(same, images, both) in keys, "the training of heads makes no other features"


def test_a_stop_keeps_the_chunks_that_are_finished(tmp_path: Path, towers_here: frozen_towers.Counted) -> None:
    cfg, run = made(tmp_path / "run")
    stop, ask = StopFlag(), towers_here.image

    def look(pixels_B3YX: Tensor) -> Tensor:
        if towers_here.pictures >= 16:
            stop.received = signal.SIGTERM
        return ask(pixels_B3YX)

    towers_here.image = look  # type: ignore[method-assign]
    both = towers.Towers(look, towers_here.text, frozen_towers.LINEAGE, CPU)
    with pytest.raises(StopRequested, match="clip: stopped by a signal; finished parts are kept"):
        clip_features.features(cfg, run, open_images(cfg, run, "train"), both, World.single(), stop)
    before = towers_here.pictures
    computed(cfg, run)
    assert 16 <= before < COUNT - 1 and towers_here.pictures == COUNT - 1, "each picture was looked at once"


def test_training_goes_on_bit_for_bit_after_a_stop_and_marks_what_heads_were_trained_on(tmp_path: Path, towers_here: frozen_towers.Counted) -> None:
    cfg, run = made(tmp_path / "whole")
    clip.run(cfg, run, World.single(), StopFlag())
    assert not Path(run.at("clip", "features")).exists(), "let go of with the stage's end"
    about = export.describe(run.at("clip", "export"))
    assert (
        about["parents"] == {"images": open_images(cfg, run, "train").content_hash, **frozen_towers.LINEAGE} and about["model"]["towers"] == "frozen"
    )
    summary = run.done("clip")["summary"]  # type: ignore[index]
    assert 0 <= summary["recall_at_1"] <= summary["recall_at_10"] <= 1 and summary["parameters"] == 8 * (IMAGE_FEATURES + TEXT_FEATURES + 2) + 1
    cfg_2, other = made(tmp_path / "stopped")
    stop, run_to_end = StopFlag(), clip.Trainer.run_to_end

    def stopped(self: Any) -> Any:
        write = self._save

        def save(step: int, elapsed_s: float) -> None:
            stop.received = signal.SIGTERM  # after the first save, at update 4
            write(step, elapsed_s)

        self._save = save
        return run_to_end(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopRequested):
        patch.setattr(clip.Trainer, "run_to_end", stopped)
        clip.run(cfg_2, other, World.single(), stop)
    assert Path(other.at("clip", "features")).exists() and not storage.exists(other.at("clip", "done.json"))
    looked = towers_here.pictures
    clip.run(cfg_2, other, World.single(), StopFlag())
    assert towers_here.pictures == looked + 12, "only the validation pictures are looked at again"
    assert export.describe(other.at("clip", "export"))["content_hash"] == about["content_hash"]


def opened(cfg: RunConfig, run: RunFolder) -> tuple[Contrastive, str]:
    return open_contrastive(run.at("clip", "export"), cfg.clip, 16, open_tokenizer(cfg, run)[0], cfg.tokenizer.vocab, CPU)


def test_an_export_opens_as_what_ranks_and_other_towers_are_refused(
    tmp_path: Path, towers_here: frozen_towers.Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, run = made(tmp_path / "run")
    heads = FrozenHeads(cfg.clip)
    export.write(run.at("clip", "export"), heads.state_dict(), cfg.clip, parents=frozen_towers.LINEAGE)
    model, _ = opened(cfg, run)
    pixels = torch.rand(2, 3, 16, 16)
    image_BE, text_BE = model.encode_batch({"pixels": pixels, "captions": ["a fox", "a tree"]})
    assert torch.allclose(image_BE, heads.embed_image(towers_here.image(pixels))) and torch.allclose(text_BE[1:], model.encode_caption("a tree"))
    asked = towers_here.captions
    model.encode_caption("a tree")
    assert towers_here.captions == asked, "each candidate asks for the same caption"
    export.write(run.at("clip", "export"), heads.state_dict(), cfg.clip, parents=frozen_towers.LINEAGE | {"image_tower": "d" * 64})
    with pytest.raises(DataError, match=r"features of image_tower dddddddddddd, and the installed package holds aaaaaaaaaaaa; install the version"):
        opened(cfg, run)
    export.write(run.at("clip", "export"), FrozenHeads(ClipConfig(towers="frozen", embed=9)).state_dict(), cfg.clip, parents=frozen_towers.LINEAGE)
    with pytest.raises(CheckpointError, match="weights of another model: 'image_head"):
        opened(cfg, run)


def test_data_in_scripts_that_the_encoder_does_not_know_are_said(towers_here: frozen_towers.Counted, caplog: pytest.LogCaptureFixture) -> None:
    both, pixels = towers.open_towers(CPU), torch.rand(2, 3, 16, 16)
    for captions, warned in ((["a fox", "лиса"], False), (["лиса", "дом"], True)):
        (batch,) = clip_features.of_batches(iter([{"ids": ["1", "2"], "pixels": pixels, "captions": captions}]), both)
        assert batch["text_features"].shape == (2, TEXT_FEATURES) and ("2 of 2 validation captions" in caplog.text) is warned


def test_only_towers_of_its_own_divide_the_picture_into_patches() -> None:
    assert load_run("tiny", [*WORDS, "clip.patch=7", "clip.heads=3"]).clip.patch == 7
    with pytest.raises(ConfigError, match=r"clip\.patch = 7 does not divide dvae\.image_size = 16"):
        load_run("tiny", ["clip.patch=7"])


def pairs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    features = {
        "image_features": torch.randn(8, IMAGE_FEATURES, generator=generator),
        "text_features": torch.randn(8, TEXT_FEATURES, generator=generator),
    }
    return features | {"ids": [str(number) for number in range(8)]}


def gradients(world: World) -> tuple[float, dict[str, Tensor]]:
    """Of one update over two micro-batches of this rank's pairs, which are told apart from those of all."""
    cfg = load_run("tiny", [*WORDS, "clip_fit.batch=8", 'clip_fit.contrast="update"'])
    torch.manual_seed(0)
    engine, each = clip.clip_engine(FrozenHeads(cfg.clip), cfg.clip_fit, world), 8 // (2 * world.size)
    begin = world.rank * 2 * each
    batches = [{name: value[start : start + each] for name, value in pairs().items()} for start in (begin, begin + each)]
    task = ClipTask(cfg, world, CPU, [])  # type: ignore[arg-type]
    denominators, total = task.denominators(batches), 0.0
    for place, batch in enumerate(batches):
        engine.micro_batch(last=place == 1)
        loss = task.loss(engine, batch, 1, {}, denominators)
        engine.backward(loss.total)
        total += float(loss.sums["loss"].detach())
    return total, {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}


def test_heads_on_two_ranks_have_the_gradient_of_all_pairs_and_a_clamped_scale() -> None:
    torch.manual_seed(0)
    whole, batch = BothHeads(FrozenHeads(load_run("tiny", WORDS).clip)), pairs()
    loss = contrastive_loss(*whole(batch["image_features"], batch["text_features"]))
    loss.backward()  # type: ignore[no-untyped-call]
    results = run_in_ranks(gradients, 2)
    assert sum(told for told, _ in results) == pytest.approx(float(loss.detach()), rel=1e-5)
    for _, found in results:
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    whole.clip.log_scale.data.fill_(9.0)
    whole.clip.limit_scale()
    assert float(whole.clip.scale.detach()) == pytest.approx(100)
