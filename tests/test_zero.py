"""ZeRO 1, 2 and 3 in fp32, bf16 and fp16 with scales: gradients against fp32 in one process, overflows, checkpoints across ranks and stages."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra.errors import CheckpointError, ConfigError
from infra.world import World
from model.transformer import parameter_tags
from tests.ranks import run_in_ranks
from tests.zero_cases import (
    BATCH,
    CONFIG,
    Case,
    backward,
    every_case,
    fit_of,
    make_engine,
    make_model,
    pairwise,
    reference_gradients,
    true_gradients,
    updates,
    zero_of,
)
from train import checkpoint, warm_start
from train.checkpoint_saver import Saver
from train.fit import full_shape
from train.zero.groups import weight_bytes, weight_storage

DEEP = dataclasses.replace(CONFIG, layers=12)
MATRIX = pairwise(every_case(), ("stage", "precision", "weights", "checkpointing", "accumulation"))
OTHERS = [
    Case(stage=2, precision="fp16", sharding="node", constant=2),
    Case(stage=3, precision="fp16", sharding="node", accumulation=2),
    Case(stage=1, precision="fp32", sharding="node", overlap=True),
    Case(stage=2, precision="fp16", moments="16-bit", offload=True),
    Case(stage=3, precision="fp16", offload=True, accumulation=2),
    Case(stage=2, precision="fp16", scope="none"),
    Case(stage=3, precision="fp16", scope="global", overlap=True, constant=-4),
]
FLAT = [*MATRIX, *(case for case in OTHERS if case.sharding == "flat")]
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 4e-3}
"""Relative error of the whole gradient against fp32 in one process."""


def compare(world: World, case: Case, device: str = "cpu") -> dict[str, float]:
    """Gradient and loss of the first update against the reference."""
    engine = make_engine(case, world, device=device)
    loss = backward(engine, world, 0, case.accumulation)
    measured = engine.measure()
    dist.all_reduce(measured)
    shards = true_gradients(engine)
    expected_loss, expected = reference_gradients(0, half_weights=engine.storage == "fp16")
    error = size = 0.0
    for name, gradient in expected.items():
        found = shards.get(name, torch.zeros_like(gradient))
        if world.size > 1:
            dist.all_reduce(found)
        found /= engine.nodes
        error, size = error + float((found - gradient).square().sum()), size + float(gradient.square().sum())
    update = engine.step(1e-2, measured.tolist())
    later = updates(engine, world, 1, 4, case.accumulation)
    return {
        "loss": abs(loss / expected_loss - 1),
        "gradient": math.sqrt(error / size),
        "norm": abs(update.grad_norm / math.sqrt(size) - 1),
        "applied": float(update.applied and all(applied for *_, applied in later)),
        "last": later[-1][0],
        "numerics": float(len(update.numerics)),
    }


def compare_all(world: World, cases: list[Case]) -> dict[str, dict[str, float]]:
    return {str(case): compare(world, case) for case in cases}


def judge(found: dict[str, float], case: Case) -> None:
    bound = TOLERANCE[case.precision]
    assert found["applied"], (case, found)
    assert found["loss"] < bound and found["gradient"] < bound and found["norm"] < bound, (case, found)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Everything that is measured on two processes, which are dear to start; and the folder of the checkpoints that they wrote."""
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, run_in_ranks(on_two, 2, folder)


@pytest.fixture(scope="module")
def four(two: tuple[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return run_in_ranks(on_four, 4, two[0])[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def one(two: tuple[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return run_in_ranks(on_one, 1, two[0])[0]  # type: ignore[no-any-return]


def on_two(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"matrix": compare_all(world, FLAT)}
    found["construction"] = construction(world)
    return found | {"infinite": {str(case): inject(world, case) for case in INFINITE}, "saved": save_all(world, folder), "wire": wire(world)}


def on_four(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"node": compare_all(world, [case for case in OTHERS if case.sharding == "node"])}
    try:
        make_engine(Case(sharding="node"), World(world.rank, 3, world.rank, 2))
    except ConfigError as error:
        found["refused"] = str(error)
    return found | {"curves": curves(world), "loaded": load_all(world, folder)}


def on_one(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"curves": curves(world), "loaded": load_all(world, folder)}
    plain = make_engine(Case(stage=2, precision="fp16"), world)
    try:
        checkpoint.load(f"{folder}/0", 3, plain.fragments(to_load=True))
    except CheckpointError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.parametrize("case", FLAT, ids=str)
def test_gradients_and_losses_are_those_of_fp32_in_one_process(two: Any, case: Case) -> None:
    first, second = (rank["matrix"][str(case)] for rank in two[1])
    assert first == second, "ranks must agree"
    judge(first, case)


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_whole_matrix(size: int) -> None:
    cases = [*every_case(), *(case for case in OTHERS if case.sharding == "flat" or size > 1)]
    cases = [case for case in cases if size * case.accumulation <= BATCH]
    found = run_in_ranks(compare_all, size, cases)[0]
    for case in cases:
        judge(found[str(case)], case)


def on_gpu(world: World, cases: list[Case]) -> dict[str, Any]:
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, Any] = {}
    for case in cases:
        found[str(case)] = compare(world, case, "cuda")
        engine = make_engine(case, world, device="cuda")
        with torch.cuda.device(0):
            updates(engine, world, 0, 2)
            backward(engine, world, 2, case.accumulation)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                engine.measure()  # nothing here may wait for the device
            finally:
                torch.cuda.set_sync_debug_mode("default")
            engine.step(1e-2)
            engine.average.wait()
            found["average " + str(case)] = max(
                float((engine.average.values[str(i)] - flat.detach().cpu()).abs().max()) for i, flat in enumerate(engine._masters())
            )
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_engine_on_a_gpu_gives_the_gradients_of_fp32_on_a_cpu() -> None:
    cases = [Case(stage=stage, precision="fp16", moments="16-bit") for stage in (1, 2, 3)] + [Case(stage=2, precision="fp16", offload=True)]
    found = run_in_ranks(on_gpu, 1, cases)[0]
    for case in cases:
        judge(found[str(case)], case)
        assert found["average " + str(case)] < 0.1


CURVES = {Case(stage=1): 1e-5, Case(stage=3, precision="fp16"): 2e-3}
"""Relative bounds within which losses do not depend on the number of processes."""


def curves(world: World) -> dict[str, list[float]]:
    return {str(case): [loss for loss, *_ in updates(make_engine(case, world), world, 0, 8)] for case in CURVES}


def test_node_local_sharding_on_four_processes_and_loss_curves_on_any_number(four: dict[str, Any], one: dict[str, Any]) -> None:
    for case in OTHERS:
        if case.sharding == "node":
            judge(four["node"][str(case)], case)
    assert "3 processes do not divide into nodes of 2" in four["refused"]
    for case, bound in CURVES.items():
        assert four["curves"][str(case)] == pytest.approx(one["curves"][str(case)], rel=bound)


INFINITE = [
    Case(stage=1, precision="fp16"),
    Case(stage=2, precision="fp16", weights="cast", moments="16-bit"),
    Case(stage=3, precision="fp16"),
    Case(stage=2, precision="fp16", skip="resblock"),
]


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Masters, moments and averages of this rank."""
    return {name: fragment.tensor.clone() for name, fragment in engine.fragments(to_load=True).items()}


def inject(world: World, case: Case) -> dict[str, Any]:
    """Two updates, one with an Inf in a parameter gradient of resblock 1 on the last rank, three more."""
    engine = make_engine(case, world)
    history = updates(engine, world, 0, 2)
    before, scales = everything(engine), engine.scales.values()
    with engine.averaged():
        pass  # masters and parameters must come back from this bit for bit
    assert all(torch.equal(value, before[name]) for name, value in everything(engine).items())
    matrix = engine.module.resblocks[1].mlp_1.weight
    hook = matrix.register_hook(lambda grad: torch.full_like(grad, float("inf")) if world.rank == world.size - 1 else grad)
    (poisoned,) = updates(engine, world, 2, 3)
    hook.remove()
    after = everything(engine)
    out = {
        "applied": poisoned[2],
        "changed": sorted(name for name, value in after.items() if not torch.equal(value, before[name])),
        "ratios": [new / old for new, old in zip(engine.scales.values(), scales, strict=True)],
        "overflows": engine.scales.overflows,
        "count": engine.updates,
    }
    return out | {"history": history + updates(engine, world, 3, 6)}


def test_an_infinity_in_one_resblock_on_one_rank_moves_that_scale_alone_and_skips_the_update(two: Any) -> None:
    for case in INFINITE:
        first, second = (rank["infinite"][str(case)] for rank in two[1])
        assert first["ratios"] == second["ratios"] and first["overflows"] == second["overflows"] == [0, 1, 0, 0], case
        grown = 2 ** (1 / 1000)
        assert first["ratios"] == pytest.approx([grown, 1 / math.sqrt(2), grown, grown]), case
        assert all(applied for *_, applied in first["history"]) and first["history"][-1][0] < first["history"][0][0], case
        for rank in (first, second):
            if case.skip == "all":
                assert not rank["applied"] and rank["changed"] == [] and rank["count"] == 2, case
            else:
                moved = {name.split(".")[1] for name in rank["changed"] if name.startswith(("model/resblocks", "optimizer"))}
                assert rank["applied"] and {"0", "2"} <= moved and "1" not in moved, moved


SAVED = [Case(stage=2, precision="fp16", moments="16-bit"), Case(stage=1), Case(stage=3, precision="fp16", moments="16-bit", weights="fp16")]
HALF = Case(precision="fp16", moments="16-bit")
LOADED = {
    1: {0: dataclasses.replace(HALF, stage=3), 1: Case(stage=3), 2: dataclasses.replace(HALF, stage=2)},
    2: {0: dataclasses.replace(HALF, stage=3), 1: Case(stage=2), 2: dataclasses.replace(HALF, stage=1, weights="cast")},
    4: {0: dataclasses.replace(HALF, sharding="node"), 1: Case(stage=2), 2: dataclasses.replace(HALF, stage=3, weights="cast")},
}
"""Number of ranks -> index of the saved case -> what loads it."""


def save_all(world: World, folder: str) -> dict[int, Any]:
    out: dict[int, Any] = {}
    for index, case in enumerate(SAVED):
        engine = make_engine(case, world)
        updates(engine, world, 0, 3)
        meta = {"shapes": {}, "updates": engine.updates, "engine": engine.state()}
        saver = Saver(f"{folder}/{index}", world, keep=2)
        saver.save(3, engine.fragments(to_load=False), meta)
        out[index] = {"gathered": gathered(engine), "scales": engine.scales and [s / world.size for s in engine.scales.values()]}
        out[index]["losses"] = [loss for loss, *_ in updates(engine, world, 3, 23)]  # training goes on while the checkpoint is written
        saver.wait()
        again = make_engine(case, world, seed=99)
        restore(again, f"{folder}/{index}", world)
        out[index]["again"] = [loss for loss, *_ in updates(again, world, 3, 23)]
    return out


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    """Whole masters, moments and averages, from all shards."""
    out = {}
    fragments = engine.fragments(to_load=True)
    kinds = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq", "average")
    for name in (f"{kind}/{parameter}" for kind in kinds for parameter, _ in engine.module.named_parameters()):
        fragment = fragments.get(name)
        whole = torch.zeros(math.prod(full_shape(engine.module.get_parameter(name.split("/")[-1]))), dtype=torch.float64)
        if fragment is not None:
            whole[fragment.offset : fragment.offset + fragment.tensor.numel()] = fragment.tensor.double()
        dist.all_reduce(whole)
        out[name] = whole / engine.nodes
    return out


def restore(engine: Any, url: str, world: World) -> None:
    meta = checkpoint.load_newest(url, engine.fragments(to_load=True), world)
    assert meta is not None
    engine.loaded(meta["updates"])
    engine.restore(meta["engine"])


def load_all(world: World, folder: str) -> dict[int, Any]:
    out: dict[int, Any] = {}
    for index, case in LOADED[world.size].items():
        engine = make_engine(case, world, seed=99)
        restore(engine, f"{folder}/{index}", world)
        out[index] = {"gathered": gathered(engine), "scales": engine.scales and [s / world.size for s in engine.scales.values()]}
        out[index]["losses"] = [loss for loss, *_ in updates(engine, world, 3, 23 if case.precision == "fp32" else 11)]
    return out


def same_state(found: dict[int, Any], saved: dict[int, Any]) -> None:
    for index, result in found.items():
        wanted = saved[index]
        assert all(torch.equal(value, wanted["gathered"][name]) for name, value in result["gathered"].items()), index
        assert result["scales"] == wanted["scales"], index
        losses = wanted["losses"][: len(result["losses"])]
        assert result["losses"] == pytest.approx(losses, rel=5e-3 if result["scales"] else 1e-5), index


def test_a_run_that_goes_on_from_a_checkpoint_on_as_many_ranks_is_the_same_run(two: Any) -> None:
    for index, case in enumerate(SAVED):
        found = two[1][0]["saved"][index]
        assert len(found["again"]) == 20 and found["again"] == found["losses"], case


def test_a_checkpoint_restores_bit_for_bit_on_any_number_of_ranks_and_any_stage(two: Any, four: dict[str, Any], one: dict[str, Any]) -> None:
    saved = two[1][0]["saved"]
    same_state(one["loaded"], saved)
    same_state(four["loaded"], saved)
    assert "is kept as torch.int16, this configuration holds torch.float32: set moments" in one["refused"]


@pytest.mark.soak
def test_a_checkpoint_restores_on_as_many_ranks_into_other_stages(two: Any) -> None:
    same_state(run_in_ranks(load_all, 2, two[0])[0], two[1][0]["saved"])


WIRED = [Case(stage=stage, precision="fp16", weights=weights) for stage in (1, 2, 3) for weights in ("fp16", "cast")] + [Case(stage=2)]


def wire(world: World) -> dict[str, dict[str, int]]:
    """Elements that an update sends through reductions, and through gathers of parameters, by dtype."""
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    out: dict[str, dict[str, int]] = {}
    for case in WIRED:
        engine = make_engine(case, world)
        updates(engine, world, 0, 1)
        sent: dict[str, int] = {}
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather"):
                patch.setattr(backend, name, counting(getattr(backend, name), "reduce" if "reduce" in name else "gather", sent))
            updates(engine, world, 1, 2)
        stored = [p.ds_tensor if case.stage == 3 else p for p in engine.module.parameters()] + engine._masters()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored}
        out[str(case)] = sent | {"held": sum(held.values())}
    return out


def counting(plain: Any, kind: str, sent: dict[str, int]) -> Any:
    def counted(*given: Any, **named: Any) -> Any:
        tensors = [value for value in (*given, *named.values()) if torch.is_tensor(value)]
        if tensors:
            largest = max(tensors, key=torch.Tensor.numel)
            key = f"{kind} {largest.dtype}".replace("torch.", "")
            sent[key] = sent.get(key, 0) + largest.numel()
        return plain(*given, **named)

    return counted


def test_block_matrices_travel_in_fp16_and_everything_else_in_fp32(two: Any) -> None:
    model = make_model()
    tags = parameter_tags(model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if tags[name].compressible)
    others = sum(p.numel() for p in model.parameters()) - matrices
    for case in WIRED:
        sent = two[1][0]["wire"][str(case)]
        storage = weight_storage(fit_of(case), zero_of(case))
        expected = matrices * weight_bytes(case.stage, storage, 2) + others * weight_bytes(case.stage, "fp32", 2)
        assert sent["held"] == pytest.approx(expected, rel=0.02), (case, sent, expected)
        if case.precision == "fp32":
            assert "reduce float16" not in sent and sent["reduce float32"] >= matrices + others
            continue
        assert matrices <= sent["reduce float16"] < matrices * 1.1 and others <= sent["reduce float32"] < others + matrices / 2, (case, sent)
        if case.stage == 3:  # forward and backward passes each gather
            assert sent["gather float16"] >= matrices and sent["gather float32"] < 4 * others, (case, sent)


def construction(world: World) -> dict[str, Any]:
    """Most elements of parameters that a process ever held while a model for stage 3 was built, and what it holds then; its weights, read whole."""
    from train.zero.construction import sharded_construction

    made: list[Any] = []
    most = 0
    plain = torch.nn.init.normal_

    def counting_normal(p: Any, *given: Any, **named: Any) -> Any:
        nonlocal most
        made.append(p)
        most = max(most, sum(q.numel() + (q.ds_tensor.numel() if hasattr(q, "ds_tensor") else 0) for q in made))
        return plain(p, *given, **named)

    case = Case(stage=3, precision="fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", counting_normal)
        with sharded_construction(fit_of(case), zero_of(case), world):
            model = make_model("fp16", config=DEEP)
    shapes = {name: tuple(full_shape(p)) for name, p in model.named_parameters()}
    tensors = {name: p.detach() + 1 for name, p in make_model(config=DEEP, seed=5).named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start.export, "read_tensors", lambda _: ("hash", tensors))
        warm_start.load(model, "url", "dalle_fit.init_from")
    whole = {}
    for name, p in model.named_parameters():
        p.all_gather()  # type: ignore[operator]
        whole[name] = torch.equal(p, tensors[name])
        p.partition()  # type: ignore[operator]
    return {"most": most, "held": sum(p.numel() + p.ds_tensor.numel() for p in model.parameters()), "shapes": shapes, "loaded": whole}  # type: ignore[attr-defined]


def test_stage_3_builds_a_model_that_no_process_ever_holds_whole_and_starts_it_from_an_export(two: Any) -> None:
    sizes = {name: p.numel() for name, p in make_model(config=DEEP).named_parameters()}
    total, largest = sum(sizes.values()), max(sizes.values())
    for rank in two[1]:
        found = rank["construction"]
        assert found["held"] < 0.51 * total and found["most"] <= 0.51 * total + 2 * largest < 0.7 * total, found
        assert {name: math.prod(shape) for name, shape in found["shapes"].items()} == sizes and all(found["loaded"].values())


def test_moments_stay_in_their_formats_on_disk(two: Any) -> None:
    url = checkpoint.folder(f"{two[0]}/0", 3)
    index = checkpoint.Reader(url).read_metadata().state_dict_metadata
    kinds = {name: entry.properties.dtype for name, entry in index.items()}  # type: ignore[union-attr]
    assert kinds["optimizer/exp_avg/resblocks.0.q.weight"] == kinds["optimizer/exp_avg_sq/resblocks.1.mlp_2.weight"] == torch.int16
    assert kinds["optimizer/exp_avg/resblocks.0.q.bias"] == kinds["optimizer/exp_avg/text_tokens.weight"] == torch.float32


def test_storage_follows_the_stage_and_groups_follow_the_resblocks() -> None:
    from train.zero.engine import deepspeed_config
    from train.zero.groups import parameter_groups

    half = Case(precision="fp16")
    assert [weight_storage(fit_of(half), zero_of(dataclasses.replace(half, stage=stage))) for stage in (1, 2, 3)] == ["fp16", "fp16", "fp16"]
    assert weight_storage(fit_of(Case(precision="bf16")), zero_of(Case())) == "fp32"
    model = make_model()
    groups = parameter_groups(model, parameter_tags(model), fit_of(half), by_resblock=True)
    assert groups[0]["resblock"] is None and {group["resblock"] for group in groups} == {None, 0, 1, 2, 3}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    config = deepspeed_config(fit_of(Case(accumulation=2)), zero_of(Case(stage=3, offload=True)), World(0, 4, 0, 2), nodes=2)
    assert config["train_batch_size"] == 4 and config["train_micro_batch_size_per_gpu"] == 1 and config["gradient_clipping"] == 0.0
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] and config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
