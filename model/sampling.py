"""Sampling of image codes from a trained transformer, one position after the other or several in a pass.

Several in a pass is speculative decoding without a second model: codes are guessed (drafts), one pass computes which code would be drawn at each of these
positions, and the drafts are kept up to the first wrong one (docs/drawing.md).

B pictures, C captions, T text and I image positions, P given codes, N image codes, Q positions of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.captured import PASSES_BEFORE, WORTHWHILE, Capture, cuda_graph
from model.config import StreamShape
from model.decoder import Drawer, DrawingWeights, Texts
from model.draw_cache import Window

_LEAST = 1e-6
"""The lowest temperature; the highest is its inverse. Logits beyond these overflow in fp32, or are all equal."""
_MOST_GUIDANCE = 1000.0


@dataclass(frozen=True)
class Rule:
    """How a code is sampled from logits. After the following steps, the code is the argmax of logits plus the noise of (seed, position, code)."""

    temperature: float = 1.0
    """The logits are divided by this number above 0 (paper: 1)."""
    top_k: int | None = None
    """Only the k likeliest codes can be drawn."""
    top_p: float | None = None
    """Only the likeliest codes can be drawn that together reach this probability."""
    guidance: float = 1.0
    """Classifier-free guidance, which comes first: the logits are l_empty + s (l_caption - l_empty) with this s; 1 costs nothing."""

    def check(self, shape: StreamShape) -> None:
        """
        Raises:
            ValueError: a value is out of range.
        """
        if not _LEAST <= self.temperature <= 1 / _LEAST:
            raise ValueError(f"temperature = {self.temperature}: must be above 0, from {_LEAST:g} to {1 / _LEAST:g}")
        if self.top_k is not None and not 1 <= self.top_k <= shape.image_vocab:
            raise ValueError(f"top_k = {self.top_k}: accepted are 1 to dvae.vocab = {shape.image_vocab}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: accepted are numbers above 0 and up to 1")
        if not 0 <= self.guidance <= _MOST_GUIDANCE:
            raise ValueError(f"guidance = {self.guidance}: accepted are numbers from 0 to {_MOST_GUIDANCE:g}; 1 is none")

    def filtered(self, logits_BQN: Tensor) -> Tensor:
        """Logits divided by the temperature, fp32, with -inf for codes that cannot be drawn."""
        logits_BQN = logits_BQN / self.temperature
        if self.top_k is not None:
            least_BQ1 = logits_BQN.topk(self.top_k, dim=-1).values[..., -1:]
            logits_BQN = logits_BQN.masked_fill(logits_BQN < least_BQ1, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            sorted_BQN = logits_BQN.sort(dim=-1, descending=True).values
            p_BQN = sorted_BQN.softmax(-1)
            count_BQ1 = (p_BQN.cumsum(-1) - p_BQN < self.top_p).sum(-1, keepdim=True).clamp(min=1)  # also of a top_p that fp32 takes for 0
            logits_BQN = logits_BQN.masked_fill(logits_BQN < sorted_BQN.gather(-1, count_BQ1 - 1), float("-inf"))
        return logits_BQN


@dataclass(frozen=True)
class Drawn:
    """The result of ``sample``."""

    codes_BI: Tensor
    """int64, in raster order."""
    passes: int
    """Passes of the model that were needed, without those that read captions and given codes."""


class NotFiniteError(ValueError):
    """The model's logits are not finite."""


@torch.no_grad()
def sample(
    weights: DrawingWeights,
    text_CT: Tensor,
    lengths_C: Tensor,
    seeds: Sequence[int],
    rule: Rule = Rule(),
    *,
    prefix_BP: Tensor | None = None,
    window: int = 1,
    after_pass: Callable[[Tensor, Tensor], None] | None = None,
) -> Drawn:
    """Draw the codes of pictures for captions. A picture depends only on its caption, its seed, the rule and its given codes.

    Equal seeds give equal codes whatever else is drawn and whatever the window is, unless rounding changes an argmax, because sums in matrix products depend on
    how many rows are computed at once. With the same numbers of captions and pictures and the same window, logits are equal bit for bit.

    Args:
        weights: weights of a trained transformer.
        text_CT: text ids, int64 [C, T].
        lengths_C: number of tokens of each caption, int64 [C].
        seeds: one for each picture; as many pictures for each caption. The pictures of a caption are consecutive.
        rule: how codes are sampled.
        prefix_BP: given codes, int64 [B, P], the first ones of each picture (paper 2.9: the upper part of a photo).
        window: positions computed in one pass. If it is above 1, all positions but the first have drafts as input. Drafts that the pass confirms are kept, and
            so is the code after them: the same codes as one at a time, in fewer passes.
        after_pass: called with the codes so far, int64 [B, I], and how many of each picture are drawn, [B]. An error that it raises ends the drawing.

    Raises:
        ValueError: seeds, lengths or given codes do not fit the captions; the rule or the window is out of range.
        NotFiniteError: logits are not finite; the message names the position.
    """
    run = begin(weights, text_CT, lengths_C, seeds, rule, prefix_BP=prefix_BP, window=window)
    while not run.is_done:
        run.step()
        if after_pass is not None:
            after_pass(run.codes_BI, run.known_B)
    return Drawn(run.codes_BI, run.passes)


@torch.no_grad()
def begin(
    weights: DrawingWeights,
    text_CT: Tensor,
    lengths_C: Tensor,
    seeds: Sequence[int],
    rule: Rule = Rule(),
    *,
    prefix_BP: Tensor | None = None,
    window: int = 1,
) -> Sampling:
    """Compute the captions and the given codes, and return what draws the rest; arguments and errors as for ``sample``."""
    shape = weights.shape
    _check(shape, text_CT, lengths_C, seeds, prefix_BP, window)
    rule.check(shape)
    pictures, device = len(seeds), text_CT.device
    texts = [Texts(text_CT, lengths_C, pictures // len(text_CT))]
    if rule.guidance != 1:
        texts.append(Texts(torch.zeros_like(text_CT[:1]), torch.zeros_like(lengths_C[:1]), pictures))
    seeds_B = torch.tensor(seeds, dtype=torch.int64).to(device, non_blocking=True)
    passes = (shape.image_tokens - (0 if prefix_BP is None else prefix_BP.shape[1])) // window
    capture = cuda_graph if device.type == "cuda" and passes >= WORTHWHILE else None
    return Sampling(weights.drawer(texts), rule, seeds_B, prefix_BP, window, capture)


def _check(shape: StreamShape, text_CT: Tensor, lengths_C: Tensor, seeds: Sequence[int], prefix_BP: Tensor | None, window: int) -> None:
    if text_CT.ndim != 2 or text_CT.shape[1] != shape.text_tokens or not len(text_CT):
        raise ValueError(f"text has shape {tuple(text_CT.shape)}: expected [captions, {shape.text_tokens}], as tokenizer.max_tokens says")
    if lengths_C.shape != (len(text_CT),) or bool(((lengths_C < 0) | (lengths_C > shape.text_tokens)).any()):
        raise ValueError(f"lengths {lengths_C.tolist()} of {len(text_CT)} captions: expected one for each, 0 to {shape.text_tokens}")
    if not seeds or len(seeds) % len(text_CT):
        raise ValueError(f"{len(seeds)} seeds for {len(text_CT)} captions: one for each picture is needed, and as many pictures for each caption")
    if not 1 <= window <= shape.grid:
        raise ValueError(f"window = {window}: accepted are 1 to {shape.grid}, a row of codes")
    if prefix_BP is not None and (prefix_BP.ndim != 2 or len(prefix_BP) != len(seeds) or prefix_BP.shape[1] > shape.image_tokens):
        raise ValueError(f"prefix codes have shape {tuple(prefix_BP.shape)}: expected [{len(seeds)}, at most {shape.image_tokens}]")
    if prefix_BP is not None and bool(((prefix_BP < 0) | (prefix_BP >= shape.image_vocab)).any()):
        raise ValueError(f"prefix codes reach from {int(prefix_BP.min())} to {int(prefix_BP.max())}: accepted are 0 to {shape.image_vocab - 1}")


class Sampling:
    """A batch of pictures that is being drawn. The first ``known_B[b]`` codes of picture b are final; those after them are drafts.

    All tensors of its state stay where they are, and the work of a pass depends on their values alone. So it can be recorded once and run again (``capture``).
    """

    def __init__(self, drawer: Drawer, rule: Rule, seeds_B: Tensor, prefix_BP: Tensor | None, window: int, capture: Capture | None = None) -> None:
        """
        Args:
            capture: records passes; None: they run one by one.
        """
        self.drawer, self.rule, self.seeds_B, self.window = drawer, rule, seeds_B, window
        shape, pictures = drawer.weights.shape, len(seeds_B)
        # copies is 2 with guidance, where each picture is computed with its caption and with the empty caption.
        self.total, self.grid, self.copies = shape.image_tokens, shape.grid, drawer.pictures // pictures
        given = 0 if prefix_BP is None else prefix_BP.shape[1]
        self.codes_BI = torch.zeros(pictures, self.total, dtype=torch.int64, device=seeds_B.device)
        if prefix_BP is not None:
            self.codes_BI[:, :given] = prefix_BP
        self.known_B = torch.full((pictures,), given, device=seeds_B.device)
        # least: the number of final codes of the picture that has the fewest.
        self.least, self.passes = given, 0
        self._drafted_B = self.known_B.clone()
        """Positions below this already hold drafts from an earlier pass."""
        self._end = torch.full((), self.total, device=seeds_B.device)
        self._bad_B = torch.full_like(self.known_B, -1)
        """The first position of each picture whose logits were not finite; -1: there is none."""
        self._capture = capture
        self._replay: Callable[[], object] | None = None
        if 0 < given < self.total:
            drawer.fill(self._repeated(self.codes_BI), given)

    @property
    def is_done(self) -> bool:
        return self.least >= self.total

    def run_to(self, end: int, after_pass: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Draw the codes of all pictures up to position ``end``, and none of a later one."""
        self._end.fill_(end)
        while self.least < end:
            self.step()
            if after_pass is not None:
                after_pass(self.codes_BI, self.known_B)

    def select(self, index_B: Tensor, seeds: Sequence[int]) -> None:
        """Go on from the pictures ``index_B`` instead, each with the seed of its further codes. Only after ``run_to``, where all have come equally far; a picture
        can only take the place of one with the same caption."""
        for kept in (self.codes_BI, self._drafted_B):
            kept.copy_(kept[index_B])
        self.seeds_B.copy_(torch.tensor(seeds, dtype=torch.int64).to(self.codes_BI.device, non_blocking=True))
        pictures = len(index_B)
        self.drawer.select(torch.cat([index_B + copy * pictures for copy in range(self.copies)]))

    def _repeated(self, x_B: Tensor) -> Tensor:
        return x_B if self.copies == 1 else x_B.repeat(self.copies, *[1] * (x_B.ndim - 1))

    def step(self) -> None:
        """Run one pass of the model.

        Raises:
            NotFiniteError: logits are not finite. Where passes of one position are recorded, that is looked for at the end of each row.
        """
        self.passes += 1
        if self._capture is not None and self.passes > PASSES_BEFORE:
            self._replay = self._capture(lambda: self._pass(None))
            self._capture = None
        if self._replay is not None:
            self._replay()
        else:
            self._pass(self.least if self.window == 1 and self._capture is None else None)
        self.least = self.least + 1 if self.window == 1 else int(self.known_B.min())
        if self._replay is None or self.window > 1 or self.least % self.grid == 0:
            self._refuse_no_numbers()

    def _pass(self, common: int | None) -> None:
        """Queue the work of a pass.

        Args:
            common: the position, if it is the same in all pictures and the work need not be the same for others. Then less has to be gathered.
        """
        window = Window(self.known_B, self.window, common)
        if self.window > 1:
            self._draft(window)
        logits_BQN = self.drawer.logits(self._repeated(self.codes_BI), Window(self._repeated(self.known_B), self.window, common))
        if self.copies == 2:
            caption_BQN, empty_BQN = logits_BQN.chunk(2)
            logits_BQN = empty_BQN + self.rule.guidance * (caption_BQN - empty_BQN)
        values_BQ, drawn_BQ = self.drawer.weights.choose(self.rule.filtered(logits_BQN), self.seeds_B, window.states_BQ)
        self._note_no_numbers(values_BQ, window)
        if common is not None:
            self.codes_BI[:, common] = drawn_BQ[:, 0]
            self.known_B += 1
        else:
            self._accept(drawn_BQ, window)

    def _draft(self, window: Window) -> None:
        """Fill positions without a draft from an earlier pass with the code above them."""
        for step in range(self.window - 1):
            at_B1 = (window.first_B + step)[:, None].clamp(max=self.total - 1)
            above_B1 = self.codes_BI.gather(1, (at_B1 - self.grid).clamp(min=0))
            has_none_B1 = at_B1 >= self._drafted_B[:, None]
            self.codes_BI.scatter_(1, at_B1, torch.where(has_none_B1, above_B1, self.codes_BI.gather(1, at_B1)))

    def _accept(self, drawn_BQ: Tensor, window: Window) -> None:
        """Keep the drafts that the pass has confirmed, and the code after them; the other codes of the pass become the next drafts."""
        states_BQ = window.states_BQ
        at_BQ = states_BQ.clamp(max=self.total - 1)
        is_same_BQ = (self.codes_BI.gather(1, at_BQ) == drawn_BQ) & (states_BQ < self.total)
        right_B = is_same_BQ[:, :-1].long().cumprod(1).sum(1)
        count_B = (right_B + 1).minimum(self._end - window.first_B)
        step_BI = torch.arange(self.total, device=at_BQ.device) - window.first_B[:, None]
        is_new_BI = (step_BI >= 0) & (step_BI < self.window)
        self.codes_BI.copy_(torch.where(is_new_BI, drawn_BQ.gather(1, step_BI.clamp(0, self.window - 1)), self.codes_BI))
        self.drawer.keep(self._repeated(count_B))
        self._drafted_B.copy_((window.first_B + self.window).clamp(max=self.total))
        self.known_B += count_B

    def _note_no_numbers(self, best_BQ: Tensor, window: Window) -> None:
        # Only the first position counts: at later ones a wrong draft may be the cause.
        is_first_B = ~best_BQ[:, 0].isfinite() & (window.first_B < self.total) & (self._bad_B < 0)
        self._bad_B.copy_(torch.where(is_first_B, window.first_B, self._bad_B))

    def _refuse_no_numbers(self) -> None:
        if bool((self._bad_B >= 0).any()):
            first = int(self._bad_B[self._bad_B >= 0].min())
            last = min(first + self.window, self.total) - 1  # a state that is not finite spoils the whole pass
            place = f"position {first}" if first == last else f"positions {first} to {last}"
            raise NotFiniteError(f"the logits of image {place} of {self.total} are not finite")
