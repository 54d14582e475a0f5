"""Shapes of the networks, as plain frozen dataclasses without torch and pydantic, so that they can be used where only torch is installed.

As sections of the run configuration they are validated strictly by pydantic (``__pydantic_config__``).
"""

import math
from dataclasses import dataclass
from typing import Literal

NORM_GROUPS = 32
"""Groups of channels in a VQGAN's normalisation."""
_STRICT = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True}


def _positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value <= 0:
            raise ValueError(f"{name} = {value}: must be positive")


def _at_most(section: object, **limits: int) -> None:
    """Refuse sizes that no machine holds, before anything is computed from them. A configuration may come with somebody else's weights."""
    for name, limit in limits.items():
        value = getattr(section, name)
        if value > limit:
            raise ValueError(f"{name} = {value}: at most {limit} is accepted")


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """What turns pictures into codes and back: the discrete VAE of the release (paper A.1), whose sizes are the defaults, or an imported VQGAN."""

    __pydantic_config__ = _STRICT

    kind: Literal["dvae", "vqgan"] = "dvae"
    """'dvae': the paper's, trained by the stage dvae or imported; 'vqgan': the networks of taming-transformers and LlamaGen, imported by 'launcher.py
    import-vqgan', which names the values of all other keys."""
    image_size: int = 256
    """Height and width of an image in pixels. The image size is set here only."""
    downsample: int = 8
    """Pixels per code along each axis: 2, 4, 8 or 16. The code grid is image_size / downsample."""
    groups: int = 4
    """Groups of residual blocks; group i has width * 2**i channels in the encoder. The first log2(downsample) end in a pool. 'vqgan': each but the last ends in
    one, and group i has width * factors[i] channels."""
    blocks_per_group: int = 2
    """Residual blocks in each group."""
    width: int = 256
    """Channels of the encoder's first group (n_hid of the release; ch of a VQGAN)."""
    init_width: int = 128
    """Channels after the decoder's first 1x1 convolution (n_init): the width of a codebook vector (embed_dim of a VQGAN)."""
    vocab: int = 8192
    """Number of codes."""
    pool: Literal["max", "average"] = "max"
    """How the encoder's groups halve the picture: 'max' gave the better ELB (paper A.1). Without effect on a VQGAN."""
    factors: tuple[int, ...] = ()
    """'vqgan' only: channels of each group, divided by width (ch_mult)."""
    attention: tuple[int, ...] = ()
    """'vqgan' only: groups, counted from 0 at the pixels, whose residual blocks are each followed by attention."""
    latent: int = 0
    """'vqgan' only: channels between the networks and the codebook (z_channels)."""
    codebook: Literal["nearest", "cosine", "gumbel"] = "nearest"
    """'vqgan' only: which code is chosen. 'nearest': that of the nearest vector (taming-transformers); 'cosine': of the nearest direction, with vectors of length
    one (LlamaGen); 'gumbel': the likeliest by logits of its own (taming-transformers' GumbelVQ)."""

    def __post_init__(self) -> None:
        _positive(self, "image_size", "groups", "blocks_per_group", "width", "init_width", "vocab")
        _at_most(self, image_size=1 << 14, groups=12, blocks_per_group=256, width=1 << 16, init_width=1 << 20, vocab=1 << 24)
        if self.downsample not in (2, 4, 8, 16):
            raise ValueError(f"downsample = {self.downsample}: accepted are 2, 4, 8 and 16")
        if self.image_size % self.downsample:
            down = self.image_size // self.downsample * self.downsample
            raise ValueError(
                f"image_size = {self.image_size} is not divisible by downsample = {self.downsample}; nearest sizes: {down}, {down + self.downsample}"
            )
        if self.kind == "vqgan":
            self._check_vqgan()
            return
        if self.factors or self.attention or self.latent:
            raise ValueError(f"factors = {list(self.factors)}, attention = {list(self.attention)}, latent = {self.latent}: only for kind = 'vqgan'")
        if 2**self.groups < self.downsample:
            raise ValueError(f"groups = {self.groups} cannot downsample by {self.downsample}: at least {self.downsample.bit_length() - 1} groups")
        if self.width % 4:
            raise ValueError(f"width = {self.width}: must be a multiple of 4 (residual branches have a quarter of the width)")

    def _check_vqgan(self) -> None:
        if len(self.factors) != self.groups or 2 ** (self.groups - 1) != self.downsample:
            raise ValueError(
                f"kind = 'vqgan' with groups = {self.groups}, factors = {list(self.factors)} and downsample = {self.downsample}: it has one factor for each "
                f"group, and downsample = 2**(groups - 1)"
            )
        _positive(self, "latent")
        odd = [factor for factor in self.factors if factor <= 0 or self.width * factor % NORM_GROUPS]
        if odd:
            raise ValueError(f"width = {self.width} times factor {odd[0]}: the channels of a group must be a positive multiple of {NORM_GROUPS}")
        if any(not 0 <= group < self.groups for group in self.attention):
            raise ValueError(f"attention = {list(self.attention)}: groups are counted from 0 to {self.groups - 1}")
        if self.codebook == "gumbel" and self.latent != self.init_width:
            raise ValueError(f"codebook = 'gumbel' with latent = {self.latent} and init_width = {self.init_width}: they must be equal")

    @property
    def grid(self) -> int:
        """Codes along each axis of an image."""
        return self.image_size // self.downsample


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The decoder-only transformer (paper B.1). Defaults are the 12-billion-parameter model."""

    __pydantic_config__ = _STRICT

    layers: int = 64
    """Self-attention layers; each is an attention resblock and an MLP resblock."""
    width: int = 3968
    """Width of the residual stream; a multiple of heads."""
    heads: int = 62
    """Attention heads."""
    conv_kernel: int = 11
    """Kernel of the convolutional mask of the last layer; odd."""
    conv_offsets: Literal["figure", "causal"] = "figure"
    """'figure': the rule fitted to Figure 11(d), with 66 offsets for 11x11 on 32x32; 'causal': the plain causal half of the kernel, with 61."""
    attention: Literal["auto", "dense", "flex", "structured"] = "auto"
    """Attention engine; all compute the same. 'dense': the reference; 'structured': short lines, for CPUs; 'flex': FlexAttention's block masks, for CUDA only;
    'auto': the fastest one according to recorded measurements (train/machine/attention_records), or 'dense' if there are none."""
    pads_in_text_loss: bool = False
    """Whether padding positions count in the text loss, with the padding id as target. The paper does not say."""
    text_loss_weight: float = 0.125
    """Weight of the text cross-entropy; that of the image is 1 minus this (paper 2.2: 1/8 and 7/8)."""
    embedding_scale: float = 1.0
    """Factor on the initial embeddings. 1: as published for large models; a narrow model with a large step size learns faster at 30 (DECISIONS.md)."""
    zero_projections: bool = False
    """Begin with zeros in the last matrix of each resblock, so that an untrained resblock adds nothing; all other weights are the same with and without it."""
    qk_norm: bool = False
    """Normalise the query and the key of each head, with a learned gain (Dehghani et al. 2023, arXiv 2302.05442, section 2)."""
    rotary_positions: bool = False
    """Turn queries and keys by their places, beside the learned positions: by row and column in the picture (Heo et al. 2024, arXiv 2403.13298), by slot in the text
    (Su et al. 2021, arXiv 2104.09864)."""
    base_width: int = 0
    """Width of the narrower model at which dalle_fit.lr was chosen: start and step sizes are scaled so that it fits this width too (model/width.py, docs/stage2.md).
    0, or the own width: nothing is scaled."""
    base_heads: int = 0
    """With base_width: heads of that model. 0: its heads were as wide as these."""

    def __post_init__(self) -> None:
        _positive(self, "layers", "width", "heads", "conv_kernel", "embedding_scale")
        _at_most(self, layers=4096, width=1 << 20, heads=1 << 16, conv_kernel=1 << 12, base_width=1 << 20, base_heads=1 << 16)
        if self.width % self.heads:
            down = max(1, self.width // self.heads) * self.heads
            raise ValueError(f"width = {self.width} does not divide into heads = {self.heads}; nearest widths: {down}, {down + self.heads}")
        if self.rotary_positions and self.width // self.heads % 4:
            raise ValueError(
                f"rotary_positions = true with width / heads = {self.width // self.heads}: rows and columns each turn pairs of a head's elements, so it must be a multiple of 4"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel = {self.conv_kernel}: must be odd")
        if not 0 <= self.text_loss_weight <= 1:
            raise ValueError(f"text_loss_weight = {self.text_loss_weight}: must lie in [0, 1]")
        self._check_base()

    def _check_base(self) -> None:
        if self.base_width < 0 or self.base_heads < 0:
            raise ValueError(f"base_width = {self.base_width}, base_heads = {self.base_heads}: must be positive, or 0 for none")
        if self.base_heads and not self.base_width:
            raise ValueError(
                f"base_heads = {self.base_heads} without base_width: set base_width to the width of the model with these heads, or base_heads = 0"
            )
        if not self.base_heads and self.base_width % (head := self.width // self.heads):
            raise ValueError(
                f"base_width = {self.base_width} does not divide into heads of width / heads = {head}; set base_heads to the heads of that model"
            )
        if self.base_heads and self.base_width % self.base_heads:
            down = max(1, self.base_width // self.base_heads) * self.base_heads
            raise ValueError(
                f"base_width = {self.base_width} does not divide into base_heads = {self.base_heads}; nearest widths: {down}, {down + self.base_heads}"
            )

    @property
    def width_ratio(self) -> float:
        """How many times as wide it is as the model of base_width; 1 without one."""
        return self.width / self.base_width if self.base_width else 1.0

    @property
    def score_ratio(self) -> float:
        """What scores of attention are multiplied by so that, with heads K wide instead of the base's, they are as if divided by K instead of its root (Yang et al.
        2022, definition 4.1)."""
        if not self.base_heads:
            return 1.0
        return math.sqrt(self.base_width * self.heads / (self.base_heads * self.width))


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """Shape of the single stream of text and image tokens that the transformer models. Derived from the sections tokenizer and dvae."""

    text_tokens: int
    """Text positions (256 in the paper)."""
    text_vocab: int
    """Size of the text vocabulary, including special ids."""
    grid: int
    """Codes along each axis of an image."""
    image_vocab: int
    """Number of image codes."""

    @property
    def image_tokens(self) -> int:
        return self.grid**2

    @property
    def states(self) -> int:
        """Number of all positions, including the start vectors (docs/paper.md 3.4)."""
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The contrastive model that reranks pictures (paper 2.6)."""

    __pydantic_config__ = _STRICT

    towers: Literal["own", "frozen"] = "own"
    """'own': both towers are trained. 'frozen': pictures are looked at by EfficientNet-Lite0 and captions, English ones, read by all-MiniLM-L6-v2, whose weights come in
    packages, and only heads on top of their features are trained (docs/drawing.md)."""
    width: int = 512
    """'own': width of both towers; a multiple of heads."""
    layers: int = 12
    """'own': transformer layers of each tower."""
    heads: int = 8
    """'own': attention heads."""
    patch: int = 16
    """'own': side of an image patch in pixels; divides dvae.image_size."""
    embed: int = 512
    """Width of the shared embedding."""

    def __post_init__(self) -> None:
        _positive(self, "width", "layers", "heads", "patch", "embed")
        _at_most(self, layers=4096, width=1 << 20, heads=1 << 16, patch=1 << 12, embed=1 << 20)
        if self.towers == "own" and self.width % self.heads:
            raise ValueError(f"width = {self.width} does not divide into heads = {self.heads}")

    @property
    def reads_pieces(self) -> bool:
        """Whether it reads captions as the run's tokenizer divides them."""
        return self.towers == "own"
