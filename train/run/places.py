"""Where the shard sets of a run lie, which of its stages are finished, and how it takes possession of its folder."""

from __future__ import annotations

import json
import os
from typing import Any

from infra import config_keys, ledger, storage
from infra.commands import launcher
from infra.config import to_json
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.run import change_points
from train.run.stage_table import STAGES

SPLITS = ("train", "validation")


def images(cfg: RunConfig, run: RunFolder) -> str:
    """Folder of the image sets."""
    return cfg.data.images or run.at("images")


def image_set(cfg: RunConfig, run: RunFolder, split: str) -> str:
    """The image set of a split."""
    return storage.join(images(cfg, run), split)


def tokenizer(cfg: RunConfig, run: RunFolder) -> str:
    """The tokenizer's folder."""
    return cfg.data.tokenizer or run.at("tokenizer")


def code_set(cfg: RunConfig, run: RunFolder, crop: int, split: str) -> str:
    """The code set of a crop and a split."""
    return storage.join(cfg.data.codes or run.at("codes"), f"crop-{crop}", split)


def claim(cfg: RunConfig, run: RunFolder, command: str, going_on: str = "") -> RunConfig:
    """Store the configuration in the run folder, or check that the folder already holds the same one (see ``RunFolder.claim``). Returns the configuration to
    run with: for keys that the stored one lacks, and that were not given a value now, it has the value that keeps the behaviour before those keys existed.

    Args:
        going_on: the training stage that continues with other values from its newest checkpoint on; empty: none does.

    Raises:
        ConfigError: the folder cannot be written to, or holds another configuration. The message names the command that continues with the new values, if that
            is possible, otherwise the command that starts a new run.
    """
    return looked_at(cfg, run, command, going_on, change=True)[0]


def looked_at(cfg: RunConfig, run: RunFolder, command: str, going_on: str = "", *, change: bool = False) -> tuple[RunConfig, bool]:
    """As ``claim``, for a launcher that does not hold its stage yet: values that differ from those of the run are not written. Says whether there are any."""
    if cfg.cluster.kept_apart:
        os.environ["LAUNCHER_KEPT_APART"] = "1"  # for the creation of the folder, and for ranks, too
    stored = run.stored()
    if stored is None and not run.create(json.loads(to_json(cfg)), command):
        stored = run.stored()  # another launcher was first
    if stored is not None:
        cfg = config_keys.adopted(cfg, stored)
        changed = change_points.changed(stored, json.loads(to_json(cfg)))
        fixed = {key: values for key, values in changed.items() if not change_points.may_change(key)}
        if not going_on or any(change_points.stage_of(key) != going_on for key in fixed):
            _refuse(cfg, run, fixed)
        elif fixed:
            _check_going_on(cfg, run, going_on)
        differs = run.claim(
            json.loads(to_json(cfg)), command, lambda stored: config_keys.completed(RunConfig, stored), lambda key: True, change=change
        )
        return cfg, bool(differs)
    return cfg, False


def _refuse(cfg: RunConfig, run: RunFolder, fixed: dict[str, list[Any]]) -> None:
    if not fixed:
        return
    words = [f"{key}={json.dumps(new)}" for key, (_, new) in fixed.items()]
    lines = "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in fixed.items())
    stages = {change_points.stage_of(key) for key in fixed}
    if len(stages) == 1 and (stage := stages.pop()) and _could_go_on(cfg, run, stage):
        saved = ledger.newest_checkpoint(run, stage)
        what = (
            f"To go on with these from the newest checkpoint on, after update {saved}, as a recorded change point"
            if saved >= 0
            else f"To take these for '{stage}', which has no checkpoint yet and begins with them"
        )
        advice = f"{what}: {launcher(stage, run.url, *words, '--go-on')}"
    else:
        name = run.url.rpartition("/")[2]
        advice = f"As a new run: {launcher('demo', run.url, f'run.name={name}-2', *words)}"
    raise ConfigError(
        f"{run.url} holds a run with another configuration; use another run.name, or the values of the folder:\n  {lines}\n  (folder -> given)\n{advice}"
    )


def updates(cfg: RunConfig, run: RunFolder, stage: str, marker: dict[str, Any]) -> int:
    """How many updates a finished training stage has made. An imported dVAE counts as trained to the end."""
    steps: int = getattr(cfg, f"{stage}_fit").steps
    made = int(marker.get("updates", ledger.newest_checkpoint(run, stage)))
    return made if made >= 0 else steps


def finished(cfg: RunConfig, run: RunFolder, stage: str) -> bool:
    """Whether a stage has nothing left to do. Its done.json must exist. For a training stage it must also name as many updates as the configuration asks for now;
    if it holds the stage's settings, they must be equal to those of the configuration."""
    marker = run.done(stage)
    if marker is None:
        return False
    if "settings" in marker:
        section = getattr(cfg, stage)
        return bool(config_keys.completed(type(section), marker["settings"]) == json.loads(to_json(section)))
    return not STAGES[stage].trains or updates(cfg, run, stage, marker) >= getattr(cfg, f"{stage}_fit").steps


def _could_go_on(cfg: RunConfig, run: RunFolder, stage: str) -> bool:
    try:
        _check_going_on(cfg, run, stage)
    except ConfigError:
        return False
    return True


def has_begun(run: RunFolder, stage: str) -> bool:
    """Whether a training stage has made something that its values shaped: a checkpoint, or its export."""
    return run.done(stage) is not None or ledger.newest_checkpoint(run, stage) >= 0


def _check_going_on(cfg: RunConfig, run: RunFolder, stage: str) -> None:
    made, marker = ledger.newest_checkpoint(run, stage), run.done(stage)
    steps = getattr(cfg, f"{stage}_fit").steps
    if made < 0 and marker is not None:
        raise ConfigError(f"{run.at(stage)} holds weights and no checkpoint (they were imported, or it was deleted): there is nothing to go on from.")
    if made >= steps:
        raise ConfigError(
            f"{run.at(stage)} has made {made} updates, and {stage}_fit.steps = {steps}: nothing would be left to do with other values; set more "
            f"{stage}_fit.steps too."
        )


def require(run: RunFolder, *stages: str) -> dict[str, Any]:
    """The contents of the stages' done.json, by name of stage.

    Raises:
        DataError: a stage has not finished; the message names the command that runs it.
    """
    found = {}
    for stage in stages:
        marker = run.done(stage, once=True)
        if marker is None:
            raise DataError(f"{run.at(stage, 'done.json')} is missing: run '{launcher(stage, run.url)}' first.")
        found[stage] = marker
    return found


def transformer(cfg: RunConfig, run: RunFolder) -> str:
    """The stage whose exported transformer the run draws with now: align, once it has made one."""
    aligned = cfg.transformer == "align" and (run.done("align") is not None or storage.exists(run.at("align", "export", "config.json")))
    return "align" if aligned else "dalle"


def run_folder(cfg: RunConfig) -> RunFolder:
    """The folder of a run."""
    return RunFolder(storage.join(cfg.run.root, cfg.run.name))


def version(run: RunFolder, stage: str, name: str) -> str:
    """The version of a set that a finished stage made or found.

    Args:
        stage: prepare or encode.
        name: the set's name in the stage's done.json: the split, or 'crop/split'.

    Raises:
        DataError: the stage has not finished, or its done.json names no such set.
    """
    found = require(run, stage)[stage].get("versions", {}).get(name)
    if not isinstance(found, str):
        raise DataError(f"{run.at(stage, 'done.json')}: names no version of '{name}'; delete it and run 'launcher.py {stage} {run.url}' again.")
    return found


def leases(run: RunFolder, *stages: str) -> list[str]:
    """Labels of the leases of stages, and of all shares of these stages that have ever run. While a process holds all of them, no other can run these stages."""
    shares = {name.partition("/")[0] for name in storage.list_files(run.at("locks"))}
    return sorted({*stages} | {name for name in shares if name.partition(".")[0] in stages})
