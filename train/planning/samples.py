"""What drawing while training takes (section [samples]). Needs no torch."""

from __future__ import annotations

from infra.text import counted
from train.config import RunConfig
from train.planning import states

_FP32, _BF16 = 4, 2
_PROCESS = 1_080_000_000
"""Bytes of a process that has torch and the kernels of drawing, and no weights: measured at 26 and 152 million weights, which took 8.5 bytes each."""


def given(cfg: RunConfig) -> tuple[str, ...]:
    """The captions that the configuration names; if there are none, held-out ones are drawn."""
    return cfg.samples.captions or cfg.generate.captions[: cfg.samples.num_captions]


def pictures(cfg: RunConfig) -> int:
    """How many pictures are drawn at once."""
    return len(given(cfg)) or cfg.samples.num_captions


def memory(cfg: RunConfig) -> int:
    """Bytes: the weights as they are read (fp32), and once more as they are laid out for drawing; keys and values of every position of each picture."""
    shape, count = cfg.stream_shape(), states.count(cfg.dalle, cfg.stream_shape()).total
    item = _FP32 if cfg.samples.device == "cpu" else _BF16
    cached = 2 * item * cfg.dalle.width * cfg.dalle.layers * (shape.text_tokens + shape.image_tokens) * pictures(cfg)
    return _PROCESS + count * (_FP32 + item) + cached


def line(cfg: RunConfig) -> list[str]:
    """Describe it in a line of text, for ``launcher.py plan``; nothing where nothing is drawn."""
    if not cfg.samples.every:
        return []
    found, limit = memory(cfg), cfg.samples.memory_gb
    where = {
        "auto": "beside training where four cores are left over, else at evaluations",
        "beside": "beside training",
        "evaluation": "at evaluations",
    }
    beyond = f"; more than samples.memory_gb = {limit:g}: nothing is drawn" if limit and found > limit * 1e9 else ""
    return [
        f"samples              {counted(pictures(cfg), 'picture')} every {counted(cfg.samples.every, 'update')}, {where[cfg.samples.where]}, on the main rank's "
        f"{'CPU' if cfg.samples.device == 'cpu' else 'GPU'}: {found / 1e9:.2f} GB while they are drawn{beyond}"
    ]
