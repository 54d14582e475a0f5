"""Error buffers of a rank: the part of its block matrices' gradients that has not been sent yet, in true units of the gradient, in fp32 or as codes of 1-6-9.

The sum of a buffer over all machines is the part of the gradient that the model has not received yet, whatever the number of machines, of their GPUs, or the ZeRO
stage. Checkpoints rely on that.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from train.engines.zero.shards import Piece
from train.optimizer.number_formats import SIGNED_169
from train.weights.fragments import Fragment


class ErrorBuffers:
    """One flat tensor for each piece of a block matrix."""

    def __init__(self, pieces: Iterable[Piece], rest: str, device: torch.device) -> None:
        """
        Args:
            rest: format of the buffers, 'fp32' or '1-6-9'.
            device: device of the gradients.
        """
        self.pieces = {piece.name: piece for piece in pieces}
        self.rest, self.device = rest, device
        self.tensors = self.empty(rest)

    def empty(self, rest: str) -> dict[str, Tensor]:
        """Zeros for every piece, in the given format."""
        dtype = torch.int16 if rest == "1-6-9" else torch.float32
        return {name: torch.zeros(piece.length, dtype=dtype, device=self.device) for name, piece in self.pieces.items()}

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Values of a buffer; a view if the format is fp32."""
        return decoded(self.tensors[name].narrow(0, start, length))

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write values into a buffer."""
        place = self.tensors[name].narrow(0, start, values.numel())
        place.copy_(SIGNED_169.encode(values.reshape(-1)) if self.rest == "1-6-9" else values.reshape(-1))

    def fragments(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Fragment]:
        """Tensors with the layout of the buffers, as fragments for a checkpoint."""
        return {f"{prefix}/{name}": Fragment(tensor, self.pieces[name].offset, self.pieces[name].total) for name, tensor in tensors.items()}


def decoded(tensor: Tensor) -> Tensor:
    """Values of a buffer in either format."""
    return SIGNED_169.decode(tensor) if tensor.dtype == torch.int16 else tensor
