"""Bytes that an update reads and writes outside of matrix products: norms, casts, activation functions, copies, losses, and gradients on their way to their shards. Needs
no torch.

Every formula adds up operations of the code as torch runs them one by one, each with what it reads and what it writes. Tests compare the sums with those of real updates
(tests/train/planning/test_passes.py). E is the number of elements of the stream: B samples x S states x D width; b are the bytes of an element in the residual branches.
"""

from __future__ import annotations

from model.offsets import Kind, layer_kinds, mask_kind
from train.planning.activations import Run, window_lines
from train.planning.states import Parameters

_FP32 = 4
NORM, NORM_BACKWARD = 2, 3
"""Elements read and written for each one of a layer norm; so are those below."""
ADD = 3
GELU, GELU_BACKWARD = 6, 3
SOFTMAX, SOFTMAX_BACKWARD = 2, 3
COPY = 2
_LOSS, _LOSS_BACKWARD = 6, 6
"""Of the logarithm of the sum (largest, less it, exponential, sum), and of the difference, its exponential and the product. Chunks may lie in a cache; it counts all the same."""
_EDGES = 14
"""Passes over the fp32 stream in embeddings, the final norm and the split into two heads."""
_GRADIENT, _GRADIENT_AND_GATHERED = 8, 10
"""A gradient goes into a bucket, is copied for the reduction and divided there, and goes out to its shard; on stage 3 the parameter is gathered as well."""


def of_activations(run: Run, *, recomputes: bool) -> float:
    """Bytes of a micro-batch's forward and backward pass."""
    once = forward(run)
    return once + backward(run) + (once - _edges(run) if recomputes else 0.0)


def forward(run: Run) -> float:
    """Bytes of its forward pass."""
    kinds = layer_kinds(run.cfg.layers)
    return (
        2 * len(kinds) * _around(run, NORM)
        + sum(_attention(run, kind) + GELU * 4 * _branch(run) for kind in kinds)
        + _heads(run, _LOSS)
        + _edges(run)
    )


def backward(run: Run) -> float:
    """Bytes of its backward pass."""
    kinds = layer_kinds(run.cfg.layers)
    # Sums for biases: of the four projections in attention, and of D and 4 D in the MLP. Gradients of the norm's result come from three projections.
    mlp = (GELU_BACKWARD * 4 + 5) * _branch(run)
    attention = (4 + 2 * ADD) * _branch(run)
    inside = sum(_attention_backward(run, kind) + attention + mlp for kind in kinds)
    return 2 * len(kinds) * _around(run, NORM_BACKWARD) + inside + _heads(run, _LOSS_BACKWARD) + _edges(run)


def of_casts(run: Run, parameters: Parameters, *, forwards: int) -> float:
    """Bytes of casting fp32 weights in so many forward passes, and of their gradients' way back, in a micro-batch."""
    return (1 + forwards) * (_FP32 + run.branch_bytes) * parameters.matrices if run.cast_bytes else 0.0


def of_gradients(parameters: Parameters, stage: int) -> float:
    """Bytes between a backward pass and the shards, in each reduction."""
    return (_GRADIENT_AND_GATHERED if stage == 3 else _GRADIENT) * _FP32 * parameters.total


def _branch(run: Run) -> int:
    return run.branch_bytes * run.positions


def _around(run: Run, norm: int) -> float:
    """The norm, the casts to the branch and from it, and the sum with the stream."""
    cast = 2 * (_FP32 + run.branch_bytes) * run.positions if run.branch_bytes != _FP32 else 0
    return (norm + ADD) * _FP32 * run.positions + cast


def _attention(run: Run, kind: Kind) -> float:
    if run.engine != "structured":  # one kernel reads q, k and v, and writes the result; those of a transposed kind are laid out anew
        return (4 + COPY + 4 * COPY * mask_kind(kind).is_transposed) * _branch(run)
    text, image, line = _scores(run, kind)
    # Queries are scaled; both parts of the result are joined, and laid out anew. Scores get the mask and a softmax, those of the image are joined before, and copied after.
    scores = (COPY + SOFTMAX) * text + COPY * line + (2 * COPY + SOFTMAX) * image
    return run.branch_bytes * (scores + _windows(run, kind)) + 3 * COPY * _branch(run)


def _attention_backward(run: Run, kind: Kind) -> float:
    if run.engine != "structured":
        return (8 + 3 * COPY + 4 * COPY * mask_kind(kind).is_transposed) * _branch(run)
    text, image, _ = _scores(run, kind)
    scores = SOFTMAX_BACKWARD * text + (2 * COPY + SOFTMAX_BACKWARD) * image
    return run.branch_bytes * (scores + _windows_backward(run, kind)) + 7 * COPY * _branch(run)


def _scores(run: Run, kind: Kind) -> tuple[int, int, int]:
    """Scores of the text, of the image, and those of them that are with the image."""
    shape, lines = run.shape, window_lines(run, kind)
    each = run.batch * run.cfg.heads
    line = each * shape.image_tokens * lines * shape.grid
    return each * shape.text_tokens**2, each * shape.image_tokens * shape.text_tokens + line, line


def _windows(run: Run, kind: Kind) -> int:
    """Elements moved for the keys and values of the lines before: padded, and each line joined to those before it."""
    lines, image = window_lines(run, kind), run.batch * run.shape.image_tokens * run.cfg.width
    return 2 * (COPY * image + (COPY * image + COPY * lines * image if lines > 1 else 0))


def _windows_backward(run: Run, kind: Kind) -> int:
    """Each line of a window back into a padded image, these added up, and the padding cut off."""
    lines, image = window_lines(run, kind), run.batch * run.shape.image_tokens * run.cfg.width
    return 2 * (COPY * image + (lines * COPY * image + (lines - 1) * ADD * image + COPY * image if lines > 1 else 0))


def _heads(run: Run, passes: int) -> float:
    """Bytes of both losses; with bf16 products, logits or their gradients are cast."""
    shape = run.shape
    logits = run.batch * (shape.text_tokens * shape.text_vocab + shape.image_tokens * shape.image_vocab)
    return float(logits * (_FP32 * passes + (_FP32 + 2) * run.casts_logits))


def _edges(run: Run) -> float:
    return _EDGES / 2 * _FP32 * run.positions
