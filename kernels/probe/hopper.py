"""Query centroids against all true keys: the kernel for Hopper GPUs, in Gluon.

Formulas, rounding and results: triton.py, which hands over to it routing "output_error" of equal tiles, head_dim 64 or
128, float16 or bfloat16, on sm_90. Structured as kernels/attention/hopper.py, with these differences:

- One program takes 128 query centroids, 64 in each group of four warps, and a run of at most 64 key blocks, two at
  a time. The two blocks' logits are one matrix product; each block's weights and values are one of their own, whose
  sum of squares is all that is kept of it.
- A group whose 64 centroids would all lie behind the last one computes nothing.
- Runs are as long as it takes for the last programs to start together on all multiprocessors (run_length).
- Logarithms are the GPU's own instruction.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..hopper_tiles import boxes
from ..plan import KEY_BLOCK, QUERY_BLOCK
from .hopper_kernel import probe_kernel

MOST_BLOCKS = KEY_BLOCK
"""Of a run: the logits of its key centroids are one half of a tile."""
_START = 4
# What a program takes before its first pair of key blocks, in key blocks; a guess that only the length of runs needs.


def probe(
    query_centroids: Tensor, key: Tensor, value: Tensor, key_offsets: Tensor, key_centroids: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """error, gap [B,H,Ck,Cq or more] and parts of triton.RowScores. The centroids are of the keys' dtype."""
    B, H, _, D = key.shape
    Cq, Ck = query_centroids.shape[2], key_centroids.shape[2]
    tiles, lines = triton.cdiv(Cq, QUERY_BLOCK), triton.cdiv(Cq, 32) * 32
    run = run_length(Ck, tiles * B * H, _processors(key.device))
    error, gap = key.new_empty((2, B, H, Ck, lines), dtype=torch.float32)
    parts = key.new_empty((B, H, triton.cdiv(Ck, run), Cq), dtype=torch.float32)
    probe_kernel[(tiles, parts.shape[2], B * H)](
        query_centroids, boxes(key), boxes(value), key_offsets, boxes(key_centroids), error, gap, parts,
        scale, run, Cq, Ck, lines, **meta(D),
    )  # fmt: skip
    return error, gap, parts


def meta(head_dim: int) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    return {"HEAD_DIM": head_dim, "STAGES": 2, "num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}


@cache
def run_length(blocks: int, programs: int, processors: int) -> int:
    """Key blocks per program, an even number: the least waves(runs) (run + _START), waves(runs) = programs runs /
    processors rounded up. programs: of one run of all `blocks`; each multiprocessor has one at a time."""
    least = triton.cdiv(blocks, MOST_BLOCKS)

    def length(runs: int) -> int:
        return 2 * triton.cdiv(blocks, 2 * runs)

    def time(runs: int) -> int:
        return triton.cdiv(programs * runs, processors) * (length(runs) + _START)

    return length(min(range(least, 4 * least + 1), key=time))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
