"""``launcher.py export RUN --package``: writes a folder that can draw without the run, with a model card in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import MANIFEST, MODEL, read_manifest
from infra import scratch, shown, storage
from infra.config import to_json
from infra.errors import ConfigError, DataError
from infra.run_folder import producer
from train.drawing.place import PACKAGE, Place, locate
from train.drawing.source import check_parents, newest_weights
from train.weights import export
from train.weights.contrastive import networks_of
from train.weights.towers import INSTALL

SCHEMA = "package/1"
CARD = "README.md"
_LONGEST_CREDIT = 2000
_SECTIONS = {"run": ("seed",), "dalle_fit": ("caption_dropout",)}
"""The only keys of these sections that drawing needs. The others are left out, because they say where the data is and how training went."""
_WHOLE = ("tokenizer", "dvae", "dalle", "clip")


def write(url: str, out: str) -> list[str]:
    """Write a package; package.json, which marks it as complete, is written last. Returns the names of its parts. The contrastive model is included if the run has
    one.

    Raises:
        ConfigError: there is no run, or the package cannot be written there.
        DataError: the run has no weights yet, or they do not belong together.
    """
    place = locate(url)
    if place.run is None:
        raise ConfigError(f"{url}: this is a package already; copy the folder.")
    if not out:
        raise ConfigError("--package needs a folder to write to: give --out FOLDER.")
    if storage.exists(storage.join(out, "provenance.json")):
        raise ConfigError(f"--out {out}: a run folder; name one for the package.")
    storage.delete(storage.join(out, PACKAGE))
    tensors, identity, parents, description = newest_weights(place)
    if not storage.exists(storage.join(place.dvae, export.DESCRIPTION)):
        raise DataError(f"{place.dvae}: there is no dvae here; run 'launcher.py dvae {place.url}' first.")
    hashes = {
        "dvae": export.describe(place.dvae)["content_hash"],
        "tokenizer": read_manifest(place.tokenizer)["content_hash"],
    }
    check_parents(place, "dalle", parents, hashes)
    parts = ["dvae", *(["clip"] if storage.exists(storage.join(place.clip, export.DESCRIPTION)) else [])]
    for part in parts:
        _copy(getattr(place, part), storage.join(out, part), (export.WEIGHTS, export.DESCRIPTION))
    _copy(place.tokenizer, storage.join(out, "tokenizer"), (MODEL, MANIFEST))
    export.write(storage.join(out, "dalle"), tensors, place.cfg.dalle, parents=parents, weights=description)
    storage.write_json(storage.join(out, "config.json"), _config(place))
    storage.write_text(storage.join(out, CARD), _card(place, description, identity, tensors, parts))
    weights = hashes | {"dalle": identity}
    storage.write_json(storage.join(out, PACKAGE), {"schema": SCHEMA, "weights": weights, "producer": producer()})
    return ["dalle", *parts, "tokenizer", CARD]


def _copy(source: str, target: str, names: tuple[str, ...]) -> None:
    with scratch.folder("package-") as room:
        for name in names:
            data, path = storage.join(source, name), Path(room, name)
            if storage.is_remote(data):
                storage.download_file(data, path)
            storage.upload_file(path if storage.is_remote(data) else storage.local_path(data), storage.join(target, name))


def _config(place: Place) -> dict[str, Any]:
    whole = json.loads(to_json(place.cfg))
    found = {name: whole[name] for name in _WHOLE} | {name: {key: whole[name][key] for key in keys} for name, keys in _SECTIONS.items()}
    found["run"]["name"] = place.cfg.run.name  # the configuration that a run stores holds no name: the run is named by its folder
    return found


def _card(place: Place, description: str, identity: str, tensors: dict[str, Any], parts: Sequence[str] = ()) -> str:
    """The model card: what it is, how to draw with it, what it was trained on and under which licences."""
    cfg = place.cfg
    assert place.run is not None
    prepared = place.run.done("prepare") or {}
    credits = (prepared.get("summary") or {}).get("credits") or []
    parameters = sum(tensor.numel() for tensor in tensors.values())
    dropout = cfg.dalle_fit.caption_dropout
    towers = f"`clip/` holds heads on networks that come in packages: `{INSTALL}`.\n\n" if networks_of(cfg.clip) and "clip" in parts else ""
    guidance = f"Trained with {dropout:.0%} of captions dropped: `--guidance` works." if dropout else "Trained without caption dropout: no guidance."
    licences = (
        "\n".join(f"- {shown.markdown(str(line), _LONGEST_CREDIT)}" for line in credits)
        or "- The run has recorded no licences of its images: ask who trained it before you share pictures."
    )
    return f"""---
license: other
license_name: see-training-data
pipeline_tag: text-to-image
tags:
- text-to-image
- dall-e
- discrete-vae
---

# {shown.markdown(cfg.run.name)}

A text-to-image transformer after "Zero-Shot Text-to-Image Generation" (DALL-E, 2021): a caption becomes {cfg.dvae.grid} x {cfg.dvae.grid} codes of {cfg.dvae.vocab}, and
a discrete VAE turns these into {cfg.dvae.image_size} x {cfg.dvae.image_size} pixels.

| | |
|---|---|
| transformer | {cfg.dalle.layers} layers, width {cfg.dalle.width}, {cfg.dalle.heads} heads, {parameters:,} parameters |
| weights | {description}, {identity[:12]} |
| captions | up to {cfg.tokenizer.max_tokens} tokens of {cfg.tokenizer.vocab} |

{guidance}

## Draw with it

    python launcher.py draw THIS_FOLDER "a red fox" --n 8 --grid

    from train.drawing.pictures import load
    pictures = load("THIS_FOLDER").draw(["a red fox"], n=4, seed=0)

## Files

{towers}`dalle/`, `dvae/` and, if it is there, `clip/` hold `model.safetensors` and a `config.json` each; `tokenizer/` holds a sentencepiece model; `config.json` the sizes.

## Training data and their licences

{licences}
"""
