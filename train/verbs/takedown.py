"""``launcher.py takedown``: deletes the shards that hold taken-down records. Loaders hide such records as soon as they are listed; this removes their bytes."""

from __future__ import annotations

import contextlib

from data_pipeline.shards.deletion import Purge, plan_purge, unmatched
from data_pipeline.shards.spellings import read_takedown, takedown_lines
from infra import shown, storage
from infra.commands import launcher
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.text import counted
from train.config import RunConfig, load_run
from train.run import places
from train.run.stage_table import STAGES

_SHOWN = 5


def main(preset: str, overrides: list[str], *, dry_run: bool) -> None:
    """Find and show the parts of this run's image and code sets that hold records of ``data.takedown``; unless ``dry_run``, delete them.

    Raises:
        ConfigError: data.takedown is not set, or a stage of the run is running, which may read or write these parts.
        DataError: the list cannot be read.
    """
    cfg = load_run(preset, overrides)
    run = places.run_folder(cfg)
    ids = read_takedown(cfg.data.takedown)
    if not ids:
        raise ConfigError(f"data.takedown = '{cfg.data.takedown}': a list of at least one id is needed, a text file with one id a line.")
    sets = [places.image_set(cfg, run, split) for split in places.SPLITS]
    sets += [places.code_set(cfg, run, crop, split) for crop in range(cfg.encode.crops) for split in places.SPLITS]
    with contextlib.ExitStack() as held:
        for label in places.leases(run, *STAGES) if not dry_run else ():
            held.enter_context(run.lock(label))
        _take_down(cfg, run, sets, dry_run=dry_run)


def _take_down(cfg: RunConfig, run: RunFolder, sets: list[str], *, dry_run: bool) -> None:
    found = [purge for purge in (plan_purge(url, read_takedown(cfg.data.takedown)) for url in sets) if purge is not None]
    for purge in found:
        print(_line(purge))
    lines = takedown_lines(cfg.data.takedown)
    if missed := unmatched(sets, lines):
        print(f"{len(missed)} of {len(lines)} lines of {cfg.data.takedown} name no record that is stored here: {_some(missed)}")
    if not found:
        print(f"no record of the list is in the sets of {run.url}")
        return
    if dry_run:
        return
    for stage in ("encode", "prepare"):
        storage.delete(run.at(stage, "done.json"))
    for purge in found:
        purge.carry_out()
    print(f"deleted. Run '{launcher('prepare', run.url)}' and '{launcher('encode', run.url)}': they make these parts again, without the records.")


def _some(lines: list[str]) -> str:
    return ", ".join(ascii(shown.cut(line)) for line in lines[:_SHOWN]) + (" ..." if len(lines) > _SHOWN else "")


def _line(purge: Purge) -> str:
    return f"{purge.set_url}: {counted(purge.records, 'record')} in {counted(len(purge.parts), 'part')} ({', '.join(purge.parts[:5])}), {counted(len(purge.versions), 'version')}"
