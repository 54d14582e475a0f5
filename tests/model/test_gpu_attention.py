"""What the attention engines must show on a GPU (``make gpu``): exact forward and backward, no scores in memory, no fall-back. Not yet seen there.

The most valuable first: a GPU that is borrowed may be gone before the last.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from model.attention import DenseAttention
from model.attention_engines import EngineName, make_engine, why_unavailable
from model.config import StreamShape, TransformerConfig
from model.flex import FlexAttention
from model.masks import KINDS, Kind
from model.transformer import Transformer
from tests.support.gpu import CUDA_ALONE, DEVICE, NEEDS_GPU

pytestmark = NEEDS_GPU


def skip_where_it_cannot_train(engine: EngineName) -> None:
    """FlexAttention on a stand-in: it has no backward pass there."""
    reason = why_unavailable(engine, torch.device(DEVICE), TransformerConfig(layers=1, width=128, heads=2))
    if reason is not None and DEVICE != "cuda":
        pytest.skip(reason)


LARGE = (256, 32, 11)
OTHERS = [(5, 4, 3), (16, 8, 5), (256, 16, 11)]
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-2}


@cache
def exact(size: tuple[int, int, int], kind: Kind) -> list[torch.Tensor]:
    """q, k and v, what comes from above, and the output and gradients of the dense engine in fp64 on the CPU: once for all engines and dtypes."""
    cfg, shape = sizes(size)
    g = torch.Generator().manual_seed(0)
    qkv_3BHSK, above_BHSK = torch.randn(3, 2, 2, shape.states, 64, generator=g), torch.randn(2, 2, shape.states, 64, generator=g)
    leaf = qkv_3BHSK.double().requires_grad_()  # a copy
    out = DenseAttention(cfg, shape)(*leaf, kind)
    out.backward(above_BHSK.double())
    return [qkv_3BHSK, above_BHSK, out.detach(), leaf.grad]


def sizes(size: tuple[int, int, int]) -> tuple[TransformerConfig, StreamShape]:
    text_tokens, grid, kernel = size
    shape = StreamShape(text_tokens=text_tokens, text_vocab=9, grid=grid, image_vocab=9)
    return TransformerConfig(layers=5, width=128, heads=2, conv_kernel=kernel), shape


def judge(engine: EngineName, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """On a GPU each kind is compiled forward and backward, in seconds."""
    skip_where_it_cannot_train(engine)
    cfg, shape = sizes(size)
    attend = make_engine(engine, cfg, shape, torch.device(DEVICE)).to(DEVICE)
    for kind in KINDS:
        qkv_3BHSK, above_BHSK, *wanted = exact(size, kind)
        leaf = qkv_3BHSK.to(DEVICE, dtype, copy=True).requires_grad_()
        out = attend(*leaf, kind)
        out.backward(above_BHSK.to(out))
        for expected, found in zip(wanted, (out.detach(), leaf.grad), strict=True):
            error = (found.cpu().double() - expected).norm() / expected.norm()
            assert float(error) < TOLERANCES[dtype], (kind, engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ["flex", "dense", "structured"])
def test_engines_equal_the_exact_product_at_the_size_of_large_models(engine: EngineName, dtype: torch.dtype) -> None:
    judge(engine, LARGE, dtype)


def test_the_whole_model_on_flex_gives_the_losses_and_gradients_of_the_dense_one() -> None:
    shape = StreamShape(text_tokens=8, text_vocab=50, grid=8, image_vocab=30)
    cfg = TransformerConfig(layers=5, width=64, heads=4, conv_kernel=3)
    inputs = [t.to(DEVICE) for t in (torch.randint(50, (3, 8)), torch.tensor([0, 5, 8]), torch.randint(30, (3, 64)))]
    results = []
    for engine in ("dense", "flex" if DEVICE == "cuda" else "structured"):
        torch.manual_seed(0)
        model = Transformer(cfg, shape, attend=make_engine(engine, cfg, shape, torch.device(DEVICE)), checkpoint_every=2).to(DEVICE)  # type: ignore[arg-type]
        text_nll_BT, image_nll_BI = model(*inputs)
        (text_nll_BT.sum() + image_nll_BI.sum()).backward()
        results.append({"text": text_nll_BT.detach(), "image": image_nll_BI.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=2e-2, atol=2e-3, msg=name)


@CUDA_ALONE
@pytest.mark.parametrize("engine", ["flex", "dense"])
def test_scores_never_reach_global_memory(engine: EngineName) -> None:
    """Peak of forward and backward stays below the bytes that the scores of all heads would take."""
    shape, cfg = StreamShape(text_tokens=256, text_vocab=9, grid=32, image_vocab=9), TransformerConfig(layers=5, width=2048, heads=32)
    attend = make_engine(engine, cfg, shape, torch.device(DEVICE)).to(DEVICE)
    for kind in KINDS:
        q, k, v = (torch.randn(4, 32, shape.states, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        attend(q, k, v, kind).sum().backward()  # compiles
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        attend(q, k, v, kind).sum().backward()
        assert torch.cuda.max_memory_allocated() - before < 2 * 4 * 32 * shape.states**2


@CUDA_ALONE
def test_recompilation_does_not_fall_back_to_scores_in_memory() -> None:
    """Training, evaluation and several batch sizes in one process, in each kind of layer."""
    shape, cfg = StreamShape(text_tokens=16, text_vocab=9, grid=16, image_vocab=9), TransformerConfig(layers=5, width=128, heads=2)
    flex = FlexAttention(cfg, shape).to(DEVICE)
    for batch in (1, 2, 3, 8):
        for trains in (True, False):
            for kind in KINDS:
                q = torch.randn(batch, 2, shape.states, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=trains)
                with torch.set_grad_enabled(trains):
                    assert flex(q, q, q, kind).isfinite().all()


@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype in TOLERANCES for size in OTHERS] + [(torch.float32, LARGE)], ids=str)
@pytest.mark.parametrize("engine", ["dense", "structured", "flex"])
def test_other_sizes_and_dtypes_equal_it_as_well(engine: EngineName, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """A step of its own: 30 kernels of FlexAttention, forward and backward, are minutes of compilation, so what compiles nothing comes first."""
    judge(engine, size, dtype)
