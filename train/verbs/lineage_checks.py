"""Checks codes, tokenizers and exports against their parents: whether they were made from the data and weights that exist now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.audit.check_parts import Problem
from data_pipeline.audit.check_set import Layout, read_layout
from data_pipeline.shards.shard_set import MANIFEST, version_url
from infra import storage, stored
from train.run import places
from train.verbs.targets import Run

_EXPORTS = (*((stage, parent) for stage in ("dalle", "align") for parent in ("dvae", "tokenizer")), ("clip", "tokenizer"))


def code_parents(layout: Layout, images: Sequence[str], run: Run | None) -> tuple[Layout | None, list[Problem]]:
    """The version of an image set that codes were made from, if one of the sets ``images`` has it; and what is wrong with the parents of the codes."""
    place, parents = storage.join(layout.url, MANIFEST), layout.manifest.get("parents", {})
    problems = []
    if run is not None:
        made_by, there = str(parents.get("dvae", "none")), _export_hash(run, "dvae")
        if made_by != there:
            problems.append(Problem(place, f"codes of dvae {made_by[:12]}, {run.folder.url} exports {there[:12]}"))
    identity = str(parents.get("images", "none"))
    owner = _owner(identity, images)
    if images and owner is None:
        problems.append(Problem(place, f"made from images {identity[:12]}, which is no version of {', '.join(images)}"))
    return (read_layout(owner, identity) if owner is not None else None), problems


def tokenizer_parents(place: str, manifest: Mapping[str, Any], images: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with the parents of a tokenizer."""
    identity = str(manifest["parents"].get("images", "none"))
    if images and _owner(identity, images) is None:
        yield Problem(place, f"trained on images {identity[:12]}, which is no version of {', '.join(images)}")


def export_parents(run: Run) -> Iterator[Problem]:
    """What is wrong with the parents of a run's exports: all must have been made with the present dVAE and tokenizer."""
    for stage, parent in _EXPORTS:
        place = run.folder.at(stage, "export", "config.json")
        if not storage.exists(place) or (stage == "clip" and not run.cfg.clip.reads_pieces):
            continue
        found = str(stored.read(place, stored.Identified).get("parents", {}).get(parent, "none"))
        there = _export_hash(run, "dvae") if parent == "dvae" else _tokenizer_hash(run)
        if found != there:
            yield Problem(place, f"trained with {parent} {found[:12]}, the run has {parent} {there[:12]}", (run.folder.at(stage),), stage)


def _owner(identity: str, images: Sequence[str]) -> str | None:
    if identity == "none":  # the codes do not say from which images they were made
        return None
    return next((url for url in images if storage.exists(storage.join(version_url(url, identity), MANIFEST))), None)


def _export_hash(run: Run, stage: str) -> str:
    place = run.folder.at(stage, "export", "config.json")
    return stored.content_hash(place)


def _tokenizer_hash(run: Run) -> str:
    place = storage.join(places.tokenizer(run.cfg, run.folder), MANIFEST)
    return stored.content_hash(place)
