"""One small all-reduce per step for everything that ranks must agree on (docs/contracts.md, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

CONTROL = ("stop", "non_finite", "heartbeat", "step_time_s")


class SignalVector:
    """Named slots in one float64 vector, summed over ranks. float64 holds counts up to 2**53 exactly."""

    def __init__(self, metrics: Iterable[str], device: torch.device) -> None:
        self.names = (*CONTROL, *metrics)
        self.device = device

    def exchange(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """Sum each slot over ranks; slots without a value contribute 0, ``heartbeat`` always 1.

        One collective, and on a GPU one host synchronisation.

        Raises:
            KeyError: a value has no slot.
        """
        unknown = set(values) - set(self.names)
        if unknown:
            raise KeyError(f"no slot for {', '.join(sorted(unknown))}; slots: {', '.join(self.names)}")
        slots = [torch.as_tensor(values.get(name, 0.0), dtype=torch.float64, device=self.device).detach() for name in self.names]
        slots[self.names.index("heartbeat")] = torch.ones((), dtype=torch.float64, device=self.device)
        vector = torch.stack(slots)
        if dist.is_initialized():
            dist.all_reduce(vector)
        return dict(zip(self.names, vector.tolist(), strict=True))
