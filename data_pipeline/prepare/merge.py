"""The end of the stage 'prepare': all parts become a new version of both image sets. Only one process does this; repeating it changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.filters import duplicates
from data_pipeline.prepare.contents import Contents
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.identity import check
from data_pipeline.prepare.parts import refuse_too_many
from data_pipeline.prepare.plan import SPLITS, Plan, Unit
from data_pipeline.prepare.tries import Tries
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ShardSet, part_name, read_markers
from data_pipeline.shards.spellings import takedown_lines, without_match
from data_pipeline.shards.versions import merge
from data_pipeline.sources.pairs import UNKNOWN
from infra import shown, storage
from infra.errors import DataError
from infra.text import counted

SUMMARY = "summary.json"
_SHOWN = 5
_FEW = 1000  # of up to this many records, by chance none may fall into the validation split
_SETTINGS = {
    "image too small": "Add larger images, or lower data.min_side",
    "beyond data.share": "Raise data.share",
    "not English": 'Set filters.languages=["ru"], for example, or filters.english=false for any language; and tokenizer.letters=unicode',
    "another language": "Add the language to filters.languages",
    "caption too short": "Lower filters.min_words",
    "caption too long": "Raise filters.max_characters",
    "image format": "Name the format in filters.formats",
    "aspect ratio": "Raise filters.max_aspect",
    "outside the source": "Name the folder in roots of the source in data.sources",
    "no caption": "Name the columns or keys of captions in data.sources as captions",
    "missing image": "Check where the paths of the images begin: beside the table, or absolute",
    "image is a web address": "Run img2dataset on it, and name its output folder",
}
"""Reason -> the setting to change so that such records are kept."""


@dataclass(frozen=True)
class State:
    """Which units are done, given up, and open."""

    done: list[tuple[Unit, str]]
    """Finished units, each with the digest that names its part."""
    markers: dict[str, list[dict[str, Any]]]
    """Split -> markers of the finished units."""
    quarantined: list[dict[str, Any]]
    """Shard, reason and number of tries of each unit that was given up."""
    open: list[tuple[Unit, str]]
    """Units that are neither done nor given up."""


def state(plan: Plan, images_url: str) -> State:
    """Look up the state of every unit."""
    contents = Contents(plan, images_url)
    inputs = [contents.inputs(unit) for unit in plan.units]
    found = {split: read_markers(storage.join(images_url, split), inputs) for split in SPLITS}
    result = State([], {split: [] for split in SPLITS}, [], [])
    for position, unit in enumerate(plan.units):
        markers = [found[split][position] for split in SPLITS]
        if all(markers):
            result.done.append((unit, inputs[position]))
            for split, marker in zip(SPLITS, markers, strict=True):
                result.markers[split].append(marker or {})
            continue
        tries = Tries(images_url, inputs[position])
        failed = tries.failed()
        if tries.spent(failed, plan.data.max_tries):
            result.quarantined.append({"shard": unit.shard.name, "reason": failed[-1]["reason"], "tries": len(failed)})
        else:
            result.open.append((unit, inputs[position]))
    return result


def finish(plan: Plan, images_url: str, producer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Merge the parts of all processes into a new version of the two sets, and write ``summary.json`` beside them.

    Returns:
        The summary: seen, splits (count, groups, sources, licenses, version), dropped (reason -> count, examples), dropped_captions, quarantined,
        groups_in_both, credits, files (source -> listed, read, pictures, not_read by suffix), not_read (tar members by suffix), and, if data.takedown is
        set, takedown (number of its lines, how many of them name no record, examples of these). Every pair that was seen is either dropped or in one of the
        splits; every file that was listed was read, is a picture beside a table, or was not read.

    Raises:
        DataError: a unit is not finished, too many are quarantined, a split is empty, or the existing set was made by another rule of ids.
    """
    check(plan, images_url)
    now = state(plan, images_url)
    if now.open:
        names = ", ".join(part_name(inputs) for _, inputs in now.open[:_SHOWN])
        raise DataError(
            f"{images_url}: {len(now.open)} of {len(plan.units)} parts are not finished ({names}); "
            "run the stage 'prepare' again, it skips finished parts."
        )
    if now.quarantined:
        refuse_too_many(plan, len(now.quarantined), f"{now.quarantined[-1]['shard']}: {now.quarantined[-1]['reason']}")
    draft = {split: _draft(images_url, split, now) for split in SPLITS}
    validation, train = draft["validation"], draft["train"]
    prints = (_joined(validation.prints(), (0, 3)), _joined(train.prints(), (0, 3)))
    found = duplicates.find((_joined(validation.id_hashes()), _joined(train.id_hashes())), prints, plan.filters)
    hidden = {"validation": found.validation, "train": found.train}
    tally = Tally()
    for marker in now.markers["train"]:
        tally.include(marker["extra"]["tally"])
    _refuse_empty(plan, draft, hidden, tally, now)
    parts = [plan.part(unit, inputs) for unit, inputs in now.done]
    sets = {
        split: merge(
            storage.join(images_url, split),
            parts,
            now.markers[split],
            IMAGE_SCHEMA,
            plan.settings() | {"split": split},
            producer=producer,
            excluded=hidden[split],
        )
        for split in SPLITS
    }
    for reason, pairs in found.pairs.items():
        tally.add(reason, len(pairs), _examples(sets, validation.stored, pairs))
    groups = {split: np.unique(values[:, 2]) for split, values in zip(("validation", "train"), prints, strict=True)}
    summary = {
        **tally.to_json(),
        "splits": {split: _split_summary(sets[split], now.markers[split], len(groups[split])) for split in SPLITS},
        "groups_in_both": len(np.intersect1d(groups["validation"], groups["train"])),
        "quarantined": now.quarantined,
        "credits": _credits(plan, now),
        "files": files(plan),
    }
    if plan.data.takedown:
        summary["takedown"] = _takedown(plan, [*validation.named_ids(), *train.named_ids()], now)
    storage.write_json(storage.join(images_url, SUMMARY), summary)
    return summary


def files(plan: Plan) -> dict[str, Any]:
    """Source -> how many of its files were listed, read and not read; for sources that consist of files."""
    pairs = zip(plan.data.sources, plan.sources, strict=True)
    return {entry.url: source.census.to_json() for entry, source in pairs if source.census.listed}


def _draft(images_url: str, split: str, now: State) -> ShardSet:
    """The set of all parts, before duplicates are excluded."""
    markers = now.markers[split]
    parts = [
        {"name": part_name(inputs), "source": "", "count": marker["count"], "files": marker["files"]}
        for (_, inputs), marker in zip(now.done, markers, strict=True)
    ]
    return ShardSet(storage.join(images_url, split), {"parts": parts, "stored": sum(marker["count"] for marker in markers)})


def _takedown(plan: Plan, stored: list[NDArray[np.uint64]], now: State) -> dict[str, Any]:
    """Which lines of the take-down list name a record (one that is stored but hidden, or one that was left out), and which name none."""
    gone = [hashed for marker in now.markers["train"] for hashed in marker["extra"].get("taken_down", ())]
    lines = takedown_lines(plan.data.takedown)
    missed = without_match(lines, plan.bases, [*stored, np.array(gone, np.uint64)])
    return {"lines": len(lines), "without_match": len(missed), "examples": [shown.cut(line) for line in missed[:_SHOWN]]}


def _joined(parts: list[NDArray[np.uint64]], empty: tuple[int, ...] = (0,)) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(empty, np.uint64), *parts])


def _refuse_empty(plan: Plan, draft: dict[str, ShardSet], hidden: dict[str, NDArray[np.int64]], tally: Tally, now: State) -> None:
    empty = [split for split in SPLITS if draft[split].stored == len(hidden[split])]
    if not empty:
        return
    if now.quarantined and not tally.seen:
        first = now.quarantined[0]
        raise DataError(
            f"data.sources = {[source.url for source in plan.data.sources]}: none of the {len(plan.units)} input shards could be read. The first, "
            f"{first['shard']}: {first['reason'].rstrip('.')}. Once that is corrected, delete the folder tries beside the image sets, and run the stage "
            "'prepare' again."
        )
    left = sum(draft[split].stored - len(hidden[split]) for split in SPLITS)
    dropped = ", ".join(f"{reason}: {entry['count']}" for reason, entry in tally.dropped.items()) or "none"
    raise DataError(
        f"data.sources = {[source.url for source in plan.data.sources]}: no record in the {empty[0]} split ({counted(tally.seen, 'pair')} read; "
        f"dropped: {dropped}). {advice(plan, empty[0], left, tally)}"
    )


def advice(plan: Plan, split: str, left: int, tally: Tally) -> str:
    """What to change so that the split is not empty."""
    if left:  # all records went to the other split
        other = next(name for name in SPLITS if name != split)
        if any(entry.split == other for entry in plan.entries):
            return f'data.sources says split = "{other}" of them: leave it out, or name a source with split = "{split}".'
        if any(unit.shard.splits != {""} for unit in plan.units) or left > _FEW:
            return f'The data call all of it {other}: add data that is called {split}, or give the source split = "hash", which takes it from all.'
        return f"In all there {'is' if left == 1 else 'are'} {counted(left, 'record')}: add data, or raise data.validation_share."
    if not tally.dropped:
        return "Nothing was read: add data, or raise data.share."
    reason, entry = max(tally.dropped.items(), key=lambda item: int(item[1]["count"]))
    why = next((example["why"] for example in entry["examples"] if example["why"]), "")
    return _SETTINGS.get(reason, f"Most of it is '{reason}'") + (f" (for example {entry['examples'][0]['id']}: {why})." if why else ".")


def _examples(sets: dict[str, ShardSet], border: int, pairs: list[tuple[int, int]]) -> list[dict[str, str]]:
    def name(position: int) -> str:
        split, row = ("validation", position) if position < border else ("train", position - border)
        return str(sets[split].rows_at([row])[0]["id"])

    return [{"id": name(position), "why": f"repeats {name(other)}"} for position, other in pairs[:_SHOWN]]


def _split_summary(shard_set: ShardSet, markers: list[dict[str, Any]], groups: int) -> dict[str, Any]:
    sources: Counter[str] = Counter()
    licenses: Counter[str] = Counter()
    for marker in markers:
        sources.update(marker["extra"]["sources"])
        licenses.update(marker["extra"]["licenses"])
    return {
        "count": shard_set.count,
        "groups": groups,
        "sources": dict(sources),
        "licenses": dict(licenses),
        "version": shard_set.content_hash,
    }


def _credits(plan: Plan, now: State) -> list[str]:
    lines: dict[str, str] = {}
    for source in plan.sources:
        lines |= source.credits()
    used = {name for markers in now.markers.values() for marker in markers for name in marker["extra"]["sources"]}
    silent = {entry.url for entry in plan.data.sources if not (entry.is_emoji or entry.license)}
    found = []
    for name in sorted(used):
        line = lines.get(name) or f"{name}: {_terms(name, now)}"
        found.append(f"Images and captions from {name}: {_terms(name, now)}" if name in silent and name in lines else line)
    return found


def _terms(name: str, now: State) -> str:
    """The licences that a source's records name, for sources whose licence is not known otherwise."""
    licenses: Counter[str] = Counter()
    for markers in now.markers.values():
        for marker in markers:
            if name in marker["extra"]["sources"]:
                licenses.update(marker["extra"]["licenses"])
    known = [f"{text} ({counted(count, 'record')})" for text, count in licenses.most_common(_SHOWN) if text not in ("", UNKNOWN)]
    return (
        f"licences by its records: {', '.join(known)}; the author stands with each record, if anywhere."
        if known
        else "the source gave neither author nor licence."
    )
