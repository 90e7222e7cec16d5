"""Which tokens lie together in one block? Permutations of tokens into query and key blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Blocks(NamedTuple):
    """order [B,H,L] int32 and offsets [B,H,C+1] int32, as in Plan; contiguous."""

    order: Tensor
    offsets: Tensor


def make_blocks(
    x: Tensor,
    valid: Tensor | None,
    counts: tuple[int, int],
    carried: Tensor | None,
    num_text: int,
    text_first: bool,
    order: str,
    grid: tuple[int, ...] | None,
    seed: int,
) -> tuple[Blocks, Tensor | None]:
    """Puts the tokens of x [B,H,L,D] into counts = (video, text) blocks; text blocks come last."""
    raise NotImplementedError
