"""Where a run keeps its shard sets, and what its stages need of each other."""

from __future__ import annotations

import json
from typing import Any

from infra import config_keys, storage
from infra.commands import launcher
from infra.config import to_json
from infra.errors import DataError
from infra.run_folder import RunFolder
from train.config import RunConfig

SPLITS = ("train", "validation")


def images(cfg: RunConfig, run: RunFolder) -> str:
    """Root of the image sets."""
    return cfg.data.images or run.at("images")


def image_set(cfg: RunConfig, run: RunFolder, split: str) -> str:
    """One split's image set."""
    return storage.join(images(cfg, run), split)


def tokenizer(cfg: RunConfig, run: RunFolder) -> str:
    """The tokenizer's folder."""
    return cfg.data.tokenizer or run.at("tokenizer")


def code_set(cfg: RunConfig, run: RunFolder, crop: int, split: str) -> str:
    """One crop's and split's code set."""
    return storage.join(cfg.data.codes or run.at("codes"), f"crop-{crop}", split)


def claim(cfg: RunConfig, run: RunFolder, command: str) -> RunConfig:
    """Make the run folder this configuration's, or check that it is (see ``RunFolder.claim``), and return the configuration that the run goes on with:
    keys that the folder's lacks, and that nobody has given a value, keep the behaviour before they existed.

    Raises:
        ConfigError: the folder is unwritable, or holds another configuration.
    """
    stored = run.stored()
    if stored is not None:
        cfg = config_keys.adopted(cfg, stored)

    def allowed(key: str) -> bool:
        return config_keys.declared(RunConfig, key).get(config_keys.MAY_CHANGE) == config_keys.ANY_TIME[config_keys.MAY_CHANGE]

    run.claim(json.loads(to_json(cfg)), command, lambda stored: config_keys.completed(RunConfig, stored), allowed)
    return cfg


def require(run: RunFolder, *stages: str) -> dict[str, Any]:
    """The markers of finished stages, by name.

    Raises:
        DataError: a stage has not finished; the command that runs it is named.
    """
    found = {}
    for stage in stages:
        marker = run.done(stage)
        if marker is None:
            raise DataError(f"{run.at(stage, 'done.json')} is missing: run '{launcher(stage, run.url)}' first.")
        found[stage] = marker
    return found


def run_folder(cfg: RunConfig) -> RunFolder:
    """The folder of a run."""
    return RunFolder(storage.join(cfg.run.root, cfg.run.name))
