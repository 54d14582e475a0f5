"""``make gpu``: its table knows every test that needs a GPU, and what a cut, a failure, a missing package or a lack of time leave of the report. About 5 s."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.root import ROOT


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, on a machine that has a GPU."""
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / ".ci" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_script", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "machine", lambda device: ({"torch": "2.15.0", "gpu": "none such"}, []))
    return module


def test_every_file_with_a_test_that_needs_a_gpu_belongs_to_a_step_and_every_step_to_a_file(gpu: Any) -> None:
    named = {word for step in gpu.STEPS for word in step.command if word.startswith("tests/")}
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and ("NEEDS_GPU" in path.read_text() or "mark.gpu" in path.read_text())
    }
    assert named == marked
    modules = [step.command[1] for step in gpu.STEPS if step.name.startswith("bench ")]
    assert all((ROOT / (name.replace(".", "/") + ".py")).exists() for name in modules)


def test_all_steps_together_may_take_longer_but_the_most_valuable_half_fits(gpu: Any) -> None:
    names = [step.name for step in gpu.STEPS]
    first = names.index("bench model")
    assert sum(step.seconds for step in gpu.STEPS[:first]) < 60 * gpu.MINUTES < 540
    assert {"networks", "engine", "attention", "kernel", "sampler", "zero", "copies"} == set(names[:first])


def test_every_test_of_attention_belongs_to_one_of_its_two_steps(gpu: Any) -> None:
    chosen = [step.command[-1] for step in gpu.STEPS if step.name.startswith("attention")]
    assert chosen == ["not other_sizes", "other_sizes"]


def step(gpu: Any, name: str, script: str, seconds: int = 20, needs: tuple[str, ...] = ()) -> Any:
    return gpu.Step(name, seconds, ("-c", script), needs)


def told(gpu: Any, folder: Path, *steps: Any, arguments: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    gpu.STEPS = steps
    code = gpu.main(["--out", str(folder / "out"), "--wheels", str(folder / "wheels"), *arguments])
    return code, json.loads((folder / "out" / "gpu.json").read_text())


def test_the_report_is_on_disk_after_every_step_and_says_what_was_not_done(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "out" / "gpu.json"
    looks = f"import json; print([s['name'] + ' ' + s['status'] for s in json.load(open({str(report)!r}))['steps']])"
    code, found = told(
        gpu,
        tmp_path,
        step(gpu, "good", "print('well')"),
        step(gpu, "looks", looks),
        step(gpu, "hangs", "import time; print('begun', flush=True); time.sleep(60)", seconds=1),
        step(gpu, "fails", "raise SystemExit(3)"),
        step(gpu, "lacks", "", needs=("no_such_module",)),
    )
    assert code == 1
    assert [(s["name"], s["status"]) for s in found["steps"]] == [
        ("good", "passed"),
        ("looks", "passed"),
        ("hangs", "cut"),
        ("fails", "failed"),
        ("lacks", "skipped"),
    ]
    table = gpu.table(tmp_path / "out")
    assert "| hangs | cut: ran past its 1 s |" in table and len(found["load"]) == 2
    assert f"; load {found['load'][0]:g} to {found['load'][1]:g}; " in table.splitlines()[0]
    assert "['good passed']" in found["steps"][1]["tail"]
    assert "begun" in found["steps"][2]["tail"] and found["steps"][2]["seconds"] < 20
    said = capsys.readouterr().out
    assert "not done: hangs (ran past its 1 s); lacks (missing: no_such_module)" in said and "fails: exit code 3" in said


def test_no_step_begins_that_the_clock_does_not_allow(gpu: Any, tmp_path: Path) -> None:
    gpu._WORTH_STARTING_S = 3.0
    steps = [step(gpu, str(number), "import time; time.sleep(30)") for number in range(3)]
    code, found = told(gpu, tmp_path, *steps, arguments=("--minutes", "0.07"))
    assert code == 1 and [s["status"] for s in found["steps"]] == ["cut", "skipped", "skipped"] and found["seconds"] < 15
    assert found["steps"][0]["why"].endswith(" s, the rest of the whole run") and found["steps"][1]["why"] == "no time left of 0.07 minutes"


def write_wheel(folder: Path, name: str) -> None:
    """A wheel of one module, whose WORD is 'here'."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "WORD = 'here'\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_a_missing_package_comes_from_the_folder_of_wheels_without_a_network(gpu: Any, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "brought_along")
    needing = step(gpu, "needing", "import brought_along; print(brought_along.WORD)", needs=("brought_along",))
    code, found = told(gpu, tmp_path, needing)
    assert code == 0 and found["steps"][0]["tail"].strip() == "here" and not found["notes"]
    (tmp_path / "bare").mkdir()
    assert told(gpu, tmp_path / "bare", needing)[1]["steps"][0]["why"] == "missing: brought_along"


def test_a_rehearsal_names_its_device_and_only_what_is_asked_for_runs(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shows = gpu.Step("shows", 20, ("-c", "import os, sys; print(os.environ.get('GPU_STAND_IN'), sys.argv[1])", "{device}"))
    code, found = told(gpu, tmp_path, shows, step(gpu, "other", ""), arguments=("--device", "cpu", "--only", "shows"))
    assert code == 0 and found["steps"][0]["tail"].split() == ["cpu", "cpu"] and found["steps"][1]["why"] == "not asked for"
    with pytest.raises(SystemExit):
        gpu.main(["--only", "shown"])
    assert "no step shown; there are shows, other" in capsys.readouterr().err


def test_where_nothing_can_run_every_step_is_skipped_and_the_exit_code_says_so(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "torch sees no GPU: nothing can run. --device cpu rehearses."
    monkeypatch.setattr(gpu, "machine", lambda device: ({"torch": "2.15.0", "gpu": None}, [note]))
    code, found = told(gpu, tmp_path, step(gpu, "any", ""))
    assert code == 1 and found["steps"][0]["why"] == "nothing can run here" and found["notes"] == [note]


def test_a_later_run_adds_to_the_report_of_an_earlier_one_and_not_to_that_of_another_machine(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (step(gpu, "one", "pass"), step(gpu, "two", "raise SystemExit(3)"))
    told(gpu, tmp_path, *steps, arguments=("--only", "two"))
    _, found = told(gpu, tmp_path, step(gpu, "one", "pass"), step(gpu, "two", "pass"), arguments=("--only", "one"))
    assert [(one["status"], one["why"]) for one in found["steps"]] == [("passed", ""), ("failed", "in an earlier run: exit code 3")]
    _, found = told(gpu, tmp_path, step(gpu, "one", "pass"), step(gpu, "two", "pass"), arguments=("--only", "two"))
    assert [(one["status"], one["why"]) for one in found["steps"]] == [("passed", "in an earlier run"), ("passed", "")]
    looks = f"import json; print([s['name'] + ' ' + s['status'] for s in json.load(open({str(tmp_path / 'out' / 'gpu.json')!r}))['steps']])"
    _, found = told(gpu, tmp_path, step(gpu, "first", "pass"), step(gpu, "one", looks), step(gpu, "two", "pass"), arguments=("--only", "first,one"))
    assert found["steps"][1]["tail"].strip() == "['first passed', 'one passed', 'two passed']", (
        "also while the later run is at work, which may be killed"
    )
    monkeypatch.setattr(gpu, "machine", lambda device: ({"torch": "2.15.0", "gpu": "another"}, []))
    _, found = told(gpu, tmp_path, *steps, arguments=("--only", "two"))
    assert [one["why"] for one in found["steps"]] == ["not asked for", "exit code 3"]


def test_a_stop_ends_the_step_under_way_and_the_report_says_what_was_not_reached(tmp_path: Path) -> None:
    script = f"""
import importlib.util, signal, sys
spec = importlib.util.spec_from_file_location("gpu_script", {str(ROOT / ".ci" / "gpu.py")!r})
module = sys.modules["gpu_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
module.machine = lambda device: ({{"torch": "2.15.0", "gpu": "none such"}}, [])
long = "import os, signal, time; print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
module.STEPS = [module.Step(name, 30, ("-c", words)) for name, words in (("one", "pass"), ("long", long), ("last", "pass"))]
module.main(["--out", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode and done.stderr.count("\n") == 1 and done.stderr.startswith("gpu: stopped; what was done is in "), done.stderr
    found = [(one["status"], one["why"]) for one in json.loads((tmp_path / "gpu.json").read_text())["steps"]]
    assert found == [("passed", ""), ("cut", "the run was stopped"), ("skipped", "not reached")]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "long.log").read_text()), 0)


def test_a_wheel_for_another_python_costs_no_other(gpu: Any, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "aaa-1.0-cp27-cp27m-win32.whl").write_bytes(b"none")
    write_wheel(wheels, "found_in_wheels")
    needs = ("found_in_wheels",)
    _, found = told(gpu, tmp_path, step(gpu, "one", "import found_in_wheels", needs=needs))
    assert [one["status"] for one in found["steps"]] == ["passed"]
    assert len(found["notes"]) == 1 and "aaa-1.0-cp27-cp27m-win32.whl (make gpu-wheels" in found["notes"][0]


def test_tests_that_are_cut_leave_their_names_and_no_plugin_of_the_machine_is_loaded(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "site" / "bad-1.0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[pytest11]\nbad = no_such_module_at_all\n")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    path = tmp_path / "test_it.py"
    path.write_text(
        "import pytest, time\npytestmark = pytest.mark.gpu\n"
        "def test_one(): pass\n@pytest.mark.skip(reason='why not')\ndef test_two(): pass\ndef test_three(): time.sleep(60)\n"
    )
    steps = gpu.tests("some", 20, str(path)), gpu.tests("whole", 20, str(path), "-k", "one or two")
    steps = (gpu.replace(steps[0], seconds=6), steps[1])
    plain = gpu.settings
    monkeypatch.setattr(gpu, "settings", lambda *given: (of := plain(*given)) | {"PYTHONPATH": of["PYTHONPATH"] + ":" + str(plugin.parent)})
    _, found = told(gpu, tmp_path, *steps, arguments=("--device", "cpu"))
    cut, whole = found["steps"]
    assert cut["why"] == "ran past its 6 s: 1 passed, 1 skipped, in test_three" and "test_one PASSED" in cut["tail"], cut
    assert (whole["status"], whole["why"]) == ("passed", "1 passed, 1 skipped") and "why not" in whole["tail"]


def test_a_benchmark_that_is_cut_says_how_many_figures_it_leaves(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slow-a.unfinished.json").write_text("{}")  # of an earlier run
    figures = "dict(floor=dict(a=1), measured=dict(b=1), peers=dict())"
    script = f"import json, sys, time; open(sys.argv[1] + '/slow-cpu.unfinished.json', 'w').write(json.dumps({figures})); time.sleep(60)"
    _, found = told(gpu, tmp_path, gpu.Step("bench slow", 2, ("-c", script, "{out}")))
    assert found["steps"][0]["why"] == "ran past its 2 s: 2 figures in slow-cpu.unfinished.json"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"device": "cpu", "machine": {}, "seconds": 1, "steps": [{}]}', '{"machine": []}'])
def test_a_table_of_no_report_or_of_a_damaged_one_is_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "gpu.json").write_text(text)
    words = [sys.executable, str(ROOT / ".ci" / "gpu.py"), "--table", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    wanted = "cannot be read (No such file or directory); a run makes it" if text is None else "is damaged, or no report ("
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert done.stderr.startswith(f"gpu: {tmp_path / 'gpu.json'} {wanted}")


def test_a_run_whose_lines_nobody_reads_goes_on_to_its_end(tmp_path: Path) -> None:
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu_script", {str(ROOT / ".ci" / "gpu.py")!r})
module = sys.modules["gpu_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.machine = lambda device: ({{"torch": "2.15.0", "gpu": "none such"}}, ["a note"])
module.STEPS = [module.Step(name, 30, ("-c", "pass")) for name in ("one", "two")]
sys.stdin.readline()
sys.exit(module.main(["--out", {str(tmp_path / "out")!r}, "--wheels", "none"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    process.stderr.close()
    assert [one["status"] for one in json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]] == ["passed", "passed"]


def test_a_package_of_the_machine_that_is_too_old_is_named_and_one_of_the_wheels_is_not(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.metadata, "version", lambda name: {"pydantic": "1.10.2", "numpy": "2.1.3", "pytest": "7.0"}[name])
    assert gpu.outside(["pydantic", "numpy", "pytest"], tmp_path) == ["pydantic 1.10.2 is not in >=2.13,<3", "pytest 7.0 is not in >=8,<10"]
    (tmp_path / "pydantic").mkdir()
    assert gpu.outside(["pydantic"], tmp_path) == []


def test_the_report_says_what_the_machine_is_and_warns_of_a_compiler_that_triton_would_miss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import gpu_machine  # type: ignore[import-not-found]

    asked = {"torch": "2.15.0+cu132", "cuda": "13.2", "triton": "3.6.0", "gpu": "H100", "capability": "9.0", "memory_gib": 80, "gpus": 1}
    monkeypatch.setattr(gpu_machine, "_ASK", f"print({json.dumps(json.dumps(asked))})")
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:07:40 UTC 2025\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(gpu_machine, "_DRIVER", driver)
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'cc 13.0'\necho more\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setattr(gpu_machine, "_has_headers", lambda: True)
    found, notes = gpu_machine.machine("cuda")
    assert (
        not notes
        and found["driver"] == "580.65.06"
        and found["compiler"] == "cc 13.0"
        and found["capability"] == "9.0"
        and found["triton"] == "3.6.0"
    )
    assert found["commit"] and found["python_h"]
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    monkeypatch.setattr(gpu_machine, "_has_headers", lambda: False)
    (note,) = gpu_machine.machine("cuda")[1]
    assert note.startswith("Triton needs a C compiler and Python.h, which are not here: attention")
    monkeypatch.setattr(gpu_machine, "_ASK", "import torch_of_nobody")
    assert "nothing can run. ModuleNotFoundError: No module named 'torch_of_nobody'" in gpu_machine.machine("cuda")[1][0]
