"""The part of stage evaluate that draws captions of the validation split and measures the drawings (docs/evaluation.md). Out: evaluate/drawings.json.

Captions are divided among ranks. Each one's codes and features are kept in a file of a folder that is named by everything on which they depend, so a start after a
stop draws and looks at the rest only; the figures are then computed from the files.

Shapes: N candidates of a caption, I code positions, V views of one picture (the best of so many candidates, and blurs of the last one), D features.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.shards.shard_set import ShardSet
from infra import storage
from infra.errors import ConfigError, DataError
from infra.progress import Progress
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.decoder import DrawingWeights
from train.config import RunConfig
from train.drawing import open_clip_folder
from train.drawing.cpu_drawer import ready
from train.drawing.draw import Picture, draw, score
from train.drawing.judging import refuse_shared, shares_pictures
from train.drawing.place import locate
from train.drawing.settings import Settings, key, of_stage, replaced
from train.drawing.source import Models, check_judge, judge_networks, known_lineage, open_judge
from train.evaluation.blur import blurred
from train.evaluation.colours import shares
from train.evaluation.distances import quantiles
from train.evaluation.drawings import OWN_CLIP, Judge, figures
from train.evaluation.features import feature_net
from train.ranks.device import wait_for_all
from train.run.data_inputs import open_images
from train.run.inputs import Exports
from train.stages.finish import stop_together
from train.stages.generate_nearest import nearest, thumbs, view
from train.stages.generate_prompts import Prompt, held_out
from train.weights import export
from train.weights.contrastive import networks_of

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Task:
    """What is drawn, how, and who judges it."""

    cfg: RunConfig
    run: RunFolder
    wanted: Sequence[Prompt]
    settings: Settings
    models: Models
    judges: Sequence[Judge]

    @property
    def folder(self) -> str:
        """The folder of the captions' files, relative to the run folder."""
        section = self.cfg.evaluate
        words = {"judges": [[judge.name, judge.identity] for judge in self.judges], "best_of": section.best_of, "blur": section.blur}
        digest = key("", self.settings, self.models.lineage, [], self.models.lineage["clip"], ids=[prompt.id for prompt in self.wanted], **words)
        return f"evaluate/drawings-{digest[:12]}"

    def url(self, index: int) -> str:
        return self.run.at(self.folder, f"{index:05d}.npz")


def check(cfg: RunConfig, run: RunFolder) -> None:
    """Check what can be known before weights are read: the settings of drawing, and that the judge is there.

    Raises:
        ConfigError: this model cannot draw with them, or there is no such judge, or it looks through a network of the model that ranks.
    """
    _settings(cfg).check(cfg)
    ranker, section = networks_of(cfg.clip), cfg.evaluate
    refuse_shared(f"evaluate.frechet_net = '{section.frechet_net}' with evaluate.drawings", {section.frechet_net}, ranker)
    if section.judge:
        place = locate(run.url)
        check_judge(place, section.judge, known_lineage(place)["tokenizer"], "evaluate.judge")
        refuse_shared(f"evaluate.judge = '{section.judge}'", judge_networks(place, section.judge, "evaluate.judge"), ranker)


def _settings(cfg: RunConfig) -> Settings:
    return replaced(of_stage(cfg), n=max(cfg.evaluate.best_of), search=False)  # candidates of a search are not independent


def measure(cfg: RunConfig, run: RunFolder, exports: Exports, world: World, stop: StopFlag) -> dict[str, float]:
    """Draw and look at this rank's captions; the main rank then computes the figures of all, and writes them. Returns the most important of them. Collective.

    Raises:
        ConfigError: the judge is the model that ranks.
    """
    task = _task(cfg, run, exports)
    mine = [index for index in range(world.rank, len(task.wanted), world.size) if not storage.exists(task.url(index))]
    stop.orderly("the choice of captions")
    _draw(task, mine, world, stop)
    stop_together(stop, task.models.device, "evaluate")
    wait_for_all()
    stop.phase("the figures of the drawings")  # if it is stopped, the next start computes them again from the files
    if not world.is_main:
        return {}
    found = _found(task, [_read(task.url(index)) for index in range(len(task.wanted))], open_images(cfg, run, "train"))
    storage.write_json(run.at("evaluate", "drawings.json"), found)
    own = found["retrieval"][OWN_CLIP]["by_n"]["1"]
    return {"drawings_recall_at_1": own["recall_at_1"], "drawings_clip_score": own["clip_score"]}


def _task(cfg: RunConfig, run: RunFolder, exports: Exports) -> _Task:
    weights = ready(exports.dalle, DrawingWeights.dtype_of(exports.dalle))
    models = Models(run.url, cfg, exports.dvae, weights, exports.tokenizer, exports.clip, exports.lineage, "exported weights")
    wanted = held_out(open_images(cfg, run, "validation"), cfg.evaluate.drawings, cfg.run.seed)
    return _Task(cfg, run, wanted, _settings(cfg), models, _judges(cfg, run, models))


def _judges(cfg: RunConfig, run: RunFolder, models: Models) -> list[Judge]:
    """The run's own contrastive model, which judges unranked drawings only because it ranks the others, and the networks that the configuration names."""
    assert models.clip is not None
    found = [Judge(OWN_CLIP, models.lineage["clip"], models.clip.encode_image, models.clip.encode_caption, ranks=True)]
    section, device = cfg.evaluate, models.device
    if section.judge:
        clip, identity = open_judge(run.url, section.judge, models.lineage["tokenizer"], device)
        if identity == models.lineage["clip"]:
            raise ConfigError(f"evaluate.judge = '{section.judge}': the model that ranks the drawings, which never judges them; name another one.")
        found.append(Judge("judge", identity, clip.encode_image, clip.encode_caption, shares_images=_shares_images(section.judge, run)))
    if section.frechet_net != "none":
        net = feature_net(section.frechet_net, section.frechet_weights, device)
        weights = storage.sha256_file(storage.local_path(section.frechet_weights)) if section.frechet_weights else "its package"
        classes = None if net.classes is None else _on_cpu(net.classes, device)  # features are kept on the CPU
        shares = shares_pictures({section.frechet_net}, models.clip.networks)
        found.append(Judge(section.frechet_net, weights, net.features, classes=classes, score=net.score, shares_images=shares))
    return found


def _shares_images(judge: str, run: RunFolder) -> bool:
    """Whether the judge was trained on the images of the model that ranks. One of open_clip was not: it comes from elsewhere."""
    if open_clip_folder.is_there(judge):
        return False
    images = [export.describe(url).get("parents", {}).get("images") for url in (judge, run.at("clip", "export"))]
    return images[0] == images[1]


def _on_cpu(classes: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda features_BD: classes(features_BD.to(device)).cpu()


def _draw(task: _Task, mine: Sequence[int], world: World, stop: StopFlag) -> None:
    """Draw captions, as many together as fit, and write each one's file."""
    each = max(1, task.models.room.batch_width(task.settings) // task.settings.n)
    progress = Progress(len(mine), "drawings", unit="captions", timed=True, enabled=world.is_main)
    for begin in range(0, len(mine), each):
        if stop:
            return
        some = mine[begin : begin + each]
        stop.phase("the drawing of captions to measure")  # finished ones are kept
        by_caption: dict[str, list[Picture]] = {task.wanted[index].caption: [] for index in some}
        for pictures in draw(task.models, list(by_caption), task.settings):
            for picture in pictures:
                by_caption[picture.caption].append(picture)
        for index in some:
            storage.write_bytes(task.url(index), _looked_at(task, index, by_caption[task.wanted[index].caption]))
        stop.orderly("the end of a caption")
        progress.update(begin + len(some))
    progress.finish()


@torch.no_grad()
def _looked_at(task: _Task, index: int, pictures: list[Picture]) -> bytes:
    """Everything that the figures need of a caption's drawings, as the bytes of an npz file."""
    prompt, section, models = task.wanted[index], task.cfg.evaluate, task.models
    assert prompt.truth is not None
    scores_N = np.array(score(models, pictures))
    best = [int(scores_N[:count].argmax()) for count in section.best_of]
    real_YXC = view(prompt.truth, task.cfg.dvae.image_size)
    views = [pictures[place].pixels_YXC for place in best]
    out: Arrays = {
        "codes_NI": np.stack([picture.codes_I for picture in pictures]).astype(np.uint16),
        "scores_N": scores_N,
        "colours_VK": np.stack([shares(pixels_YXC) for pixels_YXC in views]),
        "real_colours_K": shares(real_YXC),
        "thumb_F": thumbs(pictures[0].pixels_YXC[None])[0],
        "real_thumb_F": thumbs(real_YXC[None])[0],
    }
    drawn_V3YX = _with_blurs(_tensor(views, models.device), section.blur)
    real_V3YX = _with_blurs(_tensor([real_YXC], models.device), section.blur)
    for judge in task.judges:
        out[f"{judge.name}/drawn_VD"] = _features(judge, drawn_V3YX)
        out[f"{judge.name}/real_VD"] = _features(judge, real_V3YX)
        if judge.text is not None:
            out[f"{judge.name}/text_D"] = judge.text(prompt.caption)[0].float().cpu().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **out)  # type: ignore[arg-type]
    return buffer.getvalue()


def _features(judge: Judge, pictures_V3YX: Tensor) -> NDArray[np.float32]:
    """Features of pictures, one at a time, so that their bits do not depend on how many there are."""
    return torch.cat([judge.image(one_3YX[None]).float() for one_3YX in pictures_V3YX]).cpu().numpy()


def _tensor(pictures: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device).float() / 255


def _with_blurs(pictures_V3YX: Tensor, radii: Sequence[int]) -> Tensor:
    """The pictures, and the blurs of the last one."""
    return torch.cat([pictures_V3YX, *(blurred(pictures_V3YX[-1:], radius) for radius in radii)])


def _read(url: str) -> Arrays:
    """
    Raises:
        DataError: the file is damaged, or unpacks to more than it is, as none of ours does.
    """
    data = io.BytesIO(storage.read_bytes(url))
    try:
        with zipfile.ZipFile(data) as members:
            if sum(member.file_size for member in members.infolist()) > len(data.getbuffer()):
                raise ValueError("it unpacks to more than it is")
        with np.load(data, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{url}: no figures of drawings, or damaged ({error}); delete it, and run the stage 'evaluate' again.") from error


def _found(task: _Task, files: Sequence[Arrays], training: ShardSet) -> dict[str, Any]:
    section = task.cfg.evaluate
    captions = [prompt.caption for prompt in task.wanted]
    found = figures(captions, files, task.judges, section.best_of, section.blur, task.cfg.run.seed)
    among = min(task.cfg.generate.nearest_among, training.count)
    both_BF = np.concatenate([np.stack([file[name] for file in files]) for name in ("thumb_F", "real_thumb_F")])
    images = nearest(both_BF, training, task.cfg.dvae.image_size, among) or []
    found["nearest"] = _overlap(np.array([image.distance for image in images]), among)
    found["settings"] = task.settings.shape()
    ids = json.dumps([prompt.id for prompt in task.wanted])
    return found | {"parents": task.models.lineage, "captions_hash": hashlib.sha256(ids.encode()).hexdigest(), "files": task.folder}


def _overlap(distance_B: NDArray[np.float64], among: int) -> dict[str, Any]:
    """Distances to the nearest training images, of drawings and of held-out pictures: drawings that are nearer than nearly all held-out pictures may be copies."""
    drawn, real = np.split(distance_B, 2)
    near = quantiles(real)["p01"]
    return {"among": among, "drawn": quantiles(drawn), "real": quantiles(real), "drawn_nearer_than_p01_of_real": float((drawn < near).mean())}
