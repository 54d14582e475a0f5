"""One small all-reduce in each step, for everything that must be the same on all ranks (docs/contracts.md, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from infra.world import World
from train.ranks import watchdog

watchdog.waits_for_ranks(__file__)
CONTROL = ("stop", "non_finite", "heartbeat", "step_time_s")


class SignalVector:
    """Named slots in one float64 vector, summed over ranks. float64 holds counts up to 2**53 exactly.

    Args:
        world: whose ranks each have a slot of their own, for the seconds of their own work; None: there are none. They are in every message, needed or not: its
            length decides in which order libraries add up from three ranks on.
    """

    def __init__(self, metrics: Iterable[str], device: torch.device, world: World | None = None) -> None:
        self.names = (*CONTROL, *metrics)
        self.device = device
        self._rank, self._ranks = (world.rank, world.size) if world is not None and world.size > 1 else (0, 0)
        self.own_s: list[float] = []
        """What each rank sent with the last message."""

    def exchange(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """Sum each slot over all ranks. A slot without a value contributes 0; ``heartbeat`` always contributes 1. See ``exchange_with``. Collective."""
        return self.exchange_with(values, None)[0]

    def exchange_with(
        self, values: Mapping[str, float | torch.Tensor], more: torch.Tensor | None, own_s: float = 0.0
    ) -> tuple[dict[str, float], list[float] | None]:
        """The same, with a vector of an engine's own (float64, equally long on all ranks) that travels along, and this rank's seconds of own work.

        One collective, and on a GPU one host synchronisation.

        Raises:
            KeyError: a value has no slot.
        """
        unknown = set(values) - set(self.names)
        if unknown:
            raise KeyError(f"no slot for {', '.join(sorted(unknown))}; slots: {', '.join(self.names)}")
        numbers = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)} | {"heartbeat": 1.0}
        # One copy that nobody waits for: on a GPU, a tensor made of a number there waits for everything before it.
        plain = torch.zeros(len(self.names) + self._ranks, dtype=torch.float64)
        plain[: len(self.names)] = torch.tensor([numbers.get(name, 0.0) for name in self.names], dtype=torch.float64)
        if self._ranks:
            plain[len(self.names) + self._rank] = own_s
        host = plain.to(self.device, non_blocking=True)
        slots = list(host[: len(self.names)].unbind())
        for index, name in enumerate(self.names):
            value = values.get(name)
            if isinstance(value, torch.Tensor):
                slots[index] = value.detach().to(self.device, torch.float64)
        vector = torch.cat([torch.stack(slots), host[len(self.names) :], *([] if more is None else [more.to(self.device)])])
        if dist.is_initialized():
            dist.all_reduce(vector)
        sums = vector.tolist()
        mine = len(self.names)
        self.own_s = sums[mine : mine + self._ranks]
        return dict(zip(self.names, sums, strict=False)), None if more is None else sums[mine + self._ranks :]
