"""Decodes code records into pictures with the dVAE of a run. Separate from ``inspect``, because it needs torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.shards.shard_set import ShardSet
from infra.commands import launcher
from infra.errors import DataError
from train.report.images import Pixels
from train.run.inputs import open_dvae
from train.verbs.targets import Run

_BATCH = 16


def decode_codes(codes: Sequence[NDArray[np.uint16]], opened: ShardSet, run: Run) -> list[Pixels]:
    """Pictures, uint8 [S, S, 3], of code sequences, uint16 [grid * grid].

    Raises:
        DataError: the codes were made by another dVAE than the run's, or are outside its codebook.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, weights = open_dvae(run.cfg, run.folder, device)
    made_by = opened.manifest["parents"].get("dvae", "none")
    if made_by != weights:
        raise DataError(
            f"{opened.url}: codes of dvae {made_by[:12]}, but {run.folder.url} exports dvae {weights[:12]}; name the run that encoded them, or none."
        )
    grid, out = run.cfg.dvae.grid, []
    for start in range(0, len(codes), _BATCH):
        codes_BI = np.stack(codes[start : start + _BATCH]).astype(np.int64)
        if codes_BI.max() >= run.cfg.dvae.vocab or codes_BI.shape[1] != grid**2:
            raise DataError(
                f"{opened.url}: a record holds {codes_BI.shape[1]} codes up to {codes_BI.max()}, the run's dVAE has {grid**2} codes below "
                f"{run.cfg.dvae.vocab}; run '{launcher('validate', opened.url, '--run', run.folder.url)}'."
            )
        pixels_B3YX = model.decode(torch.from_numpy(codes_BI).unflatten(1, (grid, grid)).to(device))
        out += list((pixels_B3YX * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return out
