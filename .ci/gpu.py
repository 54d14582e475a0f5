"""Everything that only a GPU can show, on one machine that may be bare and offline, within nine minutes; the most valuable first. Usage: make gpu.

Needs Python 3.11 or 3.12, torch 2.11 to 2.15 with CUDA, a C compiler and Python.h for Triton, and a plain copy of this tree: no git, no network, no pip. Packages that
are missing come from a folder of wheels (``make gpu-wheels`` fills it where there is a network); what still cannot run is skipped, and said. The report is written after
every step, and what a step prints and measures as it does so.

    python .ci/gpu.py --out gpu-report --wheels wheels       # on the machine
    python .ci/gpu.py --device cpu                           # the rehearsal: the same steps, on a stand-in
    python .ci/gpu.py --only kernel,sampler

A step is a line of STEPS. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
from gpu_machine import machine  # noqa: E402
from gpu_wheels import unpack  # noqa: E402

MINUTES = 8.75
"""By this script's own clock, starting and reporting included."""
_TAIL = 4000
"""Characters kept of what a step printed."""
_WORTH_STARTING_S = 8.0
_LEFT_OUT = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONSTARTUP", "PYTHONHOME")
"""Of the environment: what this machine's owner set for other programs."""


@dataclass(frozen=True)
class Step:
    """One piece of the run: a process of its own."""

    name: str
    seconds: int
    """After which it is cut. It is measured on an H100's order of speed; a rehearsal on a CPU may need more."""
    command: tuple[str, ...]
    """Arguments of Python; ``{device}`` and ``{out}`` are filled in."""
    needs: tuple[str, ...] = ()
    """Modules that must be there beside torch, each with what it depends on (tests/repository/test_gpu_needs.py)."""
    on_cpu: tuple[str, ...] = ()
    """Further ones, on a stand-in: on a GPU, Triton has their part."""

    def needed(self, device: str) -> tuple[str, ...]:
        return self.needs if device == "cuda" else self.needs + self.on_cpu


def tests(name: str, seconds: int, *chosen: str, needs: tuple[str, ...] = (), on_cpu: tuple[str, ...] = ()) -> Step:
    """A step of tests that are marked gpu. Settings of their own: those of pyproject.toml need plugins. Names are printed before each test, so that a cut names it."""
    words = ("-m", "pytest", "-v", "-rs", "-c", ".ci/gpu.ini", "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider", "-m", "gpu", *chosen)
    return Step(name, seconds, words, ("pytest", *needs), on_cpu)


def bench(name: str, seconds: int, *options: str, needs: tuple[str, ...] = (), on_cpu: tuple[str, ...] = ()) -> Step:
    """A step that measures, and leaves its figures in the folder of the report, each as it is measured."""
    return Step(f"bench {name}", seconds, ("-m", f"train.bench.{name}", "--device", "{device}", "--out", "{out}", *options), needs, on_cpu)


_ATTENTION = "tests/model/test_gpu_attention.py"
_NUMBA = ("numba", "numpy")
_STORED = ("numpy", "pydantic")
STEPS: tuple[Step, ...] = (
    tests("networks", 60, "tests/model/test_gpu.py"),
    tests("engine", 45, "tests/train/engines/test_gpu.py"),
    tests("attention", 150, _ATTENTION, "-k", "not other_sizes"),
    tests("kernel", 45, "tests/train/optimizer/test_gpu.py", on_cpu=_NUMBA),
    tests("sampler", 45, "tests/model/test_gpu_sampling.py"),
    tests("zero", 60, "tests/train/engines/test_gpu_zero.py", needs=("deepspeed", "numba", *_STORED)),
    tests("copies", 30, "tests/train/weights/test_gpu_copies.py", needs=_STORED),
    bench("model", 120, "--seconds", "0.5", "--runs", "3"),
    bench("dvae", 60, "--seconds", "0.5", "--runs", "3"),
    bench("optimizer", 30, "--seconds", "0.5", "--runs", "3", on_cpu=_NUMBA),
    bench("sample", 60, "--seconds", "0.5", "--runs", "3", on_cpu=_NUMBA),
    bench(
        "checkpoint", 90, "--seconds", "1", "--runs", "3", needs=("deepspeed", "safetensors", "sentencepiece", "xxhash", *_STORED), on_cpu=("numba",)
    ),
    bench("compression", 30, "--seconds", "0.5", "--runs", "3", needs=_STORED),
    tests("memory", 60, "tests/model/test_gpu_model.py"),
    tests("attention sizes", 120, _ATTENTION, "-k", "other_sizes"),
)
"""The most valuable first. A new step is a line here; every file with a test marked gpu belongs to one (tests/repository/test_gpu_script.py)."""


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    status: str
    """passed, failed, cut (out of its time, or with the whole run) or skipped."""
    seconds: float = 0.0
    why: str = ""
    tail: str = ""


@dataclass
class Report:
    """The whole run; written after every step, so that a cut loses one step at most."""

    device: str
    machine: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    steps: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    load: list[float] = field(default_factory=lambda: [round(os.getloadavg()[0], 1)])
    """Of the machine at the start and at the last report: other work explains wide figures and cuts."""

    def write(self, folder: Path) -> None:
        self.load[1:] = [round(os.getloadavg()[0], 1)]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "gpu.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")
        new.replace(path)


def missing(names: Sequence[str], folder: Path) -> list[str]:
    """Modules that neither this Python nor the folder of unpacked wheels has."""
    return [
        name for name in names if importlib.util.find_spec(name) is None and not (folder / name).exists() and not (folder / f"{name}.py").exists()
    ]


def outside(names: Sequence[str], folder: Path) -> list[str]:
    """Packages of this machine whose version is none of those that requirements.txt allows."""
    found, ranges = [], {}
    for path in (ROOT / "requirements.txt", ROOT / "requirements-dev.txt"):
        ranges |= dict(re.findall(r"^([a-z0-9-]+)(>=\S+)$", path.read_text(), re.MULTILINE))
    for name in names:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        least, _, first_unsupported = ranges.get(name, "").removeprefix(">=").partition(",<")
        if least and not (folder / name).exists() and not _numbers(least) <= _numbers(version) < _numbers(first_unsupported or "9999"):
            found.append(f"{name} {version} is not in {ranges[name]}")
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def perform(step: Step, limit: float, device: str, out: Path, environment: dict[str, str]) -> Outcome:
    """Run a step in a group of processes of its own, so that all of it ends with its time."""
    began = time.monotonic()
    words = [word.format(device=device, out=out) for word in step.command]
    log = out / f"{step.name.replace(' ', '-')}.log"
    for stale in unfinished(step, out):  # of an earlier run
        stale.unlink()
    with log.open("w") as target:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=target, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        code = None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:  # out of time, or this script was stopped: what goes on would hold the GPU's memory, and distort later figures
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds, text = round(time.monotonic() - began, 1), log.read_text(errors="replace")
    tail, is_pytest = text[-_TAIL:], "pytest" in step.command
    rest = ", the rest of the whole run" if limit < step.seconds else ""
    if code is None:
        return Outcome(step.name, "cut", seconds, f"ran past its {limit:.0f} s{rest}{reached(text) if is_pytest else kept(step, out)}", tail)
    if code == 5 and is_pytest:
        return Outcome(step.name, "failed", seconds, "no test was selected", tail)
    last = (tail.strip().splitlines() or [""])[-1]  # "==== 25 passed, 15 skipped in 3.21s ===="
    if code == 0 and is_pytest and " passed" not in last:
        return Outcome(step.name, "skipped", seconds, "all its tests were skipped on this device", tail)
    counts = ", ".join(re.findall(r"\d+ (?:failed|passed|skipped|errors?)", last)) if is_pytest else ""
    return Outcome(
        step.name, "failed" if code else "passed", seconds, ": ".join([*([f"exit code {code}"] if code else []), *([counts] if counts else [])]), tail
    )


def reached(text: str) -> str:
    """What tests had shown when they were cut, and the one that they were in: pytest -v prints each name before its test, and the verdict after it."""
    verdicts = re.findall(r"^\S*::.* (PASSED|FAILED|SKIPPED|ERROR)\b", text, re.MULTILINE)
    counts = [f"{verdicts.count(word)} {word.lower()}" for word in ("FAILED", "ERROR", "PASSED", "SKIPPED") if word in verdicts]
    last = (text.splitlines() or [""])[-1]
    inside = re.search(r"::(.+)", last) if not re.search(r" (PASSED|FAILED|SKIPPED|ERROR)\b", last) else None
    return "".join([f": {', '.join(counts) or 'no test ended'}", f", in {inside[1].strip()}" if inside else ""])


def unfinished(step: Step, out: Path) -> list[Path]:
    """The file that a benchmark writes while it is at work (train/bench/harness.py)."""
    return sorted(out.glob(f"{step.name.removeprefix('bench ')}-*.unfinished.json"))


def kept(step: Step, out: Path) -> str:
    """What a benchmark had measured when it was cut."""
    for path in unfinished(step, out):
        found = json.loads(path.read_text())
        return f": {sum(len(found[kind]) for kind in ('floor', 'measured', 'peers'))} figures in {path.name}"
    return ""


def settings(device: str, packages: Path) -> dict[str, str]:
    """The environment of steps. No plugin of this machine's pytest is loaded, and what is printed is in the log at once."""
    kept_ones = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    found = kept_ones | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return found | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"GPU_STAND_IN": device} if device != "cuda" else {})


def say(text: str) -> None:
    """Print a line. Where nobody reads any more (``| head``), the run goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run(device: str, out: Path, wheels: Path, minutes: float, only: Sequence[str]) -> Report:
    """All steps, in order, as far as the time goes."""
    end = time.monotonic() + 60 * minutes
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    packages = out.with_name(out.name + "-packages")  # beside the report, which is copied back
    found, notes = machine(device)
    report = Report(device, found, notes)
    can_run = "torch" in found and (device != "cuda" or found["gpu"] is not None)
    wanted = sorted({name for step in STEPS for name in step.needed(device)})
    shutil.rmtree(packages, ignore_errors=True)
    if can_run and wheels.is_dir():  # all of them, as they belong together: the machine's numpy beside our numba would be luck
        problem = unpack(wheels, packages)
        report.notes += [problem] if problem else []
    report.notes += [f"{one}: make gpu-wheels brings another." for one in outside(wanted, packages)]
    for note in report.notes:
        say(f"gpu: {note}")
    environment = settings(device, packages)
    before, done = earlier(out, device, found), list[Outcome]()
    for number, step in enumerate(STEPS):
        absent, left = missing(step.needed(device), packages), end - time.monotonic()
        if only and step.name not in only:
            outcome = Outcome(step.name, "skipped", why="not asked for")
        elif not can_run:
            outcome = Outcome(step.name, "skipped", why="nothing can run here")
        elif absent:
            outcome = Outcome(step.name, "skipped", why=f"missing: {', '.join(absent)}")
        elif left < _WORTH_STARTING_S:
            outcome = Outcome(step.name, "skipped", why=f"no time left of {minutes:g} minutes")
        else:
            try:
                # Of tests on tiny tensors, several threads on a busy machine take ten times as long as one.
                few = {"OMP_NUM_THREADS": "1"} if device != "cuda" and "pytest" in step.command else {}
                outcome = perform(step, min(step.seconds, left - 2), device, out, environment | few)
            except BaseException:
                done.append(Outcome(step.name, "cut", why="the run was stopped"))
                report.steps = done + [before.get(later.name, Outcome(later.name, "skipped", why="not reached")) for later in STEPS[number + 1 :]]
                report.seconds = round(time.monotonic() - began, 1)
                report.write(out)
                raise
        if outcome.status == "skipped":
            outcome = before.get(step.name, outcome)
        done.append(outcome)
        # What an earlier run has of later steps stays in the report meanwhile, as this one may be killed.
        report.steps = done + [before[later.name] for later in STEPS[number + 1 :] if later.name in before]
        report.seconds = round(time.monotonic() - began, 1)
        report.write(out)
        say(f"{outcome.status:8}{outcome.seconds:7.1f} s  {outcome.name}{': ' + outcome.why if outcome.why else ''}")
    return report


def earlier(out: Path, device: str, found: dict[str, Any]) -> dict[str, Outcome]:
    """What became of steps in an earlier run with the same folder, device and machine: a run with --only, or after a cut, adds to its report."""
    try:
        report = json.loads((out / "gpu.json").read_text())
        outcomes = [Outcome(**one) for one in report["steps"]]
        if report["device"] != device or report["machine"] != found:
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    kept = [one for one in outcomes if one.status != "skipped" and one.why != "the run was stopped"]
    return {
        one.name: replace(one, why=one.why if one.why.startswith("in an earlier run") else f"in an earlier run{': ' * bool(one.why)}{one.why}")
        for one in kept
    }


def table(folder: Path) -> str:
    """The steps of a report as Markdown.

    Raises:
        SystemExit: there is none, or it cannot be read as one.
    """
    path = folder / "gpu.json"
    try:
        report = json.loads(path.read_text())
        facts = ", ".join(f"{name} {value}" for name, value in sorted(report["machine"].items()) if value is not None)
        load = " to ".join(f"{one:g}" for one in report["load"])
        lines = [
            f"Device {report['device']}; {facts}; load {load}; {report['seconds']:.0f} s in all.",
            "",
            "| step | what became of it | seconds |",
            "|---|---|---:|",
        ]
        lines += [f"| {s['name']} | {s['status']}{': ' + s['why'] if s['why'] else ''} | {s['seconds']:.1f} |" for s in report["steps"]]
    except OSError as error:
        raise SystemExit(f"gpu: {path} cannot be read ({error.strerror}); a run makes it, and --out names its folder.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"gpu: {path} is damaged, or no report ({type(error).__name__}: {error}); run again with this --out to replace it."
        ) from None
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every step that ran has passed, and at least one did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on a stand-in")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-report", help="folder of the report, the figures and what steps printed")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels for packages that are missing")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time in all")
    parser.add_argument("--only", default="", help="names of steps, with commas between")
    parser.add_argument("--table", action="store_true", help="print the report in --out as Markdown, and run nothing")
    given = parser.parse_args(arguments)
    if given.table:
        say(table(given.out))
        return 0
    only = [name.strip() for name in given.only.split(",") if name.strip()]
    unknown = sorted(set(only) - {step.name for step in STEPS})
    if unknown:
        parser.error(f"--only: no step {', '.join(unknown)}; there are {', '.join(step.name for step in STEPS)}")
    try:
        report = run(given.device, given.out.resolve(), given.wheels.resolve(), given.minutes, only)
    except KeyboardInterrupt:
        raise SystemExit(f"gpu: stopped; what was done is in {given.out / 'gpu.json'}, and a run with the same --out adds to it.") from None
    except OSError as error:
        raise SystemExit(f"gpu: {error.filename or given.out}: {error.strerror}; name a folder that can be written with --out.") from None
    left_out = [f"{step.name} ({step.why})" for step in report.steps if step.status in ("skipped", "cut")]
    say(f"gpu: {report.seconds:.0f} s; not done: {'; '.join(left_out) or 'nothing'}; report: {given.out / 'gpu.json'}")
    statuses = {step.status for step in report.steps}
    return 0 if "passed" in statuses and "failed" not in statuses else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way ends with the script
    sys.exit(main())
