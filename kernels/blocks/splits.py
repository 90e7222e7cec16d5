"""Balanced splits: equal tiles of near tokens, by recursion along principal directions.

An alternative to the clusters of arXiv 2603.08982 that needs no iterations and no state. Nothing is sorted:
a segment is cut in two by the median of its tokens' coordinates, and both halves keep the order they had.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import kernels_for

# Bytes of working memory for the heads that are split at a time.
_CHUNK_BYTES = 2**28


def splits(x: Tensor, valid: Tensor | None, block: int) -> Tensor:
    """slot -> token [B,H,N] int64 by recursive balanced splits of x [B,H,N,D] along principal directions.

    N tokens are m = ceil(N/block) tiles. At level l the slots are 2^l segments of whole tiles, segment k
    those numbered from ceil(k m / 2^l) to ceil((k+1) m / 2^l); each is cut into the two segments of the next
    level along its first principal direction, so that the tokens with the smaller coordinates lie in the first; among
    equal ones, those that come first. valid [B,N] bool, None when all are: the valid tokens fill a prefix of the
    slots, the masked ones follow in their order.
    """
    B, H, N, D = x.shape
    order = torch.empty((B, H, N), dtype=torch.int64, device=x.device)
    steps, tiles = kernels_for(x).splits, -(-N // block)
    step = max(1, _CHUNK_BYTES // (N * steps.bytes_per_token(D)))
    # Where power iterations start: no data is orthogonal to it on purpose.
    start = torch.cos(torch.arange(D, device=x.device, dtype=torch.float32) ** 2 + 1)
    for b in range(B):
        tokens, live = _valid_first(None if valid is None else valid[b], N, x.device)
        for h in range(0, H, step):
            part = x[b, h : h + step]
            slots = tokens.expand(len(part), -1).contiguous()
            for level in range((tiles - 1).bit_length()):
                directions = steps.directions(part, slots, live, start, block, 2**level)
                along = steps.project(part, slots, live, directions, block)
                slots = steps.partition(along, slots, block, 2**level)
            order[b, h : h + step] = slots
    return order


def _valid_first(valid: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens [n] int32, valid ones first, and how many these are [1] int32."""
    if valid is None:
        live = torch.full((1,), n, dtype=torch.int32, device=device)
        return torch.arange(n, dtype=torch.int32, device=device), live
    tokens = (~valid).to(torch.uint8).argsort(stable=True)
    return tokens.to(torch.int32), valid.sum(dtype=torch.int32)[None]
