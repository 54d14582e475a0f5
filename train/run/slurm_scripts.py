"""The job files of infra/slurm: one for each stage, filled into one template. ``launcher.py docs`` writes them."""

from __future__ import annotations

from infra.repository import REPOSITORY
from train.run.stage_table import STAGES, Stage

FOLDER = REPOSITORY / "infra" / "slurm"
TEMPLATE = FOLDER / "stage.sbatch.in"


def scripts() -> dict[str, str]:
    """File name -> text, for each stage of the table."""
    template = TEMPLATE.read_text()
    return {f"{name}.sbatch": template.format(stage=name, title=stage.title, **_shape(stage)) for name, stage in STAGES.items()}


def _shape(stage: Stage) -> dict[str, str]:
    """What differs between a gang of launchers, an array that divides the work, and one node."""
    if stage.trains:
        how = "one launcher for each node; change --nodes at will, also between restarts"
        return {"options": "--nodes 4 ", "how": how, "job": "%j", "array": ""}
    if stage.shared:
        how = "an array: any size without gaps, the tasks divide the work"
        return {"options": "--array=0-15 ", "how": how, "job": "%A_%a", "array": "#SBATCH --array=0-3\n"}
    return {"options": "", "how": "one node", "job": "%j", "array": ""}
