"""What models are built with, from the configuration."""

from __future__ import annotations

import pytest
import torch

from train.config import DalleFit
from train.run.inputs import logits_dtype


@pytest.mark.parametrize(
    ("logits", "branches", "found"),
    [
        ("fp32", torch.bfloat16, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float32),
        ("auto", torch.float32, torch.float32),
    ],
)
def test_products_at_the_heads_follow_the_branches_only_where_asked_to_and_only_into_bf16(
    logits: str, branches: torch.dtype, found: torch.dtype
) -> None:
    assert logits_dtype(DalleFit.model_validate({"logits": logits}), branches) == found
    assert logits_dtype(DalleFit(), branches) == torch.float32
