"""Everything that only a GPU can show, on one machine that may be bare and offline, within nine minutes; the most valuable first. Usage: make gpu.

Needs Python 3.11 or 3.12, torch 2.11 to 2.15 with CUDA, and a plain copy of this tree: no git, no network, no installation. Packages that are missing come from a
folder of wheels (``make gpu-wheels`` fills it where there is a network); what still cannot run is skipped, and said. The report is written after every step.

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
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.75
"""By this script's own clock, starting and reporting included."""
TORCH = ((2, 11), (2, 15))
_WHOLE = ("deepspeed", "pydantic", "streaming", "boto3", "numba", "hypothesis")
_TAIL = 4000
"""Characters kept of what a step printed."""
_WORTH_STARTING_S = 8.0


@dataclass(frozen=True)
class Step:
    """One piece of the run: a process of its own."""

    name: str
    seconds: int
    """After which it is cut. It is measured on an H100's order of speed; a rehearsal on a CPU may need more."""
    command: tuple[str, ...]
    """Arguments of Python; ``{device}`` and ``{out}`` are filled in."""
    needs: tuple[str, ...] = ()
    """Modules that must be there beside torch."""


def tests(name: str, seconds: int, *chosen: str, needs: tuple[str, ...] = ()) -> Step:
    """A step of tests that are marked gpu. Settings of their own: those of pyproject.toml need plugins."""
    words = ("-m", "pytest", "-q", "-c", ".ci/gpu.ini", "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider", "-m", "gpu", *chosen)
    return Step(name, seconds, words, ("pytest", *needs))


def bench(name: str, seconds: int, *options: str, needs: tuple[str, ...] = ()) -> Step:
    """A step that measures, and leaves its figures in the folder of the report."""
    return Step(f"bench {name}", seconds, ("-m", f"train.bench.{name}", "--device", "{device}", "--out", "{out}", *options), needs)


STEPS: tuple[Step, ...] = (
    tests("networks", 60, "tests/model/test_gpu.py"),
    tests("engine", 45, "tests/train/engines/test_gpu.py"),
    tests("attention", 150, "tests/model/test_gpu_attention.py"),
    tests("kernel", 45, "tests/train/optimizer/test_gpu.py"),
    tests("sampler", 45, "tests/model/test_gpu_sampling.py"),
    tests("zero", 90, "tests/train/engines/test_zero.py", needs=_WHOLE),
    tests("copies", 30, "tests/train/loop/test_trainer.py", needs=_WHOLE),
    bench("model", 120, "--seconds", "0.5", "--runs", "3"),
    bench("dvae", 60, "--seconds", "0.5", "--runs", "3"),
    bench("optimizer", 30, "--seconds", "0.5", "--runs", "3"),
    bench("sample", 60, "--seconds", "0.5", "--runs", "3"),
    bench("checkpoint", 60, "--seconds", "1", "--runs", "3", needs=_WHOLE),
    bench("compression", 30, "--seconds", "0.5", "--runs", "3", needs=_WHOLE),
    tests("memory", 60, "tests/model/test_gpu_model.py"),
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

    def write(self, folder: Path) -> None:
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


def unpack(wheels: Path, folder: Path) -> str:
    """Install a folder of wheels beside the environment, without a network; what went wrong, or nothing. torch and what belongs to it stay the machine's."""
    chosen = [str(path) for path in sorted(wheels.glob("*.whl")) if not path.name.lower().startswith(("torch-", "nvidia", "triton-", "cuda"))]
    if not chosen:
        return f"no wheels in {wheels}"
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--upgrade", "--target", str(folder)]
    problems = []
    for wheel in chosen:  # one by one: a wheel for another Python must not cost the others
        try:
            done = subprocess.run([sys.executable, *words, wheel], capture_output=True, text=True, timeout=30)
            said = "" if done.returncode == 0 else " ".join(done.stderr.strip().splitlines()[-1:]) or f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            said = "it took 30 s"
        problems += [f"{Path(wheel).name}: {said}"] if said else []
    return f"wheels that cannot be installed: {'; '.join(problems)}" if problems else ""


def perform(step: Step, limit: float, device: str, out: Path, environment: dict[str, str]) -> Outcome:
    """Run a step in a group of processes of its own, so that all of it ends with its time."""
    began = time.monotonic()
    words = [word.format(device=device, out=out) for word in step.command]
    log = out / f"{step.name.replace(' ', '-')}.log"
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
    seconds, tail = round(time.monotonic() - began, 1), log.read_text(errors="replace")[-_TAIL:]
    if code is None:
        return Outcome(step.name, "cut", seconds, f"ran past its {limit:.0f} s", tail)
    if code == 5 and "pytest" in step.command:
        return Outcome(step.name, "failed", seconds, "no test was selected", tail)
    if code == 0 and "pytest" in step.command and " passed" not in tail:
        return Outcome(step.name, "skipped", seconds, "all its tests were skipped on this device", tail)
    last = (tail.strip().splitlines() or [""])[-1]  # "25 passed, 15 skipped in 3.21s"
    counts = ", ".join(re.findall(r"\d+ (?:passed|skipped)", last)) if "skipped" in last else ""
    return Outcome(step.name, "failed" if code else "passed", seconds, f"exit code {code}" if code else counts, tail)


def machine(device: str) -> tuple[dict[str, Any], list[str]]:
    """What this machine is, asked in a process of its own, and what is odd about it."""
    script = (
        "import json, torch; d = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None; "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, 'gpu': d and d.name, 'memory_gib': d and round(d.total_memory / 2**30)}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    if done.returncode:
        return {"python": platform.python_version()}, ["torch cannot be imported here: nothing can run."]
    found = {"python": platform.python_version(), **json.loads(done.stdout.strip().splitlines()[-1])}
    notes = []
    version = tuple(int(part) for part in found["torch"].split("+")[0].split(".")[:2])
    if not TORCH[0] <= version <= TORCH[1]:
        notes.append(f"torch {found['torch']} is outside of the range that is supported, {TORCH[0][0]}.{TORCH[0][1]} to {TORCH[1][0]}.{TORCH[1][1]}.")
    if device == "cuda" and found["gpu"] is None:
        notes.append("torch sees no GPU: nothing can run. --device cpu rehearses.")
    return found, notes


def run(device: str, out: Path, wheels: Path, minutes: float, only: Sequence[str]) -> Report:
    """All steps, in order, as far as the time goes."""
    end = time.monotonic() + 60 * minutes
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    packages = out / "packages"
    found, notes = machine(device)
    report = Report(device, found, notes)
    can_run = "torch" in found and (device != "cuda" or found["gpu"] is not None)
    wanted = sorted({name for step in STEPS for name in step.needs})
    if can_run and wheels.is_dir() and missing(wanted, packages):
        problem = unpack(wheels, packages)
        report.notes += [problem] if problem else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "PYTHONDONTWRITEBYTECODE": "1"}
    if device != "cuda":
        environment["GPU_STAND_IN"] = device
    before, done = earlier(out, device, found), list[Outcome]()
    for number, step in enumerate(STEPS):
        absent, left = missing(step.needs, packages), end - time.monotonic()
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
        print(f"{outcome.status:8}{outcome.seconds:7.1f} s  {outcome.name}{': ' + outcome.why if outcome.why else ''}", flush=True)
    return report


def earlier(out: Path, device: str, found: dict[str, Any]) -> dict[str, Outcome]:
    """What became of steps in an earlier run with the same folder, device and machine: a run with --only, or after a cut, adds to its report."""
    try:
        report = json.loads((out / "gpu.json").read_text())
        outcomes = [Outcome(**one) for one in report["steps"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if report["device"] != device or report["machine"] != found:
        return {}
    kept = [one for one in outcomes if one.status != "skipped" and one.why != "the run was stopped"]
    return {
        one.name: replace(one, why=one.why if one.why.startswith("in an earlier run") else f"in an earlier run{': ' * bool(one.why)}{one.why}")
        for one in kept
    }


def table(folder: Path) -> str:
    """The steps of a report as Markdown."""
    report = json.loads((folder / "gpu.json").read_text())
    facts = ", ".join(f"{name} {value}" for name, value in sorted(report["machine"].items()) if value is not None)
    lines = [f"Device {report['device']}; {facts}; {report['seconds']:.0f} s in all.", "", "| step | what became of it | seconds |", "|---|---|---:|"]
    lines += [f"| {s['name']} | {s['status']}{': ' + s['why'] if s['why'] else ''} | {s['seconds']:.1f} |" for s in report["steps"]]
    return "\n".join(lines) + "\n"


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
        print(table(given.out), end="")
        return 0
    only = [name.strip() for name in given.only.split(",") if name.strip()]
    unknown = sorted(set(only) - {step.name for step in STEPS})
    if unknown:
        parser.error(f"--only: no step {', '.join(unknown)}; there are {', '.join(step.name for step in STEPS)}")
    report = run(given.device, given.out.resolve(), given.wheels.resolve(), given.minutes, only)
    for note in report.notes:
        print(f"gpu: {note}")
    left_out = [f"{step.name} ({step.why})" for step in report.steps if step.status in ("skipped", "cut")]
    print(f"gpu: {report.seconds:.0f} s; not done: {'; '.join(left_out) or 'nothing'}; report: {given.out / 'gpu.json'}")
    statuses = {step.status for step in report.steps}
    return 0 if "passed" in statuses and "failed" not in statuses else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way ends with the script
    sys.exit(main())
