"""What ``prepare --dry-run`` shows besides the configuration: the effect of the filters on a sample of the records. Needs no torch."""

from __future__ import annotations

from collections import Counter

from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.identity import check
from data_pipeline.prepare.merge import advice, files
from data_pipeline.prepare.outlook import outlook
from data_pipeline.prepare.plan import SPLITS, Plan, make_plan, spread
from infra.text import counted
from train.config import RunConfig
from train.run import places

SAMPLED = 1000
"""Number of records in the sample."""
_SAMPLED_SHARDS = 20


def plan_of(cfg: RunConfig) -> Plan:
    """The plan of the stage prepare: its parts, and which of them have to be made."""
    return make_plan(cfg.data, cfg.filters, cfg.dvae.image_size, cfg.run.seed)


def preview(cfg: RunConfig) -> str:
    """Apply the filters to a sample of the records and describe the result as text, before the whole stage is run."""
    plan, tally = plan_of(cfg), Tally()
    where = places.images(cfg, places.run_folder(cfg))
    check(plan, where)
    kept, splits = 0, Counter[str]()
    for unit in spread(plan.units, _SAMPLED_SHARDS):
        begun = tally.seen
        for record in parts.accepted(plan, unit, tally):
            kept += 1
            splits[record.split] += 1
            if tally.seen - begun >= -(-SAMPLED // min(_SAMPLED_SHARDS, len(plan.units))):
                break
    lines = [*_files(plan), *_parts(plan, where), *_columns(plan)]
    if plan.carves:
        share = cfg.data.validation_share
        lines.append(
            f'# everything is called train: {share:.0%} of the groups become validation; split = "train" in data.sources keeps all for training'
        )
    lines.append(
        f"# {counted(len(plan.units), 'input shard')}; of a sample of {counted(tally.seen, 'record')} {kept:,} {'is' if kept == 1 else 'are'} kept ({kept / max(1, tally.seen):.1%})"
    )
    lines.append(f"# split: {', '.join(f'{split} {splits[split]}' for split in SPLITS)}")
    if kept and tally.seen < SAMPLED:  # of more records, others may be in it
        lines += [
            f"# no record in the {split} split: 'prepare' would end with 65. {advice(plan, split, kept, tally)}"
            for split in SPLITS
            if not splits[split]
        ]
    for reason, entry in sorted(tally.dropped.items(), key=lambda item: -item[1]["count"]):
        lines.append(f"{entry['count']:6d}  {reason}")
        lines += [f"          {_printable(example['id'])}: {_printable(example['why'])}".rstrip(": ") for example in entry["examples"]]
    lines += [f"{count:6d}  captions left out: {reason}" for reason, count in tally.dropped_captions.most_common()]
    lines += [f"{count:6d}  members of tars that are not read: {suffix}" for suffix, count in tally.not_read.most_common()]
    if cfg.data.share < 1:
        lines.append(f"# data.share = {cfg.data.share:g} keeps {cfg.data.share:.0%} of the groups; data.share=1 keeps all")
    lines.append("# duplicates are searched for among all records, and not in a sample")
    return "\n".join(lines) + "\n"


def _parts(plan: Plan, where: str) -> list[str]:
    """How many parts exist already, how many have to be made and why, and about how many bytes have to be read for that."""
    found = outlook(plan, where)
    lines = [f"# {found.there:,} of {len(plan.units):,} parts are there"]
    if found.looked_at:
        lines.append(
            f"# {found.looked_at:,} inputs are of the names and sizes of before, with another time or ETag of a file or of an image that their rows name: "
            f"read once (at most {found.looked_at_bytes:,} bytes), and made again only where a record differs"
        )
    if found.made:
        lines.append(
            f"# {found.made:,} parts are made: at most {found.made_bytes:,} bytes are read, of their files and of the images that their rows name"
        )
        of = "" if found.asked == found.made else f" (of {found.asked:,} that were looked up)"
        lines += [f"{count:6d}  parts are made{of}: {_printable(why)}" for why, count in found.why.most_common()]
    return lines


def _files(plan: Plan) -> list[str]:
    """Which files each source has, and which of them are not read."""
    lines = []
    for url, census in files(plan).items():
        beside = f", {counted(census['pictures'], 'image')} beside them" if census["pictures"] else ""
        lines.append(
            f"# {_printable(url)}: {counted(census['listed'], 'file')}, {census['read']:,} read{beside}, {sum(census['not_read'].values()):,} not read"
        )
        lines += [f"{count:6d}  files that are not read: {suffix}" for suffix, count in sorted(census["not_read"].items(), key=lambda item: -item[1])]
    return lines


def _columns(plan: Plan) -> list[str]:
    """In which columns images and captions were found, for sources that report it."""
    lines = []
    for source in plan.sources:
        for what, image, captions in getattr(getattr(source, "origin", None), "columns", ()):
            named = ", ".join(f"'{_printable(caption)}'" for caption in captions)
            lines.append(f"# {_printable(source.name)}: images in {what} '{_printable(image)}', captions in {named}")
    return lines


def _printable(text: str) -> str:
    """Escape a name or an example, so that it can be shown on a terminal whatever characters it holds."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
