"""Times of attention alone, for each engine: what `dalle.attention = "auto"` chooses by. Part of ``launcher.py bench model``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.attention_engines import ENGINES, EngineName, make_engine, why_unavailable
from model.config import StreamShape, TransformerConfig
from model.offsets import KINDS, layer_kinds
from train.machine.rates import DTYPES, Figure, Options, measure

_NAME = re.compile(r"attention (\w+) (fp32|bf16|fp16), (\d+)\+(\d+)x\d+ states, heads of (\d+), layers ((?:\d+ \w+ ?)+)")


def layer_pattern(layers: int) -> str:
    """The masks of a model's layers with their counts: '2 row 1 column 1 conv'. A recorded time is the mean over these layers, so it is valid only for this
    pattern."""
    kinds = layer_kinds(layers)
    return " ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)


def pattern_shares(pattern: str) -> dict[str, float]:
    """Fraction of the layers of a pattern that have each kind of mask."""
    words = pattern.split()
    counts = {kind: int(count) for count, kind in zip(words[::2], words[1::2], strict=True)}
    return {kind: count / sum(counts.values()) for kind, count in counts.items()}


@dataclass(frozen=True)
class AttentionPoint:
    """What a time was measured of."""

    engine: EngineName
    dtype: str
    text_tokens: int
    grid: int
    head: int
    pattern: str
    """The layers over which the time is the mean, as ``layer_pattern`` writes them."""

    @classmethod
    def of(cls, engine: EngineName, dtype: str, cfg: TransformerConfig, shape: StreamShape) -> AttentionPoint:
        """The point that a model's time belongs to."""
        return cls(engine, dtype, shape.text_tokens, shape.grid, cfg.width // cfg.heads, layer_pattern(cfg.layers))

    def __str__(self) -> str:
        states = f"{self.text_tokens}+{self.grid}x{self.grid} states"
        return f"attention {self.engine} {self.dtype}, {states}, heads of {self.head}, layers {self.pattern}"


def parse(figure: str) -> AttentionPoint | None:
    """The point that the name of a figure describes; None if the figure is not a time of attention."""
    found = _NAME.fullmatch(figure)
    if found is None or found[1] not in ENGINES:
        return None
    return AttentionPoint(found[1], found[2], int(found[3]), int(found[4]), int(found[5]), found[6])  # type: ignore[arg-type]


def milliseconds(rate: Figure) -> Figure:
    """Convert a rate in calls per second to the time of one call."""
    return Figure(1e3 / rate.value, 1e3 / rate.max, 1e3 / rate.min, "ms", rate.runs)


def mean_step(
    engine: Callable[..., torch.Tensor], cfg: TransformerConfig, shape: StreamShape, batch: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], None], int]:
    """A function that runs the attention of every layer of a model once, forward and backward, and the number of layers."""
    head = cfg.width // cfg.heads
    qkv = [torch.randn(batch, shape.states, cfg.heads, head, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    seed = torch.randn(batch, shape.states, cfg.heads, head, device=device, dtype=dtype).transpose(1, 2)
    kinds = layer_kinds(cfg.layers)

    def step() -> None:
        for kind in kinds:
            torch.autograd.grad(engine(*qkv, kind), qkv, seed)

    return step, len(kinds)


def times(
    cfg: TransformerConfig, shape: StreamShape, batch: int, dtypes: tuple[str, ...], options: Options, into: dict[str, Figure] | None = None
) -> dict[str, Figure]:
    """Time of one layer's attention, forward and backward, as the mean over a model's layers, for every engine that runs on the device. ``into`` gets each as it
    is measured."""
    found: dict[str, Figure] = {} if into is None else into
    device = torch.device(options.device)
    for engine in ENGINES:
        if why_unavailable(engine, device, cfg):
            continue
        module = make_engine(engine, cfg, shape, device).to(device)
        for dtype in dtypes:
            step, layers = mean_step(module, cfg, shape, batch, DTYPES[dtype], options.device)
            point = AttentionPoint.of(engine, dtype, cfg, shape)
            found[str(point)] = milliseconds(measure(step, float(layers), "layers/s", options))
    return found
