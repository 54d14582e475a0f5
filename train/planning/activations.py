"""Bytes of activations in one process: what the forward pass keeps for the backward pass, and the peak during the backward pass. Needs no torch.

Every formula adds up the tensors that autograd holds. Tests compare the formulas with the bytes of real runs (tests/train/planning/test_planning.py).
B samples, S = T + I states, D width, H heads, K width of a head, V and N vocabularies, L lines of the image, W lines of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import StreamShape, TransformerConfig
from model.offsets import Kind, MaskRules, layer_kinds, lines_before, mask_kind

_FP32, _BF16, _INT64 = 4, 2, 8


@dataclass(frozen=True)
class Run:
    """The computation of one micro-batch in one process."""

    cfg: TransformerConfig
    shape: StreamShape
    batch: int
    """Samples of a micro-batch."""
    branch_bytes: int
    """Bytes of an element inside the residual branches: 2 or 4."""
    engine: str
    """Attention engine."""
    checkpoint_every: int = 0
    """Number of resblocks that are recomputed together in the backward pass; 0: nothing is recomputed."""
    casts_weights: bool = True
    """Whether fp32 weights are cast inside the resblocks; autograd then holds the 16-bit copies."""
    chunk_elements: int = 1 << 26
    """Number of fp32 elements in a chunk of logits (model/head.py)."""
    casts_logits: bool = False
    """Whether the heads' products read bf16 copies of their operands in training."""

    @property
    def positions(self) -> int:
        """Elements of the stream: positions of all samples times the width."""
        return self.batch * self.shape.states * self.cfg.width

    @property
    def cast_bytes(self) -> int:
        """Bytes of one cast weight; 0 if weights are not cast."""
        return self.branch_bytes if self.casts_weights and self.branch_bytes != _FP32 else 0


def kept_by_attention(run: Run, kind: Kind) -> int:
    """Bytes kept in one attention resblock, without its input: the norm's result, q, k, v, what the engine keeps, and cast weights; and with norms of queries and
    keys, these before their norms, and statistics."""
    width, size = run.cfg.width, run.branch_bytes
    plain = size * run.positions + _norm_statistics(run) + _engine_keeps(run, kind) + run.cast_bytes * 4 * width * (width + 1)
    return plain + run.cfg.qk_norm * (2 * size * run.positions + 2 * run.cfg.heads * _norm_statistics(run))


def _engine_keeps(run: Run, kind: Kind) -> int:
    """Bytes of q, k, v and the result, in the form in which the engine keeps them."""
    cfg, shape, size = run.cfg, run.shape, run.branch_bytes
    log_sums = _FP32 * run.batch * cfg.heads * shape.states
    if run.engine == "dense":  # the mask is stored as numbers
        return 4 * size * run.positions + log_sums + size * shape.states**2
    if run.engine == "flex":  # q, k, v and the result, transposed; and the result in raster order
        return (5 if mask_kind(kind).is_transposed else 4) * size * run.positions + log_sums
    text, image, lines = shape.text_tokens, shape.image_tokens, window_lines(run, kind)
    head = cfg.width // cfg.heads
    scores = text**2 + image * (text + lines * shape.grid)
    copies = (5 * text + (2 * lines + 2) * image + shape.states) * head
    return size * run.batch * cfg.heads * (scores + copies)


def window_lines(run: Run, kind: Kind) -> int:
    """How many lines of keys a line of queries is compared with in the structured engine."""
    return lines_before(kind, MaskRules.of(run.cfg, run.shape)) + 1


def kept_by_mlp(run: Run) -> int:
    """Bytes kept in one MLP resblock, without its input: the norm's result, input and output of the GELU, and cast weights."""
    width = run.cfg.width
    return run.branch_bytes * 9 * run.positions + _norm_statistics(run) + run.cast_bytes * (8 * width**2 + 5 * width)


def _norm_statistics(run: Run) -> int:
    return 2 * _FP32 * run.batch * run.shape.states


def _head_states(run: Run) -> int:
    """Bytes of the final norm and both heads without the logits: input, statistics, the states of each head, log-sums and targets."""
    return 2 * _FP32 * run.positions + _norm_statistics(run) + (_FP32 + _INT64) * run.batch * run.shape.states


def _logits(run: Run) -> int:
    shape = run.shape
    return _FP32 * run.batch * (shape.text_tokens * shape.text_vocab + shape.image_tokens * shape.image_vocab)


def _resblocks(run: Run) -> list[int]:
    """Bytes kept in each resblock, without its input."""
    return [size for kind in layer_kinds(run.cfg.layers) for size in (kept_by_attention(run, kind), kept_by_mlp(run))]


def kept_by_forward(run: Run) -> int:
    """Bytes that are kept from the forward to the backward pass, without parameters."""
    inside, state = _resblocks(run), _FP32 * run.positions
    if run.checkpoint_every:
        groups = -(-len(inside) // run.checkpoint_every)
        return groups * state + _head_states(run)
    return len(inside) * state + sum(inside) + _head_states(run) + _logits(run)


def peak(run: Run) -> int:
    """Largest number of bytes at any time during the forward and backward passes, without parameters and their gradients.

    The peak is at one of two points: in the backward pass of a head, or in that of a group of resblocks.
    """
    return max(_peak_in_head(run), _peak_in_blocks(run))


def _peak_in_head(run: Run) -> int:
    shape, width = run.shape, run.cfg.width
    moments, gone = [], 0
    for positions, vocab in (
        (shape.image_tokens, shape.image_vocab),
        (shape.text_tokens, shape.text_vocab),
    ):  # the backward pass of the image's head comes first
        rows = min(max(1, run.chunk_elements // vocab), run.batch * positions)
        chunk = _FP32 * rows * vocab
        # Beside the chunk of gradients: copies of them, of the states and of the weight, and the product with the states before it is added.
        copies = _BF16 * (rows * (vocab + width) + vocab * width) + _FP32 * vocab * width if run.casts_logits else 0
        moments.append(chunk + copies + _FP32 * width * (run.batch * positions + vocab) - gone)
        gone += 0 if run.checkpoint_every else _FP32 * run.batch * positions * vocab
    return kept_by_forward(run) + max(moments)


def _peak_in_blocks(run: Run) -> int:
    """The peak in the backward pass of the resblocks. Each group is first recomputed, if it is checkpointed, and its memory is then freed resblock by resblock."""
    inside, state = _resblocks(run), _FP32 * run.positions
    kinds = layer_kinds(run.cfg.layers)
    size = run.checkpoint_every or len(inside)
    widest = 0
    for first in range(0, len(inside), size):
        before = first // size if run.checkpoint_every else 0
        held = before * state
        for index in range(first, min(first + size, len(inside))):
            held += state + inside[index]
            # In addition to what is kept: the gradient of the stream, and what the resblock's most expensive operation needs.
            widest = max(widest, held + state + (_backward_of_mlp(run) if index % 2 else _backward_of_engine(run, kinds[index // 2])))
    return widest


def _backward_of_mlp(run: Run) -> int:
    """Bytes in the backward pass of the second matrix: the gradients of the GELU's result and of the matrix."""
    return run.branch_bytes * 4 * (run.positions + run.cfg.width**2)


def _backward_of_engine(run: Run, kind: Kind) -> int:
    """Bytes of the gradients of q, k, v and the result or, without a fused kernel, of the scores."""
    cfg, shape, size = run.cfg, run.shape, run.branch_bytes
    if run.engine != "structured":
        return 4 * size * run.positions
    # The backward pass of the softmax creates two tensors of its size. At that time the gradient of the windows of values exists, and the result is freed.
    head, lines = cfg.width // cfg.heads, window_lines(run, kind)
    scores = shape.image_tokens * (shape.text_tokens + lines * shape.grid)
    # With rotary positions, a gradient that is turned back is there beside what it becomes.
    turned = size * run.positions if cfg.rotary_positions else 0
    return size * run.batch * cfg.heads * (2 * scores + (lines * shape.image_tokens - shape.states) * head) + turned


def peak_of_forward(run: Run) -> int:
    """Most bytes at once in a forward pass that keeps nothing for a backward pass, as in evaluation: in an MLP resblock, in an attention resblock, or in a head."""
    size, state = run.branch_bytes, _FP32 * run.positions
    held = 2 * state + size * run.positions  # the stream as it came into the model and as it is; the norm's result
    mlp = held + 12 * size * run.positions  # the GELU's argument, the same scaled, and its result
    attention = held + max(3 * size * run.positions + _engine_keeps(run, kind) for kind in layer_kinds(run.cfg.layers))
    return max(mlp, attention, *_heads_of_forward(run))


def _heads_of_forward(run: Run) -> list[int]:
    """The normalised stream, a head's part of it by itself, and a chunk of logits."""
    shape, width, heads = run.shape, run.cfg.width, []
    for positions, vocab in ((shape.text_tokens, shape.text_vocab), (shape.image_tokens, shape.image_vocab)):
        chunk = min(max(1, run.chunk_elements // vocab), run.batch * positions) * vocab
        heads.append(_FP32 * (run.positions + run.batch * positions * width + chunk))
    return heads
