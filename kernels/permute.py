"""Moving tokens into block order, and the means of blocks."""

from __future__ import annotations

from torch import Tensor


def gather(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """x [B,H,L,D] in block order, contiguous; slots from offsets[..., -1] on (masked tokens) are zero."""
    raise NotImplementedError


def block_means(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean of each block of x [B,H,L,D] (in block order): [B,H,C,D] float32, 0 for an empty block."""
    raise NotImplementedError
