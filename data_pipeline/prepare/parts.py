"""Stage 'prepare': input shards -> filters -> split by group -> image parts, and the merge of all parts into ``<images>/train`` and ``<images>/validation``.

Work is divided by input shards. A single process, several, a SLURM array and a Kubernetes Indexed Job all do the same: each process calls ``run``, and the
last one calls ``finish`` (``merge.py``). Each input shard gives one part in each split; what concerns several shards (duplicates) is left to ``finish``.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from data_pipeline.filters.judge import Dropped, judge
from data_pipeline.prepare.contents import Contents, RecordsDigest
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.plan import SPLITS, Plan, Unit
from data_pipeline.prepare.tries import Tries, record_failure, withdraw
from data_pipeline.shards.part_writer import PartWriter
from data_pipeline.shards.shard_set import ImageRecord
from data_pipeline.sources.pairs import Found, NotRead, Unreadable
from infra import storage
from infra.digests import id_hash
from infra.errors import DataError, NoRoomError, ReportedError, UnchangingError, UnreachableError
from infra.world import World

log = logging.getLogger(__name__)

Stop = Callable[[], bool]
BEYOND_SHARE = "beyond data.share"
"""The reason of records that are left out before any filter has judged them."""


class Stopped(Exception):
    """The stop signal came in the middle of a shard."""


class _Poisoned(Exception):
    """An input shard could not be read."""


@dataclass
class Share:
    """What one process did."""

    units: int
    """Number of units of all processes."""
    written: int = 0
    skipped: int = 0
    """Units that were finished already."""
    recognised: int = 0
    """Those of the skipped units whose inputs had changed in time or ETag only."""
    quarantined: int = 0
    """Units that were given up after data.max_tries."""


def run(plan: Plan, images_url: str, world: World, progress: Callable[[int, int], None] | None = None, stop: Stop | None = None) -> Share:
    """Write this process's share of the parts; finished ones are skipped.

    Args:
        plan: what there is to do.
        images_url: place of the two shard sets.
        world: unit i belongs to rank i mod size.
        progress: called with (units through, units of this process).
        stop: asked for each record that is met, kept or not; True leaves the rest, and the part that was begun, to another run.

    Raises:
        DataError: more than data.max_quarantined input shards of this process could not be read.
        UnreachableError, NoRoomError: the storage gives no answer, or a disk is full; the shard in hand stays untried.
    """
    asked = stop or (lambda: False)
    mine = plan.units[world.rank :: world.size]
    share, through = Share(len(plan.units)), 0
    contents, queue = Contents(plan, images_url), deque(mine)
    while queue and not asked():
        unit = queue.popleft()
        inputs = contents.inputs(unit)
        if contents.is_done(inputs):
            share.skipped += 1
        else:
            tries = Tries(images_url, inputs)
            failed = tries.failed()
            if not tries.spent(failed, plan.data.max_tries):
                begun = tries.begin(len(failed))
                try:
                    recognised = contents.recognise(unit, partial(_content, plan, unit, asked))
                    if not recognised:
                        _write(plan, unit, inputs, contents, asked)
                except Stopped:
                    withdraw(begun)
                    break
                except _Poisoned as error:
                    if isinstance(error.__cause__, UnchangingError):
                        record_failure(begun, str(error), unchanging=True)
                        queue.appendleft(unit)  # looked at again at once, so that it is quarantined now and not only at the next start
                        continue
                    log.warning("%s: try %d of %d failed: %s", unit.shard.name, len(failed) + 1, plan.data.max_tries, error)
                    record_failure(begun, str(error))
                    queue.append(unit)  # tried again after all others, because the cause may have passed by then
                    continue
                except ReportedError:  # an outage, a full disk, a place that is not writable: no fault of the shard
                    withdraw(begun)
                    raise
                tries.clear()
                share.skipped += recognised
                share.written += not recognised
            else:
                share.quarantined += 1
                times = f"after {len(failed)} tries" if len(failed) > 1 else "at its first try"
                log.error("%s: quarantined %s: %s. Delete %s to try again.", unit.shard.name, times, failed[-1]["reason"].rstrip("."), tries.url)
                refuse_too_many(plan, share.quarantined, failed[-1]["reason"])
        through += 1
        if progress is not None:
            progress(through, len(mine))
    return replace(share, recognised=contents.recognised)


def refuse_too_many(plan: Plan, quarantined: int, reason: str) -> None:
    """End the stage if so many shards fail that the cause must lie elsewhere.

    Raises:
        DataError: more than data.max_quarantined.
    """
    if quarantined > plan.data.max_quarantined:
        raise DataError(
            f"{quarantined} input shards could not be read (the last: {reason}), more than data.max_quarantined = {plan.data.max_quarantined}; "
            "check the sources, then run the stage 'prepare' again, or raise data.max_quarantined."
        )


def _content(plan: Plan, unit: Unit, stop: Stop) -> str:
    """Digest of the unit's records, read and not filtered."""
    records = RecordsDigest(plan.sources[unit.source])
    for _ in _readable(plan, unit, Tally(), records, stop):
        if stop():
            raise Stopped
    return records.hexdigest()


def _write(plan: Plan, unit: Unit, inputs: str, contents: Contents, stop: Stop) -> None:
    tally, counts, records = Tally(), {split: _Counts() for split in SPLITS}, RecordsDigest(plan.sources[unit.source])
    places = [storage.join(contents.images, split) for split in SPLITS]
    with PartWriter(places[0], inputs, plan.data.shard_bytes) as train, PartWriter(places[1], inputs, plan.data.shard_bytes) as validation:
        writers = dict(zip(SPLITS, (train, validation), strict=True))
        for record in accepted(plan, unit, tally, records, stop):
            writers[record.split].add(record)
            counts[record.split].add(record)
        contents.record(unit, inputs, records.hexdigest())
        validation.finish(counts["validation"].to_json())
        about = {"tally": tally.to_json(), "shard": unit.shard.name} | ({"taken_down": sorted(tally.taken_down)} if tally.taken_down else {})
        train.finish(counts["train"].to_json() | about)  # with the counts of both splits


class _Counts:
    """Sources and licences of one part's records."""

    def __init__(self) -> None:
        self.sources: Counter[str] = Counter()
        self.licenses: Counter[str] = Counter()

    def add(self, record: ImageRecord) -> None:
        self.sources[record.source] += 1
        self.licenses[record.license] += 1

    def to_json(self) -> dict[str, Any]:
        return {"sources": dict(self.sources), "licenses": dict(self.licenses)}


def accepted(plan: Plan, unit: Unit, tally: Tally, records: RecordsDigest | None = None, stop: Stop = lambda: False) -> Iterator[ImageRecord]:
    """Records of one input shard that pass all filters, in order; all others are counted in ``tally``, each once. ``records`` takes all that is read.

    Raises:
        Stopped: asked at any record, ``stop`` was true: a thousand may be dropped for one that passes.
    """
    for pair in _readable(plan, unit, tally, records, stop):
        if stop():
            raise Stopped
        if isinstance(pair, NotRead):
            tally.not_read[pair.suffix] += pair.count
            continue
        tally.seen += 1
        if isinstance(pair, Unreadable):
            tally.drop(pair.reason, pair.id, pair.why)
            continue
        if gone := plan.taken_down.intersection((pair.id, *pair.also)):
            tally.drop("taken down", pair.id)
            tally.taken_down.update(map(id_hash, (pair.id, *gone)))
            continue
        try:
            verdict = judge(pair, plan.filters, plan.min_side)
        except Exception as error:  # a single hostile record must not fail its shard or the run
            log.exception("%s: a filter failed", pair.id)
            tally.drop("a filter failed", pair.id, f"{type(error).__name__}: {error}")
            continue
        tally.dropped_captions.update(verdict.dropped_captions)
        if isinstance(verdict, Dropped):
            tally.drop(verdict.reason, pair.id, verdict.example)
            continue
        kept, group = verdict.pair, plan.group(pair)
        prints = (verdict.content_hash, verdict.perceptual_hash)
        size = (verdict.width, verdict.height)
        split = plan.split(unit.source, pair.split, group)
        further = tuple(map(id_hash, pair.also))
        yield ImageRecord(kept.id, list(kept.captions), verdict.image, *size, kept.source, kept.license, group, split, prints, further)


def _readable(plan: Plan, unit: Unit, tally: Tally, records: RecordsDigest | None, stop: Stop) -> Iterator[Found]:
    """What the source reads. Its failures are the shard's; those of whoever writes are not, nor is an outage or a full disk."""

    def wanted(group: str) -> bool:
        if stop():
            raise Stopped
        if plan.wanted(group):
            return True
        tally.seen += 1
        tally.drop(BEYOND_SHARE, group)
        if records:
            records.leave_out(group)
        return False

    try:
        for found in plan.sources[unit.source].read(unit.shard, wanted):
            if records:
                records.add(found)
            yield found
    except (GeneratorExit, Stopped, UnreachableError, NoRoomError):
        raise
    except Exception as error:
        raise _Poisoned(str(error) if isinstance(error, UnchangingError) else f"{type(error).__name__}: {error}") from error
