"""The batches of stage dalle: code records with their captions. Experiments that compare another model with ours train and evaluate it on the same batches."""

from __future__ import annotations

from data_pipeline.loading.loaders import Batch, SequentialReader, ShardLoader, code_collate
from data_pipeline.loading.transforms import Sample, code_transform
from data_pipeline.tokenizer import Tokenizer
from infra.run_folder import RunFolder
from infra.world import World
from train.config import RunConfig
from train.run.data_inputs import loader_options
from train.run.inputs import open_codes


def training(
    cfg: RunConfig, run: RunFolder, world: World, tokenizer: Tokenizer, batch: int, key: str = "dalle_fit.batch"
) -> ShardLoader[Sample, Batch]:
    """Endless batches of ``batch`` samples, counted over all ranks: text int64 [B, T], lengths [B], codes [B, I]. Their order and the choice of captions depend only
    on run.seed. ``key``: what names the batch in the configuration, for messages."""
    sets = [open_codes(cfg, run, crop, "train") for crop in range(cfg.encode.crops)]
    fit = cfg.dalle_fit
    encode = code_transform(
        tokenizer,
        cfg.run.seed,
        dropout=cfg.tokenizer.dropout,
        caption_dropout=fit.caption_dropout,
        replace_codes=fit.replace_codes,
        replace_pieces=fit.replace_pieces,
        positions=cfg.dvae.grid**2,
        vocab=cfg.dvae.vocab,
        caption_keys=fit.contrasts,
    )
    return ShardLoader(sets, run.url, world, batch, cfg.run.seed, transform=encode, collate=code_collate, batch_key=key, **loader_options(cfg.data))


def validation(cfg: RunConfig, run: RunFolder, world: World, tokenizer: Tokenizer, samples: int) -> SequentialReader[Sample, Batch]:
    """At most ``samples`` validation samples, evenly spaced, each with its first caption."""
    plain = code_transform(tokenizer, cfg.run.seed, first_caption=True, positions=cfg.dvae.grid**2, vocab=cfg.dvae.vocab)
    codes = open_codes(cfg, run, 0, "validation")
    return SequentialReader(codes, world, samples, cfg.evaluate.batch, plain, code_collate)
