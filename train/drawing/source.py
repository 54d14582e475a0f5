"""Opens the models to draw with, from a run, which may still be training, or from a package, and checks that they belong together. Local or on s3."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from infra import storage, stored
from infra.errors import CheckpointError, ConfigError, DataError, MissingError
from model.config import ClipConfig
from model.decoder import DrawingWeights
from model.image_tokenizer import ImageTokenizer
from model.tokenizer_kinds import image_tokenizer
from model.transformer import Transformer
from train.config import RunConfig
from train.drawing import open_clip_folder
from train.drawing.cpu_drawer import CpuWeights, ready
from train.drawing.memory import Room
from train.drawing.place import Place, locate
from train.machine.rates import DTYPES, name_of
from train.weights import checkpoint, export, towers
from train.weights.contrastive import Ranker, networks_of, open_contrastive

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

EIGHT_BITS = "int8"
_LOST_CHECKPOINTS = 5
"""How many checkpoints may disappear while they are read: a run that is training deletes old ones."""


@dataclass(frozen=True)
class Models:
    """The models and the tokenizer that are needed to draw."""

    url: str
    cfg: RunConfig
    dvae: ImageTokenizer
    weights: DrawingWeights
    tokenizer: Tokenizer
    clip: Ranker | None
    """What ranks; None if it was not asked for."""
    lineage: dict[str, str]
    """Content hashes of dalle, dvae, tokenizer and, if it was opened, clip."""
    description: str
    """Describes for people which weights these are."""

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def room(self) -> Room:
        """Where they draw."""
        return Room(self.cfg, self.device, self.weights.dtype.itemsize)

    @property
    def precision(self) -> str:
        return EIGHT_BITS if isinstance(self.weights, CpuWeights) and self.weights.eight_bits else name_of(self.weights.dtype)

    @property
    def is_deterministic(self) -> bool:
        """Whether the bits of a picture are independent of the other pictures in its batch."""
        return isinstance(self.weights, CpuWeights) and self.weights.deterministic


def open_models(url: str, device: str = "", precision: str = "auto", rerank: str = "none", *, deterministic: bool = False, step: int = 0) -> Models:
    """Open the models to draw with. The contrastive model is opened only if it shall rank. Images and codes of the run are not needed.

    Args:
        url: a run folder, its dalle/export or align/export, or a package; local or s3://. Of a run that is training, the newest checkpoint is used.
        device: 'cpu' or 'cuda'; empty: the GPU if there is one.
        precision: precision of the transformer's products. 'auto': fp32 on a CPU, bf16 on a GPU. 'int8': weights of eight bits, only on a CPU.
        rerank: what ranks the candidates: 'none', 'clip' (the run's own contrastive model), or a folder with another exported one.
        step: the checkpoint of the stage whose weights are used; 0: the newest weights there are.
        deterministic: make the bits of a picture independent of batches and windows; only on a CPU, in fp32 or int8.

    Raises:
        ConfigError: there is no such run, device or precision.
        DataError: the run has no weights yet, or they do not belong together.
    """
    place, asked = locate(url), Asked(device, precision, rerank, deterministic)
    asked.check(place, step)
    return open_place(place, asked, step)


@dataclass(frozen=True)
class Asked:
    """How models shall be opened; see ``open_models``."""

    device: str = ""
    precision: str = "auto"
    rerank: str = "none"
    deterministic: bool = False

    def room(self, place: Place) -> Room:
        """Where these models will draw.

        Raises:
            ConfigError: there is no such device or precision.
        """
        where = _device(self.device)
        return Room(place.cfg, where, _dtype(self.precision, where, self.deterministic).itemsize)

    def check(self, place: Place, step: int = 0) -> dict[str, str]:
        """Check what can be known before any weights are read, which takes much longer than everything else: that there are such a device and precision, that
        the parts exist and, as far as their descriptions say, that they belong together. Returns their content hashes, as ``known_lineage``.

        Raises:
            ConfigError, DataError: as ``open_models``.
        """
        self.room(place)
        found = known_lineage(place)
        for name in ("dvae", *(["clip"] if self.rerank == "clip" else [])):
            _require(getattr(place, name), name, place)
        if not step and not _weights_there(place):
            raise _no_weights(place)
        if not step and "dalle" in found:
            check_parents(place, "dalle", export.describe(place.dalle)["parents"], found)
        if self.rerank != "none":
            check_judge(place, self.rerank, found["tokenizer"])
        return found


def open_place(place: Place, asked: Asked, step: int = 0) -> Models:
    """The same as ``open_models``, for a place that has been found and checked (``Asked.check``)."""
    cfg, where = place.cfg, _device(asked.device)
    dtype = _dtype(asked.precision, where, asked.deterministic)
    tokenizer, manifest = load_tokenizer(place.tokenizer, cfg.tokenizer)
    found = {"tokenizer": str(manifest["content_hash"])}
    dvae, found["dvae"] = _open(place.dvae, lambda: image_tokenizer(cfg.dvae), "dvae", place)
    tensors, found["dalle"], parents, description = _weights_of(place, step) if step else newest_weights(place)
    check_parents(place, "dalle", parents, found)
    _say_if_older(place, parents)
    judge = None
    if asked.rerank != "none":
        judge, found["clip"] = _judge(place, asked.rerank, tokenizer, where)
    model = _build(cfg, tensors, where, dtype, place.dalle)
    weights = ready(model, dtype, eight_bits=asked.precision == EIGHT_BITS, deterministic=asked.deterministic)
    return Models(place.source, cfg, export.to_device(dvae, where), weights, tokenizer, judge, found, description)  # type: ignore[arg-type]


def _say_if_older(place: Place, parents: dict[str, Any]) -> None:
    before = storage.join(place.run.at("dalle", "export"), export.DESCRIPTION) if place.run is not None and place.stage == "align" else ""
    if before and storage.exists(before) and stored.content_hash(before) != parents.get("dalle"):
        log.warning("%s: stage dalle was trained further since stage align began; these weights know nothing of that", place.url)


def known_lineage(place: Place) -> dict[str, str]:
    """Content hashes as far as descriptions give them: that of a transformer which is still training is in its checkpoints alone."""
    found = {"tokenizer": str(load_tokenizer(place.tokenizer, place.cfg.tokenizer)[1]["content_hash"])}
    for name in ("dvae", "dalle"):
        url = getattr(place, name)
        if storage.exists(storage.join(url, export.DESCRIPTION)) and (name == "dvae" or _exported(place)):
            found[name] = str(export.describe(url)["content_hash"])
    return found


def replaced_weights(models: Models, tensors: dict[str, Tensor]) -> Models:
    """The same models with other weights of the transformer."""
    dtype, old = models.weights.dtype, models.weights
    eight_bits = isinstance(old, CpuWeights) and old.eight_bits
    model = _build(models.cfg, tensors, models.device, dtype, models.url)
    return replace(models, weights=ready(model, dtype, eight_bits=eight_bits, deterministic=models.is_deterministic))


def _dtype(precision: str, device: torch.device, deterministic: bool) -> torch.dtype:
    """The dtype of activations and, except with int8, of weights.

    Raises:
        ConfigError: there is no such precision, or it does not work on this device.
    """
    if precision not in ("auto", *DTYPES, EIGHT_BITS):
        raise ConfigError(f"precision '{precision}': accepted are auto, {', '.join(DTYPES)}, and {EIGHT_BITS} on a CPU.")
    if precision == EIGHT_BITS and device.type != "cpu":
        raise ConfigError(f"precision '{precision}' on a GPU: accepted there are auto, {', '.join(DTYPES)}.")
    dtype = (torch.bfloat16 if device.type == "cuda" else torch.float32) if precision == "auto" else DTYPES.get(precision, torch.float32)
    if deterministic and (device.type != "cpu" or dtype != torch.float32):
        raise ConfigError(f"--deterministic with device {device.type} and precision {precision}: it needs --device cpu and --precision fp32 or int8.")
    return dtype


def open_judge(url: str, folder: str, tokenizer_hash: str, device: torch.device) -> tuple[Ranker, str]:
    """Open another contrastive model than the run's own, to judge drawings, and return it with its content hash.

    Raises:
        ConfigError: the folder holds none.
        DataError: it was trained with another tokenizer.
    """
    place = locate(url)
    tokenizer, _ = load_tokenizer(place.tokenizer, place.cfg.tokenizer)
    check_judge(place, folder, tokenizer_hash, "evaluate.judge")
    return _judge(place, folder, tokenizer, device, "evaluate.judge")


def check_judge(place: Place, rerank: str, tokenizer_hash: str, key: str = "rerank") -> None:
    """Check what can be known of the model that ranks before its weights are read.

    Raises:
        ConfigError: there is none, or a package that it needs is not installed.
        DataError: it was trained with another tokenizer.
    """
    if rerank != "clip" and open_clip_folder.is_there(rerank):
        open_clip_folder.check(rerank, key)
    else:
        url, sizes = judge_at(place, rerank, key)
        if not sizes.reads_pieces:
            towers.check()
        check_parents(place, "clip", export.describe(url)["parents"], {"tokenizer": tokenizer_hash})


def judge_networks(place: Place, rerank: str, key: str = "rerank") -> frozenset[str]:
    """Names of the networks from packages that a model looks through, without reading its weights. It was checked (``check_judge``)."""
    if rerank != "clip" and open_clip_folder.is_there(rerank):
        return frozenset()
    return networks_of(judge_at(place, rerank, key)[1])


def judge_at(place: Place, rerank: str, key: str = "rerank") -> tuple[str, ClipConfig]:
    """Where the contrastive model is that ranks, and its sizes.

    Raises:
        ConfigError: there is none.
    """
    if rerank == "clip":
        return place.clip, place.cfg.clip
    url = rerank.rstrip("/")
    if not storage.exists(storage.join(url, export.DESCRIPTION)):
        raise ConfigError(
            f"{key} '{rerank}': accepted are none, clip, and a folder with an exported contrastive model, such as runs/other/clip/export, or with a model of "
            f"open_clip ({open_clip_folder.CONFIG})."
        )
    try:
        return url, ClipConfig(**export.describe(url)["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{key} '{rerank}': no contrastive model ({error}); name a run's clip/export.") from error


def _judge(place: Place, rerank: str, tokenizer: Tokenizer, device: torch.device, key: str = "rerank") -> tuple[Ranker, str]:
    """Open the contrastive model that ranks, which has been checked, and return it with its content hash."""
    if rerank != "clip" and open_clip_folder.is_there(rerank):
        return open_clip_folder.open_folder(rerank, device, key)
    (url, sizes), cfg = judge_at(place, rerank, key), place.cfg
    _require(url, "clip", place)
    return open_contrastive(url, sizes, cfg.dvae.image_size, tokenizer, cfg.tokenizer.vocab, device)


def _device(name: str) -> torch.device:
    if name not in ("", "cpu", "cuda"):
        raise ConfigError(f"device '{name}': accepted are cpu and cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': there is no GPU here that torch can use; accepted here: cpu.")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _build(cfg: RunConfig, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, url: str) -> Transformer:
    """Build the transformer directly from its tensors, without initialising weights first. It has no attention engine, because drawing has its own attention."""
    with torch.device("meta"):
        model = Transformer(cfg.dalle, cfg.stream_shape(), branch_dtype=dtype, attend=nn.Identity())
    export.check_shapes(url, model, tensors)
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _require(url: str, name: str, place: Place) -> None:
    """
    Raises:
        DataError: there is no such export.
    """
    if not storage.exists(storage.join(url, export.DESCRIPTION)):
        do = "export it again with it" if place.run is None else f"run 'launcher.py {name} {place.url}' first"
        raise DataError(f"{url}: there is no {name} here; {do}.")


def _open(url: str, build: Callable[[], M], name: str, place: Place) -> tuple[M, str]:
    _require(url, name, place)
    return export.open_as(url, build)


def _exported(place: Place) -> bool:
    """Whether the export holds the newest weights. The one that a finished stage writes has no "step". One that ``launcher.py export`` wrote has, and may be older
    than the newest checkpoint."""
    if not storage.exists(storage.join(place.dalle, export.DESCRIPTION)):
        return False
    steps = checkpoint.complete(place.run.at(place.stage)) if place.run is not None else []
    about = export.describe(place.dalle) if steps else {}
    return not steps or "step" not in about or about["step"] >= steps[-1]


def _weights_there(place: Place) -> bool:
    return _exported(place) or (place.run is not None and bool(checkpoint.complete(place.run.at(place.stage))))


def _no_weights(place: Place) -> DataError:
    do = (
        "export it again"
        if place.run is None
        else f"a checkpoint comes every {place.stage}_fit.save_every updates of 'launcher.py {place.stage} {place.url}'"
    )
    return DataError(f"{place.dalle}: the transformer has no weights yet; {do}.")


def newest_weights(place: Place) -> tuple[dict[str, Tensor], str, dict[str, Any], str]:
    """Tensors, content hash, lineage and a description of the newest averaged weights.

    Raises:
        DataError: there are none yet.
    """
    aligned = "aligned, " if place.stage == "align" else ""
    if _exported(place):
        about = export.describe(place.dalle)
        identity, tensors = export.read_tensors(place.dalle)
        step = f" after update {about['step']}" if "step" in about else ""
        kind = str(about.get("weights", "average"))  # a package has the words of the run that it was made of
        return tensors, identity, about["parents"], f"{aligned}{kind if 'weights' in kind else f'{kind} weights'}{step}"
    if place.run is None or not _weights_there(place):
        raise _no_weights(place)
    meta, tensors = _newest(place.run.at(place.stage))
    return tensors, checkpoint.content_hash(tensors), meta["parents"], f"{aligned}average weights after update {meta['step']}, of a run under way"


def _weights_of(place: Place, step: int) -> tuple[dict[str, Tensor], str, dict[str, Any], str]:
    """The same of one checkpoint of a run."""
    folder = checkpoint.folder(storage.join(place.url, place.stage), step)
    meta, tensors = checkpoint.read_meta(folder), checkpoint.read_tensors(folder, "average")
    return tensors, checkpoint.content_hash(tensors), meta["parents"], f"average weights after update {step}"


def _newest(stage_url: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The newest checkpoint that can be read. If the run deletes it meanwhile, that is no error, because there is a newer one then."""
    failure: DataError | None = None
    for step in _candidates(stage_url):
        folder = checkpoint.folder(stage_url, step)
        try:
            return checkpoint.read_meta(folder), checkpoint.read_tensors(folder, "average")
        except (CheckpointError, MissingError) as error:
            log.warning("%s: gone or damaged while it was read (%s); trying the next one", folder, error)
            failure = error
    assert failure is not None
    raise failure


def _candidates(stage_url: str) -> Iterator[int]:
    tried: set[int] = set()
    for _ in range(_LOST_CHECKPOINTS):
        left = [step for step in checkpoint.complete(stage_url) if step not in tried]
        if not left:
            return
        tried.add(left[-1])
        yield left[-1]


def check_parents(place: Place, name: str, parents: dict[str, Any], found: dict[str, str]) -> None:
    """
    Raises:
        DataError: a model was trained with another dVAE or tokenizer than those that are found.
    """
    for kind in sorted({"dvae", "tokenizer"} & found.keys() & parents.keys()):
        if parents[kind] != found[kind]:
            raise DataError(
                f"{place.url}: {name} was trained with {kind} {str(parents[kind])[:12]}, and here is {kind} {found[kind][:12]}; "
                f"put the one it was trained with back, or train {name} again."
            )
