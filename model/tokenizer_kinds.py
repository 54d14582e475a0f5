"""Builds the image tokenizer that a configuration names."""

import torch

from model.config import DVAEConfig
from model.dvae import DVAE
from model.image_tokenizer import ImageTokenizer
from model.vqgan import Vqgan


def image_tokenizer(cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32) -> ImageTokenizer:
    """The networks of ``cfg.kind``, with initial weights. ``compute_dtype`` is that of the products in their blocks."""
    return Vqgan(cfg, compute_dtype) if cfg.kind == "vqgan" else DVAE(cfg, compute_dtype)
