"""Counts of how many pairs were kept and dropped, and why: for a part, and added up over parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES = 5
_LONGEST = 200  # characters of an example


@dataclass
class Tally:
    """How many pairs were seen and dropped, with up to five examples of each reason."""

    seen: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason -> count and examples (id, why)."""
    dropped_captions: Counter[str] = field(default_factory=Counter)
    """Reason -> number of captions that were left out of records."""
    taken_down: set[int] = field(default_factory=set)
    """``id_hash`` of records that were left out because they are on the take-down list."""
    not_read: Counter[str] = field(default_factory=Counter)
    """Suffix -> number of tar members that belong to no record. They are not counted in ``seen``."""

    @property
    def kept(self) -> int:
        """Number of pairs that were not dropped."""
        return self.seen - sum(entry["count"] for entry in self.dropped.values())

    def drop(self, reason: str, identity: str, why: str = "") -> None:
        """Count one dropped pair."""
        self.add(reason, 1, [{"id": identity[:_LONGEST], "why": why[:_LONGEST]}])

    def add(self, reason: str, count: int, examples: list[dict[str, str]]) -> None:
        """Count several dropped pairs."""
        entry = self.dropped.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] = (entry["examples"] + examples)[:_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        tree = {"seen": self.seen, "dropped": self.dropped, "dropped_captions": dict(self.dropped_captions)}
        return tree | ({"not_read": dict(self.not_read)} if self.not_read else {})

    def include(self, tree: dict[str, Any]) -> None:
        """Add the counts of ``to_json``."""
        self.seen += tree["seen"]
        for reason, entry in tree["dropped"].items():
            self.add(reason, entry["count"], entry["examples"])
        self.dropped_captions.update(tree["dropped_captions"])
        self.not_read.update(tree.get("not_read", {}))
