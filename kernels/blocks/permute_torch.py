"""Moving tokens into block order, and the means of blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(x: Tensor, order: Tensor, offsets: Tensor | None) -> Tensor:
    """x [B,H,L,D] in block order, contiguous: out[b,h,slot] = x[b,h,order[b,h,slot]].

    order [B,H,L] int32, a permutation per head. Slots from offsets[b,h,-1] on (masked tokens) are zero,
    whatever x holds there; offsets None: there are no such slots, and a pass over x is saved.
    """
    B, H, L, D = x.shape
    out = x.new_empty((B, H, L, D))
    for b in range(B):
        for h in range(H):  # indexing all heads at once takes several times as long
            torch.index_select(x[b, h], 0, order[b, h], out=out[b, h])
    if offsets is None:
        return out
    slots = torch.arange(L, device=x.device)
    return out.masked_fill_((slots >= offsets[..., -1:])[..., None], 0)


def block_means(x: Tensor, offsets: Tensor, most: int | None = None) -> Tensor:
    """Mean of each block of x [B,H,L,D] (in block order): [B,H,C,D] float32, 0 for an empty block.

    offsets [B,H,C+1] int32. Each block is summed by itself, in order and in float32: the same bits every
    time, on any device, and a NaN stays in its block. The sizes are never read on the host. most: the blocks hold all L
    tokens, none more than so many.
    """
    B, H, L, D = x.shape
    if most is not None and (offsets.shape[-1] - 1) * most == L:  # all are full: a view takes a third as long
        return x.float().unflatten(2, (-1, most)).mean(3)
    rows, starts = x.float().flatten(0, 1), offsets.flatten(0, 1)
    means = torch.segment_reduce(rows, "mean", offsets=starts, axis=1, initial=0, unsafe=True)
    return means.view(B, H, -1, D)


def gather_with_means(
    key: Tensor, value: Tensor, order: Tensor, offsets: Tensor, masked: bool, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(key, value) in block order, then their block means. masked: are there slots after the last block? most: tokens
    of a block, None: any number."""
    k, v = (gather(x, order, offsets if masked else None) for x in (key, value))
    most = None if masked else most
    return k, v, block_means(k, offsets, most), block_means(v, offsets, most)


def gathered_means(x: Tensor, order: Tensor, offsets: Tensor, *, most: int | None = None) -> Tensor:
    """The block means of gather(x, order, offsets) alone, where blocks hold all tokens."""
    return block_means(gather(x, order, None), offsets, most)
