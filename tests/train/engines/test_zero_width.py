"""Step sizes by width on ZeRO 1, 2 and 3: one and four ranks against a reference of whole matrices in one process. Checkpoints are in zero_checkpoints.py."""

from __future__ import annotations

from typing import Any

import pytest

from infra.world import World
from tests.support.ranks import run_in_ranks
from tests.train.engines.zero_cases import WITH_OPTIONS, Case, some
from tests.train.engines.zero_muon_runs import compared

COMPARED = some([Case(stage=stage, accumulation=a, options=True) for stage, a in ((1, 2), (2, 1), (3, 1))])
MUON = Case(stage=2, options=True, optimizer="muon")


def compare(world: World) -> dict[Case, dict[str, Any]]:
    return {case: compared(world, case) for case in [*COMPARED, MUON]}


@pytest.mark.parametrize("ranks", [1, 4])
def test_each_parameter_moves_by_its_own_step_size_on_shards_as_in_one_process(ranks: int) -> None:
    assert WITH_OPTIONS.width_ratio == 4 and WITH_OPTIONS.score_ratio == 0.5
    for rank in run_in_ranks(compare, ranks):
        for case, figures in rank.items():
            assert figures["applied"] == [True, True, True, False] and figures["clipped"], (case, figures)
            assert figures["matrices"] < 1e-5 and figures["others"] < 1e-5, (case, figures)
        assert rank[MUON]["sent"] == rank[MUON]["planned"], "whose groups the plan knows"
