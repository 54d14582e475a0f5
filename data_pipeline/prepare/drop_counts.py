"""Counts of what became of pairs: by part, and added up over parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES = 5
_LONGEST = 200  # characters of an example


@dataclass
class Tally:
    """What became of pairs, with up to five examples of each reason."""

    seen: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason -> count and examples (id, why)."""
    dropped_captions: Counter[str] = field(default_factory=Counter)
    """Reason -> captions left out of records."""

    def drop(self, reason: str, identity: str, why: str = "") -> None:
        """Count one dropped pair."""
        self.add(reason, 1, [{"id": identity[:_LONGEST], "why": why[:_LONGEST]}])

    def add(self, reason: str, count: int, examples: list[dict[str, str]]) -> None:
        """Count several."""
        entry = self.dropped.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] = (entry["examples"] + examples)[:_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return {"seen": self.seen, "dropped": self.dropped, "dropped_captions": dict(self.dropped_captions)}

    def include(self, tree: dict[str, Any]) -> None:
        """Add the counts of ``to_json``."""
        self.seen += tree["seen"]
        for reason, entry in tree["dropped"].items():
            self.add(reason, entry["count"], entry["examples"])
        self.dropped_captions.update(tree["dropped_captions"])
