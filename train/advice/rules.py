"""The rules by which a failed attempt is judged, in one table: the first that holds decides. No model, and nothing that is not in the evidence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from infra.errors import ExitCode
from train.advice.facts import Facts
from train.config import RunConfig
from train.config_align import key as key_of

Verdict = Literal["RESTART", "RESTART ELSEWHERE", "STOP"]


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    name: str
    """What happened, in a few words."""
    holds: Callable[[Facts], bool]
    verdict: Verdict
    advice: str
    """What to do; '{nodes}', '{keys}' and '{stage}' stand for what the evidence names."""
    otherwise: str = ""
    """Keys that are named where the reason names none."""


_KEY = re.compile(r"\b([a-z_]+)\.([a-z0-9_]+)\b")
_HARDWARE = re.compile(
    r"(?i)uncorrectable|ECC error|\bXid\b|fallen off the bus|fell off the bus|NVLink|CUDA error: (unspecified launch failure|hardware|device not ready|an "
    r"illegal instruction)|unhandled system error|ibv_|device is lost"
)
_ROOM = re.compile(r"No space left|quota|cannot be written \(.*(space|quota|Quota)", re.IGNORECASE)
_SHARED = re.compile(r"SIGBUS|Bus error|/dev/shm", re.IGNORECASE)
_SILENT = re.compile(r"has given no sign for")
_HANGS = re.compile(r"no progress for \d+ s")
_MEETING = re.compile(r"rendezvous at .* went away|did not meet|did not begin '|finds no free port|cannot use .*another node's")
_LEFT = re.compile(r"another rank is gone")
_BROKEN = ("SIGSEGV", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")


def keys(text: str) -> list[str]:
    """Configuration keys that a message names, in its order."""
    found = []
    for section, key in _KEY.findall(text):
        field = RunConfig.model_fields.get(section)
        inner = getattr(field.annotation, "model_fields", None) or getattr(field.annotation, "__dataclass_fields__", {}) if field is not None else {}
        if key in inner:
            found.append(f"{section}.{key}")
    return list(dict.fromkeys(found))


def _says(pattern: re.Pattern[str]) -> Callable[[Facts], bool]:
    return lambda facts: pattern.search(facts.reason) is not None


def _code(code: ExitCode, pattern: str = "") -> Callable[[Facts], bool]:
    return lambda facts: facts.code == code and re.search(pattern, facts.reason) is not None


def _crash(holds: Callable[[Facts], bool]) -> Callable[[Facts], bool]:
    return lambda facts: facts.code == ExitCode.CRASH and holds(facts)


def _signalled(*names: str) -> Callable[[Facts], bool]:
    return lambda facts: bool(set(facts.signals.values()) & set(names))


def _unfit(facts: Facts) -> bool:
    """A node's own state is to blame: what was found on it afterwards, or what the driver said."""
    of_devices = [check for checks in facts.checks.values() for check in checks if check.startswith(("gpus", "ecc", "temperature"))]
    return bool(of_devices) or "is unfit" in facts.reason or _HARDWARE.search(" ".join([facts.reason, *_lines(facts)])) is not None


def _lines(facts: Facts) -> list[str]:
    return [line for lines in facts.words.values() for line in lines]


def _same_node_again(facts: Facts) -> bool:
    """Its end points to a node to which the end of an earlier attempt pointed, while the others do their part."""
    several = len(set(facts.names.values())) > 1 or _SILENT.search(facts.reason) is not None
    if not (_SILENT.search(facts.reason) or _HANGS.search(facts.reason) or facts.signals):
        return False  # what the code says comes with the work, and not with the machine
    crashed = [each for each in facts.before if each.code == ExitCode.CRASH]
    return several and any(set(facts.nodes) & set(each.nodes) for each in crashed)


def plain(reason: str) -> str:
    """A reason without what differs each time: numbers, addresses, names of ranks."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", reason)


def _same_again(facts: Facts) -> bool:
    """The attempt before it ended alike, and neither moved a checkpoint."""
    last = facts.before[-1] if facts.before else None
    return last is not None and last.code == facts.code and plain(last.reason) == plain(facts.reason) and not facts.moved


def _full_node(facts: Facts) -> bool:
    return _says(_ROOM)(facts) and any(check.startswith(("disk", "shm")) for checks in facts.checks.values() for check in checks)


def _memory(facts: Facts) -> bool:
    """The kernel killed processes on a node for want of memory, and a rank was killed."""
    return bool(facts.memory_kills) and (_signalled("SIGKILL")(facts) or "was killed" in facts.reason or "exited unexpectedly" in facts.reason)


RULES: tuple[Rule, ...] = (
    Rule(
        "another launcher has the work",
        _code(ExitCode.REQUEUE, r"taken over by|another launcher runs"),
        "STOP",
        "nothing is to be done: it goes on there",
    ),
    Rule("stopped by a signal", _code(ExitCode.REQUEUE), "RESTART", "what it had made is saved; the same command goes on"),
    Rule("a wrong command line", _code(ExitCode.USAGE), "STOP", "give what the reason accepts"),
    Rule("a wrong configuration or run folder", _code(ExitCode.CONFIG), "STOP", "change {keys}", "what the reason names"),
    Rule("bad or missing data", _code(ExitCode.DATA), "STOP", "mend or make anew what the reason names; {keys}", "no key of the run does"),
    Rule(
        "starts that never reach a checkpoint",
        _code(ExitCode.DIVERGED, "starts in a row|stopped .* times in a row"),
        "STOP",
        "change {keys}",
        "cluster.hours, {stage}_fit.save_every",
    ),
    Rule(
        "crashes in a row without progress",
        _code(ExitCode.DIVERGED, "crash(es|ed) .*in a row|restarts in a row"),
        "STOP",
        "mend what the last of them says; {keys}",
        "no key is named",
    ),
    Rule(
        "scaled gradients overflow without end",
        _code(ExitCode.DIVERGED, "overflows of scaled gradients"),
        "STOP",
        "go on with another {keys} (--go-on)",
        "{stage}_fit.lr, {stage}_fit.max_overflow_steps",
    ),
    Rule("numbers are not finite any more", _code(ExitCode.DIVERGED), "STOP", "go on with another {keys} (--go-on)", "{stage}_fit.lr"),
    Rule(
        "a GPU's memory is too small",
        _crash(_says(re.compile(r"Less memory:|CUDA out of memory|use a larger GPU"))),
        "STOP",
        "change {keys}",
        "{stage}_fit.accumulation",
    ),
    Rule("a node's memory is too small", _crash(_memory), "STOP", "change {keys}", "cluster.memory_gib, data.workers, data.prefetch"),
    Rule("a node is broken", _crash(_unfit), "RESTART ELSEWHERE", "without {nodes}"),
    Rule("a node's own disk is full", _crash(_full_node), "RESTART ELSEWHERE", "without {nodes}, or once there is room on it"),
    Rule("the disk of the run folder is full", _crash(_says(_ROOM)), "STOP", "make room, or change {keys}", "run.root, {stage}_fit.keep"),
    Rule(
        "shared memory is too small",
        _crash(lambda facts: _signalled("SIGBUS")(facts) or _says(_SHARED)(facts)),
        "STOP",
        "change {keys}",
        "cluster.shm_gib, data.prefetch",
    ),
    Rule("the storage gave no answer", _crash(lambda facts: bool(facts.outages)), "RESTART", "once it answers (launcher.py doctor RUN)"),
    Rule("the same node again", _crash(_same_node_again), "RESTART ELSEWHERE", "without {nodes}"),
    Rule("a node or its link was lost", _crash(_says(_SILENT)), "RESTART", "a second time on the same node, without it"),
    Rule(
        "the same error again, and no checkpoint between",
        _crash(_same_again),
        "STOP",
        "it would come again: mend what the reason says; {keys}",
        "no key is named",
    ),
    Rule("a rank hung", _crash(_says(_HANGS)), "RESTART", "the stacks say where it stood (launcher.py logs RUN)"),
    Rule("nodes did not meet", _crash(_says(_MEETING)), "RESTART", "see that all nodes start and reach node 0"),
    Rule("a process broke", _crash(_signalled(*_BROKEN)), "RESTART", "a second time alike, not: it is a bug, or a broken node"),
    Rule(
        "a rank or its launcher was killed",
        _crash(lambda facts: "was killed" in facts.reason or bool(facts.signals)),
        "RESTART",
        "nobody said why: look at the node's log if it comes again",
    ),
    Rule("a rank lost its peer", _crash(_says(_LEFT)), "RESTART", "the one that left said nothing: it was killed, or the network broke"),
    Rule("an error of the code", _crash(lambda facts: True), "RESTART", "once: the same again means that it would come every time"),
    Rule("finished", lambda facts: facts.code == ExitCode.DONE, "STOP", "nothing is to be done"),
)
"""From what is certain to what is guessed: codes of their own, what the kernel, the driver and the storage said, what was seen before, and the rest."""


def decide(facts: Facts) -> tuple[Rule, str]:
    """The rule that decides, and its advice in words."""
    rule = next(rule for rule in RULES if rule.holds(facts))
    stage = facts.stage.partition(".")[0]
    named = keys(facts.reason)
    of_stage = {"stage": stage} if f"{stage}_fit" in RunConfig.model_fields else {"stage": "dalle"}
    # A key that the stage's own section lacks is one of the section that it otherwise trains with.
    usual = re.sub(r"\b(\w+)_fit\.(\w+)", lambda found: key_of(found[1], found[2]), rule.otherwise.format(**of_stage))
    words = ", ".join(named) or usual
    nodes = ", ".join(dict.fromkeys([*facts.nodes, *facts.checks])) or "the node that it names"
    return rule, rule.advice.format(nodes=nodes, keys=words, stage=stage)
