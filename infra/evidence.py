"""What a launcher knows of the ranks of its node that ended by a fault, beside their own records: signals, memory, the node, and their last words.

    <run>/exits/<stage or share>/attempt-<k>/evidence-<n>.json

Written where a rank was killed or crashed, and not where it ended with a code of its own, whose reason says all.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path

from infra import deferred_writes, listening, node_checks, storage
from infra.errors import ExitCode
from infra.run_folder import RunFolder

LINES = 80
"""Last lines that are kept of a rank: a watchdog's stack is as long."""
_MOST = 4
"""Ranks of a node whose words are kept: where hundreds crash, they say the same."""
_OURS = ("SIGTERM", "SIGKILL")
"""Signals by which a launcher ends the ranks that are left: they say nothing, of those that end so later."""
_TOGETHER_S = 3.0
_VMSTAT = Path("/proc/vmstat")


def memory_kills(source: Path = _VMSTAT) -> int:
    """Processes that this node's kernel has killed since its start for want of memory, in limits of containers too."""
    with contextlib.suppress(OSError, ValueError):
        return next((int(line.split()[1]) for line in source.read_text().splitlines() if line.startswith("oom_kill ")), 0)
    return 0


def write(run: RunFolder, label: str, attempt: int, node: int, ends: Mapping[int, int], killed: int, folder: Path) -> bool:
    """Write down what is known, or have it written after the ranks' records; whether there was anything.

    Args:
        ends: rank -> how its process ended, as its parent saw it: a code, or a signal as a negative number.
        killed: what ``memory_kills`` said at the beginning.
        folder: what ``listening`` returned.
    """
    signals = _of_themselves({rank: signal.Signals(-code).name for rank, code in ends.items() if code < 0}, folder)
    faulty = [rank for rank, code in ends.items() if rank in signals or code == ExitCode.CRASH]
    if not faulty:
        return False
    checks = [f"{each.check}: {each.found} (floor: {each.floor})" for each in node_checks.memory_and_disk() + node_checks.gpus() if not each.ok]
    words = listening.last_lines(run.url, label, attempt, folder, faulty[:_MOST], LINES)
    facts = {
        "node": node,
        "name": node_checks.node_name(),
        "signals": {str(rank): name for rank, name in signals.items()},
        "out_of_memory_kills": max(0, memory_kills() - killed),
        "checks": checks,
        "words": {str(rank): lines for rank, lines in words.items()},
    }
    url = run.attempt_url(label, attempt, f"evidence-{node}.json")
    if not deferred_writes.note(f"evidence of node {node}", url, facts):  # an outage must not keep a launcher from the records of its ranks
        storage.write_json(url, facts)
    return True


def _of_themselves(signals: dict[int, str], folder: Path) -> dict[int, str]:
    """Less the ranks that their launcher ended because another one had failed: it kills those that a stop signal does not end, and they lived for longer."""
    if any(name not in _OURS for name in signals.values()):
        return {rank: name for rank, name in signals.items() if name not in _OURS}
    killed = [rank for rank, name in signals.items() if name == "SIGKILL"]
    seen = {rank: path.stat().st_mtime for rank in killed if (path := folder / f"rank-{rank}").exists()}
    first = min(seen.values(), default=0.0)
    return {rank: "SIGKILL" for rank in killed if seen.get(rank, first) <= first + _TOGETHER_S}
