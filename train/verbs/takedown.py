"""``launcher.py takedown``: delete the shards that hold taken-down records. Loaders hide such records at once; this removes their bytes."""

from __future__ import annotations

from data_pipeline.shards.deletion import Purge, plan_purge
from data_pipeline.shards.shard_set import read_takedown
from infra import storage
from infra.commands import launcher
from infra.errors import ConfigError
from train.config import load_run
from train.run import places

_SHOWN = 5


def main(preset: str, overrides: list[str], *, dry_run: bool) -> None:
    """Find, show, and unless ``dry_run`` delete the parts of this run's image and code sets that hold ids of ``data.takedown``.

    Raises:
        ConfigError: data.takedown is not set.
        DataError: the list cannot be read.
    """
    cfg = load_run(preset, overrides)
    run = places.run_folder(cfg)
    ids = read_takedown(cfg.data.takedown)
    if not ids:
        raise ConfigError(f"data.takedown = '{cfg.data.takedown}': a list of at least one id is needed, a text file with one id a line.")
    sets = [places.image_set(cfg, run, split) for split in places.SPLITS]
    sets += [places.code_set(cfg, run, crop, split) for crop in range(cfg.encode.crops) for split in places.SPLITS]
    found = [purge for purge in (plan_purge(url, ids) for url in sets) if purge is not None]
    for purge in found:
        print(_line(purge))
    unmatched = sorted({line.strip() for line in ids} - {line.strip() for purge in found for line in purge.matched})
    if found and unmatched:
        print(f"{len(unmatched)} lines of {cfg.data.takedown} name no record that is stored here: {', '.join(map(ascii, unmatched[:_SHOWN]))}")
    if not found:
        print(f"none of the {len(ids)} ids is in the sets of {run.url}")
        return
    if dry_run:
        return
    for stage in ("encode", "prepare"):
        storage.delete(run.at(stage, "done.json"))
    for purge in found:
        purge.carry_out()
    print(f"deleted. Run '{launcher('prepare', run.url)}' and '{launcher('encode', run.url)}': they make these parts again, without the records.")


def _line(purge: Purge) -> str:
    return f"{purge.set_url}: {purge.records} records in {len(purge.parts)} parts ({', '.join(purge.parts[:5])}), {len(purge.versions)} versions"
