"""What compressing gradients between machines costs a GPU beside its backward pass, with messages that take no time. ``launcher.py bench compression``

The parts of an update that compression adds (train/engines/zero/compression/update.py) are run as one process of one machine runs them, on its shards of the block
matrices, with collectives that do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from model.attention_engines import EngineName
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer, parameter_tags
from train.bench.harness import Result, main, start
from train.bench.memory import build
from train.engines.zero.compression.buffers import ErrorBuffers
from train.engines.zero.compression.construction import members_of, slots_of
from train.engines.zero.compression.exchange import Exchange
from train.engines.zero.compression.update import CompressedUpdate
from train.engines.zero.shards import Piece
from train.machine.rates import Options, milliseconds, now, threads

_SIZES = {"cpu": (TransformerConfig(layers=1, width=2048, heads=32), 8), "cuda": (TransformerConfig(layers=24, width=2048, heads=32), 8)}
"""Device -> resblocks of 1.2B's width, and the pictures of a GPU in an update."""
_SHAPE = StreamShape(text_tokens=256, text_vocab=256, grid=32, image_vocab=256)
"""Vocabularies are small, so that the backward pass is that of the resblocks, whose gradients are compressed."""
_DTYPE = "bf16"
_SHARE = 0.25
"""Total rank over the width."""
_GPUS = (1, 2, 8)
"""GPUs of a machine, each with an equal part of every matrix, as on stage 3, and of the rank."""
_MACHINES = 2
GOAL = 20.0
"""Compression should take at most a twentieth of the backward pass."""


def run(options: Options) -> Result:
    """Measure the backward pass, and the compression for several numbers of GPUs."""
    cfg, batch = _SIZES[options.device]
    return compare(cfg, _SHAPE, batch, options, engine="flex" if options.device == "cuda" else "structured")


def compare(cfg: TransformerConfig, shape: StreamShape, batch: int, options: Options, *, engine: EngineName) -> Result:
    """Seconds of a backward pass, and of what an update's compression computes, of the same resblocks."""
    sizes = {"layers": cfg.layers, "width": cfg.width, "batch": batch, "states": shape.states, "precision": _DTYPE, "wire": "1-6-9"}
    count = torch.get_num_threads()
    result = start("compression", "Compressing gradients between machines", options, **sizes, share=_SHARE, machines=_MACHINES, threads=count)
    model = build(cfg, shape, engine, _DTYPE, 0, options.device)
    with threads(count), _silent_machines():
        works = {f"compression, {gpus} GPUs a machine": _Compressed(model, gpus, options.device) for gpus in _GPUS}
        seconds: dict[str, list[float]] = {}
        for turn in range(1 + options.runs):
            backward = _backward(model, shape, batch, options.device)
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found = {"backward pass": backward} | {name: work(gradients) for name, work in works.items()}
            if turn == 1:  # the first was a rehearsal, which stands only until there is more
                seconds.clear()
            for name, value in found.items():
                seconds.setdefault(name, []).append(value)
                (result.floor if name == "backward pass" else result.measured)[name] = milliseconds(seconds[name])  # of the turns so far
    for name in works:
        gpus = works[name].gpus
        result.ratio(f"a backward pass over compression, {gpus} GPUs a machine", "backward pass", name, goal=GOAL if gpus == max(_GPUS) else None)
    result.notes += [
        "Compression: errors and gradients added up, both products, the batched factorisation, codes of the wire, the projection and what it leaves of the errors, for one "
        f"GPU's shards, at a total rank of {_SHARE:g} of the width. Messages take no time: their bytes are in docs/compression.md and in `plan`. The cost of compression does not depend on the number of pictures, that of the backward pass is proportional to it.",
        "Products of factors are fp32 as in the paper, those of the backward pass bf16. Each of m GPUs has 1 / m of the rows and of the rank, so its products take 1 / m^2 of "
        "the time: few GPUs a machine pay most. The goal is for eight: at most a twentieth.",
    ]
    return result


class _Compressed:
    """The compression of one GPU's shards: the first of ``gpus`` equal parts of every matrix."""

    def __init__(self, model: Transformer, gpus: int, device: str) -> None:
        self.gpus, self.device = gpus, device
        tags, shapes = parameter_tags(model), {name: p.shape for name, p in model.named_parameters()}
        names = [name for name in shapes if tags[name].is_block_matrix]
        pieces = {name: Piece(name, 0, 0, 0, shapes[name].numel() // gpus, shapes[name].numel()) for name in names}
        rank = round(_SHARE * model.cfg.width / gpus) * gpus
        members = members_of(names, pieces, {name: shapes[name][-1] for name in names}, tags, rank, seed=0)
        place = torch.device(device)
        exchange = Exchange(None, _MACHINES, "1-6-9", place)
        self.update = CompressedUpdate(members, ErrorBuffers(pieces.values(), "fp32", place), exchange, refresh_every=0)
        self.lengths = {name: piece.length for name, piece in pieces.items()}
        self.slots = slots_of(tags)

    def __call__(self, gradients: dict[str, Tensor]) -> float:
        """Seconds of both halves for these gradients, without the copies of them that are made for it."""
        shards = [gradients[name].detach().reshape(-1)[:length].clone() for name, length in self.lengths.items()]
        began = now(self.device)
        self.update.exchange(shards, [1.0] * self.slots, update=1)
        self.update.settle([True] * self.slots)
        return now(self.device) - began


def _backward(model: Transformer, shape: StreamShape, batch: int, device: str) -> float:
    """Seconds of a backward pass on random tokens."""
    text_BT = torch.randint(2, shape.text_vocab, (batch, shape.text_tokens), device=device)
    lengths_B = torch.full((batch,), shape.text_tokens, device=device)
    codes_BI = torch.randint(shape.image_vocab, (batch, shape.image_tokens), device=device)
    model.zero_grad(set_to_none=True)
    text_nll_BT, image_nll_BI = model(text_BT, lengths_B, codes_BI)
    loss = text_nll_BT.mean() + image_nll_BI.mean()
    began = now(device)
    loss.backward()
    return now(device) - began


@contextmanager
def _silent_machines() -> Iterator[None]:
    """Inside, collectives do nothing. No process group is made: another benchmark of this process may have one, which DeepSpeed keeps."""
    with ExitStack() as stack:
        for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor"):
            stack.enter_context(mock.patch.object(dist, name, lambda *_, **__: None))
        yield


if __name__ == "__main__":
    main(run)
