"""The arrows of import run one way, and each heavy library has one home (docs/contracts.md, section 9)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import import_graph
from tests.support.import_graph import imported
from tests.support.root import ROOT

OURS = ("model", "data_pipeline", "train", "infra", "launcher", "tests")

MAY_IMPORT = {
    "model": {"model"},
    "infra": {"infra"},
    "data_pipeline": {"data_pipeline", "infra"},
    "train": {"train", "model", "data_pipeline", "infra"},
    "launcher": {"train", "infra"},
}

HOMES = {
    "deepspeed": ("train/engines/zero/",),
    "apex": ("train/optimizer/apex_parts.py",),
    "boto3": ("infra/s3_client.py", "infra/s3.py", "infra/s3_errors.py", "infra/s3_download.py"),
    "botocore": ("infra/s3_client.py", "infra/s3.py", "infra/s3_errors.py"),
    "s3transfer": ("infra/s3.py", "infra/s3_errors.py", "infra/s3_download.py"),
    "gcsfs": ("infra/cloud.py",),
    "adlfs": ("infra/cloud.py",),
    "streaming": ("data_pipeline/shards/mosaic.py",),
    "filelock": ("data_pipeline/loading/shard_cache.py",),
    "xxhash": ("data_pipeline/shards/rows.py",),
    "sentencepiece": ("data_pipeline/tokenizer.py",),
    "pycld2": ("data_pipeline/filters/language.py",),
    "tensorboard": ("train/loop/metrics.py",),
    "werkzeug": ("train/drawing/page.py", "train/verbs/play.py"),
    "matplotlib": ("train/report/plots.py", "train/report/labels.py"),
    "pyarrow": ("data_pipeline/sources/",),
    "simplejpeg": ("data_pipeline/images/jpeg.py", "train/bench/data_images.py"),
    "numba": (
        "data_pipeline/images/area_resize.py",
        "train/drawing/cpu_choice.py",
        "train/drawing/cpu_kernels.py",
        "train/optimizer/adamw_cpu.py",
        "train/optimizer/adamw_loops.py",
    ),
    "llvmlite": ("train/optimizer/adamw_loops.py",),
    "resvg_py": ("data_pipeline/sources/drawings.py",),
    "emoji": ("data_pipeline/sources/drawings.py",),
    "jsonschema": ("train/bench/docs.py",),
    "typer": ("launcher.py", "train/verbs/arguments.py", "train/verbs/watching_commands.py"),
    "rich": ("launcher.py", "infra/progress.py"),
    "safetensors": ("train/weights/export.py", "train/weights/vqgan_files.py", "train/evaluation/weight_files.py"),
    "triton": ("train/optimizer/adamw_kernel.py", "train/bench/kernels.py", "train/bench/generated.py", "infra/docker/check_image.py"),
    "scipy": (),
    "torchvision": ("train/bench/data_images.py",),
    "dall_e": (),
    "lpips": ("train/evaluation/lpips.py",),
}

ORDER = {
    "train": [
        ("launch",),
        ("attempt",),
        ("verbs", "experiments"),
        ("stages", "bench"),
        ("drawing",),
        ("report",),
        ("planning", "advice"),
        ("loop",),
        ("engines", "run"),
        ("weights",),
        ("evaluation", "ranks"),
        ("optimizer", "machine"),
        ("config",),
        ("config_align",),
        ("config_batch", "config_compression", "config_contrast", "config_encode", "config_learning", "config_pictures", "config_watching"),
    ],
    "data_pipeline": [
        ("prepare",),
        ("filters", "loading", "audit"),
        ("images", "sources", "tokenizer"),
        ("shards",),
        ("config", "sides"),
        ("letters",),
    ],
}
"""The rooms of a package from top to bottom. Each may import those on lower floors, and none beside or above it."""

NO_TORCH = (
    "model/config.py",
    "train/config_batch.py",
    "train/config_compression.py",
    "train/config_contrast.py",
    "train/config_learning.py",
    "train/config_pictures.py",
    "train/config_watching.py",
    "train/engines/zero/compression/fragments.py",
    "model/offsets.py",
    "data_pipeline/config.py",
    "data_pipeline/sides.py",
    "train/config.py",
    "train/launch.py",
    "train/attempt.py",
    "train/run/cluster.py",
    "train/run/elastic.py",
    "train/run/stage_table.py",
    "train/planning/demo_time.py",
    "train/planning/estimate.py",
    "train/verbs/plan.py",
    "train/verbs/watching_commands.py",
    "launcher.py",
)


def sources() -> list[Path]:
    folders = sorted(path for folder in ("model", "data_pipeline", "train", "infra") for path in (ROOT / folder).rglob("*.py"))
    return [*folders, ROOT / "launcher.py"]


def test_folders_import_only_what_they_may() -> None:
    wrong = []
    for path in sources():
        owner = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imported(path):
            top = name.split(".")[0]
            if top in OURS and top not in MAY_IMPORT[owner]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}; {owner} may import {', '.join(sorted(MAY_IMPORT[owner]))}")
    assert not wrong, "\n".join(wrong)


def test_the_model_imports_torch_and_the_standard_library_alone() -> None:
    allowed = {"torch", "model"} | set(sys.stdlib_module_names)
    wrong = [
        f"{path.name}: {name}"
        for path in sources()
        if path.is_relative_to(ROOT / "model")
        for name in imported(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, wrong
    text = "".join(path.read_text() for path in (ROOT / "model").glob("*.py"))
    assert "os.environ" not in text and "torch.distributed" not in text and "open(" not in text


@pytest.mark.parametrize("library", sorted(HOMES))
def test_each_library_has_its_home(library: str) -> None:
    users = {str(path.relative_to(ROOT)) for path in sources() for name in imported(path) if name.split(".")[0] == library}
    users |= {
        str(path.relative_to(ROOT)) for path in sources() for name in imported(path) if library == "tensorboard" and "utils.tensorboard" in name
    }
    strays = [user for user in users if not user.startswith(HOMES[library])]
    assert not strays, f"{library} belongs to {', '.join(HOMES[library]) or 'nobody yet'}; also imported by {', '.join(strays)}"
    assert users or not HOMES[library], f"nobody imports {library} any more: strike it from the table and from requirements.txt"


def test_what_a_dry_run_loads_is_free_of_torch() -> None:
    """Followed through our own modules, whatever they import at the top level."""
    reached, waiting = set(), [ROOT / name for name in NO_TORCH]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for name in imported(path, top_level_only=True):
            assert name.split(".")[0] not in ("torch", "streaming", "deepspeed", "boto3"), f"{path.relative_to(ROOT)} imports {name} at the top level"
            candidate = ROOT / (name.replace(".", "/") + ".py")
            if name.split(".")[0] in OURS and candidate.exists():
                waiting.append(candidate)
    assert ROOT / "infra/run_folder.py" in reached, "the walk must follow imports"


def test_packages_are_docstrings_only() -> None:
    for path in ROOT.rglob("__init__.py"):
        if path.relative_to(ROOT).parts[0] in OURS:
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{path.relative_to(ROOT)} should hold a docstring and nothing else"


def test_weights_are_exported_and_pictures_generated_without_deepspeed() -> None:
    program = "import sys; sys.modules['deepspeed'] = None; import train.verbs.export, train.stages.generate, train.stages.evaluate; print('well')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "well\n", done.stderr


@pytest.mark.parametrize("package", sorted(ORDER))
def test_rooms_import_only_what_lies_below_them(package: str) -> None:
    graph = import_graph.read(package)
    placed = {room for floor in ORDER[package] for room in floor}
    assert graph.rooms == placed, f"{package}: not in ORDER: {sorted(graph.rooms - placed)}; no longer there: {sorted(placed - graph.rooms)}"
    upward = graph.upward(ORDER[package])
    assert not upward, "\n".join(f"{package}/{a} imports {package}/{b}, which does not lie below it (ORDER, in this file)" for a, b in upward)
    assert not graph.cycles()


def test_nothing_imports_the_experiments_and_production_imports_no_benchmark() -> None:
    graph = import_graph.read("train")
    assert not [a for a, b in graph.arrows if b == "experiments"]
    assert {a for a, b in graph.arrows if b == "bench"} <= {"experiments", "verbs"}, "verbs runs them (launcher.py bench), and nobody else may"


def test_production_reads_nothing_in_docs() -> None:
    """Pages are written there by commands of their own; a run on a machine without docs/ works the same."""
    writers = ("train/experiments/", "train/bench/", "train/verbs/docs.py", "train/verbs/demo_page.py", "infra/repository.py")
    readers = [str(path.relative_to(ROOT)) for path in sources() if "infra.repository.DOCS" in imported(path)]
    assert not [reader for reader in readers if not reader.startswith(writers)]
    assert not [str(path) for path in sources() if '/ "docs"' in path.read_text() and path != ROOT / "infra/repository.py"]


def test_the_graph_sees_upward_arrows_and_cycles(tmp_path: Path) -> None:
    for name, text in {"top/a.py": "from train.low import b", "low/b.py": "def f():\n    import train.top.a", "low/c.py": "import train.mid"}.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_text(text)
    (tmp_path / "train/mid.py").write_text("")
    graph = import_graph.read("train", tmp_path)
    assert graph.rooms == {"top", "low", "mid"} and graph.cycles() == [["low", "top"]] and graph.floors() == 2
    assert graph.upward([("top",), ("mid",), ("low",)]) == [("low", "mid"), ("low", "top")]
