"""mosaicml-streaming, and of it only what we use.

Its package also brings data sets of other people and a loader. They import transformers, torchvision and through these torch's compiler, which costs every
process that reads or writes a shard 2.4 of 4.7 seconds of a core, and nothing here uses them. So while it is imported, empty modules stand in their places;
afterwards these are gone, and who imports one of them gets the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_UNUSED = {
    "streaming.multimodal": (),
    "streaming.text": (),
    "streaming.vision": (),
    "transformers": (),
    "transformers.feature_extraction_utils": ("BatchFeature",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
}
"""Modules, and the classes of which streaming's own loader asks whether a batch is one."""


@contextmanager
def _without_unused() -> Iterator[None]:
    if "streaming" in sys.modules or "transformers" in sys.modules:  # somebody has paid for it already
        yield
        return
    for name, classes in _UNUSED.items():
        module = sys.modules[name] = ModuleType(name)
        for each in classes:
            setattr(module, each, type(each, (), {}))
    try:
        yield
    finally:
        for name in _UNUSED:
            del sys.modules[name]


with _without_unused():
    from streaming import MDSWriter, Stream, StreamingDataset
    from streaming.base import dataset
    from streaming.base.dataset import _ShardState as ShardState
    from streaming.base.format.base.reader import FileInfo
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.shared import prefix
    from streaming.base.world import World

__all__ = ["FileInfo", "MDSReader", "MDSWriter", "ShardState", "Stream", "StreamingDataset", "World", "dataset", "prefix"]
