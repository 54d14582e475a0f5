"""The formulas of `plan` are counted values and measured bytes: parameters, pairs, activations, model states, bytes on the wire. About 15 s."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import launcher
from infra.config_keys import declared
from infra.errors import ConfigError, ExitCode
from infra.repository import DOCS, REPOSITORY
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer, parameter_tags
from train.bench import memory
from train.bench.memory import build, train_peak
from train.config import PRESETS, RunConfig, load_run
from train.machine.live_bytes import LiveBytes
from train.planning import activations, estimate, network, states, wire
from train.planning.estimate import Setting
from train.planning.flops import forward_flops, layer_pairs, train_flops
from train.planning.hardware import GPUS, find_by_device_name, named
from train.planning.out_of_memory import advice, is_out_of_memory, smaller
from train.planning.states import Cluster
from train.verbs import plan

FULL = StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)
PAPER = {"120M": (12, 768, 12), "300M": (24, 1024, 16), "1.2B": (24, 2048, 32), "2.8B": (64, 1920, 30), "5.6B": (64, 2688, 42), "12B": (64, 3968, 62)}
SMALL = StreamShape(text_tokens=32, text_vocab=300, grid=8, image_vocab=200)
NARROW = TransformerConfig(layers=4, width=128, heads=4)
WITH_OPTIONS = replace(NARROW, qk_norm=True, rotary_positions=True, base_width=64, base_heads=4)


# --- Counted -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "shape"), [(TransformerConfig(), FULL), (NARROW, SMALL), (TransformerConfig(layers=3, width=96, heads=3), FULL), (WITH_OPTIONS, SMALL)]
)
def test_parameters_are_those_of_the_built_model(cfg: TransformerConfig, shape: StreamShape) -> None:
    with torch.device("meta"):
        model = Transformer(cfg, shape, attend=lambda q, k, v, kind: q)
    tags, found, sizes = parameter_tags(model), states.count(cfg, shape), {name: p.numel() for name, p in model.named_parameters()}
    assert found.matrices == sum(size for name, size in sizes.items() if tags[name].is_block_matrix)
    assert found.blocks_rest == sum(size for name, size in sizes.items() if tags[name].resblock is not None and not tags[name].is_block_matrix)
    assert found.unembeddings == sum(size for name, size in sizes.items() if "unembedding" in name)
    assert found.total == sum(sizes.values())
    listed = [(p.name, p.elements, p.resblock, p.is_block_matrix, p.decays, p.ratios) for p in wire.parameters(cfg, shape)]
    assert listed == [(name, size, (tag := tags[name]).resblock, tag.is_block_matrix, tag.decays, tag.ratios) for name, size in sizes.items()]


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_sizes_that_they_are_named_after(name: str) -> None:
    cfg = load_run(name, [])
    assert (cfg.dalle.layers, cfg.dalle.width, cfg.dalle.heads) == PAPER[name]
    assert cfg.stream_shape() == FULL
    matrices = states.count(cfg.dalle, FULL).matrices
    if name == "12B":
        assert matrices == 12_092_178_432
    named = float(name[:-1]) * (1e9 if name.endswith("B") else 1e6)
    assert states.count(cfg.dalle, FULL).total == pytest.approx(named, rel=0.2) and matrices < 1.05 * named


def added_product(_into: object, a_shape: list[int], b_shape: list[int], *_rest: object, **_named: object) -> int:
    """Of an in-place product, which torch's counter does not know."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def test_operations_are_those_that_torch_counts_less_masked_pairs() -> None:
    cfg, shape = TransformerConfig(layers=4, width=32, heads=2, conv_kernel=3), StreamShape(text_tokens=8, text_vocab=64, grid=4, image_vocab=32)
    model = Transformer(cfg, shape)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})
    with counter:
        text_nll_BT, image_nll_BI = model(torch.zeros(2, 8, dtype=torch.long), torch.tensor([8, 8]), torch.zeros(2, 16, dtype=torch.long))
        (text_nll_BT.sum() + image_nll_BI.sum()).backward()
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm", "aten.addmm_"))
    attention = 3.0 * 2 * 2 * cfg.width * layer_pairs(cfg, shape)
    assert 2 * (train_flops(cfg, shape) - attention) == products
    assert train_flops(cfg, shape) == 3 * forward_flops(cfg, shape)


# --- Measured ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "dtype"), list(itertools.product(("dense", "structured"), ("fp32", "bf16"))))
@pytest.mark.parametrize(
    ("cfg", "shape", "batch"),
    [
        (NARROW, SMALL, 3),
        (TransformerConfig(layers=2, width=64, heads=2, conv_kernel=3), StreamShape(text_tokens=16, text_vocab=4000, grid=8, image_vocab=1000), 8),
        (WITH_OPTIONS, SMALL, 3),
    ],
    ids=["blocks", "vocabulary", "options"],
)
def test_activations_are_within_5_percent_of_the_bytes_of_real_runs(
    engine: str, dtype: str, cfg: TransformerConfig, shape: StreamShape, batch: int
) -> None:
    for every in (0, 1, 2, 4):
        model = build(cfg, shape, engine, dtype, every, "cpu")  # type: ignore[arg-type]
        train_peak(model, batch, "cpu")  # gradients exist from here on
        kept, peak = train_peak(model, batch, "cpu")
        run = activations.Run(cfg, shape, batch, 4 if dtype == "fp32" else 2, engine, every, chunk_elements=1 << 21)
        assert activations.kept_by_forward(run) == pytest.approx(kept, rel=0.05), every
        assert activations.peak(run) == pytest.approx(peak, rel=0.05), every


def test_checkpointing_every_resblock_keeps_its_inputs_alone() -> None:
    with_all, with_none = (train_peak(build(NARROW, SMALL, "dense", "bf16", every, "cpu"), 3, "cpu")[0] for every in (1, 0))
    assert with_all < 0.25 * with_none


# --- Formulas ----------------------------------------------------------------------------------------------------------------------------


def test_the_papers_memory_fits_its_gpus() -> None:
    """Paper 6.1: 12.09e9 / 8 parameters on each of 8 GPUs, with 2 bytes each for parameter, mean, variance and error buffer: 12.1 of 16 GB."""
    setting = Setting(load_run("12B", []), Cluster(128, 8), 3, "node", "half", 4, True, rank=896)
    errors = estimate.error_bytes(setting) - 4 * estimate.compression(setting)[0].basis  # the projections come on top
    found = states.states(states.count(TransformerConfig(), FULL), 3, 8, storage="half", moment_bytes=4, error_bytes=errors)
    matrices = 12_092_178_432 / 8
    assert found.error_buffers == 2 * matrices
    assert found.parameters + found.moments + found.error_buffers == pytest.approx(8 * matrices, rel=0.1)


def test_states_shrink_with_every_stage_and_16_bits_shrink_them_further() -> None:
    parameters = states.count(TransformerConfig(), FULL)
    totals = [states.states(parameters, stage, 64).total for stage in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    assert states.states(parameters, 0, 1).total == 16 * parameters.total
    for stage in (1, 2, 3):
        half = states.states(parameters, stage, 64, storage="half", moment_bytes=4)
        assert half.total < states.states(parameters, stage, 64).total
        assert half.masters == 4 * parameters.total / 64
    gathered = states.states(parameters, 3, 64, live_elements=100).parameters - states.states(parameters, 3, 64).parameters
    assert gathered == 4 * 100 and states.gathered(8, prefetch=10, max_live=6) == 4 * 64 + 10 and states.gathered(8, 10, 1000) == 1000
    assert states.states(parameters, 3, 8, live_elements=1 << 60).parameters == 4 * parameters.total * (1 + 1 / 8)
    assert states.states(parameters, 2, 64, bucket_elements=1000).buckets == 4000
    assert states.states(parameters, 3, 64, bucket_elements=1000, half_gradients=True).buckets == 2 * (2000 + 4000)
    with pytest.raises(ValueError, match="ZeRO stage 4: accepted are 0, 1, 2 and 3"):
        states.states(parameters, 4, 8)


@pytest.mark.parametrize(("width", "rank", "rate"), [(1920, 512, 83.33), (2688, 640, 85.12), (3968, 896, 85.89)])
def test_compression_rates_are_those_of_table_1(width: int, rank: int, rate: float) -> None:
    p, q = network.factor_elements(width, rank, 8)
    share = (p + q) / (12 * width**2 / 8)
    assert 100 * (1 - share) == pytest.approx(rate, abs=0.005)
    assert share == pytest.approx(rank * (8 + 2) / (2 * width * 8))
    assert network.smallest_rank(width) == rank and network.smallest_rank(1024) is None


def test_factors_of_the_12b_model_are_those_of_the_paper() -> None:
    assert network.factor_elements(3968, 896, 8) == (2_444_288, 888_832)
    assert 2 * 64 * sum(network.factor_elements(3968, 896, 8)) == pytest.approx(427e6, rel=0.002)
    with pytest.raises(ValueError, match="rank 100 does not divide over 8 GPUs of a machine; use a multiple of 8"):
        network.factor_elements(3968, 100, 8)


def test_bytes_on_the_wire_follow_stage_layout_and_compression() -> None:
    cfg = TransformerConfig()
    found, both = states.count(cfg, FULL), Cluster(nodes=2, gpus=8)
    whole = 4 * found.total

    def sent(stage: int, layout: str, **options: object) -> network.Traffic:
        return network.traffic(cfg, found, both, stage, layout, **options)  # type: ignore[arg-type]

    assert sent(0, "flat").inside == 15 / 16 * 2 * whole
    assert sent(1, "flat").inside == 15 / 16 * 3 * whole
    assert sent(2, "flat", micro_batches=4).inside == 15 / 16 * 9 * whole
    assert sent(3, "flat", micro_batches=4).inside == 15 / 16 * 12 * whole
    assert sent(1, "flat").outside == sent(1, "flat").inside / 8
    assert sent(2, "node").inside == 7 / 8 * 3 * whole and sent(2, "node").outside == whole / 8
    matrices, rest = 2 * found.matrices / 8, 4 * found.rest / 8
    setting = Setting(load_run("12B", []), both, 3, "node", "half", 4, True, rank=896)
    assert (estimate.traffic(setting).outside - rest) / matrices == pytest.approx(1 - 0.8589, abs=1e-4)
    fp16 = 2 * found.matrices + 4 * found.rest
    assert sent(2, "flat", half_gradients=True).inside == 15 / 16 * (2 * fp16 + whole)
    assert sent(3, "flat", half_gradients=True, storage="half").inside == 15 / 16 * 3 * fp16
    assert sent(2, "flat", all_reduces=False).inside == 15 / 16 * 2 * whole and sent(0, "flat", all_reduces=False) == sent(0, "flat")
    alone = Cluster(nodes=1, gpus=8)
    for layout in ("flat", "node"):
        assert network.traffic(cfg, found, alone, 2, layout).outside == 0  # type: ignore[arg-type]


def test_a_plan_is_of_what_the_configuration_says() -> None:
    cluster = Cluster(4, 8)

    def configured(*overrides: str) -> tuple[object, ...]:
        found = Setting.configured(load_run("1.2B", list(overrides)), cluster)
        return found.stage, found.layout, found.storage, found.moment_bytes, found.half_gradients

    assert configured() == (2, "flat", "cast", 8, False)
    assert configured("zero.stage=3", "zero.sharding=node", "dalle_fit.precision=fp16", "dalle_fit.moments=16-bit") == (3, "node", "half", 4, True)
    assert configured("dalle_fit.precision=fp16", "zero.weights=cast") == (2, "flat", "cast", 8, True)
    names = [name for name, _ in plan.variants(Setting.configured(load_run("1.2B", ["dalle_fit.precision=fp16"]), cluster), None)]
    assert names[-1] == "* as configured" and sum(name.startswith("*") for name in names) == 1


def test_the_average_checkpoints_and_what_is_offloaded_are_counted_in_the_machines_memory() -> None:
    cfg = load_run("1.2B", [])
    total = states.count(cfg.dalle, FULL).total
    here = estimate.memory(Setting.configured(cfg, Cluster(4, 8)))
    assert here.host == (4 + 4 + 4 + 8 + 4) * total / 32
    offloaded = estimate.memory(Setting.configured(load_run("1.2B", ["zero.offload_optimizer=true"]), Cluster(4, 8)))
    assert offloaded.host == here.host + (4 + 8 + 4) * total / 32
    assert offloaded.states.masters == offloaded.states.moments == offloaded.states.gradients == 0
    assert here.states.gradients == 4 * wire.touched(estimate.fragments(Setting.configured(cfg, Cluster(4, 8)))) > 4 * total / 32
    assert here.total - offloaded.total == pytest.approx(12 * total / 32 + here.states.gradients)


def test_gpus_are_found_by_the_names_that_cuda_gives() -> None:
    assert find_by_device_name("NVIDIA H100 80GB HBM3") == GPUS["H100-80GB"]
    assert find_by_device_name("NVIDIA H200") == GPUS["H200-141GB"]
    assert find_by_device_name("NVIDIA H100 PCIe") is None and find_by_device_name("AMD EPYC") is None


# --- The verb ----------------------------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_does_not_fit_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["plan", "12B", "--nodes", "4", "--memory", "80"]) == ExitCode.CONFIG
    found = capsys.readouterr()
    assert "DDP, fp32" in found.out and "does not fit: " in found.out
    assert "12B as configured (zero.stage = 3, 32 samples at once) needs " in found.err
    assert "any of these would fit: dalle_fit.accumulation=2" in found.err
    assert launcher.main(["plan", "12B", "--nodes", "1", "--gpus", "1", "--memory", "16"]) == ExitCode.CONFIG
    assert "use more or larger GPUs, or a smaller model" in capsys.readouterr().err


def test_remedies_include_checkpointing_and_higher_stages() -> None:
    setting = Setting(load_run("300M", ["dalle_fit.batch=1024"]), Cluster(1, 8), 1, "flat")
    words = plan.remedies(setting, estimate.room(80))
    assert "dalle_fit.activation_checkpointing=true" in words and "dalle_fit.accumulation=8" in words
    small = Setting(load_run("5.6B", []), Cluster(16, 8), 1, "flat")
    assert "zero.stage=2, zero.stage=3" in plan.remedies(small, estimate.room(60))


def test_a_batch_that_does_not_divide_and_an_unknown_gpu_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["plan", "1.2B", "--nodes", "3"]) == ExitCode.CONFIG
    assert "dalle_fit.batch = 1024 does not divide over 24 processes x dalle_fit.accumulation = 1; use a multiple of 24" in capsys.readouterr().err
    assert launcher.main(["plan", "1.2B", "--gpu", "TPU"]) == ExitCode.USAGE
    assert "--gpu TPU: accepted are V100-16GB, A100-80GB, H100-80GB" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="use a multiple of 24"):
        _ = Setting(load_run("1.2B", []), Cluster(3, 8), 2, "flat").micro_batch


# --- The tracker -------------------------------------------------------------------------------------------------------------------------


def test_the_tracker_counts_each_storage_once_and_until_it_is_freed() -> None:
    live = LiveBytes()
    with live:
        a = torch.zeros(100)
        b = a.view(10, 10)
        assert live.now == 400
        c = a + 1
        del a, b
        assert live.now == 400 and live.peak == 800
        live.restart()
        assert live.peak == 400
        c.add_(1)
        torch.zeros(1000, device="meta")
        assert (live.now, live.peak) == (400, 400)


def test_the_memory_benchmark_shows_what_checkpointing_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SIZES", {"cpu": (NARROW, SMALL, 2)})
    found = memory.run(memory.Options(device="cpu", seconds=0.01, runs=1))
    kept = [found.measured[f"kept by the forward pass, {name}"].value for name in ("no checkpointing", "checkpoint every 1", "checkpoint every 2")]
    assert kept[0] > 4 * kept[1] > 4 * kept[2]
    assert found.ratios["kept, every resblock over none"].value == kept[1] / kept[0]


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A10", "A10-24GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24GB"),
        ("NVIDIA GeForce RTX 5090", "RTX5090-32GB"),
        ("NVIDIA B300", "B300-288GB"),
        ("NVIDIA L40", None),
        ("NVIDIA A100-PCIE-40GB PCIe", None),
    ],
)
def test_a_device_is_known_by_its_whole_name_and_its_memory(device: str, key: str | None) -> None:
    assert find_by_device_name(device) == (GPUS[key] if key else None)


def test_a_gpu_can_be_given_by_its_numbers_and_a_price_shows_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        launcher.main(
            [
                "plan",
                "120M",
                "--gpus",
                "8",
                "--gpu",
                "memory_gb=80,tflops_16bit=989.4,memory_gb_s=3350,link_gb_s=450,network_gb_s=50,watts=700,tflops_fp32=66.9",
                "--price",
                "2",
            ]
        )
        == 0
    )
    given = capsys.readouterr().out
    assert launcher.main(["plan", "120M", "--gpus", "8"]) == 0
    named = capsys.readouterr().out
    hours = float(re.findall(r"([\d.,]+) GPU hours", named)[0].replace(",", ""))
    cost = float(re.findall(r"cost +([\d,]+) at 2 for each of", given)[0].replace(",", ""))
    assert cost == pytest.approx(2 * hours, rel=0.02, abs=1) and "cost " not in named and "given by --gpu" in given
    for wrong in ("memory_gb=80", "memory_gb=80,tflops_16bit=0,memory_gb_s=1", "memory_gb=80,tflops_16bit=1,memory_gb_s=1,speed=3"):
        assert launcher.main(["plan", "120M", "--gpu", wrong]) == ExitCode.USAGE
        assert "or numbers above 0 such as memory_gb=48" in capsys.readouterr().err


def test_a_full_gpu_names_the_keys_that_take_less() -> None:
    class OutOfMemoryError(RuntimeError):
        __module__ = "torch"

    error = OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("CUDA out of memory"))
    cfg = load_run("1.2B", [])
    said = advice("dalle", cfg, 8, error)
    assert said.startswith("CUDA out of memory. Less memory: dalle_fit.accumulation=") and "zero.stage=3" in said and "plan" in said
    assert "; the run goes on with any of them, and 'launcher.py plan'" in said
    wide = cfg.model_copy(update={"evaluate": cfg.evaluate.model_copy(update={"batch": 4096})})
    named_keys = {words.partition("=")[0] for words, _ in smaller(Setting.configured(wide, Cluster(1, 8)))}
    assert "evaluate.batch" in named_keys and all(declared(RunConfig, key)["may_change"] == "any time" for key in named_keys)
    more = 2 * cfg.dvae_fit.accumulation
    assert f"dvae_fit.accumulation={more}, dvae_fit.activation_checkpointing=true" in advice("dvae", cfg, 8, error)
    assert "encode.batch" in advice("encode", cfg, 8, error) and "nvidia-smi" in advice("generate", cfg, 8, error)


_DOCUMENTED = sorted(
    {
        line.partition("launcher.py ")[2]
        for page in DOCS.glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("    python launcher.py plan ")
    }
)


@pytest.mark.parametrize("line", _DOCUMENTED)
def test_every_plan_that_a_page_names_fits_its_machine(line: str) -> None:
    assert launcher.main(shlex.split(line, comments=True)) == ExitCode.DONE


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS.glob("*B.toml")] + ["120M", "300M"])
def test_every_preset_fits_the_machines_that_it_is_made_for(preset: str) -> None:
    assert launcher.main(["plan", preset]) == ExitCode.DONE


@pytest.mark.parametrize(
    ("word", "name"), [("L4", "L4-24GB"), ("L40", "L40S-48GB"), ("A100-40", "A100-40GB"), ("rtx 4090", "RTX4090-24GB"), ("B3", "B300-288GB")]
)
def test_the_beginning_of_one_gpus_name_means_it(word: str, name: str) -> None:
    assert named(word) == (name, GPUS[name])


@pytest.mark.parametrize("word", ["A100", "H", ""])
def test_what_means_several_gpus_or_none_lists_them(word: str) -> None:
    with pytest.raises(
        ValueError, match="several begin so: A100-80GB, A100-40GB; or numbers" if word == "A100" else "several begin so|accepted are V100"
    ):
        named(word)


def test_every_plan_that_a_page_shows_fits(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md")), *sorted(PRESETS.glob("*.toml"))]
    shown = {line for page in pages for line in re.findall(r"launcher\.py (plan \S+[^\n`#(']*)", page.read_text(encoding="utf-8"))}
    shown = {line.strip() for line in shown if "runs/" not in line and "RUN" not in line and "PRESET" not in line}
    assert len(shown) >= 8
    for line in sorted(shown):
        assert launcher.main(shlex.split(line)) == 0, line + capsys.readouterr().err
