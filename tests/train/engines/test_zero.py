"""ZeRO 1, 2 and 3 in fp32, bf16 and fp16 with scales: gradients against fp32 in one process, overflows, checkpoints across ranks and stages."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch

from infra.world import World
from model.transformer import parameter_tags
from tests.support.ranks import run_in_ranks
from tests.train.engines.zero_cases import BATCH, Case, backward, every_case, fit_of, make_engine, make_model, zero_of
from tests.train.engines.zero_checkpoints import NODES, SAVED, load_all
from tests.train.engines.zero_reference import judge
from tests.train.engines.zero_runs import (
    BETWEEN,
    CURVES,
    DEEP,
    FLAT,
    INFINITE,
    INFINITE_IN_NODES,
    OFFLOADED,
    ONE_PASS,
    OTHERS,
    WIRED,
    compare_all,
    on_four,
    on_one,
    on_two,
)
from train.engines.zero.groups import weight_bytes, weight_storage
from train.weights import checkpoint


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


@pytest.mark.parametrize("case", FLAT, ids=str)
def test_gradients_and_losses_are_those_of_fp32_in_one_process(two: Any, case: Case) -> None:
    first, second = (rank["matrix"][str(case)] for rank in two[1])
    assert first == second, "ranks must agree"
    judge(first, case)


@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_an_update_in_one_pass_is_deepspeeds_own_bit_for_bit(two: Any, case: Case) -> None:
    for rank in two[1]:
        same = rank["stepped"][str(case)]
        assert all(same.values()) and len(same) > 20, [name for name, equal in same.items() if not equal]


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_whole_matrix(size: int) -> None:
    cases = [*every_case(), *(case for case in OTHERS if case.sharding == "flat" or size > 1)]
    cases = [case for case in cases if size * case.accumulation <= BATCH]
    found = run_in_ranks(compare_all, size, cases)[0]
    for case in cases:
        judge(found[str(case)], case)


def test_node_local_sharding_on_four_processes_and_loss_curves_on_any_number(four: dict[str, Any], one: dict[str, Any]) -> None:
    for case in OTHERS:
        if case.sharding == "node":
            judge(four["node"][str(case)], case)
    assert "3 processes do not divide into nodes of 2" in four["refused"]
    for case, bound in CURVES.items():
        assert four["curves"][str(case)] == pytest.approx(one["curves"][str(case)], rel=bound)


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


def test_an_infinity_on_one_node_skips_the_update_on_all(four: dict[str, Any]) -> None:
    for case in INFINITE_IN_NODES:
        found = four["infinite"][str(case)]
        assert not found["applied"] and found["changed"] == [] and found["count"] == 2 and found["overflows"] == [0, 1, 0, 0], case
        assert all(applied for *_, applied in found["history"]) and found["history"][-1][0] < found["history"][0][0], case


def test_an_overflow_in_a_resblock_is_one_also_where_no_filter_keeps_it_there(one: dict[str, Any]) -> None:
    assert one["overflow"][True] == {"applied": False, "overflow": True, "bad": [False, True, False, False, False]}
    assert one["overflow"][False] == {"applied": False, "overflow": True, "bad": [True, True, False, False, True]}


def same_state(found: dict[int, Any], saved: dict[int, Any]) -> None:
    for index, result in found.items():
        wanted = saved[index]
        assert all(torch.equal(value, wanted["gathered"][name]) for name, value in result["gathered"].items()), index
        assert result["scales"] == wanted["scales"], index
        same_losses(result["losses"], wanted)


def same_losses(losses: list[float], wanted: dict[str, Any]) -> None:
    """docs/contracts.md, section 6."""
    assert len(losses) == 20 and losses == pytest.approx(wanted["losses"], rel=5e-3 if wanted["scales"] else 1e-5)


def test_a_run_that_goes_on_from_a_checkpoint_on_as_many_ranks_is_the_same_run(two: Any) -> None:
    for index, case in enumerate(SAVED):
        found = two[1][0]["saved"][index]
        assert len(found["again"]) == 20 and found["again"] == found["losses"], case


def test_a_checkpoint_restores_bit_for_bit_on_any_number_of_ranks_and_any_stage(two: Any, four: dict[str, Any], one: dict[str, Any]) -> None:
    saved = two[1][0]["saved"]
    same_state(one["loaded"], saved)
    same_state(four["loaded"], saved)
    assert not one["taken over from a later version"]
    assert "is kept as torch.int16, this configuration holds torch.float32: set moments" in one["refused"]


def test_node_local_sharding_resumes_bit_for_bit_and_flat_and_keeps_its_replicas_equal(four: dict[str, Any]) -> None:
    for index, case in enumerate(NODES):
        found = four["nodes"][index]
        assert found["again"] == found["losses"] and found["replicas"], case
        assert all(torch.equal(value, found["gathered"][name]) for name, value in found["flat"].items()), case
        same_losses(found["flat losses"], found)


def test_a_checkpoint_that_one_rank_alone_finds_damaged_is_left_by_all(two: Any) -> None:
    assert [rank["fallen back"] for rank in two[1]] == [{"meta": 1, "index": 1, "tensors": 1}] * 2


@pytest.mark.soak
@pytest.mark.parametrize("size", [2, 3])
def test_a_checkpoint_restores_on_as_many_ranks_into_other_stages_and_on_three(two: Any, size: int) -> None:
    same_state(run_in_ranks(load_all, size, two[0])[0], two[1][0]["saved"])


def test_block_matrices_travel_in_fp16_and_everything_else_in_fp32(two: Any) -> None:
    model = make_model()
    tags = parameter_tags(model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if tags[name].is_block_matrix)
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


def test_so_they_do_between_nodes(four: dict[str, Any]) -> None:
    for case in BETWEEN:
        found = four["between"][str(case)]
        halves = found["matrices"] if case.precision == "fp16" else 0
        assert found["matrices"] > found["others"] > 0
        assert found.get("torch.float16", 0) == halves and found["torch.float32"] == found["matrices"] + found["others"] - halves, case


@pytest.mark.parametrize("case", OFFLOADED, ids=str)
def test_updates_with_the_optimizer_on_the_cpu_are_those_without_bit_for_bit(two: Any, case: Case) -> None:
    for rank in two[1]:
        same = rank["offloaded"][str(case)]
        assert all(same.values()) and len(same) > 20, [name for name, equal in same.items() if not equal]


def test_stage_3_builds_a_model_that_no_process_ever_holds_whole_and_starts_it_from_an_export(two: Any) -> None:
    sizes = {name: p.numel() for name, p in make_model(config=DEEP).named_parameters()}
    total, largest = sum(sizes.values()), max(sizes.values())
    for rank in two[1]:
        found = rank["construction"]
        assert found["held"] < 0.51 * total and found["most"] <= 0.51 * total + 2 * largest < 0.7 * total, found
        assert {name: math.prod(shape) for name, shape in found["shapes"].items()} == sizes and all(found["loaded"].values())
        assert found["dtypes"] == {torch.float16, torch.float32}, "masters must not start from rounded weights"


def test_moments_stay_in_their_formats_on_disk(two: Any) -> None:
    url = checkpoint.folder(f"{two[0]}/0", 3)
    index = checkpoint.Reader(url, checkpoint.read_meta(url)["index"]).catalogue().kinds
    kinds = {name: kind.dtype for name, kind in index.items()}
    assert kinds["optimizer/exp_avg/resblocks.0.q.weight"] == kinds["optimizer/exp_avg_sq/resblocks.1.mlp_2.weight"] == torch.int16
    assert kinds["optimizer/exp_avg/resblocks.0.q.bias"] == kinds["optimizer/exp_avg/text_tokens.weight"] == torch.float32


def test_storage_follows_the_stage_and_groups_follow_the_resblocks() -> None:
    from train.engines.zero.configuration import deepspeed_config
    from train.engines.zero.groups import parameter_groups

    half = Case(precision="fp16")
    assert [weight_storage(fit_of(half), zero_of(dataclasses.replace(half, stage=stage))) for stage in (1, 2, 3)] == ["fp16", "fp16", "fp16"]
    assert weight_storage(fit_of(Case(precision="bf16")), zero_of(Case())) == "fp32"
    model = make_model()
    groups = parameter_groups(model, parameter_tags(model), fit_of(half), by_resblock=True)
    assert groups[0]["resblock"] is None and {group["resblock"] for group in groups} == {None, 0, 1, 2, 3}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    config = deepspeed_config(fit_of(Case(accumulation=2)), zero_of(Case(stage=3, offload=True)), World(0, 4, 0, 2), nodes=2)
    assert config["train_batch_size"] == BATCH // 2 and config["train_micro_batch_size_per_gpu"] == 3 and config["gradient_clipping"] == 0.0
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] and config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_a_bucket_is_no_larger_than_what_the_dtype_with_most_gradients_fills() -> None:
    from train.engines.zero.configuration import deepspeed_config, reduced

    half = torch.nn.Parameter(torch.zeros(30, dtype=torch.float16))
    cast = torch.nn.Parameter(torch.zeros(5))
    cast.comm_dtype = torch.float16  # type: ignore[attr-defined]
    sharded = torch.nn.Parameter(torch.zeros(0))
    sharded.ds_numel = 20  # type: ignore[attr-defined]
    counts = reduced([torch.nn.Parameter(torch.zeros(4, 2)), half, cast, sharded])
    assert sorted(counts) == [28, 35]
    sections = [dataclasses.replace(Case(), stage=stage) for stage in (1, 2, 3)]
    for zero in map(zero_of, sections):
        sizes = [
            deepspeed_config(fit_of(Case()), zero, World(0, 1, 0, 1), reduced=given)["zero_optimization"]["reduce_bucket_size"]
            for given in (counts, ())
        ]
        assert sizes == [min(35, zero.reduce_bucket_size), zero.reduce_bucket_size]
        zero = zero.model_copy(update={"reduce_bucket_size": 34})
        assert deepspeed_config(fit_of(Case()), zero, World(0, 1, 0, 1), reduced=counts)["zero_optimization"]["reduce_bucket_size"] == 34


def compilers_after_an_update(world: World) -> list[str]:
    engine = make_engine(Case(), world)
    backward(engine, world, 0, 1)
    assert engine.step(1e-2).applied
    return [name for name in sys.modules if name == "torch._inductor.compile_fx"]


def test_an_update_imports_no_compiler_for_an_optimizer_that_is_not_used() -> None:
    assert run_in_ranks(compilers_after_an_update, 1) == [[]]
