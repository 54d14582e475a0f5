"""Contrastive models that stage clip has trained: what they have in common, and how an export is opened.

Shapes: B pairs, E shared embedding, Y X rows and columns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from infra.errors import DataError
from model.clip import Clip
from model.config import ClipConfig
from model.frozen_clip import FrozenHeads
from train.weights import export, minilm, towers

log = logging.getLogger(__name__)

_REMEMBERED = 64  # captions whose vector is kept: each candidate of a caption asks for it


class Ranker(Protocol):
    """Maps pictures and captions to unit vectors, whose cosines say how well they fit."""

    @property
    def networks(self) -> frozenset[str]:
        """Names of the networks from packages that it looks through: nothing that looks through one of them judges what it has ranked."""

    def encode_image(self, pixels_B3YX: Tensor) -> Tensor:
        """Square pictures in [0, 1] -> [B, E]."""

    def encode_caption(self, caption: str) -> Tensor:
        """-> [1, E]."""


class Contrastive(Ranker, Protocol):
    """A model of stage clip."""

    def encode_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Unit vectors of the pictures and captions of a batch of ``image_collate``, [B, E] each."""


@dataclass(frozen=True)
class OwnClip:
    """A model whose towers stage clip has trained, with the tokenizer that it was trained with."""

    clip: Clip
    tokenizer: Tokenizer

    @property
    def networks(self) -> frozenset[str]:
        return frozenset()

    def encode_image(self, pixels_B3YX: Tensor) -> Tensor:
        return self.clip.encode_image(pixels_B3YX)

    def encode_caption(self, caption: str) -> Tensor:
        ids, length = self.tokenizer.encode(caption)
        return self.clip.encode_text(torch.from_numpy(ids)[None].to(self._device), torch.tensor([length], device=self._device))

    def encode_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        pixels_B3YX, text_BT, lengths_B = (batch[key].to(self._device) for key in ("pixels", "text", "lengths"))
        return self.clip.encode_image(pixels_B3YX), self.clip.encode_text(text_BT, lengths_B)

    @property
    def _device(self) -> torch.device:
        return next(self.clip.parameters()).device


@dataclass(frozen=True)
class FrozenClip:
    """A model whose heads stage clip has trained, on features of networks from packages."""

    heads: FrozenHeads
    towers: towers.Towers

    @property
    def networks(self) -> frozenset[str]:
        return towers.NETWORKS

    def encode_image(self, pixels_B3YX: Tensor) -> Tensor:
        return self.heads.embed_image(self.towers.image(pixels_B3YX))

    def encode_caption(self, caption: str) -> Tensor:
        """A caption in a script that the encoder does not know gets a vector, and a warning."""
        vector_1E: Tensor = self._remembered(caption)
        return vector_1E

    def encode_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        device = self.heads.log_scale.device
        return self.encode_image(batch["pixels"].to(device)), self.heads.embed_text(self.towers.text(batch["captions"]))

    @cached_property
    def _remembered(self) -> Any:
        return lru_cache(_REMEMBERED)(self._read)

    def _read(self, caption: str) -> Tensor:
        if minilm.is_foreign(caption):
            log.warning(
                "'%s': MiniLM, which reads captions for the model that ranks, knows the Latin script alone; the order of its pictures says little",
                caption[:60],
            )
        return self.heads.embed_text(self.towers.text([caption]))


def networks_of(cfg: ClipConfig) -> frozenset[str]:
    """Names of the networks from packages that a model of these sizes looks through."""
    return towers.NETWORKS if cfg.towers == "frozen" else frozenset()


def build(cfg: ClipConfig, image_size: int, text_tokens: int, text_vocab: int) -> Clip | FrozenHeads:
    """What stage clip trains, with initial weights."""
    return FrozenHeads(cfg) if cfg.towers == "frozen" else Clip(cfg, image_size, text_tokens, text_vocab)


def open_contrastive(
    url: str, cfg: ClipConfig, image_size: int, tokenizer: Tokenizer, text_vocab: int, device: torch.device
) -> tuple[Contrastive, str]:
    """Open an export as what ranks, and return it with the content hash of what was trained.

    Raises:
        CheckpointError, ConfigError, DataError: as ``open_module`` and ``ranking``.
    """
    module, identity = open_module(url, cfg, image_size, tokenizer.max_tokens, text_vocab, device)
    return ranking(module, url, tokenizer, device), identity


def open_module(
    url: str, cfg: ClipConfig, image_size: int, text_tokens: int, text_vocab: int, device: torch.device
) -> tuple[Clip | FrozenHeads, str]:
    """What stage clip has trained, and its content hash.

    Raises:
        CheckpointError: the weights are damaged, or of another shape.
    """
    module, identity = export.open_as(url, lambda: build(cfg, image_size, text_tokens, text_vocab))
    export.to_device(module, device)
    return module, identity


def ranking(module: Clip | FrozenHeads, url: str, tokenizer: Tokenizer, device: torch.device) -> Contrastive:
    """What was opened from ``url``, with what reads captions for it.

    Raises:
        ConfigError: a package that holds a frozen tower is not installed.
        DataError: it holds another network than the one that heads were trained on.
    """
    if isinstance(module, Clip):
        return OwnClip(module, tokenizer)
    found = towers.open_towers(device)
    _check_towers(url, found)
    return FrozenClip(module, found)


def _check_towers(url: str, found: towers.Towers) -> None:
    """
    Raises:
        DataError: the heads at ``url`` were trained on features of other networks than those that are installed.
    """
    parents = export.describe(url).get("parents", {})
    for kind, here in found.lineage.items():
        if (was := str(parents.get(kind, "none"))) != here:
            raise DataError(
                f"{url}: its heads were trained on features of {kind} {was[:12]}, and the installed package holds {here[:12]}; install the version that it "
                f"was trained with ({towers.INSTALL}), or train clip again."
            )
