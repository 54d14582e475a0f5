"""The run configuration: all sections, and the checks between them. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator

from data_pipeline.config import DataConfig, FilterConfig, TokenizerConfig
from infra import files
from infra.config import Section, load, parse
from infra.config_keys import ANY_TIME, GOING_ON, PLACE, anchored, completed
from infra.errors import ConfigError, MissingError
from infra.job import ClusterConfig
from model.config import ClipConfig, DVAEConfig, StreamShape, TransformerConfig
from train.config_align import AlignFit
from train.config_compression import CompressionSection, check_sharding
from train.config_contrast import ContrastSection
from train.config_encode import EncodeSection, Precision
from train.config_learning import LearningSection
from train.config_pictures import EvaluateSection, GenerateSection
from train.config_watching import NumericsSection, ReportSection, SamplesSection, WatchingSection

PRESETS = Path(__file__).parent / "presets"

_LONGEST_NAME = 255
"""Bytes of a folder's name on the file systems of Linux."""
UnscaledPrecision = Literal["auto", "bf16", "fp32"]
"""For stages without loss scaling."""


class RunSection(Section):
    """Name, place and seed of a run. Name and root say where a new run is made. They are not stored: for an existing run folder they follow from its path, so
    that a folder can be renamed, moved or copied."""

    name: str = Field(default="run", pattern=r"^[^/\x00-\x1f]*[^./\x00-\x1f][^/\x00-\x1f]*$", exclude=True)
    """Name of the run: its folder under root."""
    root: str = Field(default="runs", exclude=True)
    """Folder or s3://bucket/prefix that holds run folders."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random; see docs/contracts.md, section 2."""

    @field_validator("name")
    @classmethod
    def _fits_a_folder(cls, name: str) -> str:
        if len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"a name of {len(name.encode())} bytes; it is the name of a folder: accepted are up to {_LONGEST_NAME}")
        return name


class FitSection(WatchingSection):
    """What every training stage shares."""

    steps: int = Field(default=1000, gt=0, json_schema_extra=GOING_ON)
    """Optimizer updates."""
    on_change: Literal["recomputed", "kept", "restarted"] = Field(default="recomputed", json_schema_extra=ANY_TIME)
    """What happens to the schedule of the step size when the run continues with other values (--go-on). 'recomputed': as if the new values had applied from the
    start. 'kept': it ends where it would have ended, and stays there. 'restarted': it begins again, warm-up included, over the remaining updates."""
    batch: int = Field(default=512, gt=0, json_schema_extra=GOING_ON)
    """Samples per update, over all processes and micro-batches."""
    accumulation: int = Field(default=1, gt=0, json_schema_extra=ANY_TIME)
    """Micro-batches per update and process."""
    precision: Precision = "auto"
    """Arithmetic of the heavy products. 'auto': bf16 where a probe finds it at least 1.3 times as fast as fp32. 'fp16' scales the loss of the dVAE, and has
    gradient scales for the transformer's resblocks (section scales)."""
    eval_every: int = Field(default=1000, gt=0, json_schema_extra=ANY_TIME)
    """Updates between evaluations on the validation split; the last update always evaluates."""
    eval_samples: int = Field(default=1024, gt=0)
    """Most validation samples of one evaluation."""
    save_every: int = Field(default=1000, gt=0, json_schema_extra=ANY_TIME)
    """Updates between checkpoints; the last update always saves."""
    keep: int = Field(default=2, gt=0, json_schema_extra=ANY_TIME)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """The first checkpoint at or after each multiple of this many updates is kept permanently; 0: none."""
    max_bad_steps: int = Field(default=3, gt=0, json_schema_extra=ANY_TIME)
    """After this many consecutive updates with non-finite losses or gradients the run ends with exit code 93."""
    max_overflow_steps: int = Field(default=500, gt=0, json_schema_extra=ANY_TIME)
    """The same for consecutive updates whose scaled gradients overflowed. A scale of the transformer is divided at most once in scales.window updates, so this
    must span several windows."""


class DvaeFit(FitSection):
    """Training of the dVAE (paper A.2)."""

    activation_checkpointing: bool = Field(default=False, json_schema_extra=ANY_TIME)
    """Recompute activations inside residual blocks in the backward pass."""
    compile: bool = False
    """Compile the groups of residual blocks with torch.compile, which takes a minute or more at the start (and a C++ compiler on a CPU)."""
    lr: float = Field(default=1e-4, gt=0, json_schema_extra=GOING_ON)
    """Initial step size."""
    lr_final: float = Field(default=1.25e-6, ge=0, json_schema_extra=GOING_ON)
    """Final step size, by half-cosine."""
    warmup_steps: int = Field(default=0, ge=0, json_schema_extra=GOING_ON)
    """Updates of linear warm-up, in addition to the schedule; the paper has none."""
    clip_norm: float | None = Field(default=None, gt=0, json_schema_extra=GOING_ON)
    """Clip gradients to this global norm; the paper does not."""
    min_ln_b: float | None = Field(default=None)
    """Lower bound of ln b in the likelihood; the paper has none. Drawings with exactly flat areas need one, because their density would be unbounded and dominate."""
    lr_steps: int = Field(default=1_200_000, gt=0, json_schema_extra=GOING_ON)
    """Updates of the step-size schedule; constant afterwards."""
    beta: float = Field(default=6.6, ge=0)
    """KL weight, before the division by 3 * downsample**2."""
    beta_steps: int = Field(default=5_000, gt=0)
    """Updates over which beta rises from 0, by half-cosine."""
    tau_final: float = Field(default=1 / 16, gt=0)
    """Final temperature of the relaxation; the initial one is 1."""
    tau_steps: int = Field(default=150_000, gt=0)
    """Updates over which the temperature falls."""
    tau_schedule: Literal["cosine", "linear"] = "cosine"
    """How the temperature falls; 'linear' typically diverged (paper 2.1)."""
    warn_perplexity: float = Field(default=0.05, ge=0, le=1)
    """Warn of a collapsing codebook if the perplexity of the codes is below this share of dvae.vocab."""
    weight_decay: float = Field(default=1e-4, ge=0, json_schema_extra=GOING_ON)
    """AdamW's weight decay."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the exponential moving average of the parameters."""
    scale_min: float = Field(default=9 / 8, ge=1)
    """Listing 1: smallest resize target, divided by the image size."""
    scale_max: float = Field(default=12 / 8, ge=1)
    """Listing 1: largest resize target, divided by the image size."""


class DalleFit(ContrastSection, LearningSection, FitSection, NumericsSection):
    """Training of the transformer (paper B.2)."""

    init_from: str = Field(default="", json_schema_extra=PLACE)
    """Start from the weights of this export (a folder or s3 prefix with model.safetensors). Ignored once the run has a checkpoint, which also holds the frozen
    copy that objective = 'caption_contrast' needs."""
    attention_records: str = Field(default="", json_schema_extra={**ANY_TIME, **PLACE})
    """Folder with a site's own measurements ('launcher.py bench model --out FOLDER'), which dalle.attention = 'auto' uses besides those in the code; empty: none."""
    lr: float = Field(default=4.5e-4, gt=0, json_schema_extra=GOING_ON)
    """Peak step size."""
    warmup_steps: int = Field(default=5_000, ge=0, json_schema_extra=GOING_ON)
    """Updates of linear warm-up."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """Step size after the warm-up: half a cosine down to lr_final, or halved at plateaus of the training loss (paper B.2)."""
    lr_final: float = Field(default=0.0, ge=0, json_schema_extra=GOING_ON)
    """'cosine': step size at the last update."""
    halvings: int = Field(default=5, ge=0, json_schema_extra=GOING_ON)
    """'plateau': most halvings."""
    halve_at: tuple[PositiveInt, ...] = Field(default=(), json_schema_extra=GOING_ON)
    """'plateau': halve after exactly these updates instead of at plateaus."""
    plateau_window: int = Field(default=2_000, gt=0, json_schema_extra=GOING_ON)
    """'plateau': updates of a window; the mean losses of windows are compared."""
    plateau_patience: int = Field(default=3, gt=0, json_schema_extra=GOING_ON)
    """'plateau': windows without progress before a halving."""
    plateau_threshold: float = Field(default=1e-3, ge=0, json_schema_extra=GOING_ON)
    """'plateau': least relative improvement over the best window that counts as progress."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay."""
    beta2: float = Field(default=0.96, ge=0, lt=1)
    """AdamW's second decay."""
    weight_decay: float = Field(default=4.5e-2, ge=0, json_schema_extra=GOING_ON)
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = Field(default=4.0, gt=0, json_schema_extra=GOING_ON)
    """Clip gradients to this global norm."""
    optimizer: Literal["paper", "apex", "muon"] = "paper"
    """AdamW with the paper's details; NVIDIA apex's FusedAdam (needs a GPU and fp32 moments, has no upper limit of the variance; an error if apex cannot be
    used); or 'muon': Muon for the matrices of resblocks, the paper's AdamW for everything else (docs/small_data.md)."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """'muon': decay of the momentum, which is Nesterov's."""
    norm: Literal["torch", "apex"] = "torch"
    """Layer norm of torch, or NVIDIA apex's FusedLayerNorm (needs a GPU; an error if apex cannot be used). Weights and exports are the same."""
    logits: Literal["fp32", "bf16", "auto"] = Field(default="fp32", json_schema_extra=GOING_ON)
    """Operands of the heads' matrix products in training: 'fp32' as in the paper, 'bf16', or 'auto': bf16 where the residual branches compute in bf16. Softmax, loss,
    weights and gradients are fp32 always, and so are the products of evaluation and drawing."""
    clip_variance: float | None = Field(default=5.0, gt=0)
    """Upper limit of Adam's variance estimate; None: no limit."""
    moments: Literal["fp32", "16-bit"] = "fp32"
    """Storage of Adam's moments of block matrices: '16-bit' is 1-6-9 for the mean and 0-6-10 for the variance (paper B.2)."""
    ema: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the iterate average."""
    ema_every: int = Field(default=25, gt=0)
    """Updates between copies into the iterate average."""
    activation_checkpointing: bool = Field(default=True, json_schema_extra=ANY_TIME)
    """Recompute activations inside resblocks in the backward pass."""
    checkpoint_every: int = Field(default=1, gt=0, json_schema_extra=ANY_TIME)
    """With activation_checkpointing: resblocks that are recomputed together; activations are kept before every n-th resblock."""

    @model_validator(mode="after")
    def _contrast_is_possible(self) -> Self:
        self.check_contrast(init_from=self.init_from, batch=self.batch, z_loss=self.z_loss, replaced=self.replace_codes + self.replace_pieces)
        return self

    def has_bf16_logits(self, branches: str) -> bool:
        """Whether the heads' products read bf16 operands in training, where residual branches compute in ``branches`` (fp32, bf16 or fp16)."""
        return self.logits == "bf16" or (self.logits == "auto" and branches == "bf16")


class ZeroSection(Section):
    """DeepSpeed ZeRO. Keys have DeepSpeed's names where it has such a key."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    stage: Literal[1, 2, 3] = 2
    """ZeRO stage."""
    sharding: Literal["flat", "node"] = "flat"
    """'node': shard over the processes of a node and replicate between nodes (paper 2.5); 'flat': shard over all processes."""
    weights: Literal["auto", "fp16", "cast"] = "auto"
    """Storage of block matrices with dalle_fit.precision = "fp16": fp16 parameters, or fp32 parameters that are cast inside the resblock. 'auto': whichever
    takes fewer bytes on the ZeRO stage, which is fp16 on all three (docs/architecture.md)."""
    offload_optimizer: bool = False
    """Keep masters and moments in CPU memory, and update there."""
    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass."""
    reduce_bucket_size: int = Field(default=50_000_000, gt=0)
    """Elements per gradient reduction, at most. Buckets, which DeepSpeed allocates whole, are no larger than the model."""
    allgather_bucket_size: int = Field(default=50_000_000, gt=0)
    """Stages 1 and 2: elements per parameter gather, if torch cannot gather into one tensor. Without effect: every supported torch can."""
    use_multi_rank_bucket_allreduce: bool = True
    """Stages 1 and 2: reduce with one all-reduce instead of one reduction to each owner: fewer and larger messages, but up to twice the traffic."""
    stage3_prefetch_bucket_size: int = Field(default=50_000_000, ge=0)
    """Stage 3: elements gathered ahead."""
    stage3_param_persistence_threshold: int = Field(default=0, ge=0)
    """Stage 3: parameters of at most this many elements are never partitioned."""
    stage3_max_live_parameters: int = Field(default=1_000_000_000, ge=0)
    """Stage 3: most elements of gathered parameters at a time."""
    stage3_max_reuse_distance: int = Field(default=1_000_000_000, ge=0)
    """Stage 3: a parameter that is used again within this many elements is not released."""


class ScaleSection(Section):
    """Gradient scales of the transformer's resblocks, for dalle_fit.precision = "fp16" (paper D.1). Values are exponents of two; scales are further multiplied by
    the number of micro-batches in the global batch, over all processes (the paper's M)."""

    scope: Literal["resblock", "global", "none"] = "resblock"
    """One scale for each resblock, one for all of them, or none."""
    initial: float = 13
    """Exponent at the start."""
    growth_updates: int = Field(default=1000, gt=0)
    """Updates without overflow over which a scale doubles."""
    division: float = Field(default=0.5, gt=0)
    """Subtracted from the exponent after an overflow: 0.5 divides the scale by the square root of 2."""
    window: int = Field(default=125, gt=0)
    """A scale is divided at most once within this many updates."""
    lowest: float = 7
    """Lowest exponent."""
    highest: float = 24
    """Highest exponent."""
    before_reduction: float = 0
    """Exponent of a constant by which each process multiplies its resblocks' gradients before they are summed (paper D.3), to keep the sums within fp16.
    DeepSpeed also divides by the number of sharding processes before it sums; this constant comes on top."""
    filter: bool = True
    """Set non-finite activation gradients to zero where they enter and leave a resblock (Figure 4)."""
    skip: Literal["all", "resblock"] = "all"
    """What is skipped if a parameter gradient is not finite: the whole update (paper E.2), or the update of its resblock."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.lowest <= self.initial <= self.highest:
            raise ValueError(f"initial = {self.initial} is not between lowest = {self.lowest} and highest = {self.highest}")
        return self


class ClipFit(FitSection):
    """Training of the contrastive model."""

    precision: UnscaledPrecision = "auto"
    """Arithmetic of the large matrix products. 'auto': fp32 on a CPU; on a GPU bf16 if a probe finds it at least 1.3 times as fast as fp32."""
    contrast: Literal["micro-batch", "update"] = Field(default="micro-batch", json_schema_extra=GOING_ON)
    """Among which pairs each one is told apart: those of its micro-batch, over all processes, or those of the whole update. With 'update' and accumulation a batch of
    any size fits: embeddings come first, without activations, and each micro-batch is then computed once more (Gao et al. 2021)."""
    activation_checkpointing: bool = Field(default=False, json_schema_extra=ANY_TIME)
    """Recompute activations inside the blocks of both towers in the backward pass."""
    scale_max: float | None = Field(default=None, ge=1, json_schema_extra=GOING_ON)
    """Augmentation: largest resize target of a training picture, divided by the image size, before a crop is cut out of it at random; None: encode.scale_max."""
    mirror: bool = Field(default=False, json_schema_extra=GOING_ON)
    """Augmentation: mirror half of the training pictures. Captions that name left and right become wrong."""
    views: int = Field(default=1, ge=1, le=64, json_schema_extra=GOING_ON)
    """With clip.towers = 'frozen': crops of each training picture of which features are kept; each epoch draws one of them. Time and disk are proportional to it."""
    lr: float = Field(default=5e-4, gt=0, json_schema_extra=GOING_ON)
    """Peak step size."""
    warmup_steps: int = Field(default=100, ge=0, json_schema_extra=GOING_ON)
    """Updates of linear warm-up; half-cosine to zero afterwards."""
    weight_decay: float = Field(default=0.1, ge=0, json_schema_extra=GOING_ON)
    """Decoupled weight decay, on matrices only."""
    ema: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the exponential moving average of the parameters."""


class RunConfig(Section):
    """All sections. Stages take this; the code below them takes the smallest section that it needs."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    filters: FilterConfig = FilterConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    dvae: DVAEConfig = DVAEConfig()
    dvae_fit: DvaeFit = DvaeFit()
    encode: EncodeSection = EncodeSection()
    dalle: TransformerConfig = TransformerConfig()
    dalle_fit: DalleFit = DalleFit()
    align_fit: AlignFit = AlignFit()
    zero: ZeroSection = ZeroSection()
    scales: ScaleSection = ScaleSection()
    compression: CompressionSection = CompressionSection()
    clip: ClipConfig = ClipConfig()
    clip_fit: ClipFit = ClipFit()
    samples: SamplesSection = SamplesSection()
    generate: GenerateSection = GenerateSection()
    evaluate: EvaluateSection = EvaluateSection()
    report: ReportSection = ReportSection()
    # What a scheduler is asked for is not part of the run: it is not stored in config.json, and may change.
    cluster: ClusterConfig = Field(default=ClusterConfig(), exclude=True)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.dalle_fit.optimizer == "apex" and self.dalle_fit.moments == "16-bit":
            raise ValueError("dalle_fit.optimizer = 'apex' keeps fp32 moments; set dalle_fit.moments = 'fp32', or the optimizer to 'paper'")
        if self.dalle_fit.optimizer == "muon" and self.zero.offload_optimizer:
            raise ValueError(
                "dalle_fit.optimizer = 'muon' multiplies whole matrices, for which zero.offload_optimizer = true leaves the CPU only; set it to false, or the optimizer "
                "to 'paper'"
            )
        if self.align_fit.steps:
            self.fit("align")
        if len(set(self.dalle_fit.halve_at)) < len(self.dalle_fit.halve_at):
            raise ValueError(f"dalle_fit.halve_at = {list(self.dalle_fit.halve_at)} names an update twice; each halves the step size once")
        check_sharding(self.compression, self.zero.sharding)
        if (size := self.dvae.image_size) % self.clip.patch and self.clip.towers == "own":
            raise ValueError(f"clip.patch = {self.clip.patch} does not divide dvae.image_size = {size}")
        if self.dvae_fit.scale_min > self.dvae_fit.scale_max:
            raise ValueError(f"dvae_fit.scale_min = {self.dvae_fit.scale_min} is above dvae_fit.scale_max = {self.dvae_fit.scale_max}")
        if any(source.is_emoji for source in self.data.sources) and self.data.render_size < size:
            raise ValueError(f"data.render_size = {self.data.render_size} is below dvae.image_size = {size}")
        if self.dvae.vocab > 65536:
            raise ValueError(f"dvae.vocab = {self.dvae.vocab}: code shards hold uint16, so at most 65536")
        if (s := self.generate.guidance) != 1 and not self.dalle_fit.caption_dropout:
            raise ValueError(f"generate.guidance = {s} needs a model trained with dalle_fit.caption_dropout above 0; set that, or guidance = 1")
        if self.generate.top_k > self.dvae.vocab:
            raise ValueError(f"generate.top_k = {self.generate.top_k} is above dvae.vocab = {self.dvae.vocab}")
        if (window := self.generate.window) > (grid := self.dvae.grid):
            raise ValueError(f"generate.window = {window} is above the grid of {grid} codes (dvae.image_size / dvae.downsample)")
        if self.generate.show > self.generate.candidates:
            raise ValueError(f"generate.show = {self.generate.show} is above generate.candidates = {self.generate.candidates}")
        return self

    @property
    def transformer(self) -> str:
        """The stage whose transformer the run draws with in the end."""
        return "align" if self.align_fit.steps else "dalle"

    def fit(self, stage: str, begin: str = "dalle/export") -> FitSection | None:
        """With what a stage trains; None if it trains nothing.

        Args:
            begin: the export that stage align begins with.
        """
        if stage == "align":
            return self.align_fit.contrasting(self.dalle_fit, begin)
        found: FitSection | None = getattr(self, f"{stage}_fit", None)
        return found

    def stream_shape(self) -> StreamShape:
        """Shape of the token stream, from the sections that define its numbers."""
        return StreamShape(text_tokens=self.tokenizer.max_tokens, text_vocab=self.tokenizer.vocab, grid=self.dvae.grid, image_vocab=self.dvae.vocab)


def read_preset(preset: str) -> tuple[dict[str, Any], str]:
    """The sections of a preset, and where they were read from: a name in train/presets, a .toml file, or a run folder (its config.json).

    For a run folder, run.root and run.name follow from its path, and keys that it lacks get the value that stands for the behaviour before they existed.
    If there is no such preset, a ConfigError lists the known names.
    """
    named = PRESETS / f"{preset}.toml"
    if "/" not in preset and files.is_file(named):
        return parse(named.read_text(), f"preset {preset}"), f"preset {preset}"
    from infra import storage, strict_json  # only needed for run folders and files, which may lie on s3
    from infra.node_folder import read_once
    from infra.run_folder import place_of

    for candidate in (preset, storage.join(preset, "config.json")):
        if not candidate.endswith((".toml", ".json")):
            continue
        try:
            tree = parse(read_once(candidate, strict_json.MAX_BYTES).decode(), candidate)
        except MissingError:
            continue
        except UnicodeDecodeError as error:
            raise ConfigError(f"{candidate}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from error
        tree = completed(RunConfig, tree) if candidate.endswith(".json") else tree
        place = place_of(candidate)
        return (tree | {"run": tree["run"] | place} if place else tree), candidate
    known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.toml")))
    raise ConfigError(f"preset '{preset}': no such preset, .toml file or run folder; presets: {known}.")


def load_run(preset: str, overrides: list[str]) -> RunConfig:
    """The run configuration of a preset and overrides; see ``read_preset`` and ``infra.config.load``."""
    tree, origin = read_preset(preset)
    return anchored(load(RunConfig, tree, origin, overrides), load(RunConfig, tree, origin, []) if origin.endswith("/config.json") else None)
