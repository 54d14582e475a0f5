"""`launcher.py align`: the new run's configuration and schedule, what it shares with the trained one, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.stopped_run import FIXTURE
from train import launch
from train.config import load_run
from train.planning.flops import train_flops, update_flops
from train.run import places
from train.verbs import align


@pytest.fixture(params=["local", "s3"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run whose transformer has an export."""
    url = f"{tmp_path}/runs/mine" if request.param == "local" else f"{request.getfixturevalue('s3')}/mine"
    storage.upload_folder(FIXTURE / "run", url)
    storage.write_json(f"{url}/dalle/export/config.json", {})
    return str(url)


def test_a_new_run_shares_what_comes_before_the_transformer_and_has_the_schedule(trained: str) -> None:
    preset, words = align.prepared(trained, ["dalle_fit.batch=4"], "", dry_run=False)
    assert preset == f"{trained}-aligned" and words == []
    source, target = load_run(trained, []), load_run(preset, [])
    fit = target.dalle_fit
    assert (fit.objective, fit.init_from, fit.batch) == ("caption_contrast", f"{trained}/dalle/export", 4)
    assert (fit.steps, fit.warmup_steps, fit.ema_every, fit.weight_decay) == (align.FEWEST, 5, 1, 0.0) and fit.lr == pytest.approx(
        source.dalle_fit.lr / 10
    )
    assert source.model_copy(update={"run": target.run, "dalle_fit": fit}) == target, "all else is the trained run's"
    run = RunFolder(preset)
    assert [stage for stage in ("prepare", "tokenizer", "dvae", "encode") if places.finished(target, run, stage)] == [
        "prepare",
        "tokenizer",
        "dvae",
        "encode",
    ]
    assert run.done("clip") is None and run.done("dalle") is None
    ours, theirs = (set(storage.list_files(f"{url}/codes")) for url in (preset, trained))
    assert ours == theirs and ours and not storage.list_files(f"{preset}/dvae/checkpoints")
    if not storage.is_remote(trained):
        assert all(Path(trained, "codes", name).samefile(Path(preset, "codes", name)) for name in ours), "they take no room"


def test_the_same_command_goes_on_where_one_was_killed_and_other_values_are_refused(trained: str) -> None:
    align.prepared(trained, [], "twice", dry_run=False)
    twin = trained.rpartition("/")[0] + "/twice"
    (lost, *_) = storage.list_files(f"{twin}/codes")
    storage.delete(f"{twin}/codes/{lost}")
    storage.delete(f"{twin}/encode/done.json")
    align.prepared(trained, [], "twice", dry_run=False)
    assert storage.exists(f"{twin}/codes/{lost}") and RunFolder(twin).done("encode") == RunFolder(trained).done("encode")
    with pytest.raises(ConfigError, match=r"dalle_fit\.contrast_beta: 0\.02 -> 0\.5"):
        align.prepared(trained, ["dalle_fit.contrast_beta=0.5"], "twice", dry_run=False)
    with pytest.raises(ConfigError, match=r"^--name mine: the new run would be .*/mine itself; give another name\.$"):
        align.prepared(trained, [], "mine", dry_run=False)


def test_what_has_no_trained_transformer_is_refused_and_a_dry_run_makes_nothing(trained: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(DataError, match=r"no run folder \(it has no config\.json\); give the folder of a trained run\.$"):
        align.prepared(f"{tmp_path}/nothing", [], "", dry_run=False)
    launch.demo(*align.prepared(trained, ["dalle_fit.contrast_lambda=3.0"], "", dry_run=True), on="local", nproc=1, dry_run=True, stop=StopFlag())
    said = capsys.readouterr().out
    assert "objective = \"caption_contrast\"    # preset: 'likelihood'" in said and "contrast_lambda = 3.0 " in said
    assert f'name = "{trained.rpartition("/")[2]}-aligned"' in said and not storage.list_files(f"{trained}-aligned")
    storage.delete(f"{trained}/dalle/export/config.json")
    with pytest.raises(
        DataError, match=r"has no trained transformer to begin with; run 'launcher.py dalle .*', or of one under way 'launcher.py export"
    ):
        align.prepared(trained, [], "", dry_run=False)


@pytest.mark.parametrize("preset", ["12B", "120M"])
def test_the_schedule_takes_a_hundredth_of_the_operations_that_training_took(preset: str) -> None:
    cfg = load_run(preset, [])
    words = ["dalle_fit.init_from=/export", "dalle_fit.objective=caption_contrast", *align.schedule(cfg.dalle_fit)]
    fit, shape = load_run(preset, words).dalle_fit, cfg.stream_shape()
    assert fit.batch == cfg.dalle_fit.batch
    took, takes = cfg.dalle_fit.steps * train_flops(cfg.dalle, shape), fit.steps * update_flops(cfg.dalle, shape, contrasts=True)
    assert takes == pytest.approx(align.SHARE * took, rel=0.02)
    assert fit.steps * 0.9 < fit.ema_every / (1 - fit.ema) <= fit.steps, "the average spans all of it"
    assert fit.lr == pytest.approx(cfg.dalle_fit.lr / 10)
