"""Checks that the inputs of a run belong together: compares what every finished stage was made from with what exists now. Reads only small JSON files."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.shards.shard_set import MANIFEST, version_url
from infra import storage, stored
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.run import lineage, places
from train.run.stage_table import STAGES

_NAMES = 5  # faults that one finding lists


def checked(cfg: RunConfig, run: RunFolder) -> tuple[int, list[str]]:
    """How many inputs of finished stages were checked, and what is wrong with them."""
    there, looked, wrong = lineage.there(cfg, run), 0, list(_missing_versions(cfg, run))
    for stage in STAGES:
        for kind, identity in sorted(((run.done(stage) or {}).get("parents") or {}).items()):
            if kind == "init_from":  # belongs to another run, which may have been deleted
                continue
            looked += 1
            now = lineage.seen_by(stage, cfg, run, there).get(kind, set())
            if identity not in now:
                found = ", ".join(sorted(each[:12] for each in now)) or "none"
                wrong.append(f"{stage} was made from {kind} {str(identity)[:12]}, the run has {found}")
    return looked, wrong if len(wrong) <= _NAMES else [*wrong[:_NAMES], f"and {len(wrong) - _NAMES} more"]


def _missing_versions(cfg: RunConfig, run: RunFolder) -> Iterator[str]:
    """Versions that the run uses and that do not exist any more, and codes that were made from other images than the run's."""
    images, codes = ((run.done(stage) or {}).get("versions") or {} for stage in ("prepare", "encode"))
    for split, version in images.items():
        url = places.image_set(cfg, run, split)
        if not storage.exists(storage.join(version_url(url, version), MANIFEST)):
            yield f"{url} has no version {version[:16]} any more, which 'prepare' made"
    for name, version in codes.items():
        crop, _, split = name.partition("/")
        url = places.code_set(cfg, run, int(crop) if crop.isdecimal() else -1, split)
        manifest = storage.join(version_url(url, version), MANIFEST)
        if not storage.exists(manifest):
            yield f"{url} has no version {version[:16]} any more, which 'encode' made"
            continue
        parent = str(stored.read(manifest, stored.Identified).get("parents", {}).get("images", "none"))
        if parent != images.get(split):
            yield f"{url} was made from images {parent[:12]}, the run has {str(images.get(split))[:12]}"
