"""An export of a checkpoint goes through a file, not through memory: the same bytes and the same content hash, in bounded memory. About 10 s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import CheckpointError
from infra.world import World
from tests.support.root import ROOT
from train.weights import checkpoint, export, safetensors_file
from train.weights.fragments import even_slice
from train.weights.safetensors_file import Kind

DTYPES = tuple(safetensors_file._NAMES)


def some() -> dict[str, torch.Tensor]:
    """Every dtype, in an order that is neither the file's nor that of names; scalars, nothing, and names that JSON escapes."""
    found = {f"{(7 * place) % 10}.{dtype}": torch.randint(0, 2, (3, place + 1)).to(dtype) for place, dtype in enumerate(DTYPES)}
    return found | {'"quoted"\\\n': torch.rand(2), "größe": torch.rand(()), "empty": torch.zeros(0, 4), "b": torch.rand(5).half()}


def test_a_file_that_is_filled_in_place_is_what_safetensors_writes_byte_for_byte(tmp_path: Path) -> None:
    tensors = some()
    save_file(tensors, tmp_path / "whole")
    mapped = safetensors_file.mapped(tmp_path / "filled", {name: Kind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        mapped[name].copy_(tensor)
    del mapped
    assert (tmp_path / "filled").read_bytes() == (tmp_path / "whole").read_bytes()
    assert load_file(tmp_path / "filled").keys() == tensors.keys()
    save_file({}, tmp_path / "none")
    assert safetensors_file.mapped(tmp_path / "nothing", {}) == {} and (tmp_path / "nothing").read_bytes() == (tmp_path / "none").read_bytes()


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    fragments = {f"model/{name}": even_slice(tensor, 0, 1) for name, tensor in tensors.items()}
    return checkpoint.save(
        str(folder), 1, fragments, {"shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}}, World.single(), keep=1
    )


def test_an_export_of_a_checkpoint_has_the_bytes_and_the_hash_of_one_of_its_tensors(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in some().items() if tensor.numel()}
    url = saved(tmp_path, tensors)
    whole = export.write(str(tmp_path / "whole"), tensors, {"width": 3}, parents={})
    streamed = export.write(str(tmp_path / "streamed"), checkpoint.StoredTensors(url, "model"), {"width": 3}, parents={})
    assert whole == streamed
    for name in (export.WEIGHTS, export.DESCRIPTION):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    url = saved(tmp_path, {"w": torch.rand(100)})
    Path(url, "rank-0.bin").write_bytes(bytes(400))
    with pytest.raises(CheckpointError, match="damaged: the hash of bytes 0 to 400"):
        export.write(str(tmp_path / "out"), checkpoint.StoredTensors(url, "model"), {}, parents={})
    assert not (tmp_path / "out").exists()


_CHILD = """
import json, sys, threading, time
sys.path.insert(0, {root!r})
from train.weights import checkpoint, checkpoint_storage, export
checkpoint_storage.READ_BYTES = 1 << 20
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
seen, done = [], threading.Event()
def watch():
    while not done.wait(0.002):
        seen.append(anonymous())
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
stored = checkpoint.StoredTensors({url!r}, "model")
identity = export.write({out!r}, stored, {{}}, parents={{}})
done.set()
print(json.dumps([identity, max(seen) - before]))
"""


def test_an_export_takes_far_less_memory_than_its_weights(tmp_path: Path) -> None:
    tensors = {f"w{number}": torch.full((4 << 20,), float(number)) for number in range(8)}
    url = saved(tmp_path, tensors)
    child = _CHILD.format(root=str(ROOT), url=url, out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True, timeout=240)
    identity, most = json.loads(done.stdout)
    assert identity == checkpoint.content_hash(tensors)
    print(f"{most / 1e6:.0f} MB of memory")
    assert most < 64e6, f"{most / 1e6:.0f} MB for weights of {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.0f} MB"
