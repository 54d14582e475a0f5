"""The words of a training that diverged."""

from infra.commands import launcher
from infra.errors import DivergedError
from train.config import FitSection
from train.config_align import key as key_of


def diverged(stage: str, section: FitSection, run_url: str, step: int, saved: int, bad: int, overflows: int) -> DivergedError:
    """After too many updates in a row that were bad, ``bad`` of them by numbers that are none and ``overflows`` by scaled gradients. What helps is named before
    what only bears it.

    Args:
        saved: the update of the newest checkpoint; 0: there is none.
    """
    key = "max_overflow_steps" if overflows >= section.max_overflow_steps else "max_bad_steps"
    kinds = {"non-finite losses or gradients": bad, "overflows of scaled gradients at ever smaller scales": overflows}
    what = " or ".join(f"{kind} ({count})" if bad and overflows else kind for kind, count in kinds.items() if count)
    kept, where = (f"the checkpoint of update {saved} is kept", "Go on from there") if saved else ("there is no checkpoint yet", "Begin again")
    # A warm-up that is over when training goes on is no remedy.
    warm_up = f" or a longer {key_of(stage, 'warmup_steps')}" if saved <= getattr(section, "warmup_steps", -1) else ""
    smaller = launcher(stage, run_url, f"{stage}_fit.lr={getattr(section, 'lr', 1e-4) / 2:.3g}", "--go-on")
    return DivergedError(
        f"{stage}: {bad + overflows} consecutive updates up to update {step} had {what}; {kept}. {where} with a smaller {key_of(stage, 'lr')}{warm_up}, or, if that "
        f"many are to be expected, with a larger {key_of(stage, key)}. With half the step size: {smaller}"
    )
