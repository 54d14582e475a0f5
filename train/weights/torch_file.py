"""Reads files that torch wrote, without executing anything in them.

torch writes a zip archive (since 1.6) or a sequence of pickles and raw storages (before); plain ``pickle.dump`` nests the latter inside one pickle. All three
forms are read, as a tree of plain values (train/weights/pickle_tree.py); storages are read when a tensor is asked for.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from infra import files, storage
from infra.errors import DataError
from train.weights.pickle_tree import Call, Name, described, read_tree

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NAMES = frozenset(
    {
        *(f"torch.{name}" for name in _DTYPES),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.storage._load_from_bytes", "torch.device"),
        *("collections.OrderedDict", "__builtin__.set", "builtins.set", "_codecs.encode"),
    }
)
"""What tensors and the dictionaries around them consist of."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError, OSError, struct.error, zipfile.BadZipFile)
"""What reading a damaged file raises; zipfile has a RuntimeError for parts that are encrypted or of a kind that it does not know."""
_MOST_TIMES = 4
"""Tensors may take this many times the bytes of their file, as fp32: bytes become four times as many, and tied weights are there twice."""
_SMALL_READ = 1 << 16


@dataclass(frozen=True)
class _Stored:
    """A torch storage: its dtype, its number of elements, and a function that returns its bytes."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class _Source:
    """A file that is being read."""

    path: str
    allowed: Collection[str]


class _File(io.BufferedReader):
    """A file on a disk of which no more is asked than there is: Python takes the memory of a read before it reads."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """See BufferedReader."""
        return super().read(size if size is None or size <= _SMALL_READ else min(size, max(0, self._size - self.tell())))


class _Budget:
    """Counts what is read of a file: a thousand tensors that share one storage would take a thousand times the memory of their file."""

    def __init__(self, path: str) -> None:
        self.path, self._left = path, _MOST_TIMES * Path(path).stat().st_size

    def take(self, count: int) -> None:
        """
        Raises:
            ValueError: it is used up.
        """
        self._left -= count
        if self._left < 0:
            raise ValueError(f"its tensors share their memory, and would take more than {_MOST_TIMES} times the bytes of the file")


@contextmanager
def open_tree(path: str, names: Collection[str], what: str) -> Iterator[Any]:
    """Inside the block, the tree of a file on a disk, whose tensors ``tensor_of`` reads.

    Args:
        names: names that may occur in the file besides those of tensors and dictionaries, as ``module.name``. They are never imported.
        what: what the file should hold, for messages.

    Raises:
        DataError: the file is missing, damaged, or contains a name that is not allowed; also if the block finds that it is no such thing.
    """
    if storage.is_remote(path):
        raise DataError(f"{path}: published weights are read from a disk; download the file, and name the copy.")
    source = _Source(path, _NAMES | frozenset(names))
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_File(files.regular(Path(path), path)))
            is_zip = file.read(2) == b"PK"
            file.seek(0)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        try:
            yield _zip_tree(stack.enter_context(zipfile.ZipFile(file)), source) if is_zip else _stream_tree(file, source)
        except _DAMAGE as error:
            raise DataError(f"{path}: damaged, or not {what} ({type(error).__name__}: {error}).") from error


def _zip_tree(archive: zipfile.ZipFile, source: _Source) -> Any:
    (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    folder = pickled.removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in archive.infolist()):
        raise ValueError("compressed, which torch never does")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("not little-endian")

    def persistent(identifier: Any) -> Any:
        kind, storage_type, key, _, count = identifier
        stored = _stored(kind, storage_type, key, count, lambda: archive.read(f"{folder}data/{key}"))
        if archive.getinfo(f"{folder}data/{key}").file_size != stored.count * stored.dtype.itemsize:
            raise ValueError(f"storage {key} has another size than its header says")
        return stored

    return read_tree(io.BytesIO(archive.read(pickled)), source.allowed, persistent, source.path)


def _stream_tree(file: IO[bytes], source: _Source) -> Any:
    """Read one plain pickle, or torch's older sequence of pickles that is followed by the storages."""
    first = read_tree(file, source.allowed, _refuse_persistent, source.path)
    if first != _LEGACY_MAGIC:
        return first
    for _ in ("protocol", "system"):
        read_tree(file, source.allowed, _refuse_persistent, source.path)
    storages: dict[str, bytes] = {}
    types: dict[str, _Stored] = {}

    def persistent(identifier: Any) -> Any:
        if identifier[0] == "module":  # a class with its source code, which is not needed
            return identifier[1]
        kind, storage_type, key, _, count, view = identifier
        if view is not None:
            raise ValueError("a view of a storage")
        stored = _stored(kind, storage_type, key, count, lambda: storages[key])
        return types.setdefault(key, stored)

    tree = read_tree(file, source.allowed, persistent, source.path)
    for key in read_tree(file, source.allowed, _refuse_persistent, source.path):
        if not isinstance(key, str):
            raise ValueError(f"{described(key)} where the key of a storage belongs")
        count = int.from_bytes(file.read(8), "little")
        if count != types[key].count:
            raise ValueError(f"storage {key} has another size than its header says")
        storages[key] = file.read(count * types[key].dtype.itemsize)
    return tree


def _refuse_persistent(identifier: Any) -> Any:
    raise ValueError(f"persistent identifier {described(identifier)} in a plain pickle")


def _stored(kind: Any, storage_type: Any, key: Any, count: Any, read: Callable[[], bytes]) -> _Stored:
    is_storage = kind == "storage" and isinstance(storage_type, Name) and storage_type.name in _DTYPES and isinstance(key, str)
    if not is_storage or not isinstance(count, int) or count < 0:
        raise ValueError(f"no storage: {described(kind)}, {described(storage_type)}, {described(key)}, {described(count)}")
    return _Stored(_DTYPES[storage_type.name], count, read)


def pairs(value: Any) -> dict[str, Any]:
    """The entries of a dictionary or of an OrderedDict, which older versions of torch pickled as a list of pairs."""
    if isinstance(value, Call) and str(value.function) == "collections.OrderedDict":
        listed = [(key, item) for key, item in value.arguments[0]] if value.arguments else []
        if not all(isinstance(key, str) for key, _ in listed):
            raise ValueError("an OrderedDict whose keys are no names")
        return dict(listed) | value.items
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where a module or a dictionary belongs")
    return value


def tensors_of(named: Iterable[tuple[str, Any]], path: str) -> dict[str, Tensor]:
    """The tensors that values of the tree stand for, fp32. To be called inside the block of ``open_tree``.

    Raises:
        ValueError: one stands for something else, its storage does not hold it, or they would take far more than the file.
    """
    budget = _Budget(path)
    return {name: _tensor(value, budget) for name, value in named}


def _tensor(value: Any, budget: _Budget) -> Tensor:
    function = str(value.function)
    if function == "torch._utils._rebuild_parameter":
        return _tensor(value.arguments[0], budget)
    if function != "torch._utils._rebuild_tensor_v2":
        raise ValueError(f"'{function}' where a tensor belongs")
    stored, offset, size, stride, *_ = value.arguments
    if isinstance(stored, Call):
        stored = _nested(stored, budget)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    whole = all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)) and math.prod(size) <= stored.count and last < stored.count
    if whole:
        budget.take(max(stored.count * stored.dtype.itemsize, 4 * math.prod(size)))
    data = stored.read() if whole else b""
    if not data or len(data) != stored.count * stored.dtype.itemsize:
        raise ValueError(f"a tensor of shape {tuple(size)} that its storage does not hold")
    flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
    return torch.as_strided(flat, size, stride, offset).to(torch.float32).contiguous()


def _nested(call: Call, budget: _Budget) -> _Stored:
    """Evaluate ``torch.storage._load_from_bytes``: a storage in torch's older format, as bytes inside a plain pickle."""
    if str(call.function) != "torch.storage._load_from_bytes":
        raise ValueError(f"'{call.function}' where a storage belongs")
    (data,) = call.arguments
    if isinstance(data, Call) and str(data.function) == "_codecs.encode":  # protocol 2 writes bytes as latin-1 text
        data = data.arguments[0].encode("latin-1")
    stored = _stream_tree(io.BytesIO(data), _Source(budget.path, _NAMES))
    if not isinstance(stored, _Stored):
        raise ValueError("no storage")
    return stored
