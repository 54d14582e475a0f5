"""The kernels that torch generates for the dVAE's compiled groups on real GPUs, without having one (train/bench/generated.py).

``python -m train.bench.dvae_kernels CAPABILITY`` prints rows of docs/kernels.md for one GPU, as JSON. Convolutions are cuDNN's and not generated.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import DVAEConfig
from model.dvae import DVAE
from train.bench.generated import compiled, pretended_gpu, sources, written

CONFIG = DVAEConfig()
"""The released model's sizes."""
BATCH, GROUP = 4, "group_2"


def rows(capability: int) -> list[dict[str, Any]]:
    """The second group of the encoder and of the decoder for one GPU: how many kernels, and the most that any of them uses."""
    found = []
    with pretended_gpu(capability):
        for half in ("encoder", "decoder"):
            for direction, program in zip(("forward", "backward"), programs(half), strict=True):
                used = [compiled(name, source) for name, source in sources(program).items()]
                most = {name: max(getattr(each, name) for each in used) for name in ("registers", "spills", "shared")}
                found.append({"half": half, "pass": direction, "target": capability, "kernels": len(used)} | most)
    return found


def programs(half: str) -> tuple[str, str]:
    """The programs for a group of residual blocks, forward and backward, with fp16 products. Inside ``pretended_gpu``."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        group = getattr(DVAE(CONFIG, torch.float16), half).blocks.get_submodule(GROUP)
        parameters = dict(group.named_parameters())
        channels = next(iter(parameters.values())).shape[1]
        x = torch.empty(BATCH, channels, CONFIG.image_size // 2, CONFIG.image_size // 2, requires_grad=True)

        def run(x: Tensor, *values: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(group, dict(zip(parameters, values, strict=True)), (x,))
            return out

        return written(run, [x, *parameters.values()])


if __name__ == "__main__":
    print(json.dumps(rows(int(sys.argv[1]))))
