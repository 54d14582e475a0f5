"""dalle-pytorch 1.6.6 from PyPI, for comparison: only its DALLE module, imported with stand-ins for the packages that its tokenizers and VQGANs would load.

``make bench-peers`` installs it without its dependencies (requirements-peers.txt). Nothing in this repository needs it but comparisons.
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

# Its modules import these at the top, but a training step never calls them.
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
    """The folders in which peers may be installed: $PEERS, and the one that ``make bench-peers`` fills."""
    return [Path(os.environ.get("PEERS") or REPOSITORY / ".venv-peers")]


def find(package: str) -> Path | None:
    """The folder from which a peer's package can be imported; None if it is not installed."""
    return next((folder for folder in folders() if (folder / package / "__init__.py").is_file()), None)


def load() -> Any:
    """Import the module ``dalle_pytorch``.

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
        sys.path.append(str(folder))  # at the end, so that our own packages have priority
    try:
        return importlib.import_module("dalle_pytorch")
    finally:
        for name in absent:
            del sys.modules[name]


def attention_pattern(layers: int) -> tuple[str, ...]:
    """The pattern of its attention layers that is most similar to the paper's: row, column, row, row, ..., with convolution last."""
    return (*("axial_col" if i % 4 == 1 else "axial_row" for i in range(layers - 1)), "conv_like")


def build(cfg: TransformerConfig, shape: StreamShape, attention: tuple[str, ...], *, text_ids: int) -> Any:
    """Build its model (a torch module) with the same depth, width, heads and image vocabulary as ours.

    Args:
        cfg: sizes.
        shape: the token stream.
        attention: kinds of attention of the layers; repeated if there are more layers.
        text_ids: number of ids of text, padding (0) included; the peer adds a padding id for each position.

    Raises:
        ValueError: it is not installed.
    """
    peer = load()
    # This VAE is never run: the model only asks it for the number of codes and the size of the grid.
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
    """A function that does one update of its model with the same depth, width, heads and vocabularies as ours. Lower precision uses autocast, as its authors
    intend.

    Raises:
        ValueError: it is not installed.
    """
    torch.manual_seed(0)
    text_ids = shape.text_vocab - shape.text_tokens  # with the padding ids that it adds, as many as ours
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
    """A function that computes the logits of one code in the middle of a picture, with its cache and in fp32. Every call computes the same position.

    Its own ``generate_images`` uses the cache only with guidance.

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
    """A copy of its cache. Only the queues of shifted tokens are copied, because they change in place; keys and values are replaced by new tensors."""
    return {key: copy.copy(value) for key, value in cache.items()}
