"""Which curves belong in one plot: of the report's, and of TensorBoard's custom layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One plot: its title, and (metric, label) for each of its curves."""

    title: str
    curves: tuple[tuple[str, str], ...]
    log: bool = False
    reference: str = ""
    """Key of a value in evaluate/metrics.json, which is drawn as a dashed line."""
    reference_label: str = ""


_CONTRASTED = (
    Panel("captions contrasted: reward (log-likelihood ratio times beta)", (("train/reward", "own caption"), ("train/reward_other", "another's"))),
    Panel("captions contrasted: pictures likelier under their own (share)", (("train/reward_accuracy", "training"),)),
)

PANELS: dict[str, tuple[Panel, ...]] = {
    "dvae": (
        Panel("ELB (nats per channel value)", (("eval/elb_relaxed", "relaxed codes"), ("eval/elb_true", "true codes"))),
        Panel(
            "reconstruction term",
            (("train/nll", "training"), ("eval/nll_true", "validation, true codes"), ("eval/nll_relaxed", "validation, relaxed")),
        ),
        Panel("PSNR on validation (dB)", (("eval/psnr", "true codes"), ("eval/psnr_relaxed", "relaxed"))),
        Panel("codes in use (share)", (("eval/code_use", "validation"), ("eval/train_code_use", "newest training codes"))),
        Panel("ELB gap: relaxed minus true", (("eval/elb_gap", "validation"),)),
        Panel("SSIM on validation", (("eval/ssim", "true codes"),)),
        Panel("LPIPS on validation", (("eval/lpips", "true codes"),)),
        Panel("Fréchet distance of reconstructions", (("eval/fid", "FID"), ("eval/frechet_efficientnet_lite0", "by EfficientNet-Lite0 (no FID)"))),
        Panel("loss (nats per channel value)", (("train/loss", "training"),)),
        Panel("KL to uniform (nats per code)", (("train/kl", "training"),)),
        Panel("perplexity of codes", (("eval/perplexity", "validation"), ("eval/train_perplexity", "newest training codes"))),
        Panel("dead codes", (("eval/dead_codes", "validation"), ("eval/train_dead_codes", "newest training codes"))),
        Panel("schedules: temperature, KL weight", (("sched/tau", "temperature"), ("sched/beta", "KL weight"))),
        Panel("step size", (("optim/lr", "step size"),)),
        Panel("gradient norm", (("optim/grad_norm", "before clipping"),), log=True),
        Panel("loss scale", (("optim/loss_scale", "scale"),), log=True),
        Panel("skipped updates", (("optim/skipped_updates", "overflows so far"),)),
        Panel("images per second", (("perf/images_per_s", "images/s"),)),
        Panel("share of the matrix peak (MFU)", (("perf/mfu", "useful arithmetic"),)),
        Panel("waiting for data (s per update)", (("data/wait_s", "wait"),)),
    ),
    "dalle": (
        Panel(
            "image loss (nats per code)",
            (("train/loss_image", "training"), ("eval/loss_image", "validation"), ("eval/loss_image_shuffled", "validation, wrong captions")),
            reference="unigram_entropy_nats",
            reference_label="unigram entropy",
        ),
        Panel("text loss (nats per token)", (("train/loss_text", "training"), ("eval/loss_text", "validation"))),
        Panel("worth of the caption (nats per code)", (("eval/caption_gain", "validation"),)),
        Panel("weighted loss", (("train/loss", "training"),)),
        *_CONTRASTED,
        Panel("step size", (("optim/lr", "step size"),)),
        Panel("gradient norm", (("optim/grad_norm", "before clipping"),), log=True),
        Panel("tokens per second", (("perf/tokens_per_s", "tokens/s"),)),
    ),
    "align": (
        Panel("worth of the caption (nats per code)", (("eval/fitted_caption_gain", "validation"), ("eval/frozen_fitted_caption_gain", "before"))),
        Panel(
            "image loss (nats per code)",
            (("train/loss_image", "training"), ("eval/fitted_loss_image", "validation"), ("eval/frozen_fitted_loss_image", "before")),
        ),
        *_CONTRASTED,
        Panel("contrastive loss", (("train/loss", "training"),)),
        Panel("step size", (("optim/lr", "step size"),)),
        Panel("gradient norm", (("optim/grad_norm", "before clipping"),), log=True),
        Panel("tokens per second", (("perf/tokens_per_s", "tokens/s"),)),
    ),
    "clip": (
        Panel("contrastive loss (nats)", (("train/loss", "training"), ("eval/loss", "validation"))),
        Panel("retrieval at first rank (share)", (("eval/recall_at_1", "validation"),)),
    ),
}
TITLES = {"dvae": "dVAE", "dalle": "Transformer", "align": "Transformer, aligned", "clip": "CLIP"}
