"""Run folders that can be drawn from, made in a second: the sizes of preset tiny, with seeded random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer import run as train_tokenizer
from infra import storage
from infra.config import to_json
from infra.run_folder import RunFolder
from infra.world import World
from model.clip import Clip
from model.dvae import DVAE
from model.transformer import Transformer
from tests.support.frozen_towers import LINEAGE
from train.config import RunConfig, load_run
from train.weights import checkpoint, export
from train.weights.contrastive import build
from train.weights.fragments import even_slice

CAPTIONS = ("a red fox", "a blue house", "two green trees and a sun", "people at the sea")


class _Captions:
    """As much of an image set as the tokenizer's training asks for."""

    content_hash = "images"

    def captions(self) -> list[list[str]]:
        return [[caption] for caption in CAPTIONS]


def transformer(cfg: RunConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(cfg.dalle, cfg.stream_shape())
    with torch.no_grad():
        model.image_unembedding.weight.mul_(5)  # so that captions and seeds show
    return model


def make(url: str, *overrides: str, live: bool = False) -> RunFolder:
    """A run whose stages have all left their exports; a live one has checkpoints of the transformer instead of its export."""
    words = ["tokenizer.vocab=300", *overrides]
    cfg, run = load_run("tiny", words), RunFolder(url)
    storage.write_json(run.at("provenance.json"), {"command": "test"})
    storage.write_json(run.config_url, json.loads(to_json(cfg)))
    images: Any = _Captions()
    tokenizer = train_tokenizer(cfg.tokenizer, images, run.at("tokenizer"))["content_hash"]
    torch.manual_seed(1)
    dvae = export.write(run.at("dvae", "export"), DVAE(cfg.dvae).state_dict(), cfg.dvae, parents={})
    clip = build(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab)
    export.write(run.at("clip", "export"), clip.state_dict(), cfg.clip, parents={"tokenizer": tokenizer} if cfg.clip.reads_pieces else LINEAGE)
    parents = {"dvae": dvae, "tokenizer": tokenizer}
    storage.write_json(run.at("prepare", "done.json"), {"summary": {"credits": ["drawings by nobody, CC0"]}})
    if live:
        for step in (5, 10):
            save(run, cfg, step, parents)
    else:
        export.write(run.at("dalle", "export"), transformer(cfg).state_dict(), cfg.dalle, parents=parents)
    return run


def finish(run: RunFolder) -> None:
    """Give a run whose images, codes, tokenizer and dVAE are there the exports of the rest, with seeded random weights."""
    cfg, parents = load_run(run.url, []), parents_of(run)
    finish_clip(run)
    export.write(run.at("dalle", "export"), transformer(cfg).state_dict(), cfg.dalle, parents=parents)
    run.finish("dalle", seconds=1.0, world_size=1, updates=8, parents=parents)


def finish_clip(run: RunFolder) -> None:
    """Give a run a contrastive model with seeded random weights."""
    cfg, parents = load_run(run.url, []), parents_of(run)
    torch.manual_seed(2)
    clip = Clip(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab)
    export.write(run.at("clip", "export"), clip.state_dict(), cfg.clip, parents=parents)
    run.finish("clip", seconds=1.0, world_size=1, updates=8, parents=parents)


def save(run: RunFolder, cfg: RunConfig, step: int, parents: dict[str, str]) -> None:
    """A checkpoint with averaged weights that differ from step to step."""
    tensors = {f"average/{name}": tensor for name, tensor in transformer(cfg, step).state_dict().items()}
    meta = {
        "shapes": {name.removeprefix("average/"): list(tensor.shape) for name, tensor in tensors.items()},
        "parents": parents,
        "config": json.loads(to_json(cfg)),
    }
    fragments = {name: even_slice(tensor.contiguous(), 0, 1) for name, tensor in tensors.items()}
    checkpoint.save(run.at("dalle"), step, fragments, meta, World.single(), keep=9)


def parents_of(run: RunFolder) -> dict[str, str]:
    return {
        "dvae": export.describe(run.at("dvae", "export"))["content_hash"],
        "tokenizer": storage.read_json(run.at("tokenizer", "manifest.json"))["content_hash"],
    }


def picture_file(path: Path, size: tuple[int, int] = (40, 30)) -> str:
    """A PNG of two colours."""
    from PIL import Image

    image = Image.new("RGB", size, (200, 40, 30))
    image.paste((20, 60, 220), (0, 0, size[0] // 2, size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)
