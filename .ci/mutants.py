"""``make mutants``: plant small seeded faults, one at a time, in a copy of the repository, and see which of them no test notices.

A fault is one changed operator, number, condition, statement or bound of a slice in one of the modules below. Each runs in a child that is forked from a process
in which the libraries are loaded already, against the tests of its module alone, until the first fails. Verdicts are kept in runs/mutants/verdicts.jsonl by the code that
was changed, without its comments and docstrings: an interrupted run goes on where it was, and a function whose code changed is tried anew. ``--page`` writes
docs/mutants.md from the verdicts.

Why our own: mutmut and cosmic-ray start the tests of each fault in a fresh process, which for these modules is mostly the import of torch and DeepSpeed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import ctypes
import gc
import hashlib
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
SEED = 20261129
VERDICTS = ROOT / "runs" / "mutants" / "verdicts.jsonl"
REASONS = ROOT / ".ci" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"
SCALES = "tests/train/engines/test_scales.py"
ON_TWO = "gradients_and or one_pass or one_resblock or as_many_ranks or on_the_cpu or fp16_and_everything or stay_in or storage_follows"
PREPARED = "tests/data_pipeline/prepare/test_named_images.py -k 'not s3 and not far_more and not remembered'"
ZERO = (
    "tests/train/engines/test_zero_measures.py",
    "tests/train/engines/test_zero_alone.py",
    SCALES,
    "tests/train/engines/test_engines.py -k 'plain or infinity or skipped or any_number or another_deepspeed'",
    f"tests/train/engines/test_zero.py -k '{ON_TWO}'",
)
LOOP = tuple(
    f"tests/train/{name}.py"
    for name in (
        "weights/test_checkpointer",
        "loop/test_trainer_updates",
        "loop/test_trainer_changes",
        "loop/test_trainer",
        "weights/test_checkpoint_marker",
        "engines/test_scales",
    )
)
TARGETS: dict[str, tuple[int, tuple[str, ...]]] = {
    "data_pipeline/loading/order.py": (36, ("tests/data_pipeline/loading/test_order.py",)),
    "infra/ledger.py": (14, ("tests/infra/test_ledger.py", "tests/infra/test_job.py -k 'ledger or crash or verdict or 93'")),
    "train/loop/plateau.py": (12, (SCALES,)),
    "train/engines/zero/scales.py": (14, (SCALES,)),
    "train/loop/trainer.py": (44, LOOP),
    "data_pipeline/prepare/contents.py": (12, ("tests/data_pipeline/prepare/test_contents.py -k 'not s3'", PREPARED)),
    "data_pipeline/prepare/named_images.py": (14, (PREPARED, "tests/data_pipeline/prepare/test_named_images.py -k 's3 or far_more or remembered'")),
    "data_pipeline/shards/versions.py": (16, ("tests/data_pipeline/shards/test_shards.py",)),
    "train/weights/checkpointer.py": (12, LOOP),
    "train/optimizer/adamw.py": (12, ("tests/train/optimizer/test_adamw.py",)),
    "train/weights/checkpoint.py": (12, (*LOOP, "tests/train/engines/test_engines.py", "tests/train/weights/test_checkpoint_reads.py")),
    "train/engines/replicated.py": (12, ZERO),
    "train/engines/zero/groups.py": (8, ZERO),
    "train/engines/zero/measures.py": (10, ZERO),
    "train/engines/zero/shards.py": (14, ZERO),
    "train/engines/zero/engine.py": (36, ZERO),
}
"""Module -> how many faults, and the tests that should see them, the quickest first."""
LIMIT_S = 60
MEMORY_BYTES = 6 << 30
LIBRARIES = (
    "torch",
    "torch.distributed.checkpoint",
    "numpy",
    "pytest",
    "hypothesis",
    "deepspeed",
    "streaming",
    "boto3",
    "numba",
    "pydantic",
    "PIL.Image",
)
QUIET = {
    "DS_IGNORE_CUDA_DETECTION": "1",
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "1",
    "OMP_NUM_THREADS": "1",
    "TESTS_FORK_RANKS": "1",
    "TESTS_QUICK": "1",
    "TESTS_EXAMPLES": "25",
    "CUDA_VISIBLE_DEVICES": "",
}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "zeros": "ones", "square": "abs", "log": None, "print": None}
"""Functions that change places; calls of those without a counterpart are left alone."""
GPU = ("cuda", "gpu", "stream", "copied", "pin_memory", "non_blocking")
"""Words of lines that nothing runs without a GPU."""


@dataclass(frozen=True)
class Fault:
    """One change of one file."""

    file: str
    function: str
    line: int
    start: int
    end: int
    new: str
    old: str
    key: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.old!r} -> {self.new!r}"


def changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """What to put in a node's place, as (node, source)."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in SWAPS:
            yield node, ast.unparse(ast.Compare(left, [SWAPS[type(op)]()], [right]))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPS:
            yield node, ast.unparse(ast.BinOp(left, SWAPS[type(op)](), right))
        case ast.BoolOp(op=op, values=values):
            yield node, ast.unparse(ast.BoolOp(SWAPS[type(op)](), values))
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield node, ast.unparse(operand)
        case ast.Constant(value=bool() as value):
            yield node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, repr(value + 1)
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in SWAPS:
            yield node, ast.unparse(ast.AugAssign(target, SWAPS[type(op)](), value))
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Expr(value=ast.Call()) | ast.Raise():
            yield node, "pass"
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.UnaryOp | ast.Compare):
            yield test, f"not ({ast.unparse(test)})"
        case ast.Call(func=ast.Name(id=name) as called) if NAMES.get(name):
            yield called, str(NAMES[name])
        case ast.Slice(lower=lower, upper=upper) if lower is not None and upper is not None:
            yield lower, "0"
        case _:
            pass


def skipped(node: ast.AST) -> bool:
    """Whether nothing inside is changed: messages, types, log lines, assertions."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
        owner = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        return isinstance(owner, ast.Name) and owner.id in NAMES and NAMES[owner.id] is None
    return isinstance(node, ast.JoinedStr | ast.Assert)


def faults(file: str, text: str) -> list[Fault]:
    """Every fault of a file, in an order that depends on SEED and on the code of the fault's own function alone: neither on comments nor on where it stands."""
    data, lines = text.encode(), text.splitlines()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Fault] = []
    counts: dict[str, int] = {}

    def walk(node: ast.AST, function: str, source: str) -> None:
        if skipped(node) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and skipped(node.value)):
            return
        if isinstance(node, ast.FunctionDef):
            function, source = f"{function}.{node.name}".strip("."), code_of(node)
        elif isinstance(node, ast.ClassDef):
            function = node.name
        elif source:
            for place, new in changes(node):
                line = lines[place.lineno - 1]
                start, end = starts[place.lineno - 1] + place.col_offset, starts[(place.end_lineno or 0) - 1] + (place.end_col_offset or 0)
                old = data[start:end].decode()
                if not any(word in line or word in old for word in GPU):
                    new = new if isinstance(place, ast.stmt) or isinstance(node, ast.Slice | ast.Call) else f"({new})"
                    here = counts[function] = counts.get(function, 0) + 1  # tells changes apart that read alike
                    key = hashlib.sha256(f"{SEED}{file}{function}{source}{here}{new}".encode()).hexdigest()[:16]
                    found.append(Fault(file, function, place.lineno, start, end, new, old, key))
        inner = node.body if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)  # no decorators, defaults and types
        for child in [node.value] if isinstance(node, ast.AnnAssign) and node.value else inner:
            walk(child, function, source)

    walk(ast.parse(text), "", "")
    return sorted(found, key=lambda fault: fault.key)


def code_of(function: ast.FunctionDef) -> str:
    """What a function does: its code as Python sees it, without docstrings."""
    bare = copy.deepcopy(function)
    for node in ast.walk(bare):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(bare)


def choose(every: list[Fault], count: int, verdicts: dict[str, str]) -> list[Fault]:
    """The faults of a file that count: those that were tried, and of the others the first, up to as many as are wanted."""
    return sorted(every, key=lambda fault: (fault.key not in verdicts, fault.key))[: max(count, sum(fault.key in verdicts for fault in every))]


def tried(fault: Fault | None, tests: tuple[str, ...], place: Path, limit_s: float) -> tuple[str, float]:
    """'seen', 'hung' or 'lived', and the seconds that it took; without a fault, of the copy as it is."""
    began, path = time.monotonic(), place / (fault.file if fault else "launcher.py")
    plain = path.read_bytes()
    # The first run leaves bytecode behind. A changed file must not: its time and size may be those of the plain one.
    sys.dont_write_bytecode = fault is not None
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1" if fault else ""
    if fault is not None:
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        path.write_bytes(plain[: fault.start] + fault.new.encode() + plain[fault.end :])
    child = os.fork()
    if not child:
        try:
            _run(tests, place)
        finally:
            os._exit(99)
    try:
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() - began < limit_s:
            time.sleep(0.05)
        if ended == (0, 0):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung", time.monotonic() - began
    finally:
        path.write_bytes(plain)
    return "lived" if ended[1] == 0 else "seen", time.monotonic() - began


def _run(tests: tuple[str, ...], place: Path) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with its parent
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))  # a loop that never ends may also never stop to collect
    os.chdir(place)
    out = os.open(place / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.path[:] = [str(place), *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / ".ci")))]
    import pytest

    code = 0
    for test in tests:  # one after the other: the quickest first, and nothing is collected in vain
        code = code or pytest.main(["-x", "-q", "--durations=0", *shlex.split(test)])
    sys.stdout.flush()
    os._exit(int(code))


def main() -> int:
    """Try the faults that have no verdict yet; exit code 1 if more than 5 % of all live, or one lives for which .ci/mutants.json gives no reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="modules whose path holds one of these words, between commas: several processes may share the work"
    )
    parser.add_argument("--again", action="store_true", help="try those that lived once more")
    parser.add_argument("--first", action="store_true", help="run the quickest file of tests alone; what lives that stays open")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--page", action="store_true", help="only write docs/mutants.md")
    given = parser.parse_args()
    verdicts = read_verdicts()
    chosen = {file: choose(faults(file, (ROOT / file).read_text()), count, verdicts) for file, (count, _) in TARGETS.items()}
    if not given.page:
        wanted = {file: some for file, some in chosen.items() if any(word in file for word in given.only.split(","))}
        _load_libraries()
        jobs = [
            os.fork() or _job({file: some[job :: given.jobs] for file, some in wanted.items()}, verdicts, again=given.again, first=given.first)
            for job in range(given.jobs)
        ]
        ends = [os.waitpid(job, 0)[1] for job in jobs]
        if any(ends):
            return 1
        verdicts = read_verdicts()
    reasons: dict[str, str] = json.loads(REASONS.read_text()) if REASONS.exists() else {}
    text, ok = report(chosen, verdicts, reasons)
    print(text)
    if given.page:
        PAGE.write_text(text)
    return not ok


def read_verdicts() -> dict[str, str]:
    """Fault -> its last verdict."""
    lines = VERDICTS.read_text().splitlines() if VERDICTS.exists() else []
    return {key: verdict for key, verdict, _ in map(json.loads, lines)}


def _job(chosen: dict[str, list[Fault]], verdicts: dict[str, str], *, again: bool, first: bool) -> NoReturn:
    code = 1
    try:
        _try_all(chosen, verdicts, again=again, first=first)
        code = 0
    except SystemExit as error:
        print(error, flush=True)
    finally:
        os._exit(code)


def _load_libraries() -> None:
    os.environ |= QUIET
    for name in LIBRARIES:
        __import__(name)
    gc.freeze()  # a child's collections would touch, and so copy, the whole memory


def _try_all(chosen: dict[str, list[Fault]], verdicts: dict[str, str], *, again: bool, first: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", ".mypy_cache", ".ruff_cache", "__pycache__"))
        for file, some in chosen.items():
            left = [fault for fault in some if verdicts.get(fault.key, "open") == "open" or (again and verdicts[fault.key] == "lived")]
            if not left:
                continue
            tests = TARGETS[file][1][: 1 if first else None]
            verdict, plain_s = tried(None, tests, place, 20 * LIMIT_S)
            if verdict != "lived":
                raise SystemExit(f"{file}: its tests fail without a fault:\n{(place / 'output.txt').read_text()[-3000:]}")
            print(f"{file}: {len(left)} faults to plant; its tests pass in {plain_s:.0f} s", flush=True)
            for fault in left:
                verdict, seconds = tried(fault, tests, place, LIMIT_S + 4 * plain_s)
                verdicts[fault.key] = "open" if first and verdict == "lived" else verdict
                print(f"{verdicts[fault.key]:5} {seconds:4.0f} s  {fault}", flush=True)
                VERDICTS.parent.mkdir(parents=True, exist_ok=True)
                with VERDICTS.open("a") as out:
                    out.write(json.dumps([fault.key, verdicts[fault.key], str(fault)]) + "\n")


def report(chosen: dict[str, list[Fault]], verdicts: dict[str, str], reasons: dict[str, str]) -> tuple[str, bool]:
    """The page, and whether at most 5 % live, each with a reason."""
    rows, alive = [], []
    for file, some in chosen.items():
        known = [fault for fault in some if verdicts.get(fault.key, "open") != "open"]
        lived = [fault for fault in known if verdicts[fault.key] == "lived"]
        alive += lived
        rows.append((file, len(known), len(known) - len(lived), len(lived), len(some) - len(known)))
    total, seen = sum(row[1] for row in rows), sum(row[2] for row in rows)
    lines = [
        "# Planted faults",
        "",
        "Written by `.ci/mutants.py --page` from the verdicts of `make mutants`, which goes on with what is still to be tried.",
        "",
    ]
    lines += [
        "| module | planted | seen | lived | to be tried |",
        "|---|---|---|---|---|",
        *("| {} | {} | {} | {} | {} |".format(*row) for row in rows),
    ]
    lines += [
        f"| all | {total} | {seen} | {total - seen} ({(total - seen) / max(1, total):.1%}) | {sum(row[4] for row in rows)} |",
        "",
        "Faults that live, and why:",
        "",
    ]
    lines += [
        f"- `{fault.file}`, {fault.function}: `{fault.old}` → `{fault.new}`: {reasons.get(fault.key, '**no reason given** ' + fault.key)}"
        for fault in alive
    ]
    return "\n".join(lines) + "\n", (total - seen) <= 0.05 * total and all(fault.key in reasons for fault in alive)


if __name__ == "__main__":
    sys.exit(main())
