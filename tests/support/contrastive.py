"""The symmetrical cross-entropy of one batch in one process: what the loss over ranks (train/stages/clip_task.py) is compared to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """Symmetrical cross-entropy of finding each image's caption and each caption's image within the batch; a scalar in nats.

    Args:
        image_BE: unit vectors of images, fp32 [B, E].
        text_BE: unit vectors of their captions, in the same order.
        scale: factor of the cosines.
    """
    logits_BB = scale * image_BE @ text_BE.t()
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.t(), own_B)) / 2
