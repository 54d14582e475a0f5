"""The fused optimizer and layer norm of NVIDIA apex, for configurations that ask for them. Not yet run on a GPU.

The package called apex on the Python package index is an unrelated web toolkit, and a build of apex without its CUDA extensions can be imported but not used.
So these functions find out by constructing the objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ConfigError
from train.optimizer.protocol import ShardGroup, ShardOptimizer

_HOW = "build NVIDIA's apex from its sources with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (requirements.txt), or"


def layer_norm(key: str) -> Callable[[int], nn.Module]:
    """A function that makes apex's FusedLayerNorm (eps 1e-5) of a given width.

    Raises:
        ConfigError: it cannot be constructed here; the reason, and the key that asked for it.
    """
    reason = _norm_problem()
    if reason:
        raise ConfigError(f"{key} = 'apex': {reason}; {_HOW} set {key} = 'torch'.")
    from apex.normalization import FusedLayerNorm

    return lambda width: FusedLayerNorm(width, eps=1e-5)


def adam(groups: Iterable[ShardGroup], *, betas: tuple[float, float], eps: float, key: str) -> ShardOptimizer:
    """apex's FusedAdam, with fp32 moments and no limit of the variance. It has no method ``apply``, so DeepSpeed's own step calls it.

    Raises:
        ConfigError: it cannot be constructed here; the reason, and the key that asked for it.
    """
    reason = _adam_problem()
    if reason:
        raise ConfigError(f"{key} = 'apex': {reason}; {_HOW} set {key} = 'paper'.")
    from apex.optimizers import FusedAdam

    class ApexAdamW(FusedAdam):
        """Updates one group at a time, and applies the group's factor and the engine's count of updates, as our engine requires."""

        count = 1
        param_groups: list[Any]

        def state_names(self, group: ShardGroup) -> tuple[str, ...]:
            """See the protocol."""
            return "exp_avg", "exp_avg_sq"

        def moments(self, group: ShardGroup, p: Tensor) -> dict[str, Tensor]:
            """See the protocol."""
            state: dict[str, Tensor] = self.state[p]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            return state

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """Update all groups but those whose ``skip`` is set."""
            groups = self.param_groups
            for group in groups:
                if group["skip"]:
                    continue
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(group["factor"])
                        self.moments(group, p)
                group["step"] = self.count - 1  # FusedAdam adds one
                self.param_groups = [group]
                super().step()
            self.param_groups = groups

    given = [{"factor": 1.0, "skip": False, **group} for group in groups]
    return ApexAdamW(given, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)


def report() -> dict[str, str]:
    """Each part -> 'available', or why it is not. ``doctor`` runs this module in a separate process to get this."""
    return {"apex FusedAdam": _adam_problem() or "available", "apex FusedLayerNorm": _norm_problem() or "available"}


def _adam_problem() -> str:
    def construct() -> None:
        from apex.optimizers import FusedAdam

        FusedAdam([torch.nn.Parameter(torch.zeros(1))], lr=0.0)

    return _problem(construct)


def _norm_problem() -> str:
    def construct() -> None:
        from apex.normalization import FusedLayerNorm

        FusedLayerNorm(8)

    return _problem(construct)


def _problem(construct: Callable[[], None]) -> str:
    try:
        construct()
    except ImportError as error:
        return f"it cannot be imported ({error})"
    except Exception as error:  # a half-built extension may raise anything
        return f"it cannot be constructed ({type(error).__name__}: {error})"
    return ""


if __name__ == "__main__":
    print(json.dumps(report()))
