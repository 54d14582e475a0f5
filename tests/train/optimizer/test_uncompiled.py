"""What a process that trains, saves, restores or draws need not import: torch's compiler and symbolic algebra, 1.3 s and 0.5 s of a core in each rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.support.root import ROOT
from train.optimizer.uncompiled import AdamW

_PROGRAM = """
import sys
import torch
from torch import nn
from infra.world import World
from model.clip import Clip
from model.dvae import DVAE
from model.transformer import Transformer
from train.config import load_run
from train.engines.replicated import ReplicatedEngine
from train.optimizer.adamw import PaperAdamW
from train.weights import checkpoint

cfg = load_run("tiny", [])
with torch.device("meta"):
    clip = Clip(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab)
    assert all(p.is_meta for model in (clip, DVAE(cfg.dvae), Transformer(cfg.dalle, cfg.stream_shape(), attend=nn.Identity())) for p in model.parameters())
engine = ReplicatedEngine(nn.Linear(4, 4), World.single(), betas=(0.9, 0.99), weight_decay=0.1, ema=0.9)
before = engine.module.weight.clone()
engine.backward(engine(torch.ones(2, 4)).square().mean())
assert engine.step(0.1).applied and not torch.equal(engine.module.weight, before) and engine.module.weight.grad is None
PaperAdamW([{"params": [nn.Parameter(torch.ones(3))]}], betas=(0.9, 0.99))
fragments = engine.fragments(to_load=True)
checkpoint.save(sys.argv[1], 1, fragments, {"shapes": {}}, World.single(), keep=1)
assert checkpoint.load_newest(sys.argv[1], fragments, World.single())["step"] == 1
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""


def test_updates_checkpoints_and_opened_models_load_no_compiler(tmp_path: Path) -> None:
    dear = ("torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.tensor", "sympy")
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(tmp_path), *dear], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "\n", done.stdout + done.stderr


def test_the_optimizer_without_the_compiler_is_torchs() -> None:
    def trained(make: type[torch.optim.AdamW]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = torch.nn.Linear(8, 8)
        optimizer = make([{"params": [module.weight]}, {"params": [module.bias], "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95), fused=True)
        for _ in range(5):
            module(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert module.weight.grad is None and not optimizer.state[module.weight]["exp_avg"].requires_grad
        return [
            module.weight.detach(),
            module.bias.detach(),
            *(optimizer.state[p][key] for p in module.parameters() for key in ("exp_avg", "exp_avg_sq")),
        ]

    assert all(map(torch.equal, trained(AdamW), trained(torch.optim.AdamW)))
