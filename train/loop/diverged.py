"""The words of a training that diverged."""

from infra.commands import launcher
from infra.errors import DivergedError
from train.config import FitSection
from train.config_align import key as key_of


def diverged(stage: str, section: FitSection, run_url: str, step: int, bad: int, overflows: int) -> DivergedError:
    """After too many updates in a row that were bad, ``bad`` of them by numbers that are none and ``overflows`` by scaled gradients."""
    key = "max_overflow_steps" if overflows >= section.max_overflow_steps else "max_bad_steps"
    kinds = {"non-finite losses or gradients": bad, "overflows of scaled gradients at ever smaller scales": overflows}
    what = " or ".join(f"{kind} ({count})" if bad and overflows else kind for kind, count in kinds.items() if count)
    return DivergedError(
        f"{stage}: {bad + overflows} consecutive updates up to update {step} had {what}; the last checkpoint is "
        f"kept. Run again with a larger {key_of(stage, key)} if that is to be expected; or go on from there with a smaller step size: "
        + launcher(stage, run_url, f"{stage}_fit.lr={getattr(section, 'lr', 1e-4) / 2:.3g}", "--go-on")
    )
