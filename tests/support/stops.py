"""Stop signals at a chosen phase of a stage: sent when its main rank says that the phase begins (LAUNCHER_DEBUG), with the time until the launcher has ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT

LAUNCHER = "the launcher's imports"
"""Not a phase of a rank: as soon as the launcher hears signals at all."""
PHASES: dict[str, tuple[str, ...]] = {
    "prepare": ("the writing of a part", "the merging of the parts"),
    "tokenizer": ("the tokenizer's training",),
    "dvae": (),
    "encode": ("the encoding of a part", "the merging of the parts"),
    "dalle": (),
    "align": (),
    "clip": (),
    "evaluate": ("the evaluation",),
    "generate": ("the drawing of a caption", "the search for the nearest images", "the drawing of what was learned", "the merging of the pictures"),
    "report": ("the writing of the report",),
}
TRAINING = (
    "the first update, which compiles",
    "an update",
    "the restoring of a checkpoint",
    "an evaluation",
    "a save",
    "the end, after the last checkpoint",
)
"""Of every stage that trains, in an order in which one run meets them all."""
_CAME = re.compile(r"which came during (.+)$|stopped by \w+ during ([^;]+);|(before (?:the ranks were started|the start|node 0))", re.M)
_AT_ANY_SIZE = (LAUNCHER, "the imports", "the start")


def phases(stage: str, *, work_alone: bool = False) -> tuple[str, ...]:
    """Where a stage is struck, one start after the other; ``work_alone``: where the size of models and data counts."""
    return (*(() if work_alone else _AT_ANY_SIZE), *(PHASES[stage] or TRAINING))


@dataclass(frozen=True)
class Strike:
    """What became of a stage that was asked to stop."""

    stage: str
    phase: str
    came: str
    """What the signal met, as the log says it."""
    code: int
    latency_s: float
    """From the signal to the end of the launcher."""
    output: str
    """Lines behind the signal with their seconds."""

    def __str__(self) -> str:
        return f"| {self.stage} | {self.phase} | {self.came} | {self.code} | {self.latency_s:.1f} |"


def start(stage: str, run: Path, *words: str) -> subprocess.Popen[str]:
    """A stage's launcher, which says what begins."""
    command = [sys.executable, str(ROOT / "launcher.py"), stage, str(run), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"LAUNCHER_DEBUG": "1"}, cwd=ROOT)


def strike(stage: str, run: Path, phase: str, *words: str, after_s: float = 0.0, number: signal.Signals = signal.SIGTERM) -> Strike:
    """Start a stage, and ask its launcher to stop when a phase begins, or a while after."""
    process = start(stage, run, *words)
    assert process.stdout is not None
    lines: list[str] = []
    if phase == LAUNCHER:
        while process.poll() is None and not _hears(process.pid, number):
            time.sleep(0.002)
    else:
        for line in process.stdout:
            lines.append(line)
            if line.rstrip().endswith(f"begins: {phase}"):
                break
    time.sleep(after_s)
    process.send_signal(number)
    began = time.monotonic()
    for line in process.stdout:
        lines.append(f"{time.monotonic() - began:5.1f} s  {line}")
    process.wait(timeout=PATIENCE_S)
    latency = time.monotonic() - began
    process.stdout.close()
    output = "".join(lines)
    found = _CAME.search(output)
    came = next((word for word in found.groups() if word), "") if found else "nothing: it had ended"
    return Strike(stage, phase, came, process.returncode, latency, output)


def _hears(pid: int, number: signal.Signals) -> bool:
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def table(lines: list[str]) -> str:
    """The slowest end in each phase, over all stages and by size, from the rows that test_soak_stops.py prints: the table in docs/cluster.md."""
    rows = [[cell.strip() for cell in line.lstrip(".").strip().strip("|").split("|")] for line in lines if re.match(r"\.*\| \w+ \| \w+ \| ", line)]
    slowest: dict[str, dict[str, tuple[float, str]]] = {}
    for size, stage, phase, _, _, seconds in rows:
        entry = slowest.setdefault(phase, {})
        entry[size] = max(entry.get(size, (0.0, "")), (float(seconds), stage))
    sizes = sorted({row[0] for row in rows}, reverse=True)
    head = [f"| struck in | {' | '.join(f'{size}, s' for size in sizes)} |", f"|---|{'---|' * len(sizes)}"]
    cells = {phase: [f"{found[size][0]:.1f} ({found[size][1]})" if size in found else "" for size in sizes] for phase, found in slowest.items()}
    return "\n".join([*head, *(f"| {phase} | {' | '.join(line)} |" for phase, line in cells.items())])


if __name__ == "__main__":
    print(table([line for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]))
