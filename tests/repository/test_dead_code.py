"""Production code is called by production code: what only tests call stands in tests/support. Benchmarks, experiments and the launcher count as production."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.support.root import ROOT

FOLDERS = ("infra", "model", "data_pipeline", "train")
CALLED_BY_LIBRARIES = {
    "infra/storage.py": {"download_folder"},  # no library: the counterpart of upload_folder, for whoever fetches a set or a run by hand
    "infra/announce.py": {"redirect_request"},  # urllib
    "infra/objects.py": {"readable", "readinto", "seekable", "tell"},  # io.RawIOBase
    "infra/s3.py": {"readable", "readinto"},
    "infra/streamed_upload.py": {"readable", "readinto"},
    "infra/cloud.py": {"readable", "readinto"},
    "data_pipeline/sources/gzipped.py": {"readable", "readinto"},
    "data_pipeline/sources/parquet_pages.py": {"readable"},  # pyarrow
    "data_pipeline/loading/shard_cache.py": {"get_shards", "set_up_local", "get_index_size"},  # streaming.Stream
    "data_pipeline/loading/workers.py": {"is_set"},  # threading.Event, as DataLoader asks it
    "train/drawing/cpu_kernels.py": {"on_start", "on_end"},  # numba's events
    "train/engines/zero/topology.py": {  # DeepSpeed's mpu
        "get_data_parallel_rank",
        "get_data_parallel_world_size",
        "get_model_parallel_group",
        "get_model_parallel_rank",
        "get_model_parallel_world_size",
    },
    "train/weights/pickle_tree.py": {  # not a library: the interpreter looks its methods up by the name of an opcode
        "_global",
        "_stack_global",
        "_build",
        "_memoize",
        "_binpersid",
        "_tuple",
        "_tuple1",
        "_tuple2",
        "_tuple3",
        "_append",
        "_setitem",
        "_setitems",
    },
}
"""Methods that a library calls on objects that we hand to it."""


def unused(sources: dict[str, str]) -> list[str]:
    """Functions and classes of which no file names more than their definition, as 'file: name'. Decorated ones belong to whoever decorates (typer, pydantic)."""
    named: Counter[str] = Counter()
    defined: list[tuple[str, str]] = []
    for file, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            named.update(_names(node))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not _is_somebody_elses(node):
                defined.append((file, node.name))
    return [f"{file}: {name}" for file, name in defined if not named[name] and name not in CALLED_BY_LIBRARIES.get(file, ())]


def _names(node: ast.AST) -> Iterable[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield name
        case _:
            pass


def _is_somebody_elses(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Special methods, and what a decorator registers; properties and the like are ours."""
    words = {ast.unparse(each).split("(")[0].rpartition(".")[2] for each in node.decorator_list}
    return node.name.startswith("__") or bool(
        words - {"property", "cache", "cached_property", "staticmethod", "classmethod", "contextmanager", "dataclass", "no_grad"}
    )


def test_production_calls_every_function_of_production() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))] + [ROOT / "launcher.py"]
    found = unused({str(Path(path).relative_to(ROOT)): path.read_text() for path in paths})
    assert not found, "nothing in production calls these; what tests need belongs in tests/support:\n" + "\n".join(found)


def test_a_function_that_nothing_calls_is_found_and_one_that_is_called_is_not() -> None:
    sources = {
        "a.py": "def used(): ...\ndef alone(): ...\n@app.command\ndef verb(): ...\nclass Held:\n    @property\n    def field(self): ...\n",
        "b.py": "used()\nHeld\n",
    }
    assert unused(sources) == ["a.py: alone", "a.py: field"]
    assert unused({"infra/objects.py": "def tell(): ...\ndef told(): ...\n"}) == ["infra/objects.py: told"]
