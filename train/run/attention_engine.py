"""The attention engine of a run's transformer. It is chosen once for each kind of device and dtype and stored, so that a resumed run computes the same."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from infra import storage, stored
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.run_records import AttentionEngine
from infra.world import World
from model.attention_engines import EngineName, why_unavailable
from train.config import RunConfig
from train.machine.attention_choice import choose
from train.machine.rates import name_of


def of_run(cfg: RunConfig, run: RunFolder, world: World, device: torch.device, dtype: torch.dtype) -> EngineName:
    """The engine that dalle.attention names. If that is "auto", the one that the run chose when it first ran on such a device, which is stored in
    ``<run>/attention/<device>-<dtype>.json``. Collective.

    Raises:
        ConfigError: the engine cannot train on the device, or the folder dalle_fit.attention_records holds no records.
    """
    records = cfg.dalle_fit.attention_records
    if cfg.dalle.attention != "auto":
        return choose(cfg.dalle, cfg.stream_shape(), device, dtype, records)
    url, kept = run.at("attention", f"{device.type}-{name_of(dtype)}.json"), [""]
    if world.is_main:
        if not storage.exists(url):
            found = choose(cfg.dalle, cfg.stream_shape(), device, dtype, records)
            storage.create_once(url, (json.dumps({"engine": found}) + "\n").encode())  # another launcher of the run may have chosen meanwhile
        kept = [str(stored.read(url, AttentionEngine)["engine"])]
    if world.size > 1:
        dist.broadcast_object_list(kept, device=device)
    engine: EngineName = kept[0]  # type: ignore[assignment]
    reason = why_unavailable(engine, device, cfg.dalle)
    if reason is not None:
        raise ConfigError(
            f"{url}: this run has attention = '{engine}' on such devices: {reason}. Run it where that engine runs, or delete the file, so that another one "
            "is chosen; losses then differ from those of an undisturbed run by rounding."
        )
    return engine
