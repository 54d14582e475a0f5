"""What reading and writing shards imports."""

from __future__ import annotations

import subprocess
import sys

from tests.support.root import ROOT


def python(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_shards_are_read_and_written_without_the_data_sets_that_streaming_brings_along() -> None:
    """They import torch's compiler, in every process of every stage."""
    dear = ("transformers", "torchvision", "torch._dynamo", "streaming.text", "streaming.vision")
    script = "import sys; import data_pipeline.loading.loaders, data_pipeline.shards.mosaic; print(*[name for name in {} if name in sys.modules])"
    assert python(script.format(dear)) == []


def test_who_imports_them_afterwards_gets_the_real_ones() -> None:
    script = "import data_pipeline.shards.mosaic; from streaming.vision.base import StreamingVisionDataset as found; print(found.__module__)"
    assert python(script) == ["streaming.vision.base"]
