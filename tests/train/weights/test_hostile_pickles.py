"""Small files of weights that would take hours or gigabytes to read are refused at once, and weights of odd shapes in a sentence. About 3 s."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infra.errors import DataError
from model.config import DVAEConfig
from tests.support.published_vqgans import NARROW, Published
from train.verbs import import_dvae
from train.weights.released_dvae import read_half
from train.weights.vqgan_files import read_vqgan

DOUBLED = b")q\x00" + b"".join(b"h" + bytes([number]) + b"\x86q" + bytes([number + 1]) for number in range(60))
"""A tuple that holds another one twice, which holds another one twice, and so on: in all 2**60, in 300 bytes. Its hash and its repr never end."""


def legacy(count: int) -> bytes:
    """A file in torch's older format with a storage of ``count`` numbers, and none of them."""
    values: tuple[Any, ...] = (0x1950A86A20F9469CFC6C, 1001, {})
    head = b"".join(pickle.dumps(value, protocol=2) for value in values)
    number = b"\x8a\x09" + count.to_bytes(9, "little")
    identifier = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0kX\x03\0\0\0cpu" + number + b"NtQ."
    return head + b"\x80\x02" + identifier + pickle.dumps(["k"], protocol=2) + struct.pack("<Q", count)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"}" + DOUBLED + b"Ns", "a tuple as the key of a dictionary"),
        (b"}(" + DOUBLED + b"Nu", "a tuple as the key of a dictionary"),
        (DOUBLED + b"Q", "persistent identifier a tuple in a plain pickle"),
        (DOUBLED + b"}b", "sets attributes of a tuple"),
        (b"}(X\x01\0\0\0a" + DOUBLED + b")Ru", "a call of a tuple"),
        (b"X\x01\0\0\0a" + DOUBLED + b"\x93", "'a' and a tuple where a name belongs"),
        (b"ccollections\nOrderedDict\n]" + DOUBLED + b"N\x86a\x85R", "an OrderedDict whose keys are no names"),
        (b"\x8d" + struct.pack("<Q", 1 << 45) + b"x", "expected 35184372088832 bytes"),
        (b"\x8e" + struct.pack("<Q", 1 << 62) + b"x", "expected 4611686018427387904 bytes"),
    ],
)
def test_a_pickle_of_a_few_bytes_that_would_take_for_ever_is_refused_at_once(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04" + data + b".")
    with pytest.raises(DataError, match=message):
        read_vqgan(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("count", [1 << 40, 1 << 62])
def test_a_storage_of_more_bytes_than_the_file_takes_no_memory(count: int, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(legacy(count))
    with pytest.raises(DataError, match="damaged, or not a VQGAN's checkpoint"):
        read_vqgan(str(tmp_path / "x.ckpt"))


def test_many_tensors_of_one_storage_are_refused_before_they_take_its_size_so_many_times(tmp_path: Path) -> None:
    one = torch.zeros(1 << 18)
    torch.save({"state_dict": {f"a{number}": one.view(-1) for number in range(1000)}}, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 2 << 20
    with pytest.raises(DataError, match="its tensors share their memory, and would take more than 4 times the bytes of the file"):
        read_vqgan(str(tmp_path / "x.ckpt"))
    torch.save({"a": one, "b": one, "c": one.view(512, 512)}, tmp_path / "tied.ckpt")
    assert read_vqgan(str(tmp_path / "tied.ckpt")).tensors.keys() == {"a", "b", "c"}, "tied weights are no attack"


def test_modules_that_hold_the_next_one_twice_are_refused(tmp_path: Path) -> None:
    module: Any = collections.OrderedDict()
    for _ in range(40):
        module = Module({"_parameters": {}, "_modules": {"a": module, "b": module}})
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(module)
    (tmp_path / "x.pkl").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="more than 10000 modules inside of each other"):
        read_half(str(tmp_path / "x.pkl"))


class Module:
    """Pickled, a module of the dall-e package."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


class Pickler(pickle._Pickler):
    """Writes ``Module`` as a class that need not be there."""

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        known = self.memo.get(id(value)) if isinstance(value, Module) else None  # type: ignore[attr-defined]
        if not isinstance(value, Module) or known is not None:
            super().save(value, save_persistent_id)  # type: ignore[misc]
            return
        self.write(b"cdall_e.utils\nConv2d\n)\x81")  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]
        self.save(value.state)
        self.write(b"b")  # type: ignore[attr-defined]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.ckpt")
    with pytest.raises(DataError, match="not a regular file"):
        read_vqgan(str(tmp_path / "x.ckpt"))


WHOLE = {
    "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3),
    "encoder.conv_out.weight": torch.zeros(8, 32, 3, 3),
    "encoder.down.0.block.0.conv2.weight": torch.zeros(32, 32, 3, 3),
    "quantize.embedding.weight": torch.zeros(64, 8),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder.conv_in.weight": torch.zeros(5)}, r"'encoder\.conv_in\.weight' has the shape \[5\], where 4 sizes belong"),
        ({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, "after 0: accepted"),
        ({"encoder.conv_out.weight": torch.zeros(())}, r"'encoder\.conv_out\.weight' has the shape \[\], where 4"),
        ({"encoder.down.0.block.0.conv2.weight": torch.zeros(())}, r"conv2\.weight' has the shape \[\], where 4"),
        ({"quantize.embedding.weight": torch.zeros(4, 4, 4)}, r"'quantize\.embedding\.weight' has the shape \[4, 4, 4\], where 2"),
        ({f"encoder.down.{'9' * 5000}.block.0.x": torch.zeros(1)}, "of a shape that is not supported"),
        ({"quantize.embedding.weight": torch.zeros(64, 8, dtype=torch.int64)}, "holds numbers of the kind int64: accepted are float32"),
    ],
)
def test_tensors_of_odd_shapes_and_kinds_are_refused_by_name(changed: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(WHOLE | changed, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=message):
        import_dvae.read_published(str(tmp_path / "x.safetensors"), DVAEConfig(image_size=32))


def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    published = Published(NARROW)
    shape = read_vqgan(published.write(tmp_path / "x.ckpt")).shape(DVAEConfig(image_size=32))
    published.tensors["decoder.conv_in.bias"][0] = float("nan")
    with pytest.raises(DataError, match=r"'decoder\.conv_in\.bias' holds numbers that are not finite"):
        import_dvae.read_published(published.write(tmp_path / "x.ckpt"), shape)
