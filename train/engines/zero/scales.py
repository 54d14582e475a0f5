"""The gradient scales of the paper, one for each resblock: pure rules, the same on every rank (paper D.1; docs/paper.md 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from infra.stored import Count, Stored
from train.config import ScaleSection


class _Scales(Stored):
    """What ``GradientScales.state`` keeps."""

    exponents: Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=1)]
    divided: Annotated[list[int], Field(min_length=1)]
    overflows: list[Count]


class EngineState(Stored):
    """What a checkpoint's meta.json keeps of the engine."""

    attempts: Count
    scales: _Scales | None


class GradientScales:
    """Scales s = M * 2**e, one for each resblock, or a single one for all.

    M, the number of shares that the global batch is cut into (ranks times micro-batches), is not part of the state: a run that resumes on another
    number of ranks has its scales, initial value and limits rescaled by the change of M without more ado.
    """

    def __init__(self, resblocks: int, shares: int, rules: ScaleSection) -> None:
        self.rules, self.shares, self.resblocks = rules, shares, resblocks
        own = 1 if rules.scope == "global" else resblocks
        self.exponents = [float(rules.initial)] * own
        """e of each scale."""
        self.divided = [-rules.window] * own
        """Update of each scale's last division."""
        self.overflows = [0] * resblocks
        """Updates in which a resblock had a non-finite parameter gradient."""

    def values(self) -> list[float]:
        """The scale of each resblock."""
        found = [self.shares * 2.0**exponent for exponent in self.exponents]
        return found * self.resblocks if len(found) < self.resblocks else found

    def update(self, step: int, bad: Sequence[bool]) -> None:
        """Take in an update, applied or skipped: which resblocks had a non-finite parameter gradient on any rank.

        Args:
            step: number of the update, counting skipped ones.
            bad: one flag for each resblock.
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
        """What a checkpoint keeps; JSON-able."""
        return {"exponents": list(self.exponents), "divided": list(self.divided), "overflows": list(self.overflows)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; where its scope is another one, from the smallest scale of its scales."""
        if len(state["exponents"]) == len(self.exponents):
            self.exponents, self.divided = [float(e) for e in state["exponents"]], [int(d) for d in state["divided"]]
        else:
            self.exponents = [float(min(state["exponents"]))] * len(self.exponents)
            self.divided = [max(int(d) for d in state["divided"])] * len(self.divided)
        self.overflows = [int(o) for o in state["overflows"]]
