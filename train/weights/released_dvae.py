"""Reads the weights of the dVAE that OpenAI released (the ``dall-e`` package, docs/paper.md 2.4) from its pickled modules, without executing them.

torch writes modules as a zip archive (since 1.6) or as a sequence of pickles and raw storages (before); plain ``pickle.dump`` nests the latter inside
one pickle. All three forms are read; they may hold modules or state dictionaries. Parameters have the same names in the release and here.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from infra import storage
from infra.errors import ConfigError, DataError
from model.config import DVAEConfig
from train.weights.pickle_tree import Call, Name, read_tree

HALVES = ("encoder", "decoder")
_DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64, "LongStorage": torch.int64}
_MODULES = (
    *("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d"),
    *("torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d"),
    *("torch.nn.modules.upsampling.Upsample", "torch.nn.modules.linear.Identity"),
)
_ALLOWED = frozenset(
    {
        *_MODULES,
        *(f"torch.{name}" for name in _DTYPES),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.storage._load_from_bytes", "torch.device"),
        *("collections.OrderedDict", "__builtin__.set", "builtins.set", "_codecs.encode"),
    }
)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class _Stored:
    """A torch storage: its dtype, its number of elements, and a function that returns its bytes."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Module:
    """One half of the dVAE, encoder or decoder, as read from a file."""

    tensors: dict[str, Tensor]
    """The parameters, by their names in the release, such as ``blocks.group_1.block_1.res_path.conv_1.w``."""
    names: frozenset[str]
    """Names of all submodules; empty if the file holds a state dictionary."""


def read_half(path: str) -> Module:
    """Tensors of a pickled ``Encoder`` or ``Decoder``, fp32. Nothing in the file is executed.

    Raises:
        DataError: the file is missing, damaged, or holds anything that such a module does not.
    """
    if storage.is_remote(path):
        raise DataError(f"{path}: published weights are read from a disk; download the file, and name the copy.")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        tree = _zip_tree(data, path) if data.startswith(b"PK") else _stream_tree(io.BytesIO(data), path)
        names: set[str] = set()
        return Module({name: _tensor(value, path) for name, value in _named(tree, "", names)}, frozenset(names))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged, or not a module of the dall-e package ({type(error).__name__}: {error}).") from error


def join_halves(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the state dictionaries of the released encoder and decoder into one for our dVAE."""
    return {f"{half}.{name}": tensor for half, tensors in zip(HALVES, (encoder, decoder), strict=True) for name, tensor in tensors.items()}


def shape_of(encoder: Module, decoder: Module, cfg: DVAEConfig) -> DVAEConfig:
    """The model configuration of an encoder and a decoder, from the shapes of their tensors. The image size is taken from ``cfg``, and for state dictionaries
    also the kind of pooling and the downsampling, because their tensors do not show them.

    Raises:
        ConfigError: they are not an encoder and a decoder.
    """
    try:
        first, last = encoder.tensors["blocks.input.w"], encoder.tensors["blocks.output.conv.w"]
        codebook, statistics = decoder.tensors["blocks.input.w"], decoder.tensors["blocks.output.conv.w"]
        names = [name.split(".") for name in encoder.tensors]
        groups = len({words[1] for words in names if words[1].startswith("group_")})
        blocks = len({words[2] for words in names if words[1] == "group_1"})
    except (KeyError, IndexError) as error:
        raise ConfigError(f"no pair of encoder and decoder: '{error.args[0]}' is missing; give encoder.pkl first and decoder.pkl second.") from error
    if first.shape[1] != 3 or statistics.shape[0] != 6:
        raise ConfigError(
            f"an encoder takes 3 channels and a decoder gives 6, these take {first.shape[1]} and give {statistics.shape[0]}: "
            f"give encoder.pkl first and decoder.pkl second."
        )
    pools = sum(name.endswith(".pool") for name in encoder.names)
    return DVAEConfig(
        image_size=cfg.image_size,
        downsample=2**pools if pools else cfg.downsample,
        groups=groups,
        blocks_per_group=blocks,
        width=first.shape[0],
        init_width=codebook.shape[0],
        vocab=last.shape[0],
        pool="max" if pools else cfg.pool,
    )


def _zip_tree(data: bytes, path: str) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(data))
    (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    folder = pickled.removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("compressed, which torch never does")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("not little-endian")

    def persistent(identifier: Any) -> Any:
        kind, storage_type, key, _, count = identifier
        stored = _stored(kind, storage_type, count, lambda: archive.read(f"{folder}data/{key}"))
        if archive.getinfo(f"{folder}data/{key}").file_size != stored.count * stored.dtype.itemsize:
            raise ValueError(f"storage {key} has another size than its header says")
        return stored

    return read_tree(io.BytesIO(archive.read(pickled)), _ALLOWED, persistent, path)


def _stream_tree(file: IO[bytes], path: str) -> Any:
    """Read one plain pickle, or torch's older sequence of pickles that is followed by the storages."""
    first = read_tree(file, _ALLOWED, _refuse_persistent, path)
    if first != _LEGACY_MAGIC:
        return first
    for _ in ("protocol", "system"):
        read_tree(file, _ALLOWED, _refuse_persistent, path)
    storages: dict[str, bytes] = {}
    types: dict[str, _Stored] = {}

    def persistent(identifier: Any) -> Any:
        if identifier[0] == "module":  # a class with its source code, which is not needed
            return identifier[1]
        kind, storage_type, key, _, count, view = identifier
        if view is not None:
            raise ValueError("a view of a storage")
        types[key] = _stored(kind, storage_type, count, lambda: storages[key])
        return types[key]

    tree = read_tree(file, _ALLOWED, persistent, path)
    for key in read_tree(file, _ALLOWED, _refuse_persistent, path):
        count = int.from_bytes(file.read(8), "little")
        if count != types[key].count:
            raise ValueError(f"storage {key} has another size than its header says")
        storages[key] = file.read(count * types[key].dtype.itemsize)
    return tree


def _refuse_persistent(identifier: Any) -> Any:
    raise ValueError(f"persistent identifier {identifier!r} in a plain pickle")


def _stored(kind: Any, storage_type: Any, count: Any, read: Callable[[], bytes]) -> _Stored:
    if kind != "storage" or not isinstance(storage_type, Name) or storage_type.name not in _DTYPES or not isinstance(count, int):
        raise ValueError(f"no storage: {kind!r}, {storage_type}")
    return _Stored(_DTYPES[storage_type.name], count, read)


def _named(tree: Any, prefix: str, names: set[str]) -> list[tuple[str, Any]]:
    """The parameters of a module's tree or of a state dictionary, as (name, value). Names of submodules are added to ``names``."""
    if isinstance(tree, Call) and str(tree.function) in _MODULES:
        # The state that BUILD sets: a dictionary of attributes, or from protocol 2 on a pair of that and the slots.
        state = _pairs(tree.state[0] if isinstance(tree.state, tuple) else tree.state)
        found = [(f"{prefix}{name}", value) for name, value in _pairs(state["_parameters"]).items()]
        for name, child in _pairs(state["_modules"]).items():
            names.add(f"{prefix}{name}")
            found += _named(child, f"{prefix}{name}.", names)
        return found
    return [(f"{prefix}{name}", value) for name, value in _pairs(tree).items()]


def _pairs(value: Any) -> dict[str, Any]:
    """The entries of a dictionary or of an OrderedDict, which older versions of torch pickled as a list of pairs."""
    if isinstance(value, Call) and str(value.function) == "collections.OrderedDict":
        return {key: item for key, item in value.arguments[0]} | value.items if value.arguments else value.items
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where a module or a dictionary belongs")
    return value


def _tensor(value: Any, path: str) -> Tensor:
    function = str(value.function)
    if function == "torch._utils._rebuild_parameter":
        return _tensor(value.arguments[0], path)
    if function != "torch._utils._rebuild_tensor_v2":
        raise ValueError(f"'{function}' where a tensor belongs")
    stored, offset, size, stride, *_ = value.arguments
    if isinstance(stored, Call):
        stored = _nested(stored, path)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    whole = all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)) and math.prod(size) <= stored.count and last < stored.count
    data = stored.read() if whole else b""
    if not data or len(data) != stored.count * stored.dtype.itemsize:
        raise ValueError(f"a tensor of shape {tuple(size)} that its storage does not hold")
    flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
    return torch.as_strided(flat, size, stride, offset).to(torch.float32).contiguous()


def _nested(call: Call, path: str) -> _Stored:
    """Evaluate ``torch.storage._load_from_bytes``: a storage in torch's older format, as bytes inside a plain pickle."""
    if str(call.function) != "torch.storage._load_from_bytes":
        raise ValueError(f"'{call.function}' where a storage belongs")
    (data,) = call.arguments
    if isinstance(data, Call) and str(data.function) == "_codecs.encode":  # protocol 2 writes bytes as latin-1 text
        data = data.arguments[0].encode("latin-1")
    stored = _stream_tree(io.BytesIO(data), path)
    if not isinstance(stored, _Stored):
        raise ValueError("no storage")
    return stored
