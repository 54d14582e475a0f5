"""Drawing from Python: ``from train.drawing.pictures import load; pictures = load("runs/mine").draw(["a red fox"], n=4, seed=0)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from train.drawing import prompt_image
from train.drawing.draw import draw, score
from train.drawing.settings import Settings, replaced
from train.drawing.source import Models, open_models


class Artist:
    """A model that draws pictures, made by ``load``. Can be used any number of times."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def draw(
        self, captions: str | Sequence[str], n: int = 1, seed: int = 0, *, image: str | Image.Image | None = None, **settings: Any
    ) -> list[Image.Image]:
        """Draw pictures. They are ordered by caption; with a reranker, the best of each caption comes first.

        Args:
            captions: one caption, or several.
            n: number of pictures for each caption.
            seed: the same seed gives the same pictures, which are also those of ``launcher.py draw --seed``.
            image: an image whose upper part is kept, and whose rest is drawn: a path, a URL or a PIL image.
            settings: temperature, top_k, top_p, guidance, keep_rows, fit, batch, window; see ``train.drawing.settings.Settings``.

        Returns:
            PIL images; ``image.info`` holds caption, seed and score.

        Raises:
            ConfigError: this model cannot draw with one of the settings.
            DataError: the image cannot be read.
        """
        models = self.models
        given = replaced(Settings(n=n, seed=seed), **settings)
        given.check(models.cfg)
        wanted = [captions] if isinstance(captions, str) else list(captions)
        prefix: list[int] = []
        if image is not None:
            size = models.cfg.dvae.image_size
            whole = prompt_image.read(image, size, given.fit) if isinstance(image, str) else prompt_image.square(image, size, given.fit)
            prefix = prompt_image.codes(models, whole, given.keep_rows)
        found: dict[str, list[Image.Image]] = {caption: [] for caption in wanted}
        for pictures in draw(models, list(found), given, prefix):
            scores = score(models, pictures) if models.clip is not None else [None] * len(pictures)
            for picture, worth in zip(pictures, scores, strict=True):
                shown = Image.fromarray(picture.pixels_YXC)
                shown.info = {"caption": picture.caption, "seed": picture.seed, "score": worth}
                found[picture.caption].append(shown)
        if models.clip is not None:
            for images in found.values():
                images.sort(key=lambda shown: -shown.info["score"])
        return [shown for caption in wanted for shown in found[caption]]


def load(url: str, *, device: str = "", precision: str = "auto", rerank: str = "none", deterministic: bool = False) -> Artist:
    """Open a model to draw with: that of a run, which may still be training, or of a package that ``launcher.py export RUN --package`` wrote; local or s3://.

    Args:
        url: the run folder or the package.
        device: 'cpu' or 'cuda'; empty: the GPU if there is one.
        precision: 'auto', 'fp32', 'bf16', 'fp16', or 'int8' on a CPU.
        rerank: 'none', 'clip', or a folder with an exported contrastive model.
        deterministic: make the bits of a picture independent of batches and windows; only on a CPU.

    Raises:
        ConfigError, DataError: there is no model to draw with; the message says what is missing.
    """
    return Artist(open_models(url, device, precision, rerank, deterministic=deterministic))
