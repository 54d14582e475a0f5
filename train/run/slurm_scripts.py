"""Makes the job scripts in infra/slurm, one for each stage, from one template. ``launcher.py docs`` writes them."""

from __future__ import annotations

from infra.repository import REPOSITORY
from train.run.stage_table import STAGES, Stage

FOLDER = REPOSITORY / "infra" / "slurm"
TEMPLATE = FOLDER / "stage.sbatch.in"

_ROOM = {
    "node": "--gpus-per-node=8, --cpus-per-task=64 and --mem=0 as your nodes are",
    "one": "--gpus-per-node=1, --cpus-per-task=8 and --mem=64G, its part of a node",
    "none": "--cpus-per-task=8 and --mem=64G; it uses no GPU",
}
"""Advice in the scripts on which resources to request. ``launcher.py --on slurm`` requests them according to the section [cluster] of the configuration."""


def scripts() -> dict[str, str]:
    """File name -> text, for each stage of the table."""
    template = TEMPLATE.read_text()
    return {
        f"{name}.sbatch": template.format(stage=name, title=stage.title, room=_ROOM[stage.gpus], **_shape(stage)) for name, stage in STAGES.items()
    }


def _shape(stage: Stage) -> dict[str, str]:
    """The parts of the template that depend on the shape of the job: several nodes at once, an array whose tasks divide the work, or one node."""
    if stage.trains:
        how = "one launcher for each node; change --nodes at will, also between restarts"
        return {"options": "--nodes 4 ", "how": how, "job": "%j", "array": ""}
    if stage.shared:
        how = "an array: any size without gaps, the tasks divide the work"
        return {"options": "--array=0-15 ", "how": how, "job": "%A_%a", "array": "#SBATCH --array=0-3\n"}
    return {"options": "", "how": "one node", "job": "%j", "array": ""}
