"""``make gpu-wheels``: what is fetched for which machine, and what is taken of it there, without pip. About 1 s."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.root import ROOT


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    spec = importlib.util.spec_from_file_location("gpu_wheels_script", ROOT / ".ci" / "gpu_wheels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("py2-none-any", False),
        ("py313-none-any", False),
        ("cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64", True),
        ("cp311-cp311-manylinux_2_17_x86_64", False),
        ("cp312-cp312t-manylinux_2_17_x86_64", False),
        ("cp310-abi3-manylinux2014_x86_64", True),
        ("cp313-abi3-manylinux2014_x86_64", False),
        ("py3-none-manylinux2014_x86_64", True),
        ("cp312-cp312-linux_x86_64", True),
        ("cp312-cp312-manylinux_2_34_x86_64", False),
        ("cp312-cp312-manylinux_2_17_aarch64", False),
        ("cp312-cp312-musllinux_1_2_x86_64", False),
        ("cp312-cp312-macosx_14_0_arm64", False),
        ("cp27-cp27m-win32", False),
    ],
)
def test_tags_say_whether_a_wheel_fits(wheels: Any, tags: str, fits: bool) -> None:
    assert wheels.fits(f"a_name-1.0-{tags}.whl", (3, 12), "x86_64", 28) == fits
    assert not wheels.fits("no_wheel.whl", (3, 12), "x86_64", 28)


def write(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_are_taken_apart_without_pip_and_modules_of_their_data_are_modules(wheels: Any, tmp_path: Path) -> None:
    there, folder = tmp_path / "wheels", tmp_path / "packages"
    write(there, "a-1.0-py3-none-any.whl", {"a/__init__.py": "x = 1", "a-1.0.data/purelib/b.py": "y = 2", "a-1.0.data/scripts/tool": "#!"})
    write(there, "torch-2.15.0-py3-none-any.whl", {"torch/__init__.py": ""})
    write(there, "nvidia_nccl_cu13-2-py3-none-any.whl", {"nvidia/__init__.py": ""})
    assert wheels.unpack(there, folder) == ""
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == ["a/__init__.py", "b.py"]


@pytest.mark.parametrize(
    "entry", ["../out.py", "/tmp/gpu_wheels_out.py", "a/../../out.py", "..\\out.py", "C:\\out.py", "a-1.0.data/purelib/../../../out.py"]
)
def test_no_entry_of_a_wheel_leaves_the_folder_and_a_damaged_one_costs_no_other(wheels: Any, tmp_path: Path, entry: str) -> None:
    there, folder = tmp_path / "wheels", tmp_path / "packages"
    write(there, "a-1.0-py3-none-any.whl", {"first.py": "", entry: "x = 1"})
    (there / "b-1.0-py3-none-any.whl").write_bytes(b"PK no zip")
    write(there, "c-1.0-py3-none-any.whl", {"c.py": ""})
    said = wheels.unpack(there, folder)
    assert f"a-1.0-py3-none-any.whl: it has an entry that leaves the folder, {entry!r}; none of it was taken" in said
    assert "b-1.0-py3-none-any.whl: File is not a zip file" in said
    assert [path.name for path in tmp_path.rglob("*.py")] == ["c.py"] and not Path("/tmp/gpu_wheels_out.py").exists()


def test_it_fetches_for_the_python_that_is_named_what_steps_need_but_torch(
    wheels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def pip(words: list[str]) -> str:
        calls.append(list(words))
        if words[0] == "wheel":
            requires = "Requires-Dist: einops\nRequires-Dist: torch>=2\nRequires-Dist: black; extra == 'dev'\nRequires-Dist: pydantic>=2.0.0\n"
            write(Path(words[words.index("--wheel-dir") + 1]), "deepspeed-1-py3-none-any.whl", {"deepspeed-1.dist-info/METADATA": requires})
            return ""
        if "numba" in words:
            return "ERROR: No matching distribution found for numba"
        write(Path(words[words.index("--dest") + 1]), f"{words[-1].partition('>')[0]}-1-py3-none-any.whl", {})
        return ""

    monkeypatch.setattr(wheels, "pip", pip)
    write(tmp_path / "to", "old-1-py3-none-any.whl", {})
    assert wheels.main(["--python", "3.12", "--processor", "aarch64", "--dest", str(tmp_path / "to")]) == 1
    assert [calls[0][0], calls[0][-1]] == ["wheel", "deepspeed"]
    first = calls[1]
    assert first[first.index("--python-version") + 1] == "3.12" and "manylinux_2_28_aarch64" in first and "manylinux2014_aarch64" in first
    assert "--only-binary=:all:" in first and str(ROOT / "constraints.txt") in first
    assert {"einops", "pydantic", "pydantic>=2.0.0", "pytest", "numba", "numpy", "safetensors", "sentencepiece", "xxhash"} <= set(first)
    assert not {word for word in first if word.startswith(("torch", "black", "triton", "nvidia"))}
    said = capsys.readouterr()
    assert "not had: numba: ERROR: No matching distribution found for numba" in said.err and "for Python 3.12 on aarch64" in said.out
    found = {path.name.partition("-")[0] for path in (tmp_path / "to").iterdir()}
    assert {"deepspeed", "einops", "pytest"} <= found and not {"old", "numba"} & found, "one that cannot be had costs no other"


def test_a_python_without_pip_says_so_in_a_line(tmp_path: Path) -> None:
    script = (
        "import importlib.util, runpy, sys\n"
        "plain = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'pip' else plain(name, *more)\n"
        f"sys.argv = ['gpu_wheels.py', '--dest', {str(tmp_path / 'to')!r}]\n"
        f"runpy.run_path({str(ROOT / '.ci' / 'gpu_wheels.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and " has no pip; run .ci/gpu_wheels.py with a Python that has it" in done.stderr, (
        done.stderr
    )
