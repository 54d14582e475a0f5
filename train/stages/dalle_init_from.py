"""Starts training from the weights of an export (``dalle_fit.init_from``): to continue with another recipe, or to fine-tune."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from infra.errors import ConfigError
from model.config import TransformerConfig
from train.engines.protocol import Engine
from train.ranks.device import wait_for_all
from train.weights import export
from train.weights.fragments import full_shape

log = logging.getLogger(__name__)

_SHOWN = 10
_SAME_SHAPES = ("heads", "conv_kernel", "conv_offsets", "rotary_positions")
"""Keys of section dalle that change what weights compute, and not their shapes."""


def say_differences(url: str, cfg: TransformerConfig, key: str) -> None:
    """Warn of an export whose weights fit, but were trained to compute something else. It may be meant: fine-tuning can begin so.

    Raises:
        DataError: there is no export, or it is damaged.
    """
    if odd := _differences(export.describe(url)["model"], cfg):
        log.warning("%s = %s: these weights were trained otherwise, and begin with a higher loss: %s", key, url, "; ".join(odd))


def _differences(there: Mapping[str, Any], cfg: TransformerConfig) -> list[str]:
    return [
        f"dalle.{name} = {there[name]} there, {getattr(cfg, name)} here"
        for name in _SAME_SHAPES
        if name in there and there[name] != getattr(cfg, name)
    ]


def refuse_another_language(url: str, cfg: TransformerConfig, lineage: Mapping[str, str], key: str) -> None:
    """Refuse an export whose likelihoods of this run's codes and captions would mean nothing. Fine-tuning by likelihood may begin so; with a contrast to these very
    weights nothing would ever be learned.

    Raises:
        ConfigError: it was trained with another dVAE or tokenizer, or computes something else.
    """
    about = export.describe(url)
    parents = about.get("parents", {})
    odd = [
        f"{kind} {parents[kind][:12]} there, {lineage[kind][:12]} here"
        for kind in ("dvae", "tokenizer")
        if parents.get(kind, lineage[kind]) != lineage[kind]
    ]
    if odd := [*odd, *_differences(about["model"], cfg)]:
        raise ConfigError(
            f"{key} = {url}: dalle_fit.objective = 'caption_contrast' compares likelihoods with those of these weights, which were trained with something else: "
            f"{'; '.join(odd)}. Name the export of a run with the same dVAE, tokenizer and section dalle."
        )


@torch.no_grad()
def load(engine: Engine, url: str, key: str) -> str:
    """Load exported weights into an engine that has made no update, as master weights and as averages; return their content hash. Collective.

    As when a checkpoint is restored, each rank copies only what it holds, and fp16 copies are made from the fp32 master weights. The file of the export is
    memory-mapped; if it is on S3, it is first downloaded to TMPDIR.

    Args:
        key: the configuration key that named the export, for messages.

    Raises:
        ConfigError: weights are missing, unknown or of another shape. The message counts them and names the first ten.
        DataError: there is no export, or it is damaged.
    """
    identity, tensors = export.read_tensors(url)
    expected = {name: tuple(full_shape(p)) for name, p in engine.module.named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        lines = [f"  {name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} here" for name in odd[:_SHOWN]]
        more = [f"  and {len(odd) - _SHOWN} more"] if len(odd) > _SHOWN else []
        raise ConfigError(f"{key} = {url}: {len(odd)} of {len(expected)} weights do not fit this configuration:\n" + "\n".join(lines + more))
    for name, fragment in engine.fragments(to_load=True).items():
        kind, _, parameter = name.partition("/")
        if kind in ("model", "average", "frozen"):
            fragment.tensor.copy_(tensors[parameter].flatten().narrow(0, fragment.offset, fragment.tensor.numel()))
    wait_for_all()  # ranks take different times to read, and the next collective has a short timeout
    engine.loaded(0)
    log.info("%s: started from %d weights of %s (%s)", key, len(tensors), url, identity[:12])
    return identity
