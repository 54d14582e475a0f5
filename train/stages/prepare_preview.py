"""What ``prepare --dry-run`` shows besides the configuration: what the filters do to a sample of the records. No torch."""

from __future__ import annotations

from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.plan import Plan, make_plan, spread
from train.config import RunConfig

SAMPLED = 1000
"""Records that are looked at."""
_SAMPLED_SHARDS = 20


def plan_of(cfg: RunConfig) -> Plan:
    """What the stage prepare has to do for a run."""
    return make_plan(cfg.data, cfg.filters, cfg.dvae.image_size, cfg.run.seed)


def preview(cfg: RunConfig) -> str:
    """What the filters do to a sample of the records, as text: for a look before the long run."""
    plan, tally = plan_of(cfg), Tally()
    kept = 0
    for unit in spread(plan.units, _SAMPLED_SHARDS):
        begun = tally.seen
        for _ in parts.accepted(plan, unit, tally):
            kept += 1
            if tally.seen - begun >= -(-SAMPLED // min(_SAMPLED_SHARDS, len(plan.units))):
                break
    lines = [f"# {len(plan.units)} input shards; of a sample of {tally.seen} records {kept} are kept ({kept / max(1, tally.seen):.1%})"]
    for reason, entry in sorted(tally.dropped.items(), key=lambda item: -item[1]["count"]):
        lines.append(f"{entry['count']:6d}  {reason}")
        lines += [f"          {example['id']}: {example['why']}".rstrip(": ") for example in entry["examples"]]
    lines += [f"{count:6d}  captions left out: {reason}" for reason, count in tally.dropped_captions.most_common()]
    lines.append("# duplicates are searched for among all records, and not in a sample")
    return "\n".join(lines) + "\n"
