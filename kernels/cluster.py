"""Which tokens lie together in one block? Permutations of tokens into query and key blocks.

Two families (docs/DESIGN.md): equal tiles of `block` tokens (orders "cubes" and "splits"), and clusters of
any size, empty ones included ("kmeans"). Slots hold the video tokens first, then the text tokens in their
own order, then the masked ones. Every shape follows from the lengths, nothing is read back from the device,
and no operation is atomic: the same input gives the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kmeans import kmeans
from .places import Places
from .splits import splits

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
    split_heads: Sequence[bool] = (),
    remember: Remember = lambda device, key, make: make(),
    places: Places | None = None,
) -> tuple[Blocks, Tensor | None]:
    """Puts the tokens of x [B,H,L,D] into counts = (video, text) blocks; text blocks come last.

    valid: [B,L] bool, False for masked tokens, which belong to no block; None when there are none.
    block: tokens of an equal tile; text is cut into tiles in every order. carried: what the last call
    returned as its second value, to go on from (kmeans) or to use again (splits); None: nothing. grid:
    (frames, height, width) of the video tokens. split_heads [H]: with the order "auto" and a grid, which
    heads go by splits. remember: keeps what cubes look like, which no tensor has a say in, for the next
    call. places: where video and text tokens lie, if not in one stretch each.
    Returns the blocks and what to carry on: for "kmeans" the centroids [B,H,C,D] float32, for heads that go
    by splits the order of their video tokens [B,heads,n] int32.
    """
    B, H, L, _ = x.shape
    n, first, device = L - num_text, num_text if text_first else 0, x.device
    lies = slice(first, first + n) if places is None else places.video
    seen = None if valid is None else valid[:, lies]
    cubic = grid is not None and (order == "cubes" or (order == "auto" and not any(split_heads)))
    ends: Tensor | None = None
    state: Tensor | None = None
    if grid is not None and cubic:
        arranged = remember(device, grid, lambda: cubes(grid, device).view(1, 1, n))
    elif order == "kmeans":
        arranged, ends, state = kmeans(x[:, :, lies], seen, counts[0], carried, seed)
    elif order in ("auto", "cubes", "splits"):
        everywhere = order == "splits" or grid is None
        runs = runs_of((True,) * H if everywhere else split_heads)
        state, shape = carried, (B, runs[-1][1].stop, n)
        if state is None or state.shape != shape or state.device != device:
            state = torch.cat([splits(x[:, heads, lies], seen, block).int() for heads, _ in runs], dim=1)
        if grid is None or everywhere:
            arranged = state.long()
        else:
            arranged = remember(device, grid, lambda: cubes(grid, device).view(1, 1, n)).repeat(B, H, 1)
            for heads, rows in runs:
                arranged[:, heads] = state[:, rows].long()
    else:
        raise ValueError(f"unknown order {order!r}")

    def slots() -> Tensor:
        if places is None:
            text = torch.arange(num_text, device=device) + (0 if text_first else n)
            video = arranged + first
        else:
            text, video = places.other, places.video[arranged]
        tokens = torch.cat([video, text.expand(*arranged.shape[:2], num_text)], dim=-1)
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

    if not cubic or valid is not None or (places is not None and places.name is None):
        return Blocks(slots(), offsets()), state
    same = (grid, num_text, text_first, B, H, places and places.name)
    return Blocks(remember(device, same, slots), remember(device, (*same, block), offsets)), None


def runs_of(chosen: Sequence[bool]) -> list[tuple[slice, slice]]:
    """Runs of successive chosen heads: (their numbers among all heads, their numbers among the chosen).

    Slices need no copy to the device, which a CUDA graph could not record.
    """
    runs, number = [], 0
    for wanted, run in itertools.groupby(range(len(chosen)), lambda head: chosen[head]):
        heads = list(run)
        if wanted:
            runs.append((slice(heads[0], heads[-1] + 1), slice(number, number + len(heads))))
            number += len(heads)
    return runs


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
