"""DeepSpeed ZeRO stages 1 and 2 behind the Engine protocol. The only importer of deepspeed, with every reach into its internals checked at start."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")  # no CUDA toolkit is needed where no op is compiled
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every rank warns that it found no GPU

import deepspeed
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from infra.errors import ConfigError
from infra.world import World
from train.averaging import Average
from train.config import DalleFit, ZeroSection
from train.engine import Update, decay_groups
from train.fragments import Fragment, even_slice
from train.loss_scale import LossScale

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

_SERIES = "0.19."
_NEEDED = ("single_partition_of_fp32_groups", "averaged_gradients", "update_lp_params", "optimizer", "overflow", "check_grad_overflow")


def deepspeed_config(fit: DalleFit, zero: ZeroSection, world: World) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours. No precision section: fp32 parameters are cast inside the resblocks, and the rest stays fp32 (deepspeed.md 3)."""
    return {
        "train_batch_size": fit.batch,
        "train_micro_batch_size_per_gpu": fit.batch // (world.size * fit.accumulation),
        "gradient_accumulation_steps": fit.accumulation,
        "gradient_clipping": fit.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": zero.overlap_comm,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "allgather_bucket_size": zero.allgather_bucket_size,
        },
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


class ZeroEngine:
    """A model whose gradients and optimizer state are sharded over ranks."""

    def __init__(self, module: nn.Module, fit: DalleFit, zero: ZeroSection, world: World) -> None:
        if not deepspeed.__version__.startswith(_SERIES):
            raise ConfigError(f"deepspeed {deepspeed.__version__} is installed; train/zero/ knows {_SERIES}x (requirements.txt).")
        self.module, self.world = module, world
        self._scale = float(world.size * fit.accumulation)
        # DeepSpeed would compile a shared-memory collective at its first use on a CPU: 50 s and a compiler for no gain at these
        # sizes (DECISIONS.md); gloo does the same work.
        __compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # a single process has none, and DeepSpeed insists
        self.adam = torch.optim.AdamW(decay_groups(module.named_parameters(), fit.weight_decay), lr=0.0, betas=(fit.beta1, fit.beta2), eps=1e-8)
        self.config = deepspeed_config(fit, zero, world)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=self.adam, config=self.config, dist_init_required=False)
        absent = [name for name in _NEEDED if not hasattr(self._optimizer, name)]
        unmapped = [name for name, p in module.named_parameters() if not hasattr(p, "_hp_mapping")]
        if absent or unmapped:
            raise ConfigError(f"deepspeed {deepspeed.__version__} lacks what train/zero/ stands on: {', '.join(absent or unmapped[:3])}.")
        self.average = Average(module.named_parameters(), fit.ema, fit.ema_every)
        self.updates = 0
        self.loss_scale: LossScale | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._engine(*inputs, **named)

    def micro_batch(self, *, last: bool) -> None:
        """Check that DeepSpeed counts micro-batches as we do."""
        assert self._engine.is_gradient_accumulation_boundary() == last, "DeepSpeed's accumulation boundary is out of step"

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. DeepSpeed averages over ranks and micro-batches, and shares of a global mean must sum."""
        self._engine.backward(loss * self._scale)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, lr: float) -> Update:
        """Apply the update, unless DeepSpeed finds a non-finite gradient on any rank."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        applied = not self._optimizer.overflow
        if applied:
            self.updates += 1
            self.average.update(self.updates)
        return Update(applied, float("inf") if norm is None else float(norm))

    def fragments(self, *, to_load: bool) -> dict[str, Fragment]:
        """This rank's pieces of the fp32 masters and moments, as views of ZeRO's flat partitions; averages in even slices."""
        found: dict[str, Fragment] = {}
        if to_load:
            self._make_moments()
        for name, parameter in self.module.named_parameters():
            cut = (0, 1) if to_load else (self.world.rank, self.world.size)
            found[f"average/{name}"] = even_slice(self.average.values[name], *cut)
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # no piece of this parameter lies in this rank's partition
                continue
            offset, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            pieces = {"model": flat}
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.adam.state.get(flat, {}):
                    pieces[f"optimizer/{moment}"] = self.adam.state[flat][moment]
            for kind, whole in pieces.items():
                found[f"{kind}/{name}"] = Fragment(whole.detach().narrow(0, place.start, place.numel), offset, parameter.numel())
        return found

    def loaded(self, updates: int) -> None:
        """Finish a restore: refresh every rank's parameters from the masters, and set the count of applied updates."""
        self.updates = updates
        for flat in self._optimizer.single_partition_of_fp32_groups:
            self.adam.state[flat]["step"].fill_(float(updates))
        self._optimizer.update_lp_params()

    def _make_moments(self) -> None:
        for flat in self._optimizer.single_partition_of_fp32_groups:
            if not self.adam.state.get(flat):
                self.adam.state[flat] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
