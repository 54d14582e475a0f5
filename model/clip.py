"""A small contrastive model of images and captions, which reranks pictures (paper 2.6; Radford et al. 2021).

B pairs, C = 3 channels, Y X pixels, G patches, T text positions, D width, E shared embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import sdpa
from model.config import ClipConfig
from model.starts import normal, normal_

_MAX_LOG_SCALE = math.log(100.0)
_FIRST_LOG_SCALE = math.log(1 / 0.07)


class Block(nn.Module):
    """Pre-norm self-attention and MLP; every position attends to all positions that ``mask`` allows."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads, self.recompute = heads, False
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.post = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_1, self.mlp_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for linear, std in (
            (self.qkv, width**-0.5),
            (self.post, (2 * layers * width) ** -0.5),
            (self.mlp_1, (2 * width) ** -0.5),
            (self.mlp_2, (2 * layers * width) ** -0.5),
        ):
            normal_(linear.weight, std)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor | None = None) -> Tensor:
        """States [B, S, D] to states [B, S, D]."""
        if self.recompute and torch.is_grad_enabled():
            y_BSD: Tensor = checkpoint(self._forward, x_BSD, mask_B11S, use_reentrant=False, preserve_rng_state=False)
            return y_BSD
        return self._forward(x_BSD, mask_B11S)

    def _forward(self, x_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        q_BHSK, k_BHSK, v_BHSK = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x_BSD)).chunk(3, dim=2))
        out_BHSK = sdpa.attention(q_BHSK, k_BHSK, v_BHSK, mask=mask_B11S)
        x_BSD = x_BSD + self.post(out_BHSK.transpose(1, 2).flatten(2))
        y_BSD: Tensor = self.mlp_2(F.gelu(self.mlp_1(self.norm_2(x_BSD))))
        return x_BSD + y_BSD


class Scaled(nn.Module):
    """What contrastive models have in common: a learned factor of the cosines, of at most 100."""

    log_scale: nn.Parameter

    def add_scale(self) -> None:
        """To be called once, when the model is built."""
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_LOG_SCALE))

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines: the inverse temperature; a scalar."""
        return self.log_scale.exp()

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Keep the scale at or below 100; to be called after each update. A clamp inside ``scale`` would have no gradient beyond the limit, so a scale that has
        exceeded it could never return."""
        self.log_scale.clamp_(max=_MAX_LOG_SCALE)


class Clip(Scaled):
    """An image tower on patches, and a text tower without a causal mask; both are mean-pooled and projected into one embedding space."""

    def __init__(self, cfg: ClipConfig, image_size: int, text_tokens: int, text_vocab: int) -> None:
        """Build and initialise.

        Raises:
            ValueError: the image size is not a multiple of the patch size.
        """
        super().__init__()
        if image_size % cfg.patch:
            raise ValueError(f"clip.patch = {cfg.patch} does not divide dvae.image_size = {image_size}")
        self.cfg, self.text_tokens, self.text_vocab, self.image_size = cfg, text_tokens, text_vocab, image_size
        width = cfg.width
        self.patches = nn.Conv2d(3, width, cfg.patch, cfg.patch)
        self.patch_positions = nn.Parameter(normal((image_size // cfg.patch) ** 2, width, times=width**-0.5))
        self.tokens = nn.Embedding.from_pretrained(normal(text_vocab, width), freeze=False)  # the numbers that it would draw by itself
        self.token_positions = nn.Parameter(normal(text_tokens, width, times=0.01))
        normal_(self.tokens.weight, 0.02)
        self.image_blocks = nn.ModuleList(Block(width, cfg.heads, cfg.layers) for _ in range(cfg.layers))
        self.text_blocks = nn.ModuleList(Block(width, cfg.heads, cfg.layers) for _ in range(cfg.layers))
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_head, self.text_head = nn.Linear(width, cfg.embed, bias=False), nn.Linear(width, cfg.embed, bias=False)
        self.add_scale()

    def encode_image(self, pixels_BCYX: Tensor) -> Tensor:
        """Pixels in [0, 1], fp32 [B, 3, image_size, image_size], to unit vectors fp32 [B, E].

        Raises:
            ValueError: pictures of another shape.
        """
        if pixels_BCYX.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"pixels have shape {tuple(pixels_BCYX.shape)}: expected [B, 3, {self.image_size}, {self.image_size}] (dvae.image_size)")
        x_BGD = self.patches(pixels_BCYX * 2 - 1).flatten(2).transpose(1, 2) + self.patch_positions
        for block in self.image_blocks:
            x_BGD = block(x_BGD)
        return F.normalize(self.image_head(self.image_norm(x_BGD.mean(1))), dim=1)

    def encode_text(self, text_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Text ids int64 [B, T] with caption lengths int64 [B] to unit vectors fp32 [B, E]; ids beyond a caption's length have no effect.

        Raises:
            ValueError: texts of another shape.
        """
        if text_BT.ndim != 2 or text_BT.shape[1] != self.text_tokens or lengths_B.shape != text_BT.shape[:1]:
            raise ValueError(
                f"text has shape {tuple(text_BT.shape)} with lengths {tuple(lengths_B.shape)}: "
                f"expected [B, {self.text_tokens}] (tokenizer.max_tokens) and [B]"
            )
        # An empty caption needs at least one state to pool: its first slot.
        slot_T = torch.arange(self.text_tokens, device=text_BT.device)
        is_token_BT = slot_T < lengths_B.clamp(min=1)[:, None]
        x_BTD = self.tokens(text_BT.where(slot_T < lengths_B[:, None], 0)) + self.token_positions
        for block in self.text_blocks:
            x_BTD = block(x_BTD, is_token_BT[:, None, None])
        mean_BD = (x_BTD * is_token_BT[..., None]).sum(1) / is_token_BT.sum(1, keepdim=True)
        return F.normalize(self.text_head(self.text_norm(mean_BD)), dim=1)

    def recompute_blocks(self) -> None:
        """Keep only the inputs of blocks for the backward pass, which computes their inner activations again."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = True
