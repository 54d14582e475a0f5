"""Opens the inputs of stages and checks their lineage: for example, that codes were made by the exported dVAE of this run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from data_pipeline.shards.shard_set import CODES_SCHEMA, ShardSet, open_set
from data_pipeline.tokenizer import Tokenizer
from infra.commands import launcher
from infra.errors import DataError
from infra.run_folder import RunFolder
from infra.world import World
from model.attention_engines import EngineName, make_engine
from model.clip import Clip
from model.frozen_clip import FrozenHeads
from model.image_tokenizer import ImageTokenizer
from model.tokenizer_kinds import image_tokenizer
from model.transformer import Norm, Transformer
from train.config import DalleFit, FitSection, RunConfig
from train.config_batch import rows
from train.machine.rates import name_of
from train.run import attention_engine, places
from train.run.data_inputs import open_tokenizer
from train.weights import export, towers
from train.weights.contrastive import Contrastive, open_module, ranking


def open_codes(cfg: RunConfig, run: RunFolder, crop: int, split: str) -> ShardSet:
    """A code set, in the version that this run's stage encode made.

    Raises:
        DataError: encode has not finished, or the codes were made by another dVAE than this run's export.
    """
    parents = {"dvae": export.describe(run.at("dvae", "export"))["content_hash"]}
    version = places.version(run, "encode", f"{crop}/{split}")
    return open_set(places.code_set(cfg, run, crop, split), CODES_SCHEMA, parents, version, cfg.data.takedown)


def open_dvae(cfg: RunConfig, run: RunFolder, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[ImageTokenizer, str]:
    """The exported dVAE, or the VQGAN in its place, and its content hash. Its residual blocks compute matrix products in ``dtype``."""
    module, identity = export.open_as(run.at("dvae", "export"), lambda: image_tokenizer(cfg.dvae, dtype))
    return export.to_device(module, device), identity  # type: ignore[return-value]


def open_dalle(cfg: RunConfig, run: RunFolder, world: World, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, str]:
    """The exported transformer and its content hash. Collective."""
    module = build_dalle(cfg, device, dtype, attention_engine.of_run(cfg, run, world, device, dtype))
    return module, _load(module, run, places.transformer(cfg, run), device)


@dataclass(frozen=True)
class Exports:
    """The models and the tokenizer that are needed to draw and rank pictures. It was checked that they belong together."""

    dvae: ImageTokenizer
    dalle: Transformer
    clip: Contrastive
    tokenizer: Tokenizer
    lineage: dict[str, str]
    """Kind -> content hash."""


def open_exports(cfg: RunConfig, run: RunFolder, world: World, device: torch.device, dtype: torch.dtype) -> Exports:
    """The run's exported models and its tokenizer. Collective.

    Raises:
        ConfigError: a package that the contrastive model needs is not installed.
        DataError: the transformer was trained on codes of another dVAE, or the transformer or the contrastive model with another tokenizer.
    """
    if not cfg.clip.reads_pieces:
        towers.check()
    tokenizer, tokenizer_hash = open_tokenizer(cfg, run)
    (dvae, dvae_hash), (dalle, dalle_hash), (clip, clip_hash) = (
        open_dvae(cfg, run, device),
        open_dalle(cfg, run, world, device, dtype),
        open_clip(cfg, run, device),
    )
    transformer = places.transformer(cfg, run)
    made_from = [(transformer, "dvae", dvae_hash), (transformer, "tokenizer", tokenizer_hash)]
    for stage, parent, expected in made_from + ([("clip", "tokenizer", tokenizer_hash)] if cfg.clip.reads_pieces else []):
        found = export.describe(run.at(stage, "export")).get("parents", {}).get(parent, "none")
        if found != expected:
            raise DataError(
                f"{run.at(stage, 'export')} was trained with {parent} {found[:12]}, this run has {parent} {expected[:12]}; "
                f"delete {run.at(stage)} and run '{launcher(stage, run.url)}' again."
            )
    ranker = ranking(clip, run.at("clip", "export"), tokenizer, device)
    return Exports(dvae, dalle, ranker, tokenizer, {"dalle": dalle_hash, "dvae": dvae_hash, "clip": clip_hash, "tokenizer": tokenizer_hash})


def build_dalle(
    cfg: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    engine: EngineName,
    *,
    checkpoint_every: int = 0,
    norm: Norm | None = None,
    z_loss: float = 0.0,
) -> Transformer:
    """Build the transformer with the given attention engine, and with torch's layer norm unless another is given."""
    shape = cfg.stream_shape()
    return Transformer(
        cfg.dalle,
        shape,
        branch_dtype=dtype,
        norm=norm,
        attend=make_engine(engine, cfg.dalle, shape, device),
        checkpoint_every=checkpoint_every,
        z_loss=z_loss,
        logits_dtype=logits_dtype(cfg.dalle_fit, dtype),
    ).to(device)


def logits_dtype(fit: DalleFit, branches: torch.dtype) -> torch.dtype:
    """What the heads' matrix products read in training, in a model whose residual branches compute in ``branches``."""
    return torch.bfloat16 if fit.has_bf16_logits(name_of(branches)) else torch.float32


def open_clip(cfg: RunConfig, run: RunFolder, device: torch.device) -> tuple[Clip | FrozenHeads, str]:
    """The exported contrastive model, or its heads on frozen towers, and its content hash."""
    return open_module(run.at("clip", "export"), cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab, device)


def _load(module: nn.Module, run: RunFolder, stage: str, device: torch.device) -> str:
    identity = export.read(run.at(stage, "export"), module)
    export.to_device(module, device)
    return identity


def micro_batch(fit: FitSection, section: str, world: World) -> int:
    """Number of samples in one micro-batch, summed over all ranks.

    Args:
        section: where the configuration has them, for messages.

    Raises:
        ConfigError: the batch cannot be divided evenly among ranks and micro-batches.
    """
    return rows(fit.batch, fit.accumulation, world.size, section) * world.size
