"""dalle-pytorch 1.6.6 from PyPI as a peer: the DALLE module alone, imported with stand-ins for what its tokenizers and VQGANs would load.

``make bench-peers`` installs it without its dependencies (requirements-peers.txt); it is never a requirement of ours.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from infra.repository import REPOSITORY
from model.config import StreamShape, TransformerConfig

# Imported at the top of its modules and never called on the way to a training step.
_STAND_INS: dict[str, tuple[str, ...]] = {
    "pkg_resources": ("get_distribution",),
    "omegaconf": ("OmegaConf",),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "requests": (),
    "tqdm": ("tqdm",),
    "yaml": (),
    "PIL": (),
}


def folders() -> list[Path]:
    """Where peers may be installed: $PEERS, or the folder that ``make bench-peers`` fills."""
    return [Path(os.environ.get("PEERS") or REPOSITORY / ".venv-peers")]


def find(package: str) -> Path | None:
    """The folder to import a peer's package from; None if it is not installed."""
    return next((folder for folder in folders() if (folder / package / "__init__.py").is_file()), None)


def load() -> Any:
    """The module ``dalle_pytorch``.

    Raises:
        ValueError: it is not installed.
    """
    folder = find("dalle_pytorch")
    if folder is None:
        raise ValueError("dalle_pytorch is not installed: run 'make bench-peers', or set PEERS to a folder that holds it (requirements-peers.txt)")
    absent = [name for name in _STAND_INS if name not in sys.modules]
    for name in absent:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for member in _STAND_INS[name]:
            setattr(module, member, lambda *_: None) if member.islower() else setattr(module, member, type(member, (torch.nn.Module,), {}))
        sys.modules[name] = module
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: what we have installed ourselves goes first
    try:
        return importlib.import_module("dalle_pytorch")
    finally:
        for name in absent:
            del sys.modules[name]


def attention_pattern(layers: int) -> tuple[str, ...]:
    """Its nearest to the paper's pattern: row, column, row, row, ..., with convolution last."""
    return (*("axial_col" if i % 4 == 1 else "axial_row" for i in range(layers - 1)), "conv_like")


def build(cfg: TransformerConfig, shape: StreamShape, attention: tuple[str, ...], *, text_ids: int) -> Any:
    """Its model (a torch module) of equal depth, width, heads and image vocabulary.

    Args:
        cfg: sizes.
        shape: the token stream.
        attention: kinds of attention, layer by layer, over and over.
        text_ids: ids of text, padding (0) included; it adds a padding id of its own for each position.

    Raises:
        ValueError: it is not installed.
    """
    peer = load()
    # A VAE that is never run: the model asks it for the number of codes and the size of the grid.
    vae = peer.DiscreteVAE(image_size=8 * shape.grid, num_tokens=shape.image_vocab, num_layers=3, hidden_dim=8, codebook_dim=8)
    return peer.DALLE(
        dim=cfg.width,
        vae=vae,
        num_text_tokens=text_ids,
        text_seq_len=shape.text_tokens,
        depth=cfg.layers,
        heads=cfg.heads,
        dim_head=cfg.width // cfg.heads,
        attn_types=attention,
    )


def training_step(
    cfg: TransformerConfig, shape: StreamShape, batch: int, dtype: torch.dtype, device: str, attention: tuple[str, ...]
) -> Callable[[], None]:
    """A function that does one update of its model of equal depth, width, heads and vocabularies; reduced precision by autocast, as it is meant to be used.

    Raises:
        ValueError: it is not installed.
    """
    torch.manual_seed(0)
    text_ids = shape.text_vocab - shape.text_tokens  # with those that it adds, as many as ours
    model = build(cfg, shape, attention, text_ids=text_ids).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    text_BT = torch.randint(1, text_ids, (batch, shape.text_tokens), device=device)
    codes_BI = torch.randint(shape.image_vocab, (batch, shape.image_tokens), device=device)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(text_BT, codes_BI, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def drawing_step(cfg: TransformerConfig, shape: StreamShape) -> Callable[[], object]:
    """A function that computes the logits of one code with its cache, in the middle of a picture, in fp32; again and again at the same place.

    Its own ``generate_images`` hands the cache on only where it is guided.

    Raises:
        ValueError: it is not installed.
    """
    torch.manual_seed(0)
    text_ids = shape.text_vocab - shape.text_tokens
    model = build(cfg, shape, attention_pattern(cfg.layers), text_ids=text_ids).eval()
    text_1T = torch.randint(1, text_ids, (1, shape.text_tokens))
    codes_1P = torch.randint(shape.image_vocab, (1, shape.image_tokens // 2 + shape.grid // 2))
    cache: dict[object, object] = {}
    with torch.no_grad():
        model(text_1T, codes_1P[:, :-1], cache=cache)

    def step() -> object:
        with torch.no_grad():
            return model(text_1T, codes_1P, cache=_copied(cache))[:, -1]

    return step


def _copied(cache: dict[object, object]) -> dict[object, object]:
    """Its queues of shifted tokens change in place; its keys and values are replaced."""
    return {key: copy.copy(value) for key, value in cache.items()}
