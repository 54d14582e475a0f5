"""Our networks on CUDA without CUDA (tests/support/fake_cuda.py): nothing on the CPU meets what is on the GPU, and the host waits where a line says so, or not
at all. About 10 s."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.attention_engines import EngineName, make_engine
from model.clip import Clip
from model.config import ClipConfig, DVAEConfig, StreamShape, TransformerConfig
from model.decoder import DrawingWeights
from model.dvae import DVAE, loss
from model.flex import FlexAttention
from model.relaxation import GumbelNoise
from model.sampling import Rule, begin, sample
from model.tokenizer_kinds import image_tokenizer
from model.transformer import Transformer
from tests.support.fake_cuda import HostWait, fake_cuda, flex, is_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests marked gpu ask it itself")
CUDA = torch.device("cuda")
SHAPE = StreamShape(text_tokens=8, text_vocab=50, grid=4, image_vocab=30)
CFG = TransformerConfig(layers=3, width=64, heads=4, conv_kernel=3)
WITH_OPTIONS = TransformerConfig(layers=3, width=64, heads=4, conv_kernel=3, qk_norm=True, rotary_positions=True, base_width=32)
DVAE_CFG = DVAEConfig(image_size=16, downsample=4, groups=2, blocks_per_group=1, width=16, init_width=8, vocab=32)

VQGANS = [
    DVAEConfig(
        kind="vqgan", image_size=16, downsample=4, groups=3, blocks_per_group=1, width=32, init_width=8, vocab=32,
        factors=(1, 1, 1), attention=(2,), latent=8, codebook=codebook,
    )
    for codebook in ("nearest", "cosine", "gumbel")
]  # fmt: skip


def transformer(
    engine: EngineName = "dense",
    every: int = 0,
    dtype: torch.dtype = torch.float16,
    logits_dtype: torch.dtype = torch.float32,
    cfg: TransformerConfig = CFG,
    shape: StreamShape = SHAPE,
) -> Transformer:
    attend: Any = FlexAttention(cfg, shape, compiled=False, kernel=flex) if engine == "flex" else make_engine(engine, cfg, shape, CUDA)
    with CUDA:
        return Transformer(cfg, shape, branch_dtype=dtype, attend=attend.to(CUDA), checkpoint_every=every, logits_dtype=logits_dtype)


def tokens(count: int = 3) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(size, dtype=torch.int64, device="cuda") for size in ((count, 8), (count,), (count, 16)))


@pytest.mark.parametrize(
    ("engine", "every", "logits_dtype", "cfg"),
    [
        ("dense", 0, torch.float32, CFG),
        ("dense", 0, torch.bfloat16, WITH_OPTIONS),
        ("structured", 1, torch.float32, WITH_OPTIONS),
        ("flex", 1, torch.bfloat16, CFG),
        ("flex", 1, torch.bfloat16, WITH_OPTIONS),
    ],
)
def test_a_step_of_the_transformer_waits_for_nothing(engine: EngineName, every: int, logits_dtype: torch.dtype, cfg: TransformerConfig) -> None:
    """With the two gradient points, whose scales are tensors, and with recomputation, whose second forward pass runs inside the backward one."""
    with fake_cuda() as watch:
        with watch.setting_up():
            model, inputs = transformer(engine, every, logits_dtype=logits_dtype, cfg=cfg), tokens()
            scales = torch.ones(6, device="cuda")
            for scale, block in zip(scales, model.resblocks, strict=True):
                block.gradient_scale, block.filter_gradients = scale, True  # type: ignore[assignment]
        text_nll_BT, image_nll_BI = model(*inputs)
        (text_nll_BT.mean() + image_nll_BI.mean()).backward()
        assert is_cuda([p.grad for p in model.parameters()]) and all(p.grad is not None for p in model.parameters())
        assert not watch.waits


def test_a_step_of_the_dvae_and_encoding_wait_for_nothing() -> None:
    with fake_cuda() as watch:
        with watch.setting_up():
            model = DVAE(DVAE_CFG, torch.bfloat16).to("cuda")
            pixels_B3YX = torch.zeros(2, 3, 16, 16, device="cuda")
        for recompute in (False, True):
            if recompute:
                model.recompute_blocks()
            terms = model(pixels_B3YX, GumbelNoise([1, 2], "cuda"), 0.5)
            loss(terms.nll_B, terms.kl_B, 6.6, 4).backward()
            assert is_cuda([p.grad for p in model.parameters()])
        assert model.encode(pixels_B3YX).is_cuda and model(pixels_B3YX, None).nll_B.is_cuda
        assert not watch.waits


@pytest.mark.parametrize("cfg", [DVAE_CFG, *VQGANS], ids=["dvae", "nearest", "cosine", "gumbel"])
def test_encoding_waits_for_nothing_and_decoding_reads_the_range_of_its_codes_alone(cfg: DVAEConfig) -> None:
    with fake_cuda("model/image_tokenizer.py") as watch:
        with watch.setting_up():
            model = image_tokenizer(cfg, torch.bfloat16).to("cuda")
            pixels_B3YX = torch.zeros(2, 3, 16, 16, device="cuda")
        assert model.encode(pixels_B3YX).is_cuda and not watch.waits
        assert model.decode(torch.zeros(2, 4, 4, dtype=torch.int64, device="cuda")).is_cuda
        assert 1 <= len(watch.waits) <= 2


def test_a_step_of_clip_waits_for_nothing() -> None:
    with fake_cuda() as watch:
        with watch.setting_up():
            model = Clip(ClipConfig(layers=2, width=32, heads=2, embed=16, patch=8), 16, 8, 50).to("cuda")
        image_BE = model.encode_image(torch.zeros(3, 3, 16, 16, device="cuda"))
        text_BE = model.encode_text(*tokens()[:2])
        torch.nn.functional.cross_entropy(model.scale * image_BE @ text_BE.T, torch.arange(3, device="cuda")).backward()
        model.limit_scale()
        assert is_cuda([p.grad for p in model.parameters()]) and not watch.waits


@pytest.mark.parametrize(("rule", "cfg"), [(Rule(), CFG), (Rule(guidance=2.0, top_k=5, top_p=0.9), WITH_OPTIONS)])
def test_drawing_waits_once_for_each_code_to_see_whether_it_is_a_number(rule: Rule, cfg: TransformerConfig) -> None:
    with fake_cuda("model/sampling.py") as watch:
        with watch.setting_up(), torch.no_grad():
            weights = DrawingWeights(transformer(cfg=cfg))
            text_CT, lengths_C, _ = tokens(2)
        passes: list[int] = []

        def heard(codes_BI: torch.Tensor, known_B: torch.Tensor) -> None:
            passes.append(len(watch.waits))

        drawn = sample(
            weights, text_CT, lengths_C, [1, 2, 3, 4], rule, prefix_BP=torch.zeros(4, 5, dtype=torch.int64, device="cuda"), after_pass=heard
        )
    assert drawn.codes_BI.is_cuda and drawn.passes == 11 == len(passes)
    assert [after - before for before, after in itertools.pairwise(passes)] == [1] * 10


@pytest.mark.parametrize(("rule", "cfg"), [(Rule(), CFG), (Rule(guidance=2.0, top_k=5, top_p=0.9), WITH_OPTIONS)], ids=["plain", "options"])
@pytest.mark.parametrize("window", [1, 3])
def test_passes_of_long_drawings_are_recorded_as_a_graph_and_those_of_one_position_wait_once_for_each_row(
    rule: Rule, cfg: TransformerConfig, window: int
) -> None:
    """What is recorded may not wait at all."""
    with fake_cuda("model/sampling.py") as watch:
        with watch.setting_up(), torch.no_grad():
            weights = DrawingWeights(transformer(cfg=cfg, shape=StreamShape(text_tokens=8, text_vocab=50, grid=14, image_vocab=30)))
            text_CT, lengths_C, _ = tokens(2)
            drawing = begin(weights, text_CT, lengths_C, [1, 2, 3, 4], rule, window=window)
        waits, replays = [], []
        with torch.no_grad():
            for _ in range(3 * 14):
                before = len(watch.waits)
                drawing.step()
                waits.append(len(watch.waits) - before)
                replays.append(watch.replays)
        assert replays == [0, 0, *range(1, 41)]  # the first ones load kernels
        if window == 1:
            assert waits == [1, 1] + [int(step % 14 == 0) for step in range(3, 43)]
        else:
            assert waits == [2] * 42  # how far it came, and whether what it drew are numbers


@pytest.mark.parametrize("cfg", [CFG, WITH_OPTIONS], ids=["plain", "options"])
def test_drawing_in_windows_waits_twice_for_each_pass_once_for_how_far_it_came(cfg: TransformerConfig) -> None:
    with fake_cuda("model/sampling.py") as watch:
        with watch.setting_up(), torch.no_grad():
            weights = DrawingWeights(transformer(cfg=cfg))
            text_CT, lengths_C, _ = tokens(2)
        passes: list[int] = []

        class EnoughError(Exception):
            pass

        def heard(codes_BI: torch.Tensor, known_B: torch.Tensor) -> None:
            assert is_cuda((codes_BI, known_B))
            passes.append(len(watch.waits))
            if len(passes) == 3:
                raise EnoughError  # values are none here: it would never come further

        with pytest.raises(EnoughError):
            sample(weights, text_CT, lengths_C, [1, 2], window=4, after_pass=heard)
    assert [after - before for before, after in itertools.pairwise(passes)] == [2, 2]


def planted(found: Callable[[torch.Tensor], object]) -> str:
    """What is said of a line that does something to states on the GPU."""
    with fake_cuda(), pytest.raises((HostWait, RuntimeError)) as raised:
        found(torch.zeros(4, 4, device="cuda"))
    return str(raised.value)


PLANTED: dict[str, Callable[[torch.Tensor], object]] = {
    "an item": lambda x: x.sum().item(),
    "a number": lambda x: float(x[0, 0]),
    "a bool": lambda x: 1 if x.isfinite().all() else 0,
    "a copy": lambda x: x.cpu(),
    "a list": lambda x: x.tolist(),
    "a mask": lambda x: x[x > 0],
    "an index": lambda x: x[x.long()[0, 0]],
    "an index of the CPU": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "places": lambda x: x.nonzero(),
    "a tensor of numbers": lambda x: torch.tensor([1.0], device="cuda") + x,
    "a synchronisation": lambda x: torch.cuda.synchronize(),
    "a comparison": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_hidden_wait_is_an_error_with_its_line(name: str) -> None:
    line = PLANTED[name].__code__.co_firstlineno
    assert planted(PLANTED[name]).startswith(f"tests/model/test_fake_cuda.py:{line}: ") and "waits for the GPU" in planted(PLANTED[name])


def test_a_mask_on_the_cpu_is_an_error() -> None:
    for found in (lambda x: x.masked_fill(torch.ones(4, 4, dtype=torch.bool), 0.0), lambda x: x + torch.zeros(4), lambda x: x @ torch.zeros(4, 4)):
        assert re.search("cuda:0(, | and )cpu", planted(found))


def test_what_does_not_wait_is_none() -> None:
    with fake_cuda() as watch:
        x = torch.zeros(4, 4, device="cuda")
        host = torch.empty(4, 4, pin_memory=True)
        host.copy_(x, non_blocking=True)
        x[x > 0] = 1.0
        torch.full((), 2.0, device="cuda") + torch.tensor(1.0)
        torch.tensor([1.0, 2.0]).to("cuda", non_blocking=True)
        assert not watch.waits and not host.is_cuda


@pytest.mark.parametrize("window", [1, 2])
def test_going_on_from_other_pictures_waits_for_nothing(window: int) -> None:
    with fake_cuda("model/sampling.py") as watch:
        with watch.setting_up(), torch.no_grad():
            text_CT, lengths_C, _ = tokens(1)
            run = begin(DrawingWeights(transformer()), text_CT, lengths_C, [1, 2, 3], Rule(guidance=2.0), window=window)
            index_B = torch.tensor([0, 0, 1], device="cuda")
        with torch.no_grad():
            run.step()  # not run_to: values are none here, and a window would never come further
            before = len(watch.waits)
            run.select(index_B, [4, 5, 6])
            assert len(watch.waits) == before and run.codes_BI.is_cuda and run.seeds_B.is_cuda
            run.step()
