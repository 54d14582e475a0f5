"""Starting from the weights of an export: to go on with another recipe, or to fine-tune (``dalle_fit.init_from``)."""

from __future__ import annotations

import logging

from torch import nn

from infra.errors import ConfigError
from train import export
from train.fit import full_shape
from train.zero.construction import assign

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
        assign(p, tensors[name])
    log.info("%s: started from %d weights of %s (%s)", key, len(tensors), url, identity[:12])
    return identity
