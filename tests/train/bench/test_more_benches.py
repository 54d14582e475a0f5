"""Plain decoders as peers of the training step, and the opening of a very large set, at small sizes. About 12 s."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.shards.shard_set import IMAGE_SCHEMA, open_set
from model.config import StreamShape, TransformerConfig
from train.bench import comm, compression, peer_blocks, samples, training_peers
from train.bench import open_set as bench
from train.bench.harness import to_json
from train.bench.peer_blocks import Decoder, training_step
from train.engines.zero.compression.update import CompressedUpdate
from train.machine.rates import Options

CFG, SHAPE = TransformerConfig(layers=2, width=32, heads=2), StreamShape(text_tokens=6, text_vocab=40, grid=4, image_vocab=20)


@pytest.mark.parametrize("kind", peer_blocks.KINDS)
def test_a_peer_trains_sees_nothing_that_comes_later_and_has_as_many_weights(kind: peer_blocks.Kind) -> None:
    step = training_step(kind, CFG, SHAPE, 2, torch.float32, "cpu", compiled=False)
    losses = [step() for _ in range(25)]
    assert losses[-1] < losses[0] - 0.01 and abs(losses[0] - (math.log(40) / 8 + 7 * math.log(20) / 8)) < 1.0
    model = Decoder(kind, CFG, SHAPE)
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    text, codes = torch.randint(40, (1, 6)), torch.randint(20, (1, 16))
    model(text, codes)
    model(text, torch.cat([codes[:, :8], (codes[:, 8:] + 1) % 20], 1))
    assert torch.equal(seen[0][:, :14], seen[1][:, :14]) and not torch.equal(seen[0][:, 14:], seen[1][:, 14:])
    wide = Decoder(kind, replace(CFG, width=768, heads=12), SHAPE).blocks[0]
    matrices = sum(p.numel() for p in wide.parameters() if p.dim() == 2)
    assert matrices == 12 * 768**2, "4 in attention, 8 in the MLP"


def test_ours_is_compared_with_each_peer_at_its_best() -> None:
    found = training_peers.compare(CFG, SHAPE, 2, Options("cpu", 0.01, 1), engine="structured", compiled=False)
    assert set(found.peers) == {"nanoGPT-style, bf16, eager", "LlamaGen-style, bf16, eager"} and len(found.ratios) == 2
    assert set(found.measured) == {f"ours, bf16, logits in {logits}" for logits in ("fp32", "bf16")}
    assert all(ratio.of.startswith("ours, bf16, logits in ") and ratio.value > 0 for ratio in found.ratios.values()) and to_json(found)


def test_a_generated_set_opens_with_as_many_records_as_it_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    records = 3 * bench._A_SHARD * bench._SHARDS_A_PART + 17
    folder = str(tmp_path_factory.mktemp("set"))
    made = bench.generate(folder, records)
    found = open_set(folder, IMAGE_SCHEMA, version=made.content_hash)
    assert len(found.parts) == 4
    assert found.stored == records and sum(shard.samples for shard in found.shards) == records and len(found.removed) == -(-records // bench._HIDDEN)
    result = bench.measured(Options("cpu", 0.05, 1), records)
    assert result.measured["opening"].value > result.floor["reading the same bytes"].value > 0
    assert result.ratios["time allowed over opening"].goal == 1.0 and result.settings["records"] == records


def test_sums_over_ranks_are_timed_beside_a_copy_of_memory() -> None:
    found = comm.measured(Options("cpu", 0.02, 2), 2)
    assert found.measured["all-reduce of a bucket"].value > 0.01 and 1 < found.measured["the step's message"].value < 1e6
    assert found.ratios["all-reduce over copying memory"].to == "copying memory" and found.settings["backend"] == "gloo"


def test_compression_is_timed_whole_beside_the_backward_pass_of_the_same_resblocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    payloads, settle = [], CompressedUpdate.settle

    def slow(update: CompressedUpdate, applied: list[bool]) -> None:
        payloads.append((update.wire.payload, update.members))
        time.sleep(0.1)
        settle(update, applied)

    monkeypatch.setattr(CompressedUpdate, "settle", slow)
    found = compression.compare(CFG, SHAPE, 2, Options("cpu", 0.01, 2, tmp_path), engine="structured")
    assert capsys.readouterr().err.count("backward pass: ") == 3, "kept in each turn, the first included"
    assert found.floor["backward pass"].runs == 2
    assert all(figure.min >= 100 for figure in found.measured.values()) and found.floor["backward pass"].min < 100
    goals = {name: ratio.goal for name, ratio in found.ratios.items()}
    assert goals == {f"a backward pass over compression, {gpus} GPUs a machine": 20.0 if gpus == 8 else None for gpus in (1, 2, 8)}
    for payload, members in payloads:
        # Each of 2 layers has 4 + 8 square matrices' worth in six; every one is compressed, in codes of two bytes.
        assert len(members) == 12 and payload == sum(2 * (member.block.factors if member.block else 0) for member in members) > 0
    assert to_json(found)


def test_a_drawing_beside_training_runs_only_in_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "PRESET", "tiny")
    monkeypatch.setattr(samples, "TURNS", 3)
    monkeypatch.setattr(samples, "UPDATES", 1)
    states, kill = [], samples.os.kill

    def noted(pid: int, number: int) -> None:
        kill(pid, number)
        states.append(number)

    def update() -> None:
        drawing = states[-1] == signal.SIGCONT
        time.sleep(0.02 if drawing else 0.01)

    monkeypatch.setattr(samples.os, "kill", noted)
    monkeypatch.setattr(samples, "dalle_update", lambda *_: update)
    found = samples.run(Options("cpu", 0.01, 1))
    slower = [figure for name, figure in found.measured.items() if name.startswith("slower")]
    assert slower and all(50 < figure.min <= figure.value <= figure.max for figure in slower) and to_json(found)
    assert states[0] == signal.SIGSTOP and states.count(signal.SIGCONT) == 3 * len(slower)
