"""Advice if memory is not enough: which keys to change, for ``plan`` and for a run that has ended because a GPU's memory was full. Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from train.config import RunConfig
from train.config_align import key
from train.planning.estimate import Setting, memory
from train.planning.states import Cluster

_FACTORS = (2, 4, 8, 16, 32)


def smaller(setting: Setting) -> list[tuple[str, Setting]]:
    """Single changes of the transformer's training that take less memory: the words for the command line, and the changed setting."""
    fit, changed = setting.cfg.dalle_fit, []
    for accumulation in (fit.accumulation * factor for factor in _FACTORS):
        if fit.batch % (setting.cluster.world * accumulation) == 0:
            changed.append((f"dalle_fit.accumulation={accumulation}", _with_fit(setting, accumulation=accumulation)))
    if not fit.activation_checkpointing:
        changed.append(("dalle_fit.activation_checkpointing=true", _with_fit(setting, activation_checkpointing=True)))
    found = memory(setting)
    if found.evaluating > found.training:  # what an update takes does not matter then
        batch = setting.cfg.evaluate.batch
        changed += [(f"evaluate.batch={batch // factor}", _with_evaluation(setting, batch // factor)) for factor in _FACTORS if batch >= factor]
    changed += [(f"zero.stage={stage}", replace(setting, stage=stage)) for stage in (1, 2, 3) if stage > setting.stage]
    return changed


def _with_fit(setting: Setting, **values: int) -> Setting:
    cfg: RunConfig = setting.cfg.model_copy(update={"dalle_fit": setting.cfg.dalle_fit.model_copy(update=values)})
    return replace(setting, cfg=cfg)


def _with_evaluation(setting: Setting, batch: int) -> Setting:
    cfg: RunConfig = setting.cfg.model_copy(update={"evaluate": setting.cfg.evaluate.model_copy(update={"batch": batch})})
    return replace(setting, cfg=cfg)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU's memory was full. The error is recognised by its name, because the caller has not imported torch."""
    return type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")


def advice(stage: str, cfg: RunConfig, ranks: int, error: BaseException) -> str:
    """One line of advice for a run that ended because a GPU's memory was full."""
    what = str(error).partition(". ")[0].rstrip(".")
    return f"{what}. {_words(stage, cfg, ranks)}"


def _words(stage: str, cfg: RunConfig, ranks: int) -> str:
    if stage == "dalle":
        keys = [words for words, _ in smaller(Setting.configured(cfg, Cluster(1, ranks)))]
        look = "; the run goes on with any of them, and 'launcher.py plan' with the same words shows what each takes"
        return f"Less memory: {', '.join(keys)}{look}." if keys else "Use more or larger GPUs, or a smaller model."
    fit = cfg.fit(stage)
    if fit is None:
        return {
            "encode": f"Less memory: a smaller encode.batch (now {cfg.encode.batch}).",
            "evaluate": f"Less memory: a smaller evaluate.batch (now {cfg.evaluate.batch}).",
        }.get(stage, "Look with nvidia-smi whether another program holds the memory, or use a larger GPU.")
    found = next((fit.accumulation * factor for factor in _FACTORS if fit.batch % (ranks * fit.accumulation * factor) == 0), None)
    keys = [f"{stage}_fit.accumulation={found}"] if found else [f"a smaller {stage}_fit.batch (now {fit.batch})"]
    if getattr(fit, "activation_checkpointing", None) is False:
        keys.append(f"{key(stage, 'activation_checkpointing')}=true")
    return f"Less memory: {', '.join(keys)}."
