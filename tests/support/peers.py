"""Other projects' packages, where they are installed (make bench-peers): tests that need one skip without it."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from train.bench.peer_dalle import find


def peer_file(package: str, name: str) -> ModuleType:
    """One module of a peer's package, from its file alone; the test that asks is skipped where the peer is not installed."""
    folder = find(package)
    if folder is None:
        pytest.skip(f"{package} is not installed (make bench-peers)")
    spec = importlib.util.spec_from_file_location(f"peer_{package}", folder / package / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
