"""Blocks of neighbours in the frame grid: an order of its tokens in which every stretch is a compact box."""

from __future__ import annotations

import torch
from torch import Tensor

# Edge of the columns of "cubes", in frames and rows: 4 x 4 x 8 tokens are a query block, 4 x 4 x 4 a key one.
_EDGE = 4


def _slab(position: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced slabs of at most _EDGE: (number of a position's slab, the slab's start, its size)."""
    slabs = -(-length // _EDGE)
    number = ((position + 1) * slabs - 1) // length
    start = number * length // slabs
    return number, start, (number + 1) * length // slabs - start


def cubes(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """slot -> token [F*H*W] int64: any run of successive slots of a frame grid forms a compact box.

    Frames and rows are cut into balanced slabs (3 or 4 wide, as the grid allows); each (frame slab, row slab)
    is a column that is traversed along the width, alternately forwards and backwards, and the columns of a frame slab
    alternately down and up; inside a column the (frame, row) cells of each width position form a serpentine too. So
    successive slots are almost always neighbours, and a block that is cut anywhere is one piece. The token -> slot
    map is integer arithmetic on the coordinates; its inverse is this.
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
