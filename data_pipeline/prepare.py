"""Stage 'prepare': pairs -> filters -> split by concept -> image shard sets ``<images>/train`` and ``<images>/validation``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.filters import Candidate, first_reason
from data_pipeline.pairs import Source
from data_pipeline.shards import IMAGE_SCHEMA, ImageRecord, ShardSet, digest, merge, open_set, part_done, read_marker, write_part
from data_pipeline.sources import InputPart, input_parts, open_source
from infra import storage
from infra.errors import DataError
from infra.seeds import derive
from infra.world import World

SPLITS = ("train", "validation")
SUMMARY = "summary.json"
_EXAMPLES = 5
_VERSION = 1  # of the filters and of what a part holds; a change does finished parts again


def split_of(group: str, seed: int, validation_share: float) -> str:
    """'validation' or 'train', by a stable hash of the group: adding data never moves a sample."""
    return "validation" if derive(seed, "split", group) < validation_share * 2**63 else "train"


@dataclass(frozen=True)
class Plan:
    """What there is to do: sources and input parts. Every process makes the same plan from the same inputs."""

    data: DataConfig
    min_side: int
    seed: int
    sources: list[Source]
    parts: list[InputPart]

    def inputs_hash(self, part: InputPart) -> str:
        """Everything that a part's records depend on."""
        return digest([_VERSION, self.data.sources[part.source], self.sources[part.source].version(), part.keys, self.settings()])

    def settings(self) -> dict[str, Any]:
        """What shaped the records; goes to the manifests."""
        return {
            "sources": list(self.data.sources),
            "render_size": self.data.render_size if "emoji" in self.data.sources else None,
            "min_side": self.min_side,
            "validation_share": self.data.validation_share,
            "max_groups": self.data.max_groups,
            "seed": self.seed,
            "shard_bytes": self.data.shard_bytes,
        }


def make_plan(data: DataConfig, image_size: int, seed: int) -> Plan:
    """List the handles of every source, keep those of the first ``data.max_groups`` groups by stable hash, and cut them into parts.

    Raises:
        ConfigError: an entry of data.sources is empty.
        DataError: a source is missing or empty.
    """
    sources = [open_source(spec, data) for spec in data.sources]
    handles = [source.keys() for source in sources]
    if data.max_groups:
        groups = {source.group(key) for source, keys in zip(sources, handles, strict=True) for key in keys}
        # Not the hash of the split: the first groups by that one would all be validation.
        kept = set(sorted(groups, key=lambda group: (derive(seed, "split", "kept", group), group))[: data.max_groups])
        handles = [[key for key in keys if source.group(key) in kept] for source, keys in zip(sources, handles, strict=True)]
    return Plan(data, data.min_side or image_size, seed, sources, input_parts(handles, data.records_per_part))


@dataclass
class Tally:
    """What became of the pairs of one part."""

    seen: int = 0
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, reason: str, key: str) -> None:
        entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(key)


def accepted(plan: Plan, part: InputPart, tally: Tally) -> Iterator[ImageRecord]:
    """Records of one part that pass all filters, in order; the others are counted in ``tally``."""
    source, seen = plan.sources[part.source], set[tuple[bytes, tuple[str, ...]]]()
    for key in part.keys:
        tally.seen += 1
        try:
            candidate = Candidate(source.read(key), plan.min_side, seen)
        except DataError:
            tally.drop("unreadable", key)
            continue
        reason = first_reason(candidate)
        if reason is not None:
            tally.drop(reason, candidate.pair.id)
            continue
        pair, (width, height) = candidate.pair, candidate.size
        captions = [caption for caption in pair.captions if caption.strip()]
        split = split_of(pair.group, plan.seed, plan.data.validation_share)
        yield ImageRecord(pair.id, captions, pair.image, width, height, pair.source, pair.license, pair.group, split)


def _write(plan: Plan, part: InputPart, images_url: str) -> None:
    tally = Tally()
    records = list(accepted(plan, part, tally))
    for split in reversed(SPLITS):  # the training part is last, and carries the tally of both
        chosen = [record for record in records if record.split == split]
        per_source: dict[str, int] = {}
        for record in chosen:
            per_source[record.source] = per_source.get(record.source, 0) + 1
        extra: dict[str, Any] = {"sources": per_source, "groups": sorted({record.group for record in chosen})}
        if split == "train":
            extra |= {"seen": tally.seen, "reasons": tally.reasons}
        write_part(storage.join(images_url, split), part.index, chosen, plan.inputs_hash(part), plan.data.shard_bytes, extra)


def run(
    data: DataConfig,
    image_size: int,
    seed: int,
    images_url: str,
    world: World,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, int]:
    """Write this process's share of the parts; finished parts are skipped. When all processes are through, one calls ``finish``.

    Args:
        data: the section.
        image_size: side in pixels of what training will cut; the default of data.min_side.
        seed: run.seed.
        images_url: place of the two shard sets.
        world: part i belongs to rank i mod size.
        progress: called with (pairs done, pairs of this process) after each part.
        stop: asked before each part; True leaves the rest to another run.

    Returns:
        Numbers of parts: parts (of all processes), written, skipped.

    Raises:
        DataError: a source is missing or empty.
    """
    plan = make_plan(data, image_size, seed)
    mine = plan.parts[world.rank :: world.size]
    written, skipped, done, total = 0, 0, 0, sum(len(part.keys) for part in mine)
    for part in mine:
        if stop is not None and stop():
            break
        wanted = plan.inputs_hash(part)
        if not all(part_done(storage.join(images_url, split), part.index, wanted) for split in SPLITS):
            _write(plan, part, images_url)
            written += 1
        else:
            skipped += 1
        done += len(part.keys)
        if progress is not None:
            progress(done, total)
    return {"parts": len(plan.parts), "written": written, "skipped": skipped}


def finish(data: DataConfig, image_size: int, seed: int, images_url: str, producer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Merge the parts of all processes into the two sets, and write ``summary.json`` beside them. One process; doing it again changes nothing.

    Returns:
        The summary: seen, splits (count, groups, per source), reasons (count and up to five example ids), credits.

    Raises:
        DataError: a part is not finished, or a split is empty.
    """
    plan = make_plan(data, image_size, seed)
    summary = summarise(plan, images_url)
    for split in SPLITS:
        if not summary["splits"][split]["count"]:
            dropped = ", ".join(f"{reason}: {entry['count']}" for reason, entry in summary["reasons"].items()) or "none"
            raise DataError(
                f"data.sources = {list(data.sources)}: no record in the {split} split ({summary['seen']} pairs read; dropped: {dropped}). "
                "Add data, lower data.min_side, or raise data.max_groups or data.validation_share."
            )
    for split in SPLITS:
        merge(storage.join(images_url, split), len(plan.parts), IMAGE_SCHEMA, plan.settings() | {"split": split}, producer=producer)
    storage.write_json(storage.join(images_url, SUMMARY), summary)
    return summary


def summarise(plan: Plan, images_url: str) -> dict[str, Any]:
    """Add up the markers of all parts."""
    summary: dict[str, Any] = {"seen": 0, "splits": {}, "reasons": {}, "credits": []}
    for split in SPLITS:
        place = storage.join(images_url, split)
        markers = [read_marker(place, part.index) for part in plan.parts]
        groups: set[str] = set()
        entry: dict[str, Any] = {"count": 0, "groups": 0, "sources": {}}
        for part, marker in zip(plan.parts, markers, strict=True):
            if marker is None or marker["inputs"] != plan.inputs_hash(part):
                raise DataError(f"{place}: part {part.index} is not finished; run the stage 'prepare' again, it skips finished parts.")
            entry["count"] += marker["count"]
            groups.update(marker["extra"]["groups"])
            _add(entry["sources"], marker["extra"]["sources"])
            _add_reasons(summary, marker["extra"])
        entry["groups"] = len(groups)
        summary["splits"][split] = entry
    lines: dict[str, str] = {}
    for source in plan.sources:
        lines |= source.credits()
    used = {name for split in SPLITS for name in summary["splits"][split]["sources"]}
    summary["credits"] = [lines[name] for name in sorted(used)]
    return summary


def _add(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


def _add_reasons(summary: dict[str, Any], extra: dict[str, Any]) -> None:
    summary["seen"] += extra.get("seen", 0)
    for reason, entry in extra.get("reasons", {}).items():
        total = summary["reasons"].setdefault(reason, {"count": 0, "examples": []})
        total["count"] += entry["count"]
        total["examples"] = (total["examples"] + entry["examples"])[:_EXAMPLES]


def open_splits(images_url: str) -> dict[str, ShardSet]:
    """Both image sets, opened.

    Raises:
        DataError: as ``shards.open_set``.
    """
    return {split: open_set(storage.join(images_url, split), IMAGE_SCHEMA) for split in SPLITS}
