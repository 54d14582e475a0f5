"""Chooses the attention engine: the one that dalle.attention names, or the fastest according to recorded times (attention_records/model-*.json)."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.errors import ConfigError
from model.attention_engines import EngineName, why_unavailable
from model.config import StreamShape, TransformerConfig
from train.machine import attention_times
from train.machine.attention_times import AttentionPoint, layer_pattern, pattern_shares
from train.machine.rates import describe_device, name_of

log = logging.getLogger(__name__)

RECORDS = Path(__file__).with_name("attention_records")
"""Records of ``launcher.py bench model`` that come with the code. Only the times of attention in them are read."""
_UNMEASURED: EngineName = "dense"


@dataclass(frozen=True)
class Record:
    """One measured time of one engine."""

    point: AttentionPoint
    ms: float
    device: str
    file: str


def read_records(kind: str, folder: Path | str = "") -> list[Record]:
    """All recorded times on devices of a kind ('cpu' or 'cuda'): first those of the user's own folder, if one is given, then those that come with the code.

    Raises:
        ConfigError: the folder holds no record.
    """
    own = sorted(Path(folder).glob("model-*.json")) if folder else []
    if folder and not own:
        raise ConfigError(
            f"dalle_fit.attention_records = '{folder}': holds no model-*.json; 'launcher.py bench model --out {folder}' writes one, and '' means none."
        )
    found = []
    for path in [*own, *sorted(RECORDS.glob("model-*.json"))]:
        result = json.loads(path.read_text())
        if result["device"]["kind"] == kind:
            # The shortest of the timed runs, because other load on the machine can only make times longer.
            points = ((attention_times.parse(name), figure["min"]) for name, figure in result["measured"].items())
            found += [Record(point, ms, result["device"]["name"], path.name) for point, ms in points if point is not None]
    return found


def choose(cfg: TransformerConfig, shape: StreamShape, device: torch.device, dtype: torch.dtype, folder: Path | str = "") -> EngineName:
    """The engine to use. The choice and its reason are logged.

    Args:
        folder: a folder with the user's own records (dalle_fit.attention_records).

    Raises:
        ConfigError: dalle.attention names an engine that cannot train on the device; the message says why.
    """
    if cfg.attention != "auto":
        reason = why_unavailable(cfg.attention, device, cfg)
        if reason is not None:
            raise ConfigError(f"dalle.attention = {cfg.attention}: {reason}. Use dalle.attention=auto, or another engine.")
        return cfg.attention
    name = describe_device(device.type)["name"] if device.type in ("cpu", "cuda") else device.type
    records = [record for record in read_records(device.type, folder) if not why_unavailable(record.point.engine, device, cfg)]
    rivals = _nearest(records, name, name_of(dtype), cfg, shape)
    if not rivals:
        log.info(
            "attention %s: nothing is measured on %s; 'launcher.py bench model --out FOLDER' with dalle_fit.attention_records=FOLDER records what 'auto' needs",
            _UNMEASURED,
            name,
        )
        return _UNMEASURED
    best = min(rivals, key=lambda record: record.ms)
    times = ", ".join(f"{record.point.engine} {record.ms:.3g} ms" for record in sorted(rivals, key=lambda record: record.ms))
    log.info("attention %s: %s (%s; measured on %s, %s)", best.point.engine, times, best.point, best.device, best.file)
    return best.point.engine


def _nearest(records: list[Record], device: str, dtype: str, cfg: TransformerConfig, shape: StreamShape) -> list[Record]:
    """The recorded times that are most similar to what will run, by device, dtype, shape and pattern of layers: all from one file, one for each engine."""

    wanted = pattern_shares(layer_pattern(cfg.layers))

    def unlikeness(record: Record) -> tuple[float, ...]:
        point = record.point
        shares = pattern_shares(point.pattern)
        # fp16 and bf16 move the same number of bytes, so a time of one serves for the other if that was not measured.
        other_dtype = 0 if point.dtype == dtype else 1 if "fp32" not in (point.dtype, dtype) else 2
        states = point.text_tokens + point.grid**2
        return (
            float(record.device != device),
            other_dtype,
            abs(math.log(states / shape.states)),
            abs(math.log((1 + point.text_tokens) / (1 + shape.text_tokens))),
            abs(math.log(point.head * cfg.heads / cfg.width)),
            sum(abs(shares.get(kind, 0.0) - wanted.get(kind, 0.0)) for kind in shares.keys() | wanted.keys()),
        )

    least = min((unlikeness(record) for record in records), default=None)
    same = [record for record in records if unlikeness(record) == least]
    return [record for record in same if record.file == same[0].file]
