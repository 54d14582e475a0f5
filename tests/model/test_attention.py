"""Every attention engine computes what the dense one does, reads what its mask allows and nothing else, and is chosen by measurement."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import pytest
import torch
from torch import Tensor, nn

from infra.errors import ConfigError
from model import attention_engines
from model.attention import DenseAttention, StructuredAttention
from model.attention_engines import ENGINES, EngineName, make_engine, why_unavailable
from model.config import StreamShape, TransformerConfig
from model.flex import FlexAttention
from model.masks import KINDS, Kind, dense_mask
from train.config import PRESETS, load_run
from train.machine import attention_choice, attention_times
from train.machine.attention_choice import choose, read_records
from train.machine.attention_times import AttentionPoint
from train.machine.rates import Figure, Options

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CFG = TransformerConfig(layers=4, width=32, heads=2, conv_kernel=3)
SHAPE = StreamShape(text_tokens=5, text_vocab=9, grid=4, image_vocab=9)
PATTERN = "2 row 1 column 1 conv"
SIZES = [(5, 4, 3), (1, 2, 3), (9, 6, 7), (16, 8, 5), (3, 3, 11)]


def sizes(text_tokens: int, grid: int, kernel: int, rule: Literal["figure", "causal"]) -> tuple[TransformerConfig, StreamShape]:
    shape = StreamShape(text_tokens=text_tokens, text_vocab=9, grid=grid, image_vocab=9)
    return TransformerConfig(layers=4, width=16, heads=2, conv_kernel=kernel, conv_offsets=rule), shape


def uncompiled(cfg: TransformerConfig, shape: StreamShape) -> FlexAttention:
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return FlexAttention(cfg, shape, block=16, compiled=False)


@pytest.mark.parametrize(("text_tokens", "grid", "kernel"), SIZES)
@pytest.mark.parametrize("rule", ["figure", "causal"])
def test_structured_attention_equals_dense_forward_and_backward(text_tokens: int, grid: int, kernel: int, rule: Literal["figure", "causal"]) -> None:
    cfg, shape = sizes(text_tokens, grid, kernel, rule)
    torch.manual_seed(0)
    for kind in KINDS:
        results = []
        qkv = torch.randn(3, 2, 2, shape.states, 8) * 2
        weights = torch.randn(2, 2, shape.states, 8)
        for engine in (DenseAttention(cfg, shape), StructuredAttention(cfg, shape)):
            inputs = qkv.clone().requires_grad_()
            out = engine(*inputs, kind)
            (out * weights).sum().backward()
            results.append((out, inputs.grad))
        torch.testing.assert_close(results[0], results[1], msg=kind, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("text_tokens", "grid", "kernel"), SIZES)
@pytest.mark.parametrize("rule", ["figure", "causal"])
def test_flex_attention_equals_dense_forward(text_tokens: int, grid: int, kernel: int, rule: Literal["figure", "causal"]) -> None:
    """Its own reference, uncompiled: FlexAttention has no backward pass on a CPU (test_gpu.py has the rest; test_masks.py its block masks)."""
    cfg, shape = sizes(text_tokens, grid, kernel, rule)
    dense, flex = DenseAttention(cfg, shape), uncompiled(cfg, shape)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, shape.states, 16) * 2
    for kind in KINDS:
        with torch.no_grad():
            torch.testing.assert_close(flex(q, k, v, kind), dense(q, k, v, kind), msg=kind, rtol=1e-4, atol=1e-5)


def test_kinds_dtypes_and_batches_together_may_be_compiled_more_often_than_torch_allows_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times. fullgraph makes a ninth an error, which an evaluation with another batch reached."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traces and guards as always, and compiles nothing
    cfg, shape = sizes(5, 4, 3, "figure")
    flex = FlexAttention(cfg, shape, block=16)
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (2, 3):
            q, k, v = torch.randn(3, batch, 2, shape.states, 16, dtype=dtype)
            for kind in KINDS:
                with torch.no_grad():
                    assert flex(q, k, v, kind).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_engines_agree_in_half_precision_to_its_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, SHAPE.states, 16)
    for kind in KINDS:
        wanted = DenseAttention(CFG, SHAPE)(q, k, v, kind)
        for engine in (DenseAttention(CFG, SHAPE), StructuredAttention(CFG, SHAPE)):
            found = engine(q.to(dtype), k.to(dtype), v.to(dtype), kind)
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), wanted, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("engine", ["dense", "structured"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_depend_on_exactly_the_keys_and_values_that_the_mask_allows(engine: EngineName, kind: Kind) -> None:
    """By gradients: exactly zero outside the mask, and not zero inside."""
    attend = make_engine(engine, CFG, SHAPE, CPU)
    torch.manual_seed(0)
    qkv_3SK = torch.randn(3, SHAPE.states, 8)

    def run(k_SK: Tensor, v_SK: Tensor) -> Tensor:
        return cast(Tensor, attend(*(t[None, None] for t in (qkv_3SK[0], k_SK, v_SK)), kind))[0, 0]

    by_key, by_value = torch.autograd.functional.jacobian(run, (qkv_3SK[1], qkv_3SK[2]))
    mask_SS = dense_mask(kind, SHAPE, CFG)
    assert (by_value.abs().sum((1, 3)) > 0).equal(mask_SS)
    # The first state sees itself alone, so that its key does not matter.
    sees_others_SS = mask_SS & (mask_SS.sum(1) > 1)[:, None]
    assert (by_key.abs().sum((1, 3)) > 0).equal(sees_others_SS)


def test_an_engine_is_made_by_name_and_says_why_it_cannot_be() -> None:
    assert isinstance(make_engine("dense", CFG, SHAPE, CPU), DenseAttention)
    assert isinstance(make_engine("structured", CFG, SHAPE, CPU), StructuredAttention)
    with pytest.raises(ValueError, match="attention engine 'sparse': accepted are dense, flex, structured"):
        make_engine(cast(EngineName, "sparse"), CFG, SHAPE, CPU)
    with pytest.raises(
        ValueError, match=r"attention = 'flex': FlexAttention has no backward pass on device type 'cpu'.*accepted here: dense, structured"
    ):
        make_engine("flex", CFG, SHAPE, CPU)


def test_flex_is_refused_on_cuda_without_its_compiler_or_with_narrow_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_engines.importlib.util, "find_spec", lambda name: object())
    assert why_unavailable("flex", CUDA, CFG) is None
    assert isinstance(make_engine("flex", CFG, SHAPE, CUDA), nn.Module)
    assert why_unavailable("flex", CUDA, replace(CFG, heads=4)) == "FlexAttention needs heads of at least 16, and width / heads is 8"
    monkeypatch.setattr(attention_engines.importlib.util, "find_spec", lambda name: None)
    assert why_unavailable("flex", CUDA, CFG) == "FlexAttention is compiled by triton, which is not installed"


def test_a_wanted_engine_that_cannot_run_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"dalle\.attention = flex: FlexAttention has no backward pass.*Use dalle\.attention=auto"):
        choose(replace(CFG, attention="flex"), SHAPE, CPU, torch.float32)
    assert choose(replace(CFG, attention="dense"), SHAPE, CPU, torch.float32) == "dense"


def test_an_unknown_engine_is_refused_by_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"dalle\.attention: Input should be 'auto', 'dense', 'flex' or 'structured'; given: 'sparse'"):
        load_run("tiny", ["dalle.attention=sparse"])


def record(folder: Path, name: str, device: str, kind: str, figures: dict[str, float]) -> None:
    measured = {name: {"value": 50 - value, "min": value, "max": 90.0, "unit": "ms", "runs": 3} for name, value in figures.items()}
    (folder / f"model-{name}.json").write_text(json.dumps({"device": {"kind": kind, "name": device}, "measured": measured}))


def point(engine: EngineName, dtype: str, text: int, grid: int) -> str:
    return str(AttentionPoint(engine, dtype, text, grid, 16, PATTERN))


def test_auto_takes_the_fastest_of_the_nearest_measurement_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_choice, "describe_device", lambda kind: {"name": "this one"})
    figures = {
        point("dense", "fp32", 5, 4): 1.0,
        point("structured", "fp32", 5, 4): 2.0,
        point("dense", "bf16", 5, 4): 4.0,
        point("structured", "bf16", 5, 4): 3.0,
        point("dense", "fp32", 256, 32): 9.0,
        point("structured", "fp32", 256, 32): 5.0,
        "training step bf16": 0.1,
    }
    record(tmp_path, "a", "this one", "cpu", figures)
    record(tmp_path, "b", "another", "cpu", {point("structured", "fp32", 5, 4): 0.5, point("dense", "fp32", 5, 4): 1.0})
    with caplog.at_level(logging.INFO, "train.machine.attention_choice"):
        assert choose(CFG, SHAPE, CPU, torch.float32, tmp_path) == "dense"
    assert "attention dense: dense 1 ms, structured 2 ms" in caplog.text and "measured on this one, model-a.json" in caplog.text
    assert choose(CFG, SHAPE, CPU, torch.bfloat16, tmp_path) == "structured"
    assert choose(CFG, SHAPE, CPU, torch.float16, tmp_path) == "structured", "bf16 stands for fp16"
    assert choose(CFG, replace(SHAPE, text_tokens=200, grid=24), CPU, torch.float32, tmp_path) == "structured"
    monkeypatch.setattr(attention_choice, "describe_device", lambda kind: {"name": "another"})
    assert choose(CFG, SHAPE, CPU, torch.float32, tmp_path) == "structured"


def test_auto_takes_the_reference_where_nothing_is_measured_and_says_how_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_choice, "describe_device", lambda kind: {"name": "new"})
    record(tmp_path, "a", "x", "cpu", {point("structured", "fp32", 5, 4): 1.0})
    with caplog.at_level(logging.INFO, "train.machine.attention_choice"):
        assert choose(CFG, SHAPE, CUDA, torch.float32, tmp_path) == "dense"
    assert "nothing is measured on new; 'launcher.py bench model --out FOLDER' with dalle_fit.attention_records=FOLDER" in caplog.text


def test_an_engine_that_cannot_run_here_is_never_chosen_however_fast_it_was(tmp_path: Path) -> None:
    record(tmp_path, "a", "x", "cpu", {point("flex", "fp32", 5, 4): 0.1, point("dense", "fp32", 5, 4): 1.0})
    assert choose(CFG, SHAPE, CPU, torch.float32, tmp_path) == "dense"


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_committed_measurements_choose_for_every_preset_and_kind_of_device(
    preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they did before records named a pattern of layers: nothing is measured on a GPU yet, and on CPUs only tiny is too small for lines to be worth it."""
    monkeypatch.setattr(attention_choice, "describe_device", lambda kind: {"name": f"some {kind}"})
    assert {found.point.engine for found in read_records("cpu")} == {"dense", "structured"} and not read_records("cuda")
    cfg = load_run(preset, [])
    found = [choose(cfg.dalle, cfg.stream_shape(), device, dtype) for device in (CPU, CUDA)]
    assert found == ["dense" if preset == "tiny" else "structured", "dense"]


def test_a_sites_own_records_go_before_those_of_the_code_and_a_folder_without_any_is_an_error(tmp_path: Path) -> None:
    name = read_records("cpu")[0].device
    cfg, shape = TransformerConfig(layers=8, width=512, heads=8), StreamShape(text_tokens=256, text_vocab=9, grid=32, image_vocab=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_choice, "describe_device", lambda kind: {"name": name})
        assert choose(cfg, shape, CPU, torch.float32) == "structured"
        with pytest.raises(ConfigError, match=r"dalle_fit\.attention_records = '.*': holds no model-\*\.json; 'launcher\.py bench model --out"):
            choose(cfg, shape, CPU, torch.float32, tmp_path)
        points = {engine: AttentionPoint.of(engine, "fp32", cfg, shape) for engine in ENGINES}
        record(tmp_path, "site", name, "cpu", {str(points["dense"]): 1.0, str(points["structured"]): 2.0})
        assert choose(cfg, shape, CPU, torch.float32, tmp_path) == "dense"


def test_of_two_records_that_are_alike_the_one_of_the_models_own_pattern_of_layers_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "describe_device", lambda kind: {"name": "this one"})
    rows = {engine: AttentionPoint(engine, "fp32", 5, 4, 16, "4 row") for engine in ENGINES}
    figures = {str(rows["dense"]): 1.0, str(rows["structured"]): 2.0, point("dense", "fp32", 5, 4): 4.0, point("structured", "fp32", 5, 4): 3.0}
    record(tmp_path, "a", "this one", "cpu", figures)
    assert choose(CFG, SHAPE, CPU, torch.float32, tmp_path) == "structured"


def test_a_figures_name_reads_back() -> None:
    for engine in ENGINES:
        found = AttentionPoint(engine, "bf16", 256, 32, 64, "2 row 1 column 1 conv")
        assert attention_times.parse(str(found)) == found
    assert attention_times.parse("training step bf16") is None
    assert attention_times.parse("attention dense bf16, 256+32x32 states, heads of 64") is None, "a time of unknown layers"
    assert [attention_times.layer_pattern(layers) for layers in (1, 4, 8)] == ["1 conv", PATTERN, "5 row 2 column 1 conv"]
    assert attention_times.parse("attention fast bf16, 1+2x2 states, heads of 3, layers 1 conv") is None


def test_times_are_the_inverse_of_rates() -> None:
    assert attention_times.milliseconds(Figure(100.0, 50.0, 200.0, "layers/s", 3)) == Figure(10.0, 5.0, 20.0, "ms", 3)


def test_every_engine_that_runs_here_is_timed() -> None:
    found = attention_times.times(CFG, SHAPE, 2, ("fp32",), Options(device="cpu", seconds=0.01, runs=1))
    assert set(found) == {str(AttentionPoint(engine, "fp32", 5, 4, 16, PATTERN)) for engine in ("dense", "structured")}
    assert all(figure.unit == "ms" and figure.value > 0 for figure in found.values())
