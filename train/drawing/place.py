"""Finds out what is at a URL that someone wants to draw from: a run folder, one of its exports, or a package."""

from __future__ import annotations

from dataclasses import dataclass

from infra import storage
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from train.config import RunConfig, load_run
from train.run import places
from train.weights import checkpoint, export

PACKAGE = "package.json"
"""The file that marks a folder as one that ``export --package`` wrote."""
TRANSFORMERS = ("dalle", "align")
"""Stages that make a transformer."""


@dataclass(frozen=True)
class Place:
    """Where the parts of a model are."""

    url: str
    cfg: RunConfig
    dalle: str
    dvae: str
    clip: str
    tokenizer: str
    run: RunFolder | None
    """The run; None for a package."""
    source: str
    """The URL as it was given, which names the same weights again."""
    stage: str = "dalle"
    """Of a run: the stage whose transformer it is."""


def locate(url: str) -> Place:
    """Find out what is at a URL: a run folder, its dalle/export or align/export, or a package.

    Raises:
        ConfigError: none of these.
    """
    url = url.rstrip("/") or url
    if storage.exists(storage.join(url, PACKAGE)):
        parts = {name: storage.join(url, name) for name in ("dalle", "dvae", "clip", "tokenizer")}
        return Place(url, load_run(url, []), run=None, source=url, **parts)
    named = next((stage for stage in TRANSFORMERS if url.endswith(f"/{stage}/export")), "")
    head = url.removesuffix(f"/{named}/export")
    if all(storage.exists(storage.join(head, name)) for name in ("config.json", "provenance.json")):
        cfg, run = load_run(head, []), RunFolder(head)
        stage = named or newest_stage(cfg, run)
        exports = {name: run.at(name, "export") for name in ("dvae", "clip")}
        return Place(head, cfg, run.at(stage, "export"), tokenizer=places.tokenizer(cfg, run), run=run, stage=stage, source=url, **exports)
    if storage.exists(storage.join(url, export.WEIGHTS)):
        raise ConfigError(f"{url}: the weights of only one model; 'launcher.py export RUN --package --out FOLDER' writes a folder with all models.")
    raise ConfigError(f"{url}: neither a run folder nor a package (config.json is missing); name one, for example runs/demo.")


def newest_stage(cfg: RunConfig, run: RunFolder) -> str:
    """The stage whose transformer the run draws with, or will draw with if it is training."""
    begun = cfg.transformer == "align" and (places.transformer(cfg, run) == "align" or bool(checkpoint.complete(run.at("align"))))
    return "align" if begun else "dalle"
