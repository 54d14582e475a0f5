"""What a plan would do: which parts exist already, which inputs would be hashed, which parts would be made, and why. No record is read."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from data_pipeline.prepare.contents import Contents
from data_pipeline.prepare.plan import Plan, Unit, spread

_PARALLEL = 16
_ASKED = 200
"""For how many units the reason is looked up: each takes a few small files."""


@dataclass
class Outlook:
    """Counts of units, by what the plan would do with them."""

    there: int = 0
    looked_at: int = 0
    """Units of names and sizes of before, whose records are read and compared."""
    looked_at_bytes: int = 0
    made: int = 0
    made_bytes: int = 0
    asked: int = 0
    """For how many of the units to make ``why`` was looked up."""
    why: Counter[str] = field(default_factory=Counter)


def outlook(plan: Plan, images_url: str) -> Outlook:
    """Look up every unit of a plan."""
    contents, found = Contents(plan, images_url), Outlook()

    def stands(unit: Unit) -> str:
        if contents.is_done(contents.inputs(unit)):
            return "there"
        return "looked at" if contents.candidates(unit) else "made"

    with ThreadPoolExecutor(_PARALLEL) as pool:
        stand = list(pool.map(stands, plan.units))
    by_stand = {word: [unit for unit, each in zip(plan.units, stand, strict=True) if each == word] for word in ("there", "looked at", "made")}
    found.there, found.looked_at, found.made = (len(units) for units in by_stand.values())
    found.looked_at_bytes = sum(_bytes(plan, unit) for unit in by_stand["looked at"])
    found.made_bytes = sum(_bytes(plan, unit) for unit in by_stand["made"])
    asked = list(spread(by_stand["made"], _ASKED)) if by_stand["made"] else []
    found.asked = len(asked)
    with ThreadPoolExecutor(_PARALLEL) as pool:
        found.why.update(pool.map(contents.why, asked))
    return found


def _bytes(plan: Plan, unit: Unit) -> int:
    """At most how many bytes are read for a unit: of its files, and of the images that its rows name."""
    look = plan.look(unit)
    return unit.shard.bytes + (look.bytes if look else 0)
