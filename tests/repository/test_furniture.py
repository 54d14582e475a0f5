"""The repository's own furniture: requirements, constraints, Makefile, packages. About 2 s."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.root import ROOT

FILES = ("requirements.txt", "requirements-dev.txt")


def _requirements(name: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def _constraints() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def _tracked() -> list[Path]:
    """Tracked text files; in an exported tree without git, all files that are not ignored by their place."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in str(path)]
    endings = {".py", ".md", ".toml", ".txt", ".json", ".html", ".yaml", ".yml", ".sh", ""}
    return [path for path in (ROOT / name for name in names) if path.suffix in endings and path.is_file()]


def _compat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compat", ROOT / ".ci" / "compat.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_every_requirement_is_pinned_inside_its_range(name: str) -> None:
    pins = _constraints()
    for requirement in _requirements(name):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement.name} {pin} is outside {requirement.specifier}"


@pytest.mark.parametrize("name", FILES)
def test_every_requirement_has_a_lowest_and_a_first_unsupported_version_and_is_installed_within(name: str) -> None:
    for requirement in _requirements(name):
        assert sorted(each.operator for each in requirement.specifier) == ["<", ">="], requirement
        assert requirement.specifier.contains(version(requirement.name)), f"{requirement.name} {version(requirement.name)} is installed"


def test_constraints_force_no_cuda_packages_on_a_cpu_machine() -> None:
    assert [name for name in _constraints() if name.startswith(("nvidia", "cuda")) or name in ("triton", "pip")] == []


def test_the_lowest_versions_are_the_lower_bounds_and_unbounded_lines_are_refused() -> None:
    compat = _compat()
    assert compat.lower_bounds("# words\ntorch>=2.11,<2.16  # why\nrich>=13,<16\n") == ["torch==2.11.0", "rich==13.0.0"]
    assert len(compat.lower_bounds((ROOT / "requirements.txt").read_text())) == len(_requirements("requirements.txt"))
    with pytest.raises(ValueError, match=r"'torch' is not of the form name>=lowest,<first-unsupported"):
        compat.lower_bounds("torch")


def test_no_file_names_a_registry_or_a_place_on_somebodys_machine() -> None:
    forbidden = re.compile(
        r"(?i)(pypi\.org/simple|files\.pythonhosted|index-url|find-links|download\.pytorch" + r"|/home/\w|/" + "root/" + r"|/" + "work/main" + ")"
    )
    found = [
        f"{path.relative_to(ROOT)}: {hit[0]}" for path in _tracked() if path != Path(__file__) for hit in [forbidden.search(path.read_text())] if hit
    ]
    assert found == []


def test_make_help_lists_every_target_and_nothing_else() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  ([a-z-]+) +\S", shown, re.M) == phony[1].split()
    for target in phony[1].split():
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_make_says_what_to_install_when_no_python_fits(tmp_path: Path) -> None:
    made = subprocess.run(["make", "-s", "test", "PYTHON=", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode != 0
    assert "No Python 3.11 or 3.12 with venv was found" in made.stdout
    assert not (tmp_path / "venv").exists()


def test_make_takes_a_python_that_runs_not_one_that_is_only_there(tmp_path: Path) -> None:
    (tmp_path / "python3.11").write_text("#!/bin/sh\necho 'pyenv: python3.11: command not found' >&2; exit 127\n")
    (tmp_path / "python3.12").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name in ("python3.11", "python3.12"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "show.mk").write_text(f"include {ROOT / 'Makefile'}\nshow:\n\t@echo $(PYTHON)\n")
    shown = subprocess.run(
        ["make", "-s", "-f", str(tmp_path / "show.mk"), "show"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=ROOT, capture_output=True, text=True
    )
    assert shown.stdout.strip() == "python3.12", shown.stderr


def test_an_interrupted_installation_starts_afresh(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / ".installing").touch()
    (venv / "half").touch()
    python = tmp_path / "python"
    # Stands in for both the found Python and the environment's: makes a folder, "installs", and records nothing else.
    python.write_text(f'#!/bin/sh\n[ "$2" = venv ] && {{ mkdir -p "$3/bin"; cp "{python}" "$3/bin/python"; }}\nexit 0\n')
    python.chmod(0o755)
    subprocess.run(["make", "-s", str(venv / ".installed"), f"PYTHON={python}", f"VENV={venv}"], cwd=ROOT, check=True, capture_output=True)
    assert sorted(path.name for path in venv.iterdir()) == [".installed", "bin"]


def test_an_empty_selection_of_long_tests_says_so_and_passes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit ${CODE:-5}\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "-s", "soak", f"VENV={tmp_path}"]
    empty = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert empty.returncode == 0
    assert "no test is marked 'soak'" in empty.stdout
    failed = subprocess.run([*command, "CODE=1"], cwd=ROOT, capture_output=True, text=True, env={"CODE": "1", "PATH": "/usr/bin:/bin"})
    assert failed.returncode != 0


def test_packages_are_docstrings_only() -> None:
    """`import model` would be shadowed by the first variable of that name, so names are imported from modules."""
    for path in _tracked():
        if path.name == "__init__.py":
            lines = path.read_text().strip()
            assert lines.startswith('"""') and lines.endswith('"""') and lines.count('"""') == 2, path
