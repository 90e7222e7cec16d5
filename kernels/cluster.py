"""Which tokens lie together in one block? Permutations of tokens into query and key blocks.

Two families (docs/DESIGN.md): equal tiles of `block` tokens (orders "cubes" and "splits"), and clusters of
any size, empty ones included ("kmeans"). Slots hold the video tokens first, then the text tokens in their
own order, then the masked ones. Every shape follows from the lengths, nothing is read back from the device,
and no operation is atomic: the same input gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kmeans import kmeans

# Bytes of float32 tokens that one step of the recursive splits works on.
_CHUNK_BYTES = 2**28
# Power iterations per segment: a mixture of the leading directions splits nearly as well as the first alone.
# Mean squared radius of blocks of 64 against 30 iterations: 4 give 1.02x, 2 give 1.04x, 1 gives 1.07 - 1.18x
# (4,096 tokens in 40 clusters, D = 128).
_POWER_ITERATIONS = 4
# Edge of the columns of "cubes", in frames and rows: 4 x 4 x 8 tokens are a query block, 4 x 4 x 4 a key one.
_EDGE = 4

# context.Call.remember
Remember = Callable[[torch.device, Hashable, Callable[[], Any]], Any]


class Blocks(NamedTuple):
    """order [B,H,L] int32 and offsets [B,H,C+1] int32, as in Plan; contiguous."""

    order: Tensor
    offsets: Tensor


def make_blocks(
    x: Tensor,
    valid: Tensor | None,
    counts: tuple[int, int],
    block: int,
    carried: Tensor | None,
    num_text: int,
    text_first: bool,
    order: str,
    grid: tuple[int, ...] | None,
    seed: int,
    remember: Remember = lambda device, key, make: make(),
) -> tuple[Blocks, Tensor | None]:
    """Puts the tokens of x [B,H,L,D] into counts = (video, text) blocks; text blocks come last.

    valid: [B,L] bool, False for masked tokens, which belong to no block; None when there are none.
    block: tokens of an equal tile; text is cut into tiles in every order. carried: centroids
    [B,H,C,D] float32 of the last call, "kmeans" only. grid: (frames, height, width) of the video tokens.
    remember: keeps what cubes look like, which no tensor has a say in, for the next call.
    Returns the blocks and, for "kmeans", the centroids to carry on.
    """
    B, H, L, _ = x.shape
    n, first, device = L - num_text, num_text if text_first else 0, x.device
    video, seen = x[:, :, first : first + n], None if valid is None else valid[:, first : first + n]
    cubic = grid is not None and order in ("auto", "cubes")
    ends: Tensor | None = None
    state: Tensor | None = None
    if grid is not None and cubic:
        arranged = remember(device, grid, lambda: cubes(grid, device).view(1, 1, n))
    elif order == "kmeans":
        arranged, ends, state = kmeans(video, seen, counts[0], carried, seed)
    elif order in ("auto", "cubes", "splits"):
        arranged = splits(video, seen, block)
    else:
        raise ValueError(f"unknown order {order!r}")

    def slots() -> Tensor:
        text = torch.arange(num_text, device=device) + (0 if text_first else n)
        tokens = torch.cat([arranged + first, text.expand(*arranged.shape[:2], num_text)], dim=-1)
        return _of_heads(tokens if valid is None else _masked_last(tokens, valid), B, H)

    def offsets() -> Tensor:
        n_video: int | Tensor = n
        n_text: int | Tensor = num_text
        if valid is not None and seen is not None:
            n_video = seen.sum(-1).view(B, 1, 1)
            n_text = valid.sum(-1).view(B, 1, 1) - n_video
        of_video = _tile_offsets(counts[0], block, n_video, device) if ends is None else ends
        of_text = of_video[..., -1:] + _tile_offsets(counts[1], block, n_text, device)[..., 1:]
        of_video = of_video.expand(*of_text.shape[:2], -1)
        return _of_heads(torch.cat([of_video, of_text], dim=-1), B, H)

    if not cubic or valid is not None:
        return Blocks(slots(), offsets()), state
    same = (grid, num_text, text_first, B, H)
    return Blocks(remember(device, same, slots), remember(device, (*same, block), offsets)), None


def _of_heads(x: Tensor, B: int, H: int) -> Tensor:
    """[B or 1, H or 1, ...] of every head, int32, contiguous."""
    return x.to(torch.int32).expand(B, H, -1).contiguous()


def _masked_last(tokens: Tensor, valid: Tensor) -> Tensor:
    """slot -> token [B or 1, H or 1, L], masked tokens behind all others, both in the order that they had."""
    tokens = tokens.expand(len(valid), -1, -1)
    seen = valid[:, None].expand(tokens.shape).gather(-1, tokens)
    through = seen.cumsum(-1)
    slot = torch.arange(tokens.shape[-1], device=tokens.device)
    slot = torch.where(seen, through - 1, through[..., -1:] + slot - through)
    # Slots are distinct, so the order of the writes does not matter.
    return torch.empty_like(slot).scatter_(-1, slot, tokens)


def _tile_offsets(count: int, block: int, tokens: int | Tensor, device: torch.device) -> Tensor:
    """min(j * block, tokens) for j = 0..count: [1,1,count+1], or [B,1,count+1] for tokens [B,1,1]."""
    ends = (torch.arange(count + 1, device=device) * block).view(1, 1, -1)
    return ends.clamp(max=tokens) if isinstance(tokens, int) else torch.minimum(ends, tokens)


def _slab(position: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced slabs of at most _EDGE: (number of a position's slab, the slab's start, its size)."""
    slabs = -(-length // _EDGE)
    number = ((position + 1) * slabs - 1) // length
    start = number * length // slabs
    return number, start, (number + 1) * length // slabs - start


def cubes(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """slot -> token [F*H*W] int64: any run of successive slots of a frame grid forms a compact box.

    Frames and rows are cut into balanced slabs (3 or 4 wide, as the grid allows); each (frame slab, row slab)
    is a column that is run through along the width, forth and back in turns, and the columns of a frame slab
    down and up in turns; inside one column the (frame, row) cell of each width position is a serpentine too.
    So successive slots are neighbours nearly everywhere, and a block that is cut anywhere stays one piece.
    The token -> slot map is integer arithmetic on the coordinates; its inverse is this.
    """
    F, H, W = grid
    f = torch.arange(F, device=device).view(F, 1, 1)
    h = torch.arange(H, device=device).view(1, H, 1)
    w = torch.arange(W, device=device).view(1, 1, W)
    frame_slab, frame_start, frames = _slab(f, F)
    # In odd frame slabs the rows run upwards: mirror them, and everything below is the same.
    h = torch.where(frame_slab % 2 == 0, h, H - 1 - h)
    row_slab, row_start, rows = _slab(h, H)
    column = frame_slab * -(-H // _EDGE) + row_slab
    w = torch.where(column % 2 == 0, w, W - 1 - w)
    frame, row = f - frame_start, h - row_start
    inner = frame * rows + torch.where(frame % 2 == 0, row, rows - 1 - row)
    inner = torch.where((column * W + w) % 2 == 0, inner, frames * rows - 1 - inner)
    slot = frame_start * H * W + frames * row_start * W + w * frames * rows + inner
    order = torch.empty(F * H * W, dtype=torch.int64, device=device)
    # Slots are distinct, so the order of the writes does not matter.
    return order.scatter_(0, slot.flatten(), torch.arange(F * H * W, device=device))


def splits(x: Tensor, valid: Tensor | None, block: int) -> Tensor:
    """slot -> token [B,H,N] int64 by recursive balanced splits of x [B,H,N,D] along principal directions.

    An alternative to the clusters of arXiv 2603.08982 that needs no iterations and no state. N tokens are
    m = ceil(N/block) tiles. At level l the slots are 2^l segments of whole tiles, segment k those numbered
    from ceil(k m / 2^l) to ceil((k+1) m / 2^l); each segment is sorted along its first principal direction,
    stably, and so cut in two for the next level. Masked tokens sort last everywhere, so the valid ones fill
    a prefix of the slots.
    """
    B, H, N, D = x.shape
    order = torch.empty((B, H, N), dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK_BYTES // (N * D * 4))
    # A fixed direction that no data is orthogonal to on purpose; every head starts from the same.
    start = torch.cos(torch.arange(D, device=x.device, dtype=torch.float32) ** 2 + 1)
    for b, heads in _heads(B, H, step):
        order[b, heads] = _split(x[b, heads].float(), None if valid is None else valid[b], block, start)
    return order


def _heads(B: int, H: int, step: int) -> Iterator[tuple[int, slice]]:
    """All (batch element, slice of at most `step` heads)."""
    return ((b, slice(h, min(h + step, H))) for b in range(B) for h in range(0, H, step))


def _split(x: Tensor, valid: Tensor | None, block: int, start: Tensor) -> Tensor:
    """One chunk of `splits`: x [G,N,D] float32, valid [N] bool or None -> [G,N] int64."""
    G, N, D = x.shape
    device, tiles = x.device, -(-N // block)
    if valid is not None:
        x = torch.where(valid[:, None], x, 0)
    order = torch.arange(N, device=device).repeat(G, 1)
    first_row = (torch.arange(G, device=device) * N).view(G, 1, 1)
    flat = x.reshape(G * N, D)
    slot = torch.arange(N, device=device)
    for level in range((tiles - 1).bit_length()):
        # Segment k holds the slots [edges[k], edges[k+1]); `width` is the most that any of them holds.
        edges = ((torch.arange(2**level + 1, device=device) * tiles + 2**level - 1) >> level) * block
        edges = edges.clamp(max=N)
        width = min(-(-tiles // 2**level) * block, N)
        padded = edges[:-1, None] + torch.arange(width, device=device)
        live = padded < edges[1:, None]
        tokens = order[:, padded.clamp(max=N - 1)]
        if valid is not None:
            live = live & valid[tokens]
        # Tokens without a part go behind all others, padding (of the highest index) behind masked tokens.
        rows = flat.index_select(0, (tokens + first_row).flatten())
        along = _project(rows.view(G, -1, width, D), live, start)
        rank = torch.where(live, along, torch.inf).argsort(dim=-1, stable=True)
        segment = torch.searchsorted(edges[1:], slot, right=True)
        order = tokens.gather(-1, rank).flatten(1)[:, segment * width + slot - edges[segment]]
    return order


def _project(x: Tensor, live: Tensor, start: Tensor) -> Tensor:
    """Coordinates [G,S,M] of x [G,S,M,D] along each segment's first principal direction, roughly.

    Power iterations v <- X^T (X v - mean): the mean is taken of X v, so x is never centred in memory. Rows
    that are not live have the weight 0. A NaN or infinite token gets a finite coordinate, because its segment
    must stay a permutation.
    """
    weight = live.expand(x.shape[:-1]).to(x.dtype)
    size = weight.sum(-1, keepdim=True).clamp(min=1)
    direction = start.expand(*x.shape[:2], -1)
    for _ in range(_POWER_ITERATIONS):
        along = _along(x, direction, weight, size)
        direction = (along[..., None, :] @ x).squeeze(-2)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=math.sqrt(1e-37))
    return torch.nan_to_num(_along(x, direction, weight, size))


def _along(x: Tensor, direction: Tensor, weight: Tensor, size: Tensor) -> Tensor:
    """(x - mean of the segment) . direction, 0 where the weight is 0: [G,S,M]."""
    along = (x @ direction[..., None]).squeeze(-1)
    return (along - (along * weight).sum(-1, keepdim=True) / size) * weight
