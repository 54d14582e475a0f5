"""Crops drawn and cut from decoded pictures; production cuts what it decodes (``picture``)."""

import numpy as np

from data_pipeline.images.crops import CropBox, Pixels, center_crop, cut, dvae_crop, transformer_crop


def listing1(image: Pixels, target: int, scale_min: float, scale_max: float, rng: np.random.Generator) -> tuple[Pixels, CropBox]:
    """``dvae_crop`` drawn and cut: the picture [target, target, 3] and its crop box."""
    crop = dvae_crop((image.shape[1], image.shape[0]), target, scale_min, scale_max, rng)
    return cut(image, crop, target), crop


def listing2(image: Pixels, target: int, scale_max: float, rng: np.random.Generator) -> tuple[Pixels, CropBox]:
    """``transformer_crop`` drawn and cut: the picture [target, target, 3] and its crop box."""
    crop = transformer_crop((image.shape[1], image.shape[0]), target, scale_max, rng)
    return cut(image, crop, target), crop


def center(image: Pixels, target: int) -> tuple[Pixels, CropBox]:
    """``center_crop`` cut: the picture [target, target, 3] and its crop box."""
    crop = center_crop((image.shape[1], image.shape[0]), target)
    return cut(image, crop, target), crop
