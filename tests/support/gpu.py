"""The device of tests that are marked gpu: CUDA, or the stand-in on which .ci/gpu.py rehearses them."""

import os

import pytest
import torch

DEVICE = os.environ.get("GPU_STAND_IN", "cuda")
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")]
CUDA_ALONE = pytest.mark.skipif(DEVICE != "cuda", reason="the stand-in has no such memory, kernel or queue")
