"""Routing without a sort: which blocks are exact (kernels/routing/torch.py), their lists and the centroids' biases.

"output_error" is one budget for a batch element: the blocks with the largest errors, among
equals the lowest index, while their areas fit into it. Instead of sorting, the error of the first block that
does not fit is found digit by digit:

    code = the error - shift in steps, an integer of 16 bits (kernels/routing/torch.py)
    four times, 4 bits at a time: area[d] = sum of |Q_i| n_j over blocks with the digits found so far, then d
        the next digit is the least d with (area of larger codes) + sum_{e > d} area[e] <= budget

Then everything above the code is kept, and of the blocks that equal it as many as fit, in their order; `ties`
knows their areas row by row. Areas are summed as integers, so atomic additions in any order give the
same bits. The rules for text, empty blocks and errors that are NaN are those of kernels/routing/torch.py, and for the
same scores the choice is the same to the bit. The papers' budgets are computed there; only the lists are made here.

error and gap [B,H,Cq,Ck] float32 of any strides, alike (kernels/probe/triton.py lays them as [B,H,Ck,Cq]); outputs
are contiguous. Nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..plan import KEY_BLOCK, QUERY_BLOCK
from ..probe.torch import Scores
from ..probe.triton import RowScores
from . import torch as route
from .torch import LEAST_ERROR, MOST_CODE, STEPS, Routed
from .triton_kernel import lists_kernel, search_kernel, shift_kernel

_BITS, _PASSES = 4, 4
# Per batch element, int64: areas of each pass, then the budget.
_STATE = _PASSES * 2**_BITS + 1


def shift_of(scores: RowScores, routing: str) -> Tensor:
    """What to subtract from the errors of each row, [B,H,Cq] float32."""
    B, H, runs, Cq = scores.parts.shape
    shift = scores.parts.new_empty((B, H, Cq))
    options = shift_meta(routing == "output_error")
    grid = (triton.cdiv(Cq, options["BLOCK"]), B * H)
    shift_kernel[grid](scores.parts, shift, runs, Cq, **options)
    return shift


def finished(scores: RowScores, key_offsets: Tensor, routing: str) -> Scores:
    """The scores as kernels/probe/torch.py gives them, contiguous."""
    assert scores.mass is not None
    empty = (key_offsets.diff(dim=-1) == 0)[:, :, None]
    error = scores.error.contiguous() - shift_of(scores, routing)[..., None]
    return Scores(error.masked_fill_(empty, -torch.inf), scores.mass.contiguous(), scores.gap)


def select(
    scores: RowScores,
    query_offsets: Tensor,
    key_offsets: Tensor,
    video: tuple[int, int],
    routing: str,
    density: float | None,
    compensate: bool,
) -> Routed:
    """As route.select."""
    B, H, Cq, Ck = scores.gap.shape
    error, gap, device = scores.error, scores.gap, scores.gap.device
    kept = codes = state = ties = None
    zeros = torch.zeros(2 + B * (_STATE + H * Cq), dtype=torch.int64, device=device)
    areas, sizes = zeros[:2], (H, Cq, Ck, *video, *gap.stride())
    choose = routing == "output_error"
    if choose:
        assert density is not None, "only the papers' budgets find one"
        state, ties = zeros[2:].split([B * _STATE, B * H * Cq])
        codes = torch.empty_strided(gap.shape, gap.stride(), dtype=torch.int16, device=device)
        densities = torch.full((B,), density, dtype=torch.float64, device=device)
        for number in range(_PASSES + 1):
            options = search_meta(number)
            grid = (
                triton.cdiv(Cq, options["ROWS"]),
                triton.cdiv(Ck, options["STRIPS"] * options["COLUMNS"]),
                B * H,
            )
            search_kernel[grid](
                error, codes, scores.parts, query_offsets, key_offsets, densities, state, ties,
                scores.parts.shape[2], *sizes, **options,
            )  # fmt: skip
    else:
        chosen_by = finished(scores, key_offsets, routing)
        of_blocks = query_offsets.diff(dim=-1), key_offsets.diff(dim=-1)
        kept = route.route(chosen_by, *of_blocks, *video, routing, density).contiguous()
    bias = gap.new_empty((B, H, Cq, Ck))
    count = torch.empty((B, H, Cq), dtype=torch.int32, device=device)
    blocks = torch.empty((B, H, Cq, Ck), dtype=torch.int32, device=device)
    options = lists_meta(choose, compensate, routing == "output_error")
    lists_kernel[(triton.cdiv(Cq, options["ROWS"]), H, B)](
        kept, codes, gap, query_offsets, key_offsets, state, ties, bias, count, blocks, areas,
        *sizes, **options,
    )  # fmt: skip
    return Routed(bias, count, blocks, areas)


def shift_meta(output_error: bool) -> dict[str, Any]:
    """shift_kernel's compile-time constants and launch options."""
    return {"OUTPUT_ERROR": output_error, "BLOCK": 128, "num_warps": 4}


def search_meta(number: int) -> dict[str, Any]:
    """search_kernel's."""
    return {
        "PASS": number, "QUERY_TILE": QUERY_BLOCK, "KEY_TILE": KEY_BLOCK,
        "ROWS": 64, "COLUMNS": 8, "STRIPS": 2**_BITS - 1,
        "LEAST_ERROR": LEAST_ERROR, "STEPS": STEPS, "MOST_CODE": MOST_CODE,
        "BITS": _BITS, "PASSES": _PASSES, "STATE": _STATE, "num_warps": 4,
    }  # fmt: skip


def lists_meta(choose: bool, compensate: bool, with_gap: bool) -> dict[str, Any]:
    """lists_kernel's."""
    return {
        "CHOOSE": choose, "COMPENSATE": compensate, "WITH_GAP": with_gap, "ROWS": 8,
        "COLUMNS": 64, "QUERY_TILE": QUERY_BLOCK, "KEY_TILE": KEY_BLOCK, "BITS": _BITS,
        "PASSES": _PASSES, "STATE": _STATE, "num_warps": 4,
    }  # fmt: skip
