"""Somebody else's environment: variables, streams, signals and temporary folders that we did not set. About 10 s."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import environment, node_checks, scratch
from infra.errors import ConfigError
from infra.job import Job
from infra.world import Share, World
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train.launch import default_nproc
from train.run.stage_table import STAGES

TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n1",
}
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "8"}


def share() -> tuple[int, int]:
    found = Share.from_env()
    return found.index, found.count


def job() -> tuple[str, int, int]:
    found = Job.from_env()
    return found.id, found.restart, found.nodes


def size() -> int:
    return World.from_env().size


def retries() -> int:
    return environment.whole("LAUNCHER_RETRIES", 3)


def hang() -> float:
    return environment.seconds("LAUNCHER_HANG_S", 540.0)


def threads() -> int:
    return environment.threads(2)


def processes() -> int:
    return default_nproc(STAGES["dalle"])


def checked() -> dict[str, str | None]:
    environment.check()
    return {name: os.environ.get(name) for name in ("HOME", "USER", "AWS_PROFILE", "OMP_NUM_THREADS")}


MATRIX = [
    # What a sweep's array or Indexed Job means for one run is nobody's to guess.
    (share, {}, (0, 1)),
    (share, {"LAUNCHER_SHARE": ""}, (0, 1)),
    (share, {"LAUNCHER_SHARE": " 2/7 "}, (2, 7)),
    (share, ARRAY, r"task 5 of an array .* --share 1/8 .* or --share 0/1"),
    (share, ARRAY | {"LAUNCHER_SHARE": "0/1"}, (0, 1)),
    (share, {"SLURM_ARRAY_TASK_ID": "5"}, r"task 5 of an array .* --share I/N"),
    (share, {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"}, r"task x of an array .* --share I/N"),
    (share, {"SLURM_ARRAY_TASK_ID": ""}, (0, 1)),
    (share, {"JOB_COMPLETION_INDEX": "3"}, r"pod 3 of an Indexed Job .* --share 3/N .* or --share 0/1"),
    (share, {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "8"}, r"--share 3/8"),
    (share, {"LAUNCHER_SHARE": "9/4"}, r"share '9/4': expected I/N with 0 <= I < N.*without gaps"),
    # Empty is unset; a number is one whole number.
    (threads, {"OMP_NUM_THREADS": ""}, 2),
    (threads, {"OMP_NUM_THREADS": " 3 "}, 3),
    (threads, {"OMP_NUM_THREADS": "4,2"}, r"OMP_NUM_THREADS = '4,2': accepted is a whole number of at least 1"),
    (threads, {"OMP_NUM_THREADS": "0"}, r"OMP_NUM_THREADS = '0'"),
    (threads, {"OMP_NUM_THREADS": "٣"}, r"OMP_NUM_THREADS = '٣'"),
    (retries, {"LAUNCHER_RETRIES": ""}, 3),
    (retries, {"LAUNCHER_RETRIES": "-1"}, r"LAUNCHER_RETRIES = '-1'"),
    (hang, {"LAUNCHER_HANG_S": ""}, 540.0),
    (hang, {"LAUNCHER_HANG_S": "1.5"}, 1.5),
    (hang, {"LAUNCHER_HANG_S": "soon"}, r"LAUNCHER_HANG_S = 'soon': accepted is a number of seconds above 0"),
    (hang, {"LAUNCHER_HANG_S": "nan"}, r"LAUNCHER_HANG_S = 'nan'"),
    (job, {"LAUNCHER_JOB": "", "LAUNCHER_NODES": ""}, ("", 0, 1)),
    (job, {"LAUNCHER_JOB": "a", "LAUNCHER_RESTART": "", "LAUNCHER_NODES": ""}, ("a", 0, 1)),
    (job, {"LAUNCHER_JOB": "a", "LAUNCHER_RESTART": "x"}, r"LAUNCHER_RESTART = 'x'"),
    (job, {"LAUNCHER_JOB": "a", "LAUNCHER_NODES": "0"}, r"LAUNCHER_NODES = '0': accepted is a whole number of at least 1"),
    (job, TASK | {"SLURM_RESTART_COUNT": ""}, ("7", 0, 1)),
    (job, TASK | {"SLURM_RESTART_COUNT": "two"}, r"inside srun, but SLURM_RESTART_COUNT = 'two'"),
    (job, TASK | {"SLURM_NODEID": ""}, r"inside srun, but SLURM_NODEID is not set"),
    (size, RANK, 1),
    (size, RANK | {"WORLD_SIZE": ""}, r"WORLD_SIZE is not set.*Ranks are started by launcher.py"),
    (size, RANK | {"WORLD_SIZE": "1.0"}, r"WORLD_SIZE = '1.0'"),
    # As CUDA reads its list: an entry that is no device ends it.
    (processes, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
    (processes, {"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 1),
    (processes, {"CUDA_VISIBLE_DEVICES": "GPU-8d2c,MIG-7aa1"}, 2),
    *[(processes, {"CUDA_VISIBLE_DEVICES": none}, min(2, len(os.sched_getaffinity(0)))) for none in ("", "-1", "NoDevFiles", "none", "None", "void")],
    # What libraries would trip over.
    (
        checked,
        {"AWS_PROFILE": "", "OMP_NUM_THREADS": "", "HOME": "/h", "USER": "u"},
        {"HOME": "/h", "USER": "u", "AWS_PROFILE": None, "OMP_NUM_THREADS": None},
    ),
    (checked, {"OMP_NUM_THREADS": "1,1"}, r"OMP_NUM_THREADS"),
    (checked, {"TMPDIR": "/nowhere/at/all"}, r"TMPDIR = /nowhere/at/all: not a folder that can be written to"),
]


@pytest.mark.parametrize(("reader", "given", "expected"), MATRIX, ids=[f"{reader.__name__}-{number}" for number, (reader, _, _) in enumerate(MATRIX)])
def test_the_environment_is_read_in_one_way_or_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, reader: object, given: dict[str, str], expected: object
) -> None:
    for name in list(os.environ):
        if name.startswith(("LAUNCHER_", "SLURM_", "JOB_", "OMP_", "CUDA_", "AWS_PROFILE")):
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert callable(reader)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            reader()
    else:
        assert reader() == expected


def reads_environment(path: Path) -> bool:
    """Whether a file looks variables up, other than to hand all of them to a child."""
    found = False
    for node in ast.walk(ast.parse(path.read_text())):
        texts = []
        if isinstance(node, ast.Call):
            texts = [ast.unparse(node.func)] if ast.unparse(node.func) in ("os.environ.get", "os.getenv", "os.environ.pop") else []
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            texts = [ast.unparse(node.value)]
        elif isinstance(node, ast.Compare):
            texts = [ast.unparse(each) for each in node.comparators]
        found |= any(text.startswith(("os.environ", "os.getenv")) for text in texts)
    return found


def test_one_module_reads_the_environment() -> None:
    files = [path for folder in ("infra", "data_pipeline", "model", "train") for path in (ROOT / folder).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in [*files, ROOT / "launcher.py"] if reads_environment(path)} == {
        "infra/agent.py",  # torch's log level, which it restores
        "infra/deferred_writes.py",  # set by the launcher itself for its ranks
        "infra/s3_client.py",  # all that boto3 reads, to see a change
        "data_pipeline/loading/shared_memory.py",  # the names of a group of ranks
        "train/bench/data_codes.py",  # restored after a measurement
        "train/bench/peer_dalle.py",
        "train/engines/zero/internals.py",
    }


def program(text: str, **options: object) -> subprocess.CompletedProcess[str]:
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "check": False, "timeout": 60} | options
    return subprocess.run([sys.executable, "-c", text], **settings)  # type: ignore[call-overload, no-any-return]


NOBODY = 54321


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_number_without_a_name_and_without_a_home_gets_what_libraries_ask_for() -> None:
    text = (
        f"import os, getpass, pwd; from infra import environment, s3_client; os.setgid({NOBODY}); os.setuid({NOBODY}); os.environ.clear(); "
        "environment.check(); print(os.environ['HOME'], getpass.getuser(), s3_client._stamp())"
    )
    done = program(text)
    assert done.stdout == f"/tmp uid-{NOBODY} ((0, 0, 0), (0, 0, 0))\n", done.stderr


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"caf\\xe9 \\u732b"),
        ({"PYTHONIOENCODING": "latin-1"}, b"caf\xe9 \\u732b"),
        ({"PYTHONIOENCODING": "utf-8"}, "café 猫".encode()),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"caf\\xe9 \\u732b"),
    ],
)
def test_captions_are_read_as_utf8_and_printed_as_the_terminal_can(tmp_path: Path, variables: dict[str, str], shown: bytes) -> None:
    (tmp_path / "猫.txt").write_bytes("café 猫".encode())
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom infra import output\noutput.speak_utf8(); output.last()\n"
        "import os, pathlib\nprint(pathlib.Path(sys.argv[1], os.listdir(sys.argv[1])[-1]).read_text(), os.getpid())\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "猫.txt").rename(tmp_path / "data" / "猫.txt")
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "data")], env=os.environ | variables, stdout=subprocess.PIPE)
    assert process.communicate(timeout=PATIENCE_S)[0] == shown + f" {process.pid}\n".encode(), "and the process keeps its number"


SPEAKS = "from infra import output; output.last(); import sys, os; print('a' * 100_000); sys.stdout.flush(); print('b', file=sys.stderr); os.write({kept}, b'alive')"


@pytest.mark.parametrize("lost", ["full", "closed", "broken"])
def test_a_log_that_is_lost_ends_nothing(tmp_path: Path, lost: str) -> None:
    way = {"full": '"$@" > /dev/full 2>&1', "closed": '"$@" >&- 2>&- <&-', "broken": '{ "$@"; echo $? > status; } 2>&1 | true'}[lost]
    # bash tells the code of what stands before the pipe in a file.
    with (tmp_path / "kept").open("wb") as kept:
        words = ["bash", "-c", f"export PYTHONPATH={ROOT}; {way}", "bash", sys.executable, "-c", SPEAKS.format(kept=kept.fileno())]
        done = subprocess.run(words, cwd=tmp_path, pass_fds=[kept.fileno()], check=False, timeout=PATIENCE_S)
    code = int((tmp_path / "status").read_text()) if lost == "broken" else done.returncode
    assert (code, (tmp_path / "kept").read_bytes()) == (0, b"alive")


def test_what_is_printed_unbuffered_arrives_at_once() -> None:
    text = "from infra import output; output.last(); import os; print('first'); os.write(1, b'second')"
    assert program(text, env=os.environ | {"PYTHONUNBUFFERED": "1"}).stdout == "first\nsecond"
    assert program(text, env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}).stdout == "secondfirst\n"


@pytest.mark.parametrize(("ignored", "end"), [(False, "Signals.SIGHUP"), (True, "None")])
def test_a_hang_up_stops_like_term_and_is_ignored_under_nohup(ignored: bool, end: str) -> None:
    text = (
        "import os, signal, subprocess, time\nfrom infra import signals\nflag = signals.install()\n"
        "child = subprocess.Popen(['sleep', '60'])\nos.kill(os.getpid(), signal.SIGHUP); child.send_signal(signal.SIGHUP); time.sleep(0.3)\n"
        "print(repr(flag.received).partition(':')[0].strip('<'), child.poll()); child.kill()"
    )
    action = signal.SIG_IGN if ignored else signal.SIG_DFL  # whatever the tests themselves were started under
    assert program(text, preexec_fn=lambda: signal.signal(signal.SIGHUP, action)).stdout == f"{end} None\n", "helpers of libraries survive it"


def test_doctor_says_that_there_is_no_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node_checks, "SHM", str(tmp_path / "shm"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    shm, disk = node_checks.memory_and_disk()
    assert not shm.ok and "No such file" in shm.found and "mount one" in shm.advice
    assert not disk.ok and "TMPDIR" in disk.found


def test_without_any_temporary_folder_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(environment, "tempfile", SimpleNamespace(gettempdir=nowhere))
    with pytest.raises(ConfigError, match=r"no folder for temporary files .*set TMPDIR"):
        environment.temporary()


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    text = "from infra import scratch; import time, pathlib\nwith scratch.folder('part-') as room:\n    pathlib.Path(room, 'x').write_text('y'); print(room, flush=True); time.sleep(60)"
    processes = [subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
    try:
        processes[0].kill()
        processes[0].wait()
        with scratch.folder("mine-") as mine:
            assert (scratch.sweep(), killed.exists(), (living / "x").read_text(), Path(mine).is_dir()) == ([killed.name], False, "y", True)
        assert not Path(mine).exists() and killed.parent == living.parent == tmp_path / f"launcher-{os.getuid()}"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "other"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "other" / f"launcher-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        scratch.sweep()
