"""``launcher.py export RUN``: writes the weights of a checkpoint as safetensors, with a description. Needs neither a GPU nor DeepSpeed."""

from __future__ import annotations

from infra import files
from infra.errors import DataError, UsageError
from infra.run_folder import RunFolder
from train.config import load_run
from train.drawing.place import newest_stage
from train.weights import checkpoint, export

STAGES = ("dvae", "dalle", "align")
KINDS = {"average": "average", "raw": "model"}
"""Kind of weights that can be exported -> prefix of their tensors in a checkpoint."""


def package(url: str, out: str) -> None:
    """Write a folder that can draw without the run, and print how; see ``train.drawing.package.write``."""
    from train.drawing import package as written  # imported here because it imports torch

    with files.elsewhere(files.WITH_OUT):
        names = written.write(url, out)
    print(f"{out}: {', '.join(names)}\nnext: python launcher.py draw {out} 'a red fox'")


def main(url: str, stage: str, kind: str, step: int, out: str) -> None:
    """Write an export, and print where it is and its content hash.

    Args:
        url: run folder.
        stage: the training stage whose checkpoint is exported; empty: the one whose transformer the run draws with.
        kind: 'average' or 'raw' weights.
        step: which checkpoint; 0: the newest.
        out: folder to write to; empty: the stage's export folder, from which other stages read.

    Raises:
        UsageError: the stage or the kind is unknown.
        DataError: there is no such checkpoint.
    """
    stage = stage or newest_stage(load_run(url, []), RunFolder(url))
    if stage not in STAGES or kind not in KINDS:
        raise UsageError(f"--stage {stage} --weights {kind}: accepted stages are {', '.join(STAGES)}, accepted weights {', '.join(KINDS)}.")
    run = RunFolder(url)
    steps = checkpoint.complete(run.at(stage))
    if not steps or (step and step not in steps):
        known = ", ".join(map(str, steps)) or "none"
        raise DataError(f"{run.at(stage, 'checkpoints')}: no checkpoint {f'after update {step}' if step else 'yet'}; complete ones: {known}.")
    folder = checkpoint.folder(run.at(stage), step or steps[-1])
    meta = checkpoint.read_meta(folder)
    stored = checkpoint.StoredTensors(folder, KINDS[kind])
    target = out or run.at(stage, "export")
    with files.elsewhere(files.WITH_OUT):
        identity = export.write(
            target, stored, meta["config"]["dalle" if stage == "align" else stage], parents=meta["parents"], step=meta["step"], weights=kind
        )
    print(f"{target}: {kind} weights after update {meta['step']}, {len(stored.kinds)} tensors, {identity}")
