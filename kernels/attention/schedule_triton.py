"""In which order do the query blocks of a head start? Those that keep most first, so that the last to finish are light.

Equal tiles: the blocks themselves. Clusters of any size are cut into tiles here. Ties go to the lowest index; nothing
is read back from the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import SparsePlan


def schedule(plan: SparsePlan, block_m: int, variable: bool) -> tuple[Tensor, Tensor]:
    """(query block, first row in it) of every program, [B,H,tiles] int32 each, most kept blocks first.

    Equal tiles: the blocks alone, and the second tensor is unused. Otherwise as many tiles as there can be at
    most with these shapes; the surplus ones come last with block -1.
    """
    if not variable:
        order = heaviest_first(plan.kept_count)
        return order, order
    B, H, L = plan.query_order.shape
    Cq = plan.kept_count.shape[-1]
    tiles = (plan.query_offsets.diff(dim=-1) + (block_m - 1)).div(block_m, rounding_mode="floor")
    ends = tiles.cumsum(-1)
    rank = torch.arange(-(-L // block_m) + Cq, device=ends.device).expand(B, H, -1).contiguous()
    block = torch.searchsorted(ends, rank, right=True)
    inside = block < Cq
    known = block.clamp(max=Cq - 1)
    first = (rank - (ends - tiles).gather(-1, known)) * block_m
    weight = plan.kept_count.gather(-1, known).masked_fill(~inside, -1)
    heavy_first = weight.argsort(dim=-1, descending=True, stable=True)
    block = block.masked_fill(~inside, -1).gather(-1, heavy_first)
    return block.int(), first.gather(-1, heavy_first).int()


def heaviest_first(kept_count: Tensor) -> Tensor:
    """kept_count.argsort(-1, descending=True, stable=True) in one launch instead of six: [B,H,Cq] int32."""
    B, H, Cq = kept_count.shape
    order = torch.empty_like(kept_count)
    options = meta()
    heaviest_first_kernel[(triton.cdiv(Cq, options["ROWS"]), B * H)](kept_count, order, Cq, **options)
    return order


def meta() -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    return {"ROWS": 64, "COLUMNS": 128, "num_warps": 4}


@triton.jit
def heaviest_first_kernel(kept_count, order, Cq, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block's place is the number of blocks before it: each is compared with all others of its head."""
    kept_count += tl.program_id(1) * Cq
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.load(kept_count + i, mask=i < Cq, other=0)
    place = tl.zeros([ROWS], tl.int32)
    for at in range(0, Cq, COLUMNS):
        j = at + tl.arange(0, COLUMNS)
        others = tl.load(kept_count + j, mask=j < Cq, other=-1)
        earlier = (others[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum(((others[None, :] > own[:, None]) | earlier).to(tl.int32), 1)
    tl.store(order + tl.program_id(1) * Cq + place, i, mask=i < Cq)
