"""``launcher.py import-dvae ENCODER DECODER PRESET`` and ``import-vqgan FILE PRESET``: use published weights instead of training the stage dvae."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.loaders import SequentialReader, image_collate
from data_pipeline.loading.transforms import view_transform
from infra import storage
from infra.errors import ConfigError, DataError
from infra.world import World
from model.config import DVAEConfig
from model.dvae import DVAE
from model.image_tokenizer import ImageTokenizer
from model.vqgan import Vqgan
from train.config import RunConfig, load_run
from train.evaluation.reconstruction import Judges, Reconstruction, reconstruct, reconstruct_codes
from train.loop.metrics import MetricsWriter, next_attempt
from train.ranks.device import set_up
from train.run import places
from train.run.data_inputs import open_images
from train.run.places import run_folder
from train.stages.dvae_task import show
from train.weights import export
from train.weights.released_dvae import join_halves, read_half, shape_of
from train.weights.vqgan_files import read_vqgan

_BATCH = 8  # small, because pictures may be large and the machine may have little memory


def dvae(encoder: str, decoder: str, preset: str, overrides: list[str], samples: int) -> None:
    """Convert the weights of the released dVAE, measure them on validation images, export them, and mark the stage dvae as done.

    Raises:
        ConfigError: the run already has another dVAE, or its section [dvae] describes another shape than the files have; the message lists the keys to set.
        DataError: the files are not modules of the dall-e package, or the run has no images yet.
    """
    cfg = load_run(preset, overrides)
    model = read(encoder, decoder, cfg.dvae)
    _install(cfg, model, {"encoder": encoder, "decoder": decoder}, ["import-dvae", encoder, decoder, preset, *overrides], samples)


def vqgan(weights: str, preset: str, overrides: list[str], samples: int) -> None:
    """The same with the weights of a VQGAN, which are one file.

    Raises:
        ConfigError, DataError: as ``dvae``.
    """
    cfg = load_run(preset, overrides)
    _install(cfg, read_published(weights, cfg.dvae), {"weights": weights}, ["import-vqgan", weights, preset, *overrides], samples)


def _install(cfg: RunConfig, model: ImageTokenizer, files: dict[str, str], command: list[str], samples: int) -> None:
    started = time.monotonic()
    run = run_folder(cfg)
    places.claim(cfg, run, shlex.join(["python", "launcher.py", *command]))
    places.require(run, "prepare")
    with run.lock("dvae"):
        if run.done("dvae") is not None or storage.list_files(run.at("dvae", "checkpoints")):
            raise ConfigError(f"{run.at('dvae')} holds a dVAE already, trained or imported; use another run.name.")
        device = set_up(World.single())
        found = measure(cfg, model.to(device), samples, device)
        writer = MetricsWriter(run.url, "dvae", next_attempt(run.url, "dvae"))
        show(run, found, 0, writer)
        writer.scalars(0, {f"eval/{name}": value for name, value in found.values.items()})
        writer.close()
        imported = {name: storage.sha256_file(Path(path)) for name, path in files.items()}
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        weights = export.write(run.at("dvae", "export"), tensors, cfg.dvae, parents={}, evaluation=found.values, imported=imported)
        summary = found.values | {"parameters": sum(tensor.numel() for tensor in tensors.values()), "imported": imported}
        run.finish("dvae", seconds=time.monotonic() - started, world_size=1, weights=weights, parents={}, summary=summary)
    figures = ", ".join(f"{name} {found.values[name]:.3g}" for name in ("psnr", "code_use", "perplexity"))
    print(f"imported {weights[:12]} ({figures} on {found.samples} validation images): {run.at('dvae', 'export')}")


def read(encoder: str, decoder: str, cfg: DVAEConfig) -> DVAE:
    """Read the model from its two files.

    Raises:
        ConfigError: they have another shape than ``cfg`` describes.
        DataError: they cannot be read.
    """
    halves = read_half(encoder), read_half(decoder)
    shape = shape_of(*halves, cfg)
    _require_shape(f"{encoder} and {decoder} hold", cfg, shape)
    model = DVAE(cfg)
    try:
        model.load_state_dict(join_halves(*(half.tensors for half in halves)))
    except RuntimeError as error:
        raise DataError(f"{encoder} and {decoder} do not belong together: {' '.join(str(error).split())[:300]}") from error
    _require_finite(f"{encoder} and {decoder}", model)
    return model


def read_published(path: str, cfg: DVAEConfig) -> Vqgan:
    """Read a VQGAN from its file.

    Raises:
        ConfigError: it has another shape than ``cfg`` describes.
        DataError: it cannot be read, or is not supported.
    """
    found = read_vqgan(path)
    _require_shape(f"{path} holds", cfg, found.shape(cfg))
    model = Vqgan(cfg)
    try:
        model.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise DataError(f"{path}: a VQGAN whose networks are not those of taming-transformers: {' '.join(str(error).split())[:300]}") from error
    _require_finite(path, model)
    return model


def _require_finite(where: str, model: ImageTokenizer) -> None:
    if odd := next((name for name, parameter in model.named_parameters() if not parameter.isfinite().all()), ""):
        raise DataError(
            f"{where}: '{odd}' holds numbers that are not finite: the weights are damaged, or diverged. Take the file from its publisher again."
        )


def _require_shape(what: str, cfg: DVAEConfig, shape: DVAEConfig) -> None:
    ours, theirs = dataclasses.asdict(cfg), dataclasses.asdict(shape)
    words = [shlex.quote(f"dvae.{key}={_toml(theirs[key])}") for key in ours if ours[key] != theirs[key]]
    if words:
        raise ConfigError(f"{what} a dVAE of another shape than this configuration; give {' '.join(words)}.")


def _toml(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def measure(cfg: RunConfig, model: ImageTokenizer, samples: int, device: torch.device) -> Reconstruction:
    """Measure the reconstruction of validation images; that of a dVAE from relaxed codes at the final temperature."""
    validation = open_images(cfg, run_folder(cfg), "validation")
    batch = min(_BATCH, cfg.evaluate.batch)
    reader = SequentialReader(validation, World.single(), samples, batch, view_transform(cfg.dvae.image_size), image_collate)
    judges = Judges.load(cfg.evaluate, device)
    if not isinstance(model, DVAE):
        return reconstruct_codes(model, reader, judges, device)
    return reconstruct(model, cfg.dvae, reader, cfg.run.seed, cfg.dvae_fit.tau_final, judges, device)
