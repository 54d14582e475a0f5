"""The folder of wheels from which ``make gpu`` takes what a machine without a network lacks. Usage, where there is one: make gpu-wheels ARGS="--python 3.12".

Fetches for the machine that is meant, not for this one: its Python and its processor. Versions are those of constraints.txt. torch, NVIDIA's packages and triton are
the machine's own. What comes as sources alone (deepspeed) is made into a wheel here. Needs a Python with pip; standard library only.
"""

from __future__ import annotations

import argparse
import email.parser
import importlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("deepspeed",)
"""What PyPI has no wheel of. No part of it is compiled here, so its wheel is for every Python."""
_GLIBC = 28
"""Wheels for glibc 2.28 and older: Debian 10, RHEL 8, Ubuntu 20.04 and later."""
_TORCHS = ("torch", "nvidia", "triton", "cuda")
"""How the names begin of what stays the machine's."""
_OLD_NAMES = {"manylinux1": 5, "manylinux2010": 12, "manylinux2014": 17}


# --- On the machine ------------------------------------------------------------------------------------------------------------------------


def unpack(wheels: Path, folder: Path) -> str:
    """Take all wheels that fit this Python apart into a folder, without pip; what went wrong, or nothing."""
    problems, unfit = [], []
    for wheel in sorted(wheels.glob("*.whl")):
        if re.match(rf"({'|'.join(_TORCHS)})[-_]", wheel.name.lower()):
            continue
        if not fits(wheel.name, sys.version_info[:2], platform.machine(), _glibc()):
            unfit.append(wheel.name)
            continue
        try:
            _unzip(wheel, folder)
        except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            problems.append(f"{wheel.name}: {error}")
    if unfit:
        x, y = sys.version_info[:2]
        problems.append(f"not for Python {x}.{y} on {platform.machine()}: {', '.join(unfit)} (make gpu-wheels ARGS='--python {x}.{y}' fetches those)")
    return f"wheels that cannot be installed: {'; '.join(problems)}" if problems else ""


def _unzip(wheel: Path, folder: Path) -> None:
    """Write a wheel's modules below a folder. Everything is checked before anything is written."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = []
        for info in archive.infolist():
            parts = PurePosixPath(info.filename.replace("\\", "/")).parts
            if not parts or PurePosixPath(*parts).is_absolute() or ".." in parts or ":" in parts[0]:
                raise ValueError(f"it has an entry that leaves the folder, {info.filename!r}; none of it was taken")
            if parts[0].endswith(".data"):  # purelib and platlib are modules; scripts and headers are not needed
                parts = parts[2:] if parts[1:2] in (("purelib",), ("platlib",)) else ()
            if parts and not info.is_dir():
                wanted.append((info, folder.joinpath(*parts)))
        for info, target in wanted:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(info))


def fits(name: str, python: tuple[int, int], processor: str, glibc: int) -> bool:
    """Whether the tags in a wheel's name are of this Python, processor and glibc (its number after 2.)."""
    parts = name.removesuffix(".whl").split("-")
    if len(parts) < 5:
        return False
    pythons, abis, platforms = (part.split(".") for part in parts[-3:])
    return any(_python_fits(tag, abi, python) for tag in pythons for abi in abis) and any(_platform_fits(tag, processor, glibc) for tag in platforms)


def _python_fits(tag: str, abi: str, python: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(cp|py)(\d)(\d*)", tag)
    if found is None or int(found[2]) != python[0]:
        return False
    minor = int(found[3] or 0)
    if found[1] == "py":
        return abi == "none" and minor <= python[1]
    if abi == "abi3":
        return minor <= python[1]
    return minor == python[1] and abi in ("none", f"cp{python[0]}{python[1]}")


def _platform_fits(tag: str, processor: str, glibc: int) -> bool:
    if tag == "any":
        return True
    if not tag.endswith(f"_{processor}"):
        return False
    kind = tag.removesuffix(f"_{processor}")
    found = re.fullmatch(r"manylinux_2_(\d+)", kind)
    needed = int(found[1]) if found else _OLD_NAMES.get(kind)
    return kind == "linux" or (needed is not None and needed <= glibc)


def _glibc() -> int:
    """17 for 2.17; 0 where it is another library."""
    try:
        found = re.fullmatch(r"glibc 2\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, OSError):
        return 0
    return int(found[1]) if found else 0


# --- Where there is a network ----------------------------------------------------------------------------------------------------------------


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel requires, but for extras and torch."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.parser.Parser().parsestr(archive.read(name).decode())
    found = [line.partition(";")[0].strip() for line in said.get_all("Requires-Dist", []) if "extra" not in line]
    return [line for line in found if not line.lower().startswith(_TORCHS)]


def pip(words: Sequence[str]) -> str:
    """Run pip; its last error, or nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.strip().splitlines()[-1:]
    return "" if done.returncode == 0 else (errors or [f"exit code {done.returncode}"])[-1]


def fetch(names: Iterable[str], python: str, processor: str, target: Path) -> list[str]:
    """Fill the folder; what could not be had."""
    problems, wanted = [], [name for name in names if name not in SOURCES]
    for name in [name for name in names if name in SOURCES]:
        error = pip(["wheel", "--quiet", "--no-deps", "-c", str(ROOT / "constraints.txt"), "--wheel-dir", str(target), name])
        made = sorted(target.glob(f"{name}-*.whl"))
        if error or not made:
            problems.append(f"{name}: {error or 'pip made no wheel'}")
        elif not fits(made[0].name, (3, int(python.split(".")[1])), processor, _GLIBC):
            problems.append(f"{name}: the wheel made here, {made[0].name}, does not fit Python {python} on {processor}")
        else:
            wanted += requirements_of(made[0])
    platforms = [f"{name}_{processor}" for name in (*_OLD_NAMES, *(f"manylinux_2_{n}" for n in range(5, _GLIBC + 1)))]
    words = ["download", "--quiet", "--only-binary=:all:", "--python-version", python, "--implementation", "cp", "-c", str(ROOT / "constraints.txt")]
    words += [word for name in platforms for word in ("--platform", name)] + ["--dest", str(target)]
    if wanted and pip([*words, *wanted]):
        # One by one, so that what has no wheel costs no other.
        problems += [f"{name}: {error}" for name in wanted if (error := pip([*words, name]))]
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where everything was had."""
    sys.path.insert(0, str(Path(__file__).parent))
    gpu = importlib.import_module("gpu")
    mine = f"3.{sys.version_info[1]}" if sys.version_info[:2] in ((3, 11), (3, 12)) else "3.12"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=mine, choices=("3.11", "3.12"), help="the machine's Python; without it this one's")
    parser.add_argument("--processor", default="x86_64", choices=("x86_64", "aarch64"), help="the machine's, as uname -m names it")
    parser.add_argument("--dest", type=Path, default=ROOT / "wheels", help="the folder, whose wheels are made anew")
    parser.add_argument("--device", choices=("cuda", "cpu", "both"), default="both", help="cuda leaves out what the rehearsal alone needs")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("pip") is None:
        print(
            f"gpu-wheels: {sys.executable} has no pip; run .ci/gpu_wheels.py with a Python that has it (python -m ensurepip adds it).",
            file=sys.stderr,
        )
        return 1
    devices = ("cuda", "cpu") if given.device == "both" else (given.device,)
    names = sorted({name for step in gpu.STEPS for device in devices for name in step.needed(device)})
    given.dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.dest) as scratch:
        problems = fetch(names, given.python, given.processor, Path(scratch))
        made = list(Path(scratch).glob("*.whl"))
        for old in given.dest.glob("*.whl") if made else ():
            old.unlink()
        for new in made:
            new.replace(given.dest / new.name)
    found = sorted(given.dest.glob("*.whl"))
    size = sum(path.stat().st_size for path in found) / 1e6
    print(f"gpu-wheels: {len(found)} wheels, {size:.0f} MB, for Python {given.python} on {given.processor}, in {given.dest}")
    for problem in problems:
        print(f"gpu-wheels: not had: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
