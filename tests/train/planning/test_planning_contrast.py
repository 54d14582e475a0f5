"""What the plan says of a run that contrasts captions; tests/train/planning/test_check.py holds it against the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from train.config import load_run
from train.planning import estimate, states
from train.planning.estimate import Setting
from train.planning.hardware import named
from train.planning.states import Cluster
from train.verbs import plan

WORDS = ["dalle_fit.objective=caption_contrast", "dalle_fit.init_from=export"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_counts_frozen_shards_two_captions_and_four_passes_more(stage: int) -> None:
    plain, contrasting = (Setting.configured(load_run("1.2B", [f"zero.stage={stage}", *words]), Cluster(1, 8)) for words in ([], WORDS))
    without, with_it = estimate.memory(plain), estimate.memory(contrasting)
    total = states.count(plain.cfg.dalle, plain.cfg.stream_shape()).total
    assert estimate.frozen(plain) == 0 and estimate.frozen(contrasting) == 4 * total / 8
    assert with_it.host - without.host == pytest.approx(2 * 4 * total / 8)
    assert with_it.kept == 2 * without.kept and with_it.states == without.states, "a GPU holds no weights more"
    half = estimate.memory(replace(contrasting, cfg=load_run("1.2B", [f"zero.stage={stage}", "dalle_fit.accumulation=2", *WORDS])))
    assert half.kept == without.kept
    gpu = named("H100-80GB")[1]
    longer = estimate.times(contrasting, gpu).compute / estimate.times(plain, gpu).compute
    assert 8 / 4 <= longer <= 8 / 3, "between recomputing everything and nothing"


def test_it_says_so() -> None:
    setting = Setting.configured(load_run("120M", WORDS), Cluster(1, 1))
    (line,) = [line for line in plan.describe("120M", setting) if line.startswith("captions contrasted")]
    gigabytes = estimate.frozen(setting) / 1e9
    assert line.startswith(f"captions contrasted  each sample under two captions, so {2 * setting.micro_batch} at once")
    assert f"frozen weights take {gigabytes:,.2f} GB of the machine's memory for each GPU" in line
    assert not plan.contrasting(Setting.configured(load_run("120M", []), Cluster(1, 1)))
