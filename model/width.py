"""Step sizes that stay right when a model becomes wider: the maximal update parametrisation (Yang et al. 2022, Tensor Programs V, arXiv 2203.03466, Table 3). No torch.

A step of Adam changes each element of a matrix by about the step size. What a matrix with d inputs adds to its outputs then grows with d, because the elements of
a change agree with the inputs. So the step sizes of matrices whose inputs grow with the width are divided by as much, and those of tables, gains and biases are
not. The rule says all of it by initial spreads and step sizes: what the weights compute does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import TransformerConfig


@dataclass(frozen=True)
class WidthRatios:
    """How a parameter compares with its counterpart in the model of ``dalle.base_width``."""

    inputs: float = 1.0
    """How many times as many inputs it has; 1 for tables, gains and biases."""
    scores: float = 1.0
    """What scores of attention are multiplied by here (``TransformerConfig.score_ratio``); 1 for what does not make queries."""

    def step(self, *, orthogonal: bool = False) -> float:
        """What the step size is multiplied by, and weight decay divided by, so that their product stays.

        Args:
            orthogonal: Muon makes the update. All its singular values are about equal, so that its effect on outputs grows with the root of the width alone (Yang,
                Simon and Bernstein 2023, arXiv 2310.17813).
        """
        return self.scores / (self.inputs**0.5 if orthogonal else self.inputs)


UNSCALED = WidthRatios()


def width_ratios(cfg: TransformerConfig, name: str, *, is_block_matrix: bool) -> WidthRatios:
    """The ratios of a parameter, by its name and whether it is a matrix of a resblock. Without ``base_width``, and at that width, all are exactly 1."""
    grows = is_block_matrix or name.endswith("unembedding.weight")
    # With norms of queries, the matrix before the norm does not decide how large they are.
    of_queries = (".q_norm.",) if cfg.qk_norm else (".q.weight", ".q.bias")
    return WidthRatios(cfg.width_ratio if grows else 1.0, cfg.score_ratio if any(part in name for part in of_queries) else 1.0)
