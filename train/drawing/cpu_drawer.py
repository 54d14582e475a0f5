"""Drawing on a CPU through compiled kernels, except for products of many rows, which torch computes. Weights may have eight bits.

B pictures, C captions, R rows = B x Q states of a pass, D width, E outputs, I image positions, N codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import queries
from model.decoder import Drawer, DrawingWeights, Texts
from model.draw_cache import Window
from model.gumbel import mixed
from model.offsets import mask_kind, offsets_of
from model.transformer import Transformer
from train.drawing import cpu_choice, cpu_kernels

FEW_PRODUCTS = 1 << 22
"""Up to this many multiplications of a pass with a layer's weights, and for one row always, the kernels' products are faster than torch's, each of which costs
microseconds to call (docs/drawing.md)."""
_LARGE_LAYER, _LARGE_PASS = 1 << 21, 1 << 24
"""Several threads are used if a layer has at least this many weights, or a pass at least this many multiplications with them. For less, waiting for threads costs
more than they save on a busy machine: a picture of the demo's model then took 1 to 40 seconds."""
_LARGE_CHOICE = 1 << 16
"""The same limit for the number of scores among which codes are chosen."""
_EIGHT_BITS = 127
_MATRICES = ("qkv", "post", "mlp_1", "mlp_2")

Matrix = tuple[Any, Any, Any]
"""Weight [E, D], a scale for each output, and bias, as arrays."""


class CpuWeights(DrawingWeights):
    """Weights in fp32, or rounded to eight bits with a scale for each output. Sums are in fp32 in both cases."""

    def __init__(self, model: Transformer, *, eight_bits: bool = False, deterministic: bool = False) -> None:
        """
        Args:
            model: a trained transformer on the CPU.
            eight_bits: round the matrices.
            deterministic: compute each picture by sums that do not depend on the other pictures of the batch or on their number. Slower in large batches.
        """
        super().__init__(model, torch.float32)
        count = torch.get_num_threads()
        cpu_kernels.use_threads(count)
        torch.set_num_threads(count)  # if both use the same OpenMP library, starting numba has set it to all cores
        self.eight_bits, self.deterministic = eight_bits, deterministic
        rows: dict[str, list[Matrix]] = {name: [] for name in _MATRICES}
        for place, layer in enumerate(self.layers):
            rounded = {}
            for name in _MATRICES:
                matrix, rounded[name] = self._matrix(getattr(layer, name), getattr(layer, name + "_bias"))
                rows[name].append(matrix)
            # For passes that torch computes: the same rounded values that the kernels use.
            self.layers[place] = dataclasses.replace(layer, **{name: self._by_column(weight_ED) for name, weight_ED in rounded.items()})
        self.matrices = [tuple(rows[name][place] for name in _MATRICES) for place in range(len(self.layers))]
        self.head_matrix, head_ND = self._matrix(self.head.detach(), torch.zeros(len(self.head)))
        self.head = self._by_column(head_ND)
        self.norms = [(_norm(layer.attention_norm), _norm(layer.mlp_norm)) for layer in self.layers]
        self.eps = [(_eps(layer.attention_norm), _eps(layer.mlp_norm), queries.EPS) for layer in self.layers]
        none = torch.empty(0)
        self.gains = [tuple(map(_array, layer.gains or (none, none))) for layer in self.layers]
        self.turn_table = _array(torch.empty(2, 0, 0, 2) if self.turns is None else torch.view_as_real(self.turns))

    def _matrix(self, weight_ED: Tensor, bias_E: Tensor) -> tuple[Matrix, Tensor]:
        """A matrix in the form that the kernels take, and its values, which may be rounded, as a tensor."""
        if not self.eight_bits:
            return (_array(weight_ED), np.ones(len(weight_ED), np.float32), _array(bias_E)), weight_ED
        scale_E = weight_ED.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / _EIGHT_BITS
        whole_ED = (weight_ED / scale_E[:, None]).round().to(torch.int8)
        return (_array(whole_ED), _array(scale_E), _array(bias_E)), whole_ED * scale_E[:, None]

    def _by_column(self, weight_ED: Tensor) -> Tensor:
        """The same matrix as torch's products of few rows read it fastest: a third less time at 64 rows. Costs its size in memory once more."""
        return weight_ED if self.deterministic else weight_ED.t().contiguous().t()

    def choose(self, scores_BQN: Tensor, seeds_B: Tensor, positions_BQ: Tensor) -> tuple[Tensor, Tensor]:
        pictures, states, codes = scores_BQN.shape
        scores_RN = _array(scores_BQN).reshape(-1, codes)
        best_R, code_R = np.empty(len(scores_RN), np.float32), np.empty(len(scores_RN), np.int64)
        cpu_kernels.use_threads(1 if scores_RN.size < _LARGE_CHOICE else torch.get_num_threads())
        keys_R = _array(mixed(seeds_B.clone())).view(np.uint64).repeat(states)
        cpu_choice.choose(scores_RN, keys_R, _array(positions_BQ).reshape(-1), best_R, code_R)
        return torch.from_numpy(best_R).view(pictures, states), torch.from_numpy(code_R).view(pictures, states)

    def drawer(self, texts: Sequence[Texts]) -> Drawer:
        return CpuDrawer(self, texts)


class CpuDrawer(Drawer):
    """A ``Drawer`` that uses the kernels."""

    def __init__(self, weights: CpuWeights, texts: Sequence[Texts]) -> None:
        if weights.deterministic:
            self.prefill_states = 1  # the tokens of captions are computed one by one too
        super().__init__(weights, texts)
        self._cpu = weights
        shape, cfg, tables = weights.shape, weights.cfg, weights.model
        starts = np.cumsum([0, *(len(group.text_CT) for group in texts)])
        of_group = [start + np.repeat(np.arange(len(group.text_CT)), group.each) for start, group in zip(starts, texts, strict=False)]
        caption_B = np.concatenate(of_group)
        self._texts = []
        for index, groups in enumerate(self.text):
            # One tensor for all groups; the groups' tensors are views of it.
            whole = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*groups, strict=True)]
            sizes = [len(group.text_CT) for group in texts]
            self.text[index] = tuple(zip(*(part.split(sizes) for part in whole), strict=True))
            self._texts.append((_array(whole[0]), _array(whole[1]), caption_B))
        self._kept = [(_array(past.keys_BHRK), _array(past.values_BHRK)) for past in self.past]
        self._offsets = [np.array(offsets_of(past.kind, shape, cfg)[::-1]) for past in self.past]
        self._is_transposed = [mask_kind(past.kind).is_transposed for past in self.past]
        self._tables = [_array(t.weight) for t in (tables.image_tokens, tables.image_rows, tables.image_columns, tables.image_start)]
        self._buffers: dict[tuple[int, int], tuple[Any, list[Any]]] = {}
        self._first_B: Any = None
        self._by_torch = False
        self._weights_of_a_layer = 12 * cfg.width**2

    def storages(self) -> list[Tensor]:
        qkv = [torch.from_numpy(qkv_RE) for _, several in self._buffers.values() for qkv_RE in several]
        return [*super().storages(), *qkv]

    def logits(self, codes_BI: Tensor, window: Window) -> Tensor:
        x_RD = self._run(codes_BI, window)
        if self._by_torch:
            return self.weights.logits(x_RD).view(self.pictures, window.length, -1)
        out_RN = np.empty((len(x_RD), self.weights.shape.image_vocab), np.float32)
        norm = self.weights.model.final_norm
        cpu_kernels.head(x_RD.numpy(), _norm(norm), _eps(norm), self._cpu.head_matrix, np.empty_like(x_RD.numpy()), out_RN)
        return torch.from_numpy(out_RN).view(self.pictures, window.length, -1)

    def keep(self, counts_B: Tensor) -> None:
        assert self._window is not None
        if not _is_one(self._window):
            self._keep(self._first_B, counts_B.numpy(), self._window.length)
        self._window = None

    def _keep(self, first_B: Any, counts_B: Any, length: int) -> None:
        _, qkv = self._scratch(self.pictures * length, len(self.past))
        for index, (keys, values) in enumerate(self._kept):
            cpu_kernels.keep(qkv[index], keys, values, first_B, counts_B, self.weights.shape.grid, self._is_transposed[index])

    def _run(self, codes_BI: Tensor, window: Window) -> Tensor:
        rows = self.pictures * window.length
        self._window, self._first_B = window, window.first_B.numpy()
        self._by_torch = rows > 1 and rows * self._weights_of_a_layer > FEW_PRODUCTS and not self._cpu.deterministic
        self._use_threads(rows)
        is_one = _is_one(window)
        scratch, qkv = self._scratch(rows, 1 if is_one else len(self.past))
        x_RD = np.empty((rows, self.weights.cfg.width), np.float32)
        cpu_kernels.embed(codes_BI.numpy(), self._first_B, *self._tables, x_RD)
        ones_B = np.ones(self.pictures, np.int64)
        for index, (keys, values) in enumerate(self._kept):
            qkv_RE, is_transposed, grid = qkv[0 if is_one else index], self._is_transposed[index], self.weights.shape.grid
            places = (self._first_B, self._offsets[index], grid, is_transposed)
            if self._by_torch:
                self._layer(index, x_RD, (keys, values), places, scratch, qkv_RE)
            else:
                weights = (self._cpu.norms[index], self._cpu.eps[index], self._cpu.gains[index], self._cpu.turn_table, self._cpu.matrices[index])
                cpu_kernels.layer(x_RD, *weights, self._texts[index], (keys, values), places, scratch, qkv_RE)
            if is_one:  # its input is certain, not a draft
                cpu_kernels.keep(qkv_RE, keys, values, self._first_B, ones_B, grid, is_transposed)
        return torch.from_numpy(x_RD)

    def _layer(self, index: int, x_RD: Any, past: tuple[Any, Any], places: tuple[Any, ...], scratch: Any, qkv_RE: Any) -> None:
        """``cpu_kernels.layer`` for many rows: products of all rows with one matrix are torch's, what belongs to each row or picture is the kernels'."""
        layer, cpu, size = self.weights.layers[index], self._cpu, self.weights.cfg.width // self.weights.cfg.heads
        (norm_1, norm_2), (eps_1, eps_2, eps_heads) = cpu.norms[index], cpu.eps[index]
        x, normed, out, inner, qkv = (torch.from_numpy(rows) for rows in (x_RD, *scratch, qkv_RE))
        cpu_kernels.norm(x_RD, *norm_1, eps_1, scratch[0])
        torch.addmm(layer.qkv_bias, normed, layer.qkv.t(), out=qkv)
        cpu_kernels.norm_and_turn(qkv_RE, cpu.gains[index], eps_heads, cpu.turn_table, places[0], self.weights.shape.text_tokens, size)
        states = len(x_RD) // self.pictures
        text_BHQT = self._text_scores(index, self._heads(qkv, states, None)[0] * size**-0.5).contiguous()
        cpu_kernels.attend_past(qkv_RE, text_BHQT.numpy(), *past, *places, scratch[1])
        out += self._text_values(index, text_BHQT).transpose(1, 2).reshape(out.shape)
        x.addmm_(out, layer.post.t()).add_(layer.post_bias)
        cpu_kernels.norm(x_RD, *norm_2, eps_2, scratch[0])
        torch.addmm(layer.mlp_1_bias, normed, layer.mlp_1.t(), out=inner)
        cpu_kernels.gelu(scratch[2].reshape(-1))
        x.addmm_(inner, layer.mlp_2.t()).add_(layer.mlp_2_bias)

    def _use_threads(self, rows: int) -> None:
        layer = self._weights_of_a_layer
        is_small = layer < _LARGE_LAYER and rows * layer < _LARGE_PASS
        cpu_kernels.use_threads(1 if is_small else torch.get_num_threads())

    def _scratch(self, rows: int, layers: int) -> tuple[Any, list[Any]]:
        """Buffers that a pass may overwrite: states of three widths, and queries, keys and values of ``layers`` layers."""
        key = (rows, layers)
        if key not in self._buffers:
            width = self.weights.cfg.width
            states = tuple(np.empty((rows, size), np.float32) for size in (width, width, 4 * width))
            self._buffers[key] = states, [np.empty((rows, 3 * width), np.float32) for _ in range(layers)]
        return self._buffers[key]


def ready(model: Transformer, dtype: torch.dtype, *, eight_bits: bool = False, deterministic: bool = False) -> DrawingWeights:
    """Prepare a transformer for drawing, on the device where it is."""
    if model.image_start.weight.is_cuda or dtype != torch.float32:
        return DrawingWeights(model, dtype)
    return CpuWeights(model, eight_bits=eight_bits, deterministic=deterministic)


def _is_one(window: Window) -> bool:
    """Whether the window is only the next position of every picture, whose keys and values can be kept immediately."""
    return window.length == 1 and window.common is not None


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _norm(norm: nn.Module) -> tuple[Any, Any]:
    assert isinstance(norm, nn.LayerNorm)
    return _array(norm.weight), _array(norm.bias)


def _eps(norm: nn.Module) -> float:
    assert isinstance(norm, nn.LayerNorm)
    return float(norm.eps)
