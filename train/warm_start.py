"""Starting from the weights of an export: to go on with another recipe, or to fine-tune (``dalle_fit.init_from``)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ConfigError
from train import export
from train.fit import full_shape

log = logging.getLogger(__name__)

_SHOWN = 10


def load(module: nn.Module, url: str, key: str) -> str:
    """Load exported weights into a module that no engine holds yet, whole or sharded by ``sharded_construction``, and return their content hash.

    Args:
        key: the configuration key that named the export, for messages.

    Raises:
        ConfigError: a weight is missing, left over or of another shape; all of them are listed, up to ten.
        DataError: there is no export, or it is damaged.
    """
    identity, tensors = export.read_tensors(url)
    expected = {name: tuple(full_shape(p)) for name, p in module.named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        lines = [f"  {name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} here" for name in odd[:_SHOWN]]
        more = [f"  and {len(odd) - _SHOWN} more"] if len(odd) > _SHOWN else []
        raise ConfigError(f"{key} = {url}: {len(odd)} of {len(expected)} weights do not fit this configuration:\n" + "\n".join(lines + more))
    for name, p in module.named_parameters():
        _assign(p, tensors[name])
    log.info("%s: started from %d weights of %s (%s)", key, len(tensors), url, identity[:12])
    return identity


@torch.no_grad()
def _assign(p: Any, value: Tensor) -> None:
    if not hasattr(p, "ds_shape"):
        p.copy_(value)
        return
    p.all_gather()
    p.data.copy_(value)
    p.partition(has_been_updated=True)
