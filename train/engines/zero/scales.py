"""The paper's gradient scales, one for each resblock. Their rules are pure, and give the same on every rank (paper D.1; docs/paper.md 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from infra.stored import Count, Stored
from train.config import ScaleSection


class _Scales(Stored):
    """The stored form of ``GradientScales.state``."""

    exponents: Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=1)]
    divided: Annotated[list[int], Field(min_length=1)]
    overflows: list[Count]


class EngineState(Stored):
    """What a checkpoint's meta.json stores of the engine."""

    attempts: Count
    scales: _Scales | None


class GradientScales:
    """Scales s = M * 2**e, one for each resblock, or a single one for all.

    M, the number of micro-batches in the global batch (over all ranks), is not part of the state. So if a run resumes on another number of ranks, its scales,
    their initial value and their limits change with M automatically.
    """

    def __init__(self, resblocks: int, shares: int, rules: ScaleSection) -> None:
        self.rules, self.shares, self.resblocks = rules, shares, resblocks
        own = 1 if rules.scope == "global" else resblocks
        self.exponents = [float(rules.initial)] * own
        """The exponent e of each scale."""
        self.divided = [-rules.window] * own
        """The update in which each scale was last divided."""
        self.overflows = [0] * resblocks
        """For each resblock, the number of updates in which it had a non-finite parameter gradient."""

    def values(self) -> list[float]:
        """The scale of each resblock."""
        found = [self.shares * 2.0**exponent for exponent in self.exponents]
        return found * self.resblocks if len(found) < self.resblocks else found

    def update(self, step: int, bad: Sequence[bool]) -> None:
        """Adapt the scales after an update, applied or skipped.

        Args:
            step: number of the update, including skipped ones.
            bad: for each resblock whether it had a non-finite parameter gradient on any rank.
        """
        for index, overflowed in enumerate(bad):
            self.overflows[index] += overflowed
        flags = [any(bad)] if len(self.exponents) < self.resblocks else bad
        rules = self.rules
        for index, overflowed in enumerate(flags):
            if not overflowed:
                self._set(index, self.exponents[index] + 1.0 / rules.growth_updates)
            elif step - self.divided[index] >= rules.window:
                self._set(index, self.exponents[index] - rules.division)
                self.divided[index] = step

    def _set(self, index: int, exponent: float) -> None:
        self.exponents[index] = min(max(exponent, float(self.rules.lowest)), float(self.rules.highest))

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, as JSON-able values."""
        return {"exponents": list(self.exponents), "divided": list(self.divided), "overflows": list(self.overflows)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state; if its scales have another scope, from the smallest of them."""
        if len(state["exponents"]) == len(self.exponents):
            self.exponents, self.divided = [float(e) for e in state["exponents"]], [int(d) for d in state["divided"]]
        else:
            self.exponents = [float(min(state["exponents"]))] * len(self.exponents)
            self.divided = [max(int(d) for d in state["divided"])] * len(self.divided)
        self.overflows = [int(o) for o in state["overflows"]]
