"""What `launcher.py why` says of each fault that the tests inject, as a table: ``python -m tests.support.fault_verdicts`` writes docs/why.md.

Each fault is recorded in a run folder as production records it, with the message that production makes of it; tests/train/advice/test_verdicts.py compares.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from infra import ledger, listening, storage
from infra.errors import ExitCode, ReportedError
from infra.run_folder import RunFolder
from tests.support.faults import FAULTS, Fault
from tests.support.root import ROOT
from train.advice import facts
from train.advice.rules import RULES, decide

PAGE = ROOT / "docs" / "why.md"


def recorded(fault: Fault, folder: Path) -> RunFolder:
    """A run folder in which a fault came."""
    run = RunFolder(str(folder))
    size = 2
    for _ in range(fault.times):
        number = run.begin_attempt("dvae", size=size, run_id="7.0", restart=0, saved=-1)
        for rank, (code, reason) in fault.records.items():
            run.record_exit("dvae", number, rank, code, reason, alone=True)
            time.sleep(0.001)
        live = [{"rank": rank, "state": "R", "heard_s": 1.0, "said_s": 2.0, "done": 40, "total": 100, "unit": "steps"} for rank in range(size)]
        for node in range(size):
            facts_of = {"attempt": number, "node": node, "name": f"n{node}", "written": time.time(), "ranks": live[node : node + 1]}
            storage.write_json(f"{listening.place(run.url, 'dvae')}/node-{node}.json", facts_of)
            known: dict[str, Any] = {"node": node, "name": f"n{node}", "signals": {str(r): s for r, s in fault.signals.items() if r == node}}
            mine = node in fault.signals or (node in fault.records and fault.records[node][0] == 1)
            known |= {"words": {str(node): ["last words"]} if mine else {}, "out_of_memory_kills": fault.memory_kills if node in fault.signals else 0}
            known["checks"] = list(fault.checks) if node == 0 else []
            if mine:
                storage.write_json(run.attempt_url("dvae", number, f"evidence-{node}.json"), known)
        if fault.lost:
            ledger.note_lost(run, "dvae", number, fault.lost)
        if fault.end is not None:
            ledger.write_end(run, "dvae", number, {"code": fault.end[0], "reason": fault.end[1], "ended": 0.0})
    return run


def judged(fault: Fault, folder: Path) -> tuple[str, str, str]:
    """Verdict, rule and advice."""
    found = facts.gather(recorded(fault, folder), "dvae")
    assert found is not None
    rule, advice = decide(found)
    return rule.verdict, rule.name, advice


def page() -> str:
    """The text of docs/why.md."""
    lines = [
        "# Why a run failed, and whether to start it again",
        "",
        "Made by `python -m tests.support.fault_verdicts`; do not edit. `launcher.py why RUN` reads the evidence of a failed attempt from the run folder alone (exit",
        "records, signals, what ranks said last, their stacks, the nodes' checks, numerics, outages) and the first rule of this table that holds decides. No model is",
        "asked. Every attempt that crashes or diverges ends with the same lines; `--json` is for programs, `--stage` and `--attempt` choose.",
        "",
        "## The rules, in their order",
        "",
        "| what happened | verdict | what to do |",
        "|---|---|---|",
    ]
    for rule in RULES:
        keys = rule.otherwise.format(stage="<stage>")
        lines.append(
            f"| {rule.name} | {rule.verdict} | {rule.advice.format(nodes='the node', keys=f'(the keys that the reason names, else: {keys})', stage='<stage>')} |"
        )
    lines += [
        "",
        "What the reason names goes before what the rule does. *The same node again* and *the same error again* look at the three attempts before.",
        "",
        "## The faults that tests inject",
        "",
        "| fault | injected by | verdict | rule |",
        "|---|---|---|---|",
    ]
    lines += [f"| {fault.words} | `{fault.where}` | {fault.verdict} | {fault.rule} |" for fault in FAULTS]
    return "\n".join(lines) + "\n"


def unjudged(folder: Path) -> list[str]:
    """What is wrong with verdicts on the attempts in the run folders below a folder of a test: those that any test has left there."""
    wrong = []
    for place in [found for depth in ("", "*/", "*/*/", "*/*/*/") for found in folder.glob(f"{depth}exits") if found.is_dir()]:
        run = RunFolder(str(place.parent))
        for label in [path.name for path in place.iterdir() if path.is_dir() and path.name.partition(".")[0] in facts.STAGES]:
            for attempt in run.attempts(label):
                try:
                    found = facts.gather(run, label, attempt)
                except ReportedError:  # the test has damaged a record
                    continue
                assert found is not None
                rule, _ = decide(found)
                allowed = {ExitCode.CRASH: ("RESTART", "RESTART ELSEWHERE", "STOP"), ExitCode.REQUEUE: ("RESTART", "STOP")}.get(
                    ExitCode(found.code), ("STOP",)
                )
                if rule.verdict not in allowed:
                    wrong.append(f"{label}, attempt {attempt}: {found.code}, {found.reason}: {rule}")
    return wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for number, fault in enumerate(FAULTS):
            print(fault.words, "->", *judged(fault, Path(scratch, str(number)))[:2])
    PAGE.write_text(page())
