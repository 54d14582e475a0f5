"""The experiment against dalle-pytorch: ids and losses in its words, its training in a given time, the settings that halves share, the page."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from infra.digests import id_hash
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.system.test_training import copy_of
from train import launch
from train.bench import peer_dalle
from train.config import RunConfig, load_run
from train.experiments import page as page_module
from train.experiments import peer as peer_module
from train.experiments import peer_page, peer_training
from train.experiments.peer_training import Choice, Peer, best, its_text, step_size
from train.loop import metrics
from train.loop.metrics import MetricsWriter
from train.stages.dalle_task import cross_entropies

CFG = load_run("tiny", ["dalle.width=36", "dalle.heads=2", "dalle_fit.precision=fp32"])
SHAPE = CFG.stream_shape()
CHOICE = Choice("full", "fp32", 1e-3)


class StandIn(nn.Module):
    """What the experiment asks of dalle-pytorch's model, without its package: ids, padding, masked logits, the loss."""

    def __init__(self, text_ids: int) -> None:
        super().__init__()
        self.num_text_tokens = text_ids + SHAPE.text_tokens
        self.table = nn.Embedding(self.num_text_tokens + SHAPE.image_vocab, 8)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, text_BT: Tensor, codes_BI: Tensor, return_loss: bool = False) -> Tensor:
        padding_T = torch.arange(SHAPE.text_tokens) + self.num_text_tokens - SHAPE.text_tokens
        labels_BS = torch.cat([text_BT.where(text_BT != 0, padding_T), codes_BI + self.num_text_tokens], 1)
        before_BS = nn.functional.pad(labels_BS, (1, -1))
        logits_BSC = self.table(before_BS).cumsum(1) @ self.table.weight.t()
        is_image_S = torch.arange(before_BS.shape[1])[:, None] >= SHAPE.text_tokens
        is_code_C = torch.arange(len(self.table.weight)) >= self.num_text_tokens
        logits_BSC = logits_BSC.masked_fill(is_image_S != is_code_C, -torch.finfo(logits_BSC.dtype).max)
        if not return_loss:
            return logits_BSC
        nll_BS = nn.functional.cross_entropy(logits_BSC.transpose(1, 2), labels_BS, reduction="none")
        return nll_BS[:, : SHAPE.text_tokens].mean() / 8 + nll_BS[:, SHAPE.text_tokens :].mean() * 7 / 8


@pytest.fixture(params=["stand-in", "dalle-pytorch"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package, or where it is not installed its stand-in alone."""
    if request.param == "stand-in":
        monkeypatch.setattr(peer_dalle, "build", lambda cfg, shape, attention, *, text_ids: StandIn(text_ids))
    elif peer_dalle.find("dalle_pytorch") is None:
        pytest.skip("dalle_pytorch is not installed (make bench-peers)")
    return str(request.param)


def batch_of(count: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(2, SHAPE.text_vocab, (count, SHAPE.text_tokens), generator=generator)
    lengths_B = torch.randint(0, SHAPE.text_tokens + 1, (count,), generator=generator)
    lengths_B[0] = SHAPE.text_tokens
    codes_BI = torch.randint(SHAPE.image_vocab, (count, SHAPE.image_tokens), generator=generator)
    return {"ids": [f"{seed}-{index}" for index in range(count)], "text": text_BT, "lengths": lengths_B, "codes": codes_BI}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_ids_stay_and_what_is_no_token_becomes_its_padding(lengths: list[int]) -> None:
    text_BT = torch.arange(1, 1 + 6 * len(lengths)).view(-1, 6)
    for row, before, length in zip(its_text(text_BT, torch.tensor(lengths)), text_BT, lengths, strict=True):
        assert row[:length].equal(before[:length]) and not row[length:].any()


def test_its_figures_are_cross_entropies_written_by_hand(package: str) -> None:
    """Over all of its ids at once: its mask leaves image positions nothing but codes."""
    peer, batches = Peer(CFG, CHOICE), [batch_of(3), batch_of(2, 1)]
    ids, text_tokens = peer.model.num_text_tokens, SHAPE.text_tokens
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in ("text", "lengths", "codes")}
    names = [name for batch in batches for name in batch["ids"]]
    order = sorted(range(5), key=lambda index: id_hash(names[index]))
    followers = [order[(order.index(index) + 1) % 5] for index in range(5)]
    sums = []
    with torch.no_grad():
        for captions in (list(range(5)), followers):
            clean_BT = its_text(whole["text"][captions], whole["lengths"][captions])
            log_BSC = peer.model(clean_BT, whole["codes"]).log_softmax(2)
            sums.append(0.0)
            for row, code_I in enumerate(whole["codes"].tolist()):
                sums[-1] -= sum(float(log_BSC[row, text_tokens + place, ids + code]) for place, code in enumerate(code_I))
            assert float(log_BSC[:, text_tokens:, :ids].exp().sum()) == 0.0
    right, wrong = sums
    codes = 5 * SHAPE.image_tokens
    found = peer_training.figures(peer, batches)
    assert found["nats_per_code"] == pytest.approx(right / codes, rel=1e-5) and found["nats_shuffled"] == pytest.approx(wrong / codes, rel=1e-5)
    assert found["caption_gain"] == pytest.approx((wrong - right) / codes, abs=1e-5)
    everything = cross_entropies(peer.losses, batches, torch.device("cpu"), lambda lengths_B: lengths_B)
    tokens = 0.0
    with torch.no_grad():
        for batch in batches:
            text_nll_BT, _ = peer.losses(*(batch[key] for key in ("text", "lengths", "codes")))
            tokens += sum(float(row[:length].sum()) for row, length in zip(text_nll_BT, batch["lengths"].tolist(), strict=True))
    assert everything["loss_text"] == pytest.approx(tokens / sum(int(batch["lengths"].sum()) for batch in batches), rel=1e-5)


def test_its_loss_is_one_eighth_text_with_padding_and_seven_eighths_image(package: str) -> None:
    peer, batch = Peer(CFG, CHOICE), batch_of(4)
    padding_T = torch.arange(SHAPE.text_tokens) + SHAPE.text_vocab
    clean_BT = its_text(batch["text"], batch["lengths"])
    labels_BS = torch.cat([clean_BT.where(clean_BT != 0, padding_T), batch["codes"] + peer.model.num_text_tokens], 1)
    nll_BS = -peer.model(clean_BT, batch["codes"]).log_softmax(2).gather(2, labels_BS[..., None])[..., 0]
    by_hand = nll_BS[:, : SHAPE.text_tokens].mean() / 8 + nll_BS[:, SHAPE.text_tokens :].mean() * 7 / 8
    assert peer.loss(batch).item() == pytest.approx(by_hand.item(), rel=1e-5)
    garbled = batch | {"text": batch["text"].where(clean_BT != 0, 7)}
    assert peer.loss(garbled).item() == peer.loss(batch).item(), "what lies beyond a caption's length must not matter"


def test_its_step_size_warms_up_and_ends_with_the_time() -> None:
    assert 0 < step_size(0.0, 2.0) < 0.1 and step_size(peer_training.WARMUP, 2.0) == 2.0
    assert step_size(0.525, 2.0) == pytest.approx(1.0) and step_size(1.0, 2.0) == step_size(1.2, 2.0) == 0.0


class Batches:
    """A loader that has the same batch for ever."""

    def next(self) -> dict[str, Any]:
        return batch_of(2)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def test_it_trains_for_the_minutes_and_evaluations_cost_none(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    seconds = SimpleNamespace(perf_counter=lambda: float(next(clock)))  # a second for each update
    monkeypatch.setattr(peer_training, "time", seconds)  # and not for the process: other threads look at the clock too
    peer, evaluations = Peer(CFG, CHOICE), []

    def evaluate() -> float:
        next(clock)
        evaluations.append(peer.loss(batch_of(2)).item())
        return evaluations[-1]

    points = peer_training.train(peer, Batches(), CFG, 0.5, 1e-2, evaluate, evaluations=3)
    assert [(minutes * 60, updates) for minutes, updates, _ in points] == [(10, 10), (20, 20), (30, 30)]
    assert evaluations[-1] < evaluations[0] and not any(p.grad is not None and p.grad.any() for p in peer.parameters)


def test_a_diverged_choice_is_never_the_best() -> None:
    choices = [Choice("full", "fp32", lr) for lr in (1.0, 2.0, 3.0)]
    assert best(zip(choices, [math.nan, 2.0, 1.5], strict=True)) is choices[2]
    assert best(zip(choices, [1.0, math.inf, math.nan], strict=True)) is choices[0]


@pytest.mark.parametrize("updates", [1, 20, 500, 4000])
def test_ours_warms_up_alike_and_is_evaluated_where_it_logs(updates: int) -> None:
    cfg = load_run("demo", peer_module.words_of(load_run("demo", []), updates))
    assert cfg.dalle_fit.steps == updates and cfg.dalle_fit.warmup_steps == round(0.05 * updates)
    assert cfg.dalle_fit.eval_every % cfg.dalle_fit.log_every == 0 and updates / cfg.dalle_fit.eval_every < 26


def test_points_of_our_curve_leave_out_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of 1 s, evaluations of 100 s, and a start that does not matter."""
    now = [5000.0]
    monkeypatch.setattr(metrics.time, "time", lambda: now[0])
    writer = MetricsWriter(str(tmp_path), "dalle", 0)
    for step in range(1, 31):
        now[0] += 1
        writer.scalars(step, {"train/loss": 1.0})
        if step % 12 == 0 or step == 30:
            now[0] += 100
            writer.scalars(step, {"eval/loss_image": 100.0 - step})
    writer.scalars(30, {"goodput/data_s": 2.0, "goodput/step_s": 27.0, "goodput/save_s": 1.0, "goodput/evaluate_s": 300.0})
    writer.close()
    points = peer_module.curve(str(tmp_path))
    assert [(round(minutes * 60, 6), updates, nats) for minutes, updates, nats in points] == [(12, 12, 88), (24, 24, 76), (30, 30, 70)]


def test_a_half_of_other_settings_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    assert peer_module.read(out, {"batch": 1}, "ours") == {"kind": "peer", "settings": {"batch": 1}}
    peer_module.write(out, {"kind": "peer", "settings": {"batch": 1}, "peer": {"minutes": 1.23456789, "curve": [(1.0, 2, 3.0)]}})
    kept = peer_module.read(out, {"batch": 1}, "ours")
    assert kept["peer"] == {"minutes": 1.23457, "curve": [[1.0, 2, 3.0]]}
    assert "peer" not in peer_module.read(out, {"batch": 2}, None), "both halves are new"
    assert "peer" not in peer_module.read(out, {"batch": 2}, "peer"), "so is the only one there"
    with pytest.raises(ConfigError, match=r"x\.json holds the half 'peer' with other settings; run both halves again[^$]*batch: 1 -> 2"):
        peer_module.read(out, {"batch": 2}, "ours")


def test_a_stage_that_fails_ends_the_experiment_with_its_code(prepared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = RunFolder(str(copy_of(prepared, tmp_path) / "tiny"))
    monkeypatch.setattr(peer_module.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit) as caught:
        peer_module.launch(load_run(run.url, []), run, "ours", [], 1)
    assert caught.value.code == 1


class Half:
    """A started process: the words it got, the cores it may use, and the code it ends with."""

    started: ClassVar[list[Half]] = []
    code = 78

    def __init__(self, command: list[str]) -> None:
        self.words, self.cores = command[3:], os.sched_getaffinity(0)
        self.started.append(self)

    def wait(self) -> int:
        with open(self.words[-3], "a") as out:
            out.write("1")
        return int("peer" in self.words) * self.code


def test_halves_at_once_have_cores_of_their_own(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one core")
    monkeypatch.setattr(peer_module.subprocess, "Popen", Half)
    monkeypatch.setattr(Half, "started", [])
    url, out = str(prepared / "tiny"), tmp_path / "old.json"
    out.write_text("{}")
    (tmp_path / "old.json.new").write_text("stale")
    with pytest.raises(SystemExit) as caught:
        peer_module.main([url, "--at-once", "--threads", "1", "--out", str(out)])
    assert (
        caught.value.code == 78 and out.read_text() == "{}" and (tmp_path / "old.json.new").read_text() == "11" and os.sched_getaffinity(0) == allowed
    )
    ours, peer = Half.started
    assert (ours.words[-2:], peer.words[-2:]) == (["--only", "ours"], ["--only", "peer"]) and ours.words[:-2] == peer.words[:-2]
    assert "--at-once" in ours.words and len(ours.cores) == len(peer.cores) == 1 and ours.cores != peer.cores
    monkeypatch.setattr(Half, "code", -9)
    with pytest.raises(SystemExit) as caught:
        peer_module.main([url, "--at-once", "--threads", "1", "--out", str(out)])
    assert caught.value.code == 9 and out.read_text() == "{}", "a killed half is no success"
    monkeypatch.setattr(Half, "code", 0)
    monkeypatch.setattr(peer_module.peer_page, "section", str)
    peer_module.main([url, "--at-once", "--threads", "1", "--out", str(out)])
    assert out.read_text() == "11"
    with pytest.raises(ConfigError, match=f"--threads {len(allowed)} needs {2 * len(allowed)} cores"):
        peer_module.main([url, "--at-once", "--threads", str(len(allowed))])


def in_process(command: list[str], **_: Any) -> subprocess.CompletedProcess:
    """The launcher without a process of its own: importing DeepSpeed three times would take most of a minute."""
    name, preset, *words = command[2:-2]
    launch.stage(name, preset, words, on="local", nproc=int(command[-1]), dry_run=False, worker=False, stop=StopFlag())
    return subprocess.CompletedProcess(command, 0)


def test_both_halves_on_a_tiny_run_and_the_page_of_it(
    package: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_module, "subprocess", SimpleNamespace(run=in_process))
    monkeypatch.setattr(peer_training, "_RATE_S", 0.01)
    url = str(copy_of(prepared, tmp_path / "runs") / "tiny")
    out = tmp_path / "docs" / "experiments" / "against-dalle-pytorch-tiny.json"
    monkeypatch.setattr(peer_module, "_FOLDER", out.parent)
    words = [url, "dalle.width=36", "dalle.heads=2", "dalle_fit.precision=fp32", "evaluate.samples=30"]
    main_words = [*words, "--minutes", "0.02", "--probe-minutes", "0.005", "--threads", "1"]
    peer_module.main([*main_words, "--only", "ours"])
    shown = capfd.readouterr().out
    assert "The other half is missing" in shown and "on the same machine,\none after the other. Updates" in shown
    peer_module.main([*main_words, "--only", "peer", "--attention", "full", "axial"])
    text = out.read_text()
    found = json.loads(text)
    ours, peer = found["ours"], found["peer"]
    assert str(tmp_path) not in text and found["settings"]["width"] == 36 and found["settings"]["validation_images"] == 30
    assert ours["curve"][-1][0] == pytest.approx(ours["minutes"], rel=1e-3) and ours["curve"][-1][1] == ours["updates"]
    assert peer["minutes"] >= ours["minutes"] and len(peer["probes"]) == 8 and peer["recipe"]["precision"] in ("fp32", "bf16")
    for figures in (ours["final"]["averaged"], ours["final"]["raw"], peer["final"]["raw"]):
        assert figures["nats_per_code"] > 0 and figures["caption_gain"] == pytest.approx(
            figures["nats_shuffled"] - figures["nats_per_code"], abs=1e-4
        )
    assert ours["final"]["averaged"] != ours["final"]["raw"]

    (tmp_path / "docs" / "pictures").mkdir()
    monkeypatch.setattr(page_module, "DOCS", tmp_path / "docs")
    page_module.main(["--render"])
    page = (tmp_path / "docs" / "experiments.md").read_text()
    assert (
        "## Against dalle-pytorch, on tiny with `dalle.width=36" in page
        and f"| {ours['updates']:,} | {ours['updates']:,} | {peer['updates']:,} |" in page
    )
    assert "the best of 4 step sizes and of the attention patterns axial and full by probes" in page
    assert f"| epochs | {ours['updates'] * 8 / found['settings']['training_images']:.1f} |" in page
    picture = ElementTree.parse(tmp_path / "docs" / "pictures" / "against-dalle-pytorch-tiny.svg").getroot()
    shown = "".join(picture.itertext())
    assert "dalle-pytorch" in shown and "ours, averaged weights" in shown and "minutes of training" in shown


@pytest.mark.parametrize(
    ("ours", "said"), [(3.8, "5.0% lower (2.5% lower with the last weights); the goal of 5% lower is reached"), (4.2, "5.0% higher")]
)
def test_the_verdict_says_by_how_much_and_whether_that_is_enough(ours: float, said: str) -> None:
    averaged, raw, theirs = ({"nats_per_code": value} for value in (ours, 3.9, 4.0))
    found = {"ours": {"final": {"averaged": averaged, "raw": raw}}, "peer": {"final": {"raw": theirs}}}
    assert said in peer_page.verdict(found) and ("missed" in peer_page.verdict(found)) == (ours > 4)


def test_the_committed_pictures_are_those_of_the_committed_files() -> None:
    files = sorted((page_module.DOCS / "experiments").glob("against-dalle-pytorch-*.json"))
    assert [path.stem for path in files] == sorted(path.stem for path in (page_module.DOCS / "pictures").glob("against-dalle-pytorch*.svg"))
    for path in files:
        found = json.loads(path.read_text())
        assert path.stem == peer_page.stem(found["settings"]["run"])
        assert (page_module.DOCS / peer_page.picture_place(found)).read_text() == peer_page.picture(found)


def test_the_configuration_shapes_both_models(package: str) -> None:
    cfg: RunConfig = load_run("tiny", ["dalle.width=36", "dalle.heads=2", "dalle.layers=3"])
    peer = Peer(cfg, CHOICE)
    assert peer.model.num_text_tokens == SHAPE.text_vocab + SHAPE.text_tokens
    assert all(p.requires_grad for p in peer.parameters) and len(peer.parameters) < len(list(peer.model.parameters()))
