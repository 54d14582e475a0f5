"""``launcher.py sample RUN --step N``: draws the captions of section [samples] with one checkpoint of a run that trains. Training starts it; by hand it does no harm."""

from __future__ import annotations

from dataclasses import replace

from infra import environment, signals
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from train.config import RunConfig, load_run
from train.drawing import while_training
from train.planning import samples


def main(url: str, step: int, stop: StopFlag, *, aside: bool = False) -> None:
    """Draw the pictures, unless they are there already, write them to dalle/samples, and log them to TensorBoard.

    Args:
        aside: at the lowest priority, because training goes on meanwhile.

    Raises:
        DataError: there is no such checkpoint, or what it was trained with is gone.
    """
    if environment.text("LAUNCHER_PID"):
        signals.die_with_parent()
    if aside:
        while_training.step_aside()
    stop.phase("the drawing of samples")
    from train.drawing import learned  # from here on threads are started, which inherit the priority
    from train.drawing.settings import of_stage
    from train.drawing.source import open_models
    from train.loop.metrics import MetricsWriter

    run = RunFolder(url)
    cfg = load_run(run.url, [])
    captions, settings = captions_of(cfg, run), replace(of_stage(cfg), n=1, search=False)
    models = open_models(run.at("dalle", "export"), cfg.samples.device, step=step)
    place = learned.folder(run, "dalle/samples/step", step, captions, settings, models.lineage)
    if learned.is_drawn(run, place):
        return
    entry = learned.write(run, place, step, models, captions, settings)
    writer = MetricsWriter(run.url, "samples", 0, lines=False)
    for picture, array in zip(entry["pictures"], learned.pixels(run, entry["pictures"]), strict=True):
        writer.images(step, f"samples/{picture['caption']}", array)
    writer.close()


def captions_of(cfg: RunConfig, run: RunFolder) -> tuple[str, ...]:
    """The captions that are drawn while training."""
    if given := samples.given(cfg):
        return given
    from train.run import places
    from train.run.data_inputs import open_images
    from train.stages.generate_prompts import prompts

    training, validation = (open_images(cfg, run, split) for split in places.SPLITS)
    wanted = cfg.generate.model_copy(update={"num_captions": cfg.samples.num_captions, "num_known_captions": 0})
    return tuple(prompt.caption for prompt in prompts(cfg.model_copy(update={"generate": wanted}), training, validation))
