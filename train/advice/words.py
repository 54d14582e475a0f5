"""Evidence, verdict, rule and loss of a failed attempt, as text for people and as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from infra import node_checks
from infra.errors import ExitCode
from infra.progress import duration
from infra.repository import REPOSITORY
from infra.text import counted
from train.advice.facts import Facts
from train.advice.rules import decide

_SAID = 5
"""Last lines of a rank that are shown."""
_FRAMES = 4
_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+")
_RANKS = 8
"""Ranks of which each kind of evidence is shown."""


def of(facts: Facts, *, said: bool = True) -> str:
    """Some lines for people.

    Args:
        said: with what ranks printed last; not where that has just been printed.
    """
    lines = [
        f"{facts.stage}, attempt {facts.attempt}: {ExitCode(facts.code).name}" + ("" if facts.ended else ", by what is known of it: it may go on")
    ]
    lines += [_line(name, words) for name, words in _evidence(facts, said=said)]
    rule, advice = decide(facts)
    lines += [_line("lost", lost(facts)), _line("verdict", f"{rule.verdict}: {advice}{_how(rule.verdict, facts)}"), _line("rule", rule.name)]
    return "\n".join(lines)


def verdict(facts: Facts) -> str:
    """One line."""
    rule, advice = decide(facts)
    return f"{facts.stage}, attempt {facts.attempt}: {rule.verdict}: {advice} (rule: {rule.name})"


def stack(lines: Sequence[str]) -> list[str]:
    """Where a rank's main thread stood, innermost first: of a fault handler's dump that it printed last, the last thread."""
    begins = [number for number, line in enumerate(lines) if _THREAD.match(line)]
    if not begins:
        return []
    frames = [line.strip() for line in lines[begins[-1] + 1 :] if line.startswith("  File ")]
    ours = [frame for frame in frames if str(REPOSITORY) in frame and "site-packages" not in frame]
    return (frames[:1] + [frame for frame in ours if frame != frames[0]])[:_FRAMES] if frames else []


def as_json(facts: Facts) -> dict[str, Any]:
    """The same for programs."""
    rule, advice = decide(facts)
    evidence: dict[str, list[str]] = {}
    for name, words in _evidence(facts, said=True):
        evidence.setdefault(name, []).append(words)
    return {
        "stage": facts.stage,
        "attempt": facts.attempt,
        "code": int(facts.code),
        "ended": facts.ended,
        "evidence": evidence,
        "lost": {"updates": facts.lost_updates, "seconds": facts.lost_s},
        "verdict": rule.verdict,
        "advice": advice,
        "rule": rule.name,
        "nodes": list(facts.nodes),
    }


def lost(facts: Facts) -> str:
    """What the next start makes again."""
    if not facts.trains:
        return "what was begun; finished parts are kept"
    if facts.code in (ExitCode.REQUEUE, ExitCode.DONE) or not facts.lost_updates:
        return f"nothing; the newest checkpoint is of update {facts.saved}" if facts.saved >= 0 else "nothing was saved yet, and no update was logged"
    where = f"after the checkpoint of update {facts.saved}" if facts.saved >= 0 else "for there is no checkpoint yet"
    return f"{counted(facts.lost_updates, 'update')} {where}, {duration(facts.lost_s)} of work"


def _evidence(facts: Facts, *, said: bool) -> list[tuple[str, str]]:
    found = [("reason", facts.reason.splitlines()[0] if facts.reason else "none was recorded")]
    found += [("signal", f"rank {rank}{_on(facts, rank)}: {name}") for rank, name in list(facts.signals.items())[:_RANKS]]
    found += [
        ("memory", f"the kernel of {node} killed {counted(count, 'process', 'processes')} for want of memory")
        for node, count in facts.memory_kills.items()
    ]
    found += [("node", f"{node}: {check}") for node, checks in facts.checks.items() for check in checks]
    found += [("storage", outage) for outage in facts.outages[:_RANKS] if outage != facts.reason]
    found += [("numerics", words) for words in facts.numerics]
    found += [("stood", f"rank {rank}{_on(facts, rank)}: {words}") for rank, words in sorted(facts.stood.items())[:_RANKS]]
    found += [("before", f"{ExitCode(each.code).name}: {each.reason.splitlines()[0] if each.reason else ''}") for each in facts.before]
    found += [("stack", f"rank {rank}: {frame}") for rank, lines in sorted(facts.words.items())[:_RANKS] for frame in stack(lines)]
    if said:
        found += [("said", f"rank {rank}: {line}") for rank, lines in sorted(facts.words.items())[:_RANKS] for line in lines[-_SAID:]]
    return found


def _on(facts: Facts, rank: int) -> str:
    return f" ({facts.names[rank]})" if rank in facts.names else ""


def _how(verdict: str, facts: Facts) -> str:
    """How to leave nodes out where we are."""
    ways = [node_checks.exclusion(node) for node in facts.nodes] if verdict == "RESTART ELSEWHERE" else []
    return f" ({'; '.join(ways)})" if ways else ""


def _line(name: str, words: str) -> str:
    return f"  {name:<9}{words}"
